"""Base of data modules of captioned images: keyed training batches of pixels or of cached latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.held_out import HoldsOut
from datamodules.keyed_loader import KeyedLoader
from wherefrom.data.encoded_images import EncodedImages, LatentVisits, encode_image_set
from wherefrom.data.image_set import ImageSet, keep_indices, read_ids
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import LatentEncoder
from wherefrom.queries.run_size import RunSize
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Console
from wherefrom.runtime.keyed_random import hash_texts
from wherefrom.runtime.ranges import check_ranges
from wherefrom.training.keyed_batches import KeyedBatches, PixelVisits, VisitDataset

SAMPLE = 16  # images that are decoded to see how long that takes
VALIDATION_VISITS = 8  # timesteps and noise draws per held-out image


@dataclass(frozen=True)
class Census:
    """Sizes of a data set, counted before it is decoded.

    Attributes:
        training: Training images, before `exclude`.
        held_out: Held-out images.
        size: (height, width) in pixels.
        captions: Captions of each image.
        decode: Reads a few images as the data set will and says how many, to be timed; None where all are read.
    """

    training: int
    held_out: int
    size: tuple[int, int]
    captions: int
    decode: Callable[[], int] | None = None


class ImageDataModule(HoldsOut):
    """Training and held-out images with captions, and training batches of them.

    A subclass says where the images come from (`load`).

    Without an encoder the batches are pixels (for the autoencoder); with one they are latents and caption states,
    computed once and kept in the store.

    Args:
        encoder: Frozen autoencoder and text encoder.
        store: Folder for what is computed once.
        batch_size: Images in a batch over all devices.
        seed: Seed of order, flips, captions and dropout.
        exclude: Ids (or a text file of ids) to leave out of training.
        flip_share: Probability of the mirror image.
        caption_dropout: Probability of the empty caption.

    Attributes:
        half: Keep latents and caption states in float16.
        options: How the images are read, where they come from files: with `size`, `framing`, `on_error`.
        console: Where what is made once is announced and shown.
    """

    half = False
    options: Any = None

    def __init__(
        self,
        encoder: LatentEncoder | None = None,
        *,
        store: str = "cache",
        batch_size: int = 64,
        seed: int = 0,
        exclude: list[str] | str | None = None,
        flip_share: float = 0.5,
        caption_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_ranges(batch_size=batch_size, seed=seed, flip_share=flip_share, caption_dropout=caption_dropout)
        self.encoder, self.store, self.batch_size, self.seed = encoder, Store(store), batch_size, seed
        self.exclude: Sequence[str] | str | Path | None = exclude
        self.flip_share, self.caption_dropout = flip_share, caption_dropout
        self.console = Console()

    def take_size(self, model: DiffusionModel) -> RunSize | None:
        """Reads the images at the model's own size where the options name none, and checks the one that they name.

        Returns:
            The size; None where the images have one of their own.

        Raises:
            ValueError: The model cannot take it.
        """
        if not hasattr(self.options, "framing"):
            return None
        size = RunSize.of(model, self.options.size, self.options.framing)
        self.options = replace(self.options, size=size.option, framing=size.framing)
        return size

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training images and the held-out ones, before `exclude`."""
        raise TypeError(f"{type(self).__name__} does not say where its images come from.")

    def census(self) -> Census:
        """How many images there will be; here they are read, subclasses whose images take long count them only."""
        train, held_out = self.load()
        height, width = (int(side) for side in train.pixels.shape[1:3])
        return Census(len(train), len(held_out), (height, width), len(train.captions[0]))

    def latents_of(self, images: ImageSet, training: bool) -> EncodedImages:
        """Latents and caption states of the training images or of the held-out ones, before `exclude`."""
        assert self.encoder is not None
        console = self.console
        return encode_image_set(
            images, encoder=self.encoder, store=self.store, progress=console.progress, half=self.half, log=console.log
        )

    def prepare_data(self) -> None:
        """Builds images and latents in the store, once per machine."""
        for images, training in zip(self.load(), (True, False), strict=True):
            if self.encoder is not None and len(images):
                self.latents_of(images, training)

    def setup(self, stage: str | None = None) -> None:
        """Opens the images and latents that `prepare_data` stored."""
        train, validation = self.load()
        kept = keep_indices(train.ids, read_ids(self.exclude))
        self.train_images, self.validation_images = train.subset(kept), validation
        if self.encoder is not None:
            self.train_latents = self.latents_of(train, True).subset(kept)
            held_out = self.latents_of(validation, False) if len(validation) else self.train_latents.subset([])
            self.validation_latents = held_out

    def visits(self, images: ImageSet, latents: EncodedImages | None, training: bool) -> VisitDataset:
        """Training batches, or (without flips and dropout) held-out ones."""
        flip_share, dropout = (self.flip_share, self.caption_dropout) if training else (0.0, 0.0)
        if latents is not None:
            return LatentVisits(latents, self.seed, flip_share, dropout)
        return PixelVisits(
            torch.from_numpy(np.array(images.pixels)), hash_texts(list(images.ids)), self.seed, flip_share
        )

    def train_dataloader(self) -> KeyedLoader:
        """Endless keyed batches, going on from the trainer's step."""
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 0:
            raise ValueError(
                "Training runs for a fixed number of steps, so that leaving images out changes nothing else: "
                "set max_steps."
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches is {trainer.accumulate_grad_batches}, but the keyed stream gives one batch "
                "to each step: leave it at 1 and choose batch_size, which counts images over all devices."
            )
        data = self.visits(self.train_images, getattr(self, "train_latents", None), training=True)
        batches = KeyedBatches(
            hash_texts(list(self.train_images.ids)),
            seed=self.seed,
            batch_size=self.batch_size,
            steps=trainer.max_steps,
            start_step=trainer.global_step,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            repeats=self.train_images.weights,
        )
        return KeyedLoader(data, batches)

    def val_dataloader(self) -> KeyedLoader:
        """The held-out images, each visited `VALIDATION_VISITS` times with its own noise."""
        data = self.visits(self.validation_images, getattr(self, "validation_latents", None), training=False)
        visits = 1 if self.encoder is None else VALIDATION_VISITS
        steps = -(-len(self.validation_images) * visits // self.batch_size)
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        batches = KeyedBatches(
            hash_texts(list(self.validation_images.ids)),
            seed=self.seed,
            batch_size=self.batch_size,
            steps=steps,
            rank=rank,
            world_size=world,
        )
        return KeyedLoader(data, batches)

    def test_dataloader(self) -> KeyedLoader:
        """The held-out images again."""
        return self.val_dataloader()

    predict_dataloader = test_dataloader
