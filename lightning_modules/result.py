"""What a training leaves behind, also where it comes back after its last step."""

from __future__ import annotations

from lightning import LightningModule


class LeavesResult(LightningModule):
    """Base of the modules that save what they trained when training ends.

    A run that was killed between its last checkpoint and its end resumes with no step left: Lightning then calls no
    hook of training at all. train.py therefore asks for the result again after `fit`.

    Attributes:
        left: Whether the result of this run was saved, or there was none to save.
    """

    left = False

    def save_result(self) -> None:
        """Saves what was trained, on the main process, where the settings say so."""
        raise TypeError(f"{type(self).__name__} does not say what its training leaves.")

    def on_train_end(self) -> None:
        """Saves the result."""
        self.save_result()
        self.left = True
