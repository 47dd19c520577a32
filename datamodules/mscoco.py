"""COCO 2017 as a LightningDataModule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from datamodules.images import SAMPLE, Census, ImageDataModule
from wherefrom.data.cached_latents import read_cached_latents
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.data.framing import sides_of
from wherefrom.data.image_files import load_image
from wherefrom.data.image_set import ImageSet, read_ids
from wherefrom.data.mscoco import CocoOptions, build_mscoco, read_captions, select
from wherefrom.models.encoders import LatentEncoder

CAPTIONS = "annotations/captions_{split}.json"


@dataclass(frozen=True)
class ReadyMade:
    """Arrays of the training images' latents and text states that another program made; see `read_cached_latents`.

    Attributes:
        latents: Such as `coco17_train_latents.npy`; its rows are all images of the captions file by numerical id.
        states: Such as `coco17_train_text_embeddings.npy`.
        null_states: States of the empty caption; needed for training with caption dropout only.
    """

    latents: str
    states: str
    null_states: str | None = None


class MSCOCO(ImageDataModule):
    """COCO's images with five captions each: `train2017` to attribute to or train on, `val2017` held out.

    Args:
        folder: Holds `train2017`, `val2017` and `annotations`.
        options: Size, number of captions and what to do with unreadable images.
        subset: COCO ids (or a text file of ids) to keep of the training images; None keeps all.
        validation_subset: The same for the held-out images.
        ready_made: Arrays to use in place of encoding the training images.
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
        options: CocoOptions = CocoOptions(),
        subset: list[str] | str | None = None,
        validation_subset: list[str] | str | None = None,
        ready_made: ReadyMade | None = None,
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
        self.folder, self.options, self.half, self.ready_made = Path(folder), options, half, ready_made
        self.subsets = {"train2017": subset, "val2017": validation_subset}

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training images and the held-out ones."""
        train, validation = (self._split(split) for split in self.subsets)
        return train, validation

    def census(self) -> Census:
        """Counts the captions files' images; none is decoded but the few that are timed."""
        counts, first = [], []
        for split, subset in self.subsets.items():
            images = read_captions(self.folder / CAPTIONS.format(split=split), self.options.captions)
            images = images if subset is None else select(images, read_ids(subset, "subset"))
            counts.append(len(images))
            first.append(images[:SAMPLE])

        def decode() -> int:
            for image in first[0]:
                load_image(self.folder / "train2017" / image.file_name, self.options.side, self.options.framing)
            return len(first[0])

        return Census(counts[0], counts[1], sides_of(self.options.side), self.options.captions, decode)

    def _split(self, split: str) -> ImageSet:
        subset = self.subsets[split]
        return build_mscoco(
            self.store,
            folder=self.folder / split,
            captions=self.folder / CAPTIONS.format(split=split),
            options=self.options,
            subset=None if subset is None else read_ids(subset, "subset"),
            log=self.console.log,
            progress=self.console.progress,
        )

    def latents_of(self, image_set: ImageSet, training: bool) -> EncodedImages:
        """Ready-made arrays of the training images where there are some."""
        if self.ready_made is None or not training:
            return super().latents_of(image_set, training)
        images = read_captions(self.folder / CAPTIONS.format(split="train2017"), self.options.captions)
        given, null = self.ready_made, self.ready_made.null_states
        made = read_cached_latents(
            Path(given.latents),
            Path(given.states),
            [image.id for image in images],
            [image.captions for image in images],
            None if null is None else Path(null),
        )
        where = {name: row for row, name in enumerate(made.ids)}
        return replace(made.subset([where[name] for name in image_set.ids]), images=image_set)
