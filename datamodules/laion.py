"""LAION, as img2dataset leaves it, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from datamodules.held_out import checked_share
from datamodules.images import SAMPLE, Census, ImageDataModule
from wherefrom.data.decoding import Sample
from wherefrom.data.framing import sides_of
from wherefrom.data.image_set import ImageSet, read_ids
from wherefrom.data.ranked_images import RankedImages
from wherefrom.data.webdataset import ShardOptions, build_laion, decode_shard, plan_shards
from wherefrom.models.encoders import LatentEncoder


class LAION(ImageDataModule):
    """Captioned images in img2dataset's shards.

    Args:
        folder: Holds `00000.tar` beside `00000.parquet`, and so on.
        options: Size, columns of the parquet files, limits.
        subset: Keys (or a text file of keys) to keep; None keeps all.
        validation_share: Share of the images held out, by a hash of their keys; None is 0.05 while they are trained on,
            and none where a model that is trained already is attributed.
        held_out: Folder of other shards with images that were never trained on: the null; `none` and None name none.
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
        validation_share: float | None = None,
        held_out: str | None = None,
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
        self.subset, self.validation_share = subset, checked_share(validation_share)
        self.choice = RankedImages.of_options(None, held_out)

    def census(self) -> Census:
        """Counts what the shards' tables name; what is broken in the shards is found only when they are decoded."""
        shards = plan_shards(
            self.folder, self.options, None if self.subset is None else read_ids(self.subset, "subset")
        )
        total = sum(shards.counts)
        null = self.choice.null_folder(())
        if null is not None:
            held_out, training = sum(plan_shards(null, self.options).counts), total
        else:
            held_out = round((self.held_out_share(self.validation_share) or 0.0) * total)
            training = total - held_out

        def decode() -> int:
            result = islice(decode_shard(shards.paths[0], self.options, shards.subset), SAMPLE)
            return sum(isinstance(each, Sample) for each in result)

        return Census(training, held_out, sides_of(self.options.side), 1, decode)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training images and the held-out ones."""
        subset = None if self.subset is None else read_ids(self.subset, "subset")
        return self.divide(self._read(self.folder, subset), self.choice, self._read, self.validation_share)

    def _read(self, folder: Path, subset: Sequence[str] | None = None) -> ImageSet:
        return build_laion(
            self.store,
            folder=folder,
            options=self.options,
            subset=subset,
            log=self.console.log,
            progress=self.console.progress,
        )
