"""The share of images that training holds out, and that nothing else does unless it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only

from wherefrom.data.image_folder import hold_out
from wherefrom.data.image_set import ImageSet
from wherefrom.data.ranked_images import RankedImages
from wherefrom.runtime.cli_errors import in_words_of, option_names

TRAINING_SHARE = 0.05
# What the library calls an option -> how a data module is given it.
WORDS = {
    "null: none, split: all": "data.init_args: {held_out: none, split: all}",
    "null: none": "data.init_args.held_out: none",
    "split: all": "data.init_args.split: all",
    "null: ": "data.init_args.held_out: ",
    "in split:": "in data.init_args.split",
    "split: ": "data.init_args.split: ",
}
_logger = logging.getLogger("lightning.pytorch.held_out")  # shown in training, and quiet where a sweep trains


def checked_share(validation_share: float | None) -> float | None:
    """A share of the images that may be held out.

    Raises:
        ValueError: It is no share.
    """
    if validation_share is not None and not 0 <= validation_share < 1:
        raise ValueError(f"validation_share is a share from 0 to below 1, such as 0.05; given {validation_share}.")
    return validation_share


class HoldsOut(LightningDataModule):
    """A data module that knows whether its images are trained on.

    Attributes:
        trains: Whether they are; None asks the trainer: who uses the data module without one attributes a model that is
            trained already, and so does a Lightning module with `trains_on_images = False`.
    """

    trains: bool | None = None
    _said = False

    @property
    def training(self) -> bool:
        """Whether the images are trained on."""
        if self.trains is not None:
            return self.trains
        trainer = self.trainer
        return trainer is not None and bool(getattr(trainer.lightning_module, "trains_on_images", True))

    def held_out_share(self, validation_share: float | None) -> float | None:
        """The share that is held out: the one that is asked for, else the usual one in training, else none.

        Args:
            validation_share: What is asked for; None is nothing.
        """
        return TRAINING_SHARE if validation_share is None and self.training else validation_share

    def check_choice(self, choice: RankedImages, splits: Sequence[str]) -> None:
        """Refuses a choice that does not fit these splits of the images.

        Raises:
            ValueError: See `RankedImages.parts`.
        """
        with option_names(WORDS):
            choice.parts(splits)

    def divide(
        self, images: ImageSet, choice: RankedImages, read: Callable[[Path], ImageSet], validation_share: float | None
    ) -> tuple[ImageSet, ImageSet]:
        """The training images and the held-out ones; says what nobody asked for.

        Args:
            images: All images.
            choice: Which are trained on or ranked, and which are held out.
            read: Reads a folder of images that are held out.
            validation_share: Share that is held out where the choice holds none out; see `held_out_share`.

        Raises:
            ValueError: The choice does not fit the images, or one of the two would be empty.
        """
        with option_names(WORDS):
            train, named, lines = choice.of(images, read)
            if named is not None:
                self._say(lines)
                return train, named
            share = self.held_out_share(validation_share)
            kept, held_out = hold_out(train, share)
        if not self.training:
            self._say(lines if not share else ())
        elif validation_share is None:
            self._say(
                [
                    f"holding {share:.0%} ({len(held_out):,} of {len(train):,} images) out for validation; set "
                    f"validation_share. The model is never trained on them: attribution with validation_share: {share} "
                    "takes them as the null, and without it ranks them like the others."
                ]
            )
        return kept, held_out

    def _say(self, lines: Sequence[str]) -> None:
        """Logs lines once."""
        if not self._said:
            self._said = True
            for line in lines:
                _say(in_words_of(line, WORDS))


@rank_zero_only
def _say(line: str) -> None:
    _logger.info(line)
