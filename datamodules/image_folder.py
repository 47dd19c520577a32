"""A folder of the user's own captioned images as a LightningDataModule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datamodules.held_out import checked_share
from datamodules.images import SAMPLE, Census, ImageDataModule
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder, load_image
from wherefrom.data.image_set import ImageSet
from wherefrom.data.layouts.detection import open_images
from wherefrom.data.ranked_images import RankedImages
from wherefrom.models.encoders import LatentEncoder


class ImageFolder(ImageDataModule):
    """Captioned images in a folder of any layout that is known: `imagefolder`, caption files, kohya's, ….

    Args:
        folder: The folder that holds the images and their metadata.
        options: Size, caption column and what to do with unreadable images.
        validation_share: Share of the images held out where no others are; None is 0.05 while they are trained on, and
            none where a model that is trained already is attributed.
        split: Splits that are trained on or ranked, or `all`; without any, `train` where the metadata name splits and
            all images where they do not.
        held_out: Images that are not trained on, and are the null of an attribution: a split, a folder, or `none`;
            without one, the split `validation` where the metadata name it.
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
        options: ImageFolderOptions = ImageFolderOptions(),
        validation_share: float | None = None,
        split: list[str] | str | None = None,
        held_out: str | None = None,
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
        self.folder, self.options, self.validation_share = Path(folder), options, checked_share(validation_share)
        self.choice = RankedImages.of_options(split, held_out)

    def census(self) -> Census:
        """Counts the metadata's images; none is decoded but the few that are timed."""
        reading = replace(self.options.reading, cache=self.store.root)
        reader = open_images(self.folder, reading).reader
        rows = reader.rows
        splits = [row.split for row in rows]
        parts, null = self.choice.parts(splits), self.choice.null_folder(set(splits))
        training, held_out = len(parts.ranked), len(parts.null)
        if null is not None:
            held_out = len(open_images(null, reading).reader.rows)
        if not held_out:
            held_out = round((self.held_out_share(self.validation_share) or 0.0) * training)
            training -= held_out

        def decode() -> int:
            for row in rows[:SAMPLE]:
                load_image(reader.open_image(row), self.options.size, self.options.framing)
            return len(rows[:SAMPLE])

        height, width = load_image(reader.open_image(rows[0]), self.options.size, self.options.framing).shape[:2]
        return Census(training, held_out, (height, width), len(rows[0].captions), decode)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training images and the held-out ones."""

        def read(folder: Path) -> ImageSet:
            return build_image_folder(self.store, folder, self.options)

        if self.choice.chosen:  # a wrong choice is refused before anything is decoded
            reading = replace(self.options.reading, cache=self.store.root)
            splits = [row.split for row in open_images(self.folder, reading).reader.rows]
            self.check_choice(self.choice, splits)
        return self.divide(read(self.folder), self.choice, read, self.validation_share)
