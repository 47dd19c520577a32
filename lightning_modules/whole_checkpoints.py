"""Checkpoints that are whole or absent, and an earlier one in place of a damaged last one."""

from __future__ import annotations

import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from wherefrom.runtime.artifacts import replacing

_LAST = "last"
_logger = logging.getLogger(__name__)
_DAMAGED = (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, ValueError)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a kill or a full disk leaves the one before.

    Lightning's own writing goes through the system's folder for temporary files, from which a file on another file
    system is copied, not renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint; places that are not on this machine's disks are left to Lightning.

        Raises:
            StorageError: The file could not be written; the one that was there stays.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as temporary, temporary.open("wb") as stream:
            torch.save(checkpoint, stream)


def readable_checkpoint(path: Path) -> Path:
    """The checkpoint, or in place of a damaged `last.ckpt` the newest one beside it that can be read, with a warning.

    Args:
        path: A file on this machine.

    Raises:
        ValueError: It is damaged, and there is none to go on from.
    """
    reason = _damage(path)
    if reason is None:
        return path
    others = sorted((each for each in path.parent.glob(f"*{path.suffix}") if each != path), key=_age, reverse=True)
    if path.stem.startswith(_LAST):
        for each in others:
            if _damage(each) is None:
                _logger.warning("%s is damaged (%s): going on from %s instead.", path, reason, each)
                return each
    beside = ", ".join(each.name for each in others) or "no other"
    raise ValueError(
        f"{path} is damaged ({reason}), so no run can go on from it; beside it is {beside}. Name another checkpoint in "
        "--ckpt_path, or leave it out to begin again."
    )


def _damage(path: Path) -> str | None:
    """Why a file is no checkpoint; None where it is one."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _DAMAGED as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return None


def _age(path: Path) -> float:
    return path.stat().st_mtime
