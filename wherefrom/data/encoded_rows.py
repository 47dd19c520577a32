"""Latents by the content of each image and conditioning by that of each caption, in a store: nothing is made twice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.data.image_set import ImageSet
from wherefrom.models.conditioning import EMBEDDINGS, Conditioning
from wherefrom.models.encoders import LatentEncoder
from wherefrom.models.pixels import to_float
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.content_rows import ContentRows, Keys, content_keys
from wherefrom.runtime.mapped_arrays import announce_size

_LATENTS = "latents"
_EMPTY = content_keys([b""])


class EncodedRows:
    """The encoded rows of a set's images and captions: what is missing is made, and all are found.

    Args:
        image_set: The images.
        encoder: Autoencoder and text encoder.
        store: Where the rows are kept.
        batch_size: Images encoded at a time.
        half: Keep latents and embeddings in float16.
    """

    def __init__(
        self, image_set: ImageSet, *, encoder: LatentEncoder, store: Store, batch_size: int, half: bool
    ) -> None:
        self.images, self.encoder, self.store, self.half = image_set, encoder, store, half
        self.captions = [caption for several in image_set.captions for caption in several]
        self.caption_keys = content_keys(caption.encode() for caption in self.captions)
        count = len(image_set)
        self.batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        of_text = encoder.text.identity()
        of_images = {name: value for name, value in encoder.identity().items() if name not in of_text}
        kept, size = {"dtype": "float16"} if half else {}, [int(side) for side in image_set.pixels.shape[1:3]]
        self.latent_rows = ContentRows(store, "latents", {**of_images, "size": size, **kept})
        self.text_rows = ContentRows(store, "prompt_embeddings", {**of_text, **kept})

    def image_keys(self) -> Keys:
        """One hash of the pixels of each image."""
        return content_keys(_content(self.images.pixels[position]) for position in range(len(self.images)))

    def fill(self, image_keys: Keys, progress: Callable[[int, int], None] | None, log: Callable[[str], None]) -> None:
        """Makes what is missing.

        Args:
            image_keys: Hash of each image.
            progress: Called with (done, total) images: first their latents, then their captions.
            log: Receives a line that says how large the missing rows will be before any is made.

        Raises:
            ValueError: A value is too large for float16.
            StorageError: The store could not be written; finished batches are kept.
        """
        latents = np.unique(image_keys[~self.latent_rows.has(image_keys)])
        texts = np.unique(self.caption_keys[~self.text_rows.has(self.caption_keys)])
        count = len(self.images)
        if len(latents) or len(texts):
            size = len(latents) * self.latent_rows.row_bytes(self._one_latent)
            size += len(texts) * self.text_rows.row_bytes(self._one_caption)
            announce_size(log, f"latents and prompt embeddings of {count:,} images", size, self.store.root)

        def report(batch: int) -> None:
            if progress is not None:
                progress(self.batches[batch].stop, count)

        def quiet(_: int) -> None:
            """Ignores the empty prompt, which is not counted as progress."""

        several = len(self.captions) // max(count, 1)
        of_captions = [range(batch.start * several, batch.stop * several) for batch in self.batches]
        self.text_rows.fill(_EMPTY, [[0]], make=self._empty, like=self._one_caption, finished=quiet)
        self.latent_rows.fill(image_keys, self.batches, make=self._latents_of, like=self._one_latent, finished=report)
        self.text_rows.fill(
            self.caption_keys, of_captions, make=self._captions_of, like=self._one_caption, finished=report
        )

    def latents(self, image_keys: Keys) -> Tensor:
        """The latents of the images and of their mirror images, shape (N, 2, C, H, W); mapped from disk."""
        result: Tensor = self.latent_rows.rows(image_keys)[_LATENTS]
        return result

    def conditioning(self) -> Conditioning:
        """Conditioning of the captions, with leading axes (N, K); mapped from disk."""
        return Conditioning(self.text_rows.rows(self.caption_keys.reshape(len(self.images), -1)))

    def empty(self) -> Conditioning:
        """Conditioning of the empty prompt."""
        return Conditioning(self.text_rows.rows(_EMPTY)).at(0)

    def _latents_of(self, positions: list[int]) -> dict[str, Tensor]:
        images = to_float(torch.from_numpy(np.array(self.images.pixels[np.asarray(positions)])))
        both = [self.encoder.encode_pixels(images), self.encoder.encode_pixels(images.flip(-1))]
        what = f"{_LATENTS} of images from {self.images.ids[positions[0]]!r} on"
        return {_LATENTS: self._stored(torch.stack(both, dim=1), what)}

    def _captions_of(self, positions: list[int]) -> dict[str, Tensor]:
        return self._conditioning([self.captions[position] for position in positions])

    def _empty(self, _: list[int]) -> dict[str, Tensor]:
        return self._conditioning([""])

    def _conditioning(self, captions: list[str]) -> dict[str, Tensor]:
        return {
            name: self._stored(each, f"{name} of captions from {captions[0]!r} on") if name in EMBEDDINGS else each
            for name, each in self.encoder.text.encode(captions).items()
        }

    def _one_latent(self) -> dict[str, Tensor]:
        return {name: each[0] for name, each in self._latents_of([0]).items()}

    def _one_caption(self) -> dict[str, Tensor]:
        return {name: each[0] for name, each in self._conditioning([""]).items()}

    def _stored(self, values: Tensor, what: str) -> Tensor:
        """Values as they are kept.

        Raises:
            ValueError: One is too large for float16.
        """
        if not self.half:
            return values
        largest = float(values.abs().max())
        if largest > float(np.finfo(np.float16).max):
            raise ValueError(f"{what} hold {largest:.3g}, which float16 does not reach: encode without half.")
        return values.half()


def _content(pixels: UInt8[NDArray[np.uint8], "h w 3"]) -> bytes:
    return repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()
