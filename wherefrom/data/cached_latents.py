"""Ready-made arrays of latents and prompt embeddings (those of AbU on MSCOCO), used without any image or encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.data.image_set import ImageSet, check_unique
from wherefrom.models.conditioning import prompt_embeddings
from wherefrom.runtime.artifacts import identity_hash
from wherefrom.runtime.mapped_arrays import map_array

_SAMPLED_ROWS = 256  # rows whose bytes go into the fingerprint
_PIXELS = 8  # pixels of a latent's side, for Stable Diffusion's autoencoder
_GREY = 128


def _map(path: Path, what: str, rows: int, shape: str) -> Tensor:
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Give the array of {what}.")
    try:
        array = map_array(path)
    except (ValueError, EOFError, TypeError) as error:
        raise ValueError(f"{path} is not a readable .npy file ({error}). Download it again.") from error
    if array.dim() != 4 or len(array) != rows or not array.is_floating_point():
        raise ValueError(
            f"{path} holds {array.dtype} of shape {tuple(array.shape)}, but {what} are floats of shape {shape}: it is "
            "another array, or belongs to another list of ids."
        )
    return array


def _sample_hash(array: Tensor) -> str:
    """Hash of shape, type and evenly spaced rows: hashing hundreds of gigabytes at each start would take hours."""
    digest = hashlib.blake2b(f"{array.dtype} {tuple(array.shape)}".encode(), digest_size=16)
    for row in np.unique(np.linspace(0, len(array) - 1, _SAMPLED_ROWS).astype(np.intp)):
        digest.update(array[int(row)].numpy().tobytes())
    return digest.hexdigest()


def read_cached_latents(
    latents: Path,
    states: Path,
    ids: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    null_states: Path | None = None,
) -> EncodedImages:
    """A training set from arrays that another program made, mapped from disk.

    Its images have captions only where they are given, and are grey: reports show no images.

    Args:
        latents: Such as `coco17_train_latents.npy`, scaled, (2 n, C, H, W): the images, then their mirror images.
        states: Such as `coco17_train_text_embeddings.npy`, (n, K, L, D).
        ids: Ids of the images in the order of the rows. The papers' arrays do not hold them; those of COCO follow the
            numerical order of its ids, as `read_captions` does.
        captions: The K captions of each image.
        null_states: Prompt embeddings (L, D) of the empty prompt; needed for training with caption dropout only.

    Raises:
        ValueError: An array is missing or has another shape, an id occurs twice, or captions do not fit.
    """
    check_unique(ids)
    count = len(ids)
    if not count:
        raise ValueError(f"There are no ids for the rows of {latents}. Give one for each image.")
    given = _map(latents, "latents", 2 * count, f"({2 * count}, C, H, W): images, then mirror images")
    texts = _map(states, "text states", count, f"({count}, K, L, D)")
    null = torch.full(tuple(texts.shape[2:]), torch.nan)
    if null_states is not None:
        null = torch.from_numpy(np.load(null_states, allow_pickle=False)).float().reshape(-1, texts.shape[-1])
        if null.shape != texts.shape[2:]:
            raise ValueError(
                f"{null_states} has shape {tuple(null.shape)}, but a caption's states in {states} have "
                f"{tuple(texts.shape[2:])}: it is of another text encoder."
            )
    several = captions if captions is not None else [("",) * texts.shape[1]] * count
    if len(several) != count or any(len(each) != texts.shape[1] for each in several):
        raise ValueError(
            f"{states} holds {texts.shape[1]} captions of each of {count} images; the captions that were given are "
            "not as many."
        )
    fingerprint = identity_hash(
        {
            "ids": list(ids),
            "latents": _sample_hash(given),
            "states": _sample_hash(texts),
            "null": None if null_states is None else _sample_hash(null[None]),
        }
    )
    height, width = (int(side) * _PIXELS for side in given.shape[2:])
    pixels = np.broadcast_to(np.uint8(_GREY), (count, height, width, 3))
    columns = {"license": ("unknown",) * count}
    images = ImageSet(tuple(ids), tuple(tuple(each) for each in several), pixels, columns, fingerprint)
    both = given.reshape(2, count, *given.shape[1:]).transpose(0, 1)  # a view: nothing is read
    return EncodedImages.of_one_shape(
        images,
        latents=both,
        conditioning=prompt_embeddings(texts),
        empty=prompt_embeddings(null),
        fingerprint=fingerprint,
        mapped=True,
    )
