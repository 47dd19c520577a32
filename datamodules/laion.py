"""LAION, as img2dataset leaves it, as a LightningDataModule."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from datamodules.images import SAMPLE, Census, ImageDataModule
from wherefrom.data.decoding import Sample
from wherefrom.data.framing import sides_of
from wherefrom.data.image_folder import split_images
from wherefrom.data.image_set import ImageSet, read_ids
from wherefrom.data.webdataset import ShardOptions, build_laion, decode_shard, plan_shards
from wherefrom.models.encoders import LatentEncoder


class LAION(ImageDataModule):
    """Captioned images in img2dataset's shards.

    Args:
        folder: Holds `00000.tar` beside `00000.parquet`, and so on.
        options: Size, columns of the parquet files, limits.
        subset: Keys (or a text file of keys) to keep; None keeps all.
        validation_share: Share of the images held out, by a hash of their keys.
        half: Keep latents and caption states in float16.
        encoder: See `ImageDataModule`.
        store: See `ImageDataModule`.
        batch_size: See `ImageDataModule`.
        seed: See `ImageDataModule`.
        exclude: See `ImageDataModule`.
        flip_share: See `ImageDataModule`.
        caption_dropout: See `ImageDataModule`.
    """

    def __init__(
        self,
        folder: str,
        *,
        options: ShardOptions = ShardOptions(),
        subset: list[str] | str | None = None,
        validation_share: float = 0.05,
        half: bool = True,
        encoder: LatentEncoder | None = None,
        store: str = "cache",
        batch_size: int = 64,
        seed: int = 0,
        exclude: list[str] | str | None = None,
        flip_share: float = 0.5,
        caption_dropout: float = 0.1,
    ) -> None:
        super().__init__(
            encoder,
            store=store,
            batch_size=batch_size,
            seed=seed,
            exclude=exclude,
            flip_share=flip_share,
            caption_dropout=caption_dropout,
        )
        self.folder, self.options, self.half = Path(folder), options, half
        self.subset, self.validation_share = subset, validation_share

    def census(self) -> Census:
        """Counts what the shards' tables name; what is broken in the shards is found only when they are decoded."""
        shards = plan_shards(
            self.folder, self.options, None if self.subset is None else read_ids(self.subset, "subset")
        )
        total = sum(shards.counts)
        held_out = round(self.validation_share * total)

        def decode() -> int:
            result = islice(decode_shard(shards.paths[0], self.options, shards.subset), SAMPLE)
            return sum(isinstance(each, Sample) for each in result)

        return Census(total - held_out, held_out, sides_of(self.options.side), 1, decode)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training images and the held-out ones."""
        images = build_laion(
            self.store,
            folder=self.folder,
            options=self.options,
            subset=None if self.subset is None else read_ids(self.subset, "subset"),
            log=self.console.log,
            progress=self.console.progress,
        )
        return split_images(images, self.validation_share)
