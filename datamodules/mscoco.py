"""COCO as a LightningDataModule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from datamodules.images import SAMPLE, Census, ImageDataModule
from wherefrom.data.cached_latents import read_cached_latents
from wherefrom.data.coco_captions import CocoImage, read_captions
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.data.framing import sides_of
from wherefrom.data.image_files import load_image
from wherefrom.data.image_set import ImageSet, read_ids
from wherefrom.data.mscoco import CocoOptions, build_mscoco
from wherefrom.models.encoders import LatentEncoder

CAPTIONS = "annotations/captions_{split}.json"
KARPATHY = "dataset_coco.json"


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
    """COCO's images with five captions each: those of training to attribute to or train on, others held out.

    Args:
        folder: Holds an image folder for each split and `annotations`, as COCO's archives unpack; or the image folders
            and Karpathy's `dataset_coco.json`.
        options: Size, number of captions and what to do with unreadable images.
        subset: COCO ids (or a text file of ids) to keep of the training images; None keeps all.
        validation_subset: The same for the held-out images.
        captions_file: The captions file below the folder: `{split}` stands for each split's name where each has a file,
            else the images of one file name their splits. None is Karpathy's where it lies in the folder, and else
            COCO's.
        split: Splits that are trained on or attributed to; None is `train2017`, or Karpathy's `train` and `restval`.
        held_out: The split that is not, and is the null of an attribution; None is `val2017` or `val`, and `none` none.
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
        captions_file: str | None = None,
        split: list[str] | str | None = None,
        held_out: str | None = None,
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
        found = KARPATHY if (self.folder / KARPATHY).is_file() else CAPTIONS
        self.captions_file = captions_file or found
        usual = (["train2017"], "val2017") if self.each_its_file else (["train", "restval"], "val")
        self.splits = usual[0] if split is None else [split] if isinstance(split, str) else list(split)
        self.held_out = None if held_out == "none" else held_out or usual[1]
        self.subset, self.validation_subset = subset, validation_subset
        if self.each_its_file and len(self.splits) != 1:
            raise ValueError(f"split: each split has a file of its own, so one is named; given {self.splits!r}.")
        if self.held_out in self.splits:
            raise ValueError(f"held_out: {self.held_out!r} cannot be trained on or attributed to and be held out.")

    @property
    def each_its_file(self) -> bool:
        """Whether each split has a captions file and an image folder of its own."""
        return "{split}" in self.captions_file

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training images and the held-out ones."""
        train = self._build(self.splits, self.subset)
        if not self.each_its_file:
            names, other = ", ".join(map(repr, self.splits)), repr(self.held_out) if self.held_out else "none"
            self._say(
                [f"{self.captions_file}: {len(train):,} training images of the splits {names}; held out: {other}"]
            )
        return train, self._build([self.held_out], self.validation_subset) if self.held_out else train.subset([])

    def _read(self, splits: list[str], subset: list[str] | str | None) -> tuple[Path, list[CocoImage]]:
        """The folder of these splits' images, and what their captions file says of them."""
        folder, captions, named = self._places(splits)
        return folder, read_captions(captions, self.options.captions, self._ids(subset), named)

    def _ids(self, subset: list[str] | str | None) -> tuple[str, ...] | None:
        return None if subset is None else read_ids(subset, "subset")

    def _places(self, splits: list[str]) -> tuple[Path, Path, list[str] | None]:
        """Image folder, captions file, and the splits to keep of it."""
        if self.each_its_file:
            return self.folder / splits[0], self.folder / self.captions_file.format(split=splits[0]), None
        return self.folder, self.folder / self.captions_file, splits

    def census(self) -> Census:
        """Counts the captions files' images; none is decoded but the few that are timed."""
        folder, images = self._read(self.splits, self.subset)
        held_out = len(self._read([self.held_out], self.validation_subset)[1]) if self.held_out else 0

        def decode() -> int:
            for image in images[:SAMPLE]:
                load_image(folder / image.file_name, self.options.side, self.options.framing)
            return len(images[:SAMPLE])

        return Census(len(images), held_out, sides_of(self.options.side), self.options.captions, decode)

    def _build(self, splits: list[str], subset: list[str] | str | None) -> ImageSet:
        folder, captions, named = self._places(splits)
        return build_mscoco(
            self.store,
            folder=folder,
            captions=captions,
            options=self.options,
            subset=self._ids(subset),
            splits=named,
            log=self.console.log,
            progress=self.console.progress,
        )

    def latents_of(self, image_set: ImageSet, training: bool) -> EncodedImages:
        """Ready-made arrays of the training images where there are some."""
        if self.ready_made is None or not training:
            return super().latents_of(image_set, training)
        _, images = self._read(self.splits, None)
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
