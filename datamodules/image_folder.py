"""A folder of the user's own captioned images as a LightningDataModule."""

from __future__ import annotations

from pathlib import Path

from datamodules.images import SAMPLE, Census, ImageDataModule
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder, load_image, split_images
from wherefrom.data.image_metadata import read_rows
from wherefrom.data.image_set import ImageSet
from wherefrom.models.encoders import LatentEncoder


class ImageFolder(ImageDataModule):
    """Captioned images in Hugging Face's `imagefolder` layout.

    Args:
        folder: The folder that holds the images and their metadata.
        options: Size, caption column and what to do with unreadable images.
        validation_share: Share of the images held out where the metadata name no validation split.
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
        validation_share: float = 0.05,
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
        self.folder, self.options, self.validation_share = Path(folder), options, validation_share

    def census(self) -> Census:
        """Counts the metadata's images; none is decoded but the few that are timed."""
        rows = read_rows(self.folder, self.options.caption, self.options.columns)
        splits = [row.split for row in rows]
        held_out = splits.count("validation") or round(self.validation_share * len(rows))
        training = splits.count("train") if "validation" in splits else len(rows) - held_out

        def decode() -> int:
            for row in rows[:SAMPLE]:
                load_image(self.folder / row.name, self.options.size, self.options.framing)
            return len(rows[:SAMPLE])

        height, width = load_image(self.folder / rows[0].name, self.options.size, self.options.framing).shape[:2]
        return Census(training, held_out, (height, width), len(rows[0].captions), decode)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training images and the held-out ones."""
        return split_images(build_image_folder(self.store, self.folder, self.options), self.validation_share)
