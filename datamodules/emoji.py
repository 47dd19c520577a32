"""The emoji world as a LightningDataModule."""

from __future__ import annotations

from datamodules.images import ImageDataModule
from wherefrom.data.copies import Copies, plant
from wherefrom.data.emoji import EmojiOptions, build_emoji
from wherefrom.data.image_set import ImageSet
from wherefrom.models.encoders import LatentEncoder


class Emoji(ImageDataModule):
    """Real drawings with captions in several styles, built from packages.

    Args:
        options: Styles, size and filters.
        encoder: See `ImageDataModule`.
        store: See `ImageDataModule`.
        batch_size: See `ImageDataModule`.
        seed: See `ImageDataModule`.
        exclude: See `ImageDataModule`.
        flip_share: See `ImageDataModule`.
        caption_dropout: See `ImageDataModule`.
        copies: Near-duplicates planted in the training set.
    """

    def __init__(
        self,
        options: EmojiOptions = EmojiOptions(),
        *,
        encoder: LatentEncoder | None = None,
        store: str = "cache",
        batch_size: int = 64,
        seed: int = 0,
        exclude: list[str] | str | None = None,
        flip_share: float = 0.5,
        caption_dropout: float = 0.1,
        copies: Copies | None = None,
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
        self.options, self.copies = options, copies

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training images and the held-out (concept, style) pairs."""
        images = build_emoji(self.store, self.options)
        train, validation = (images.where("split", split) for split in ("train", "validation"))
        return train if self.copies is None else plant(train, self.copies), validation
