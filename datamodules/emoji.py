"""The emoji world as a LightningDataModule."""

from __future__ import annotations

from datamodules.pictures import PicturesDataModule
from wherefrom.data.copies import Copies, plant
from wherefrom.data.emoji import EmojiOptions, build_emoji
from wherefrom.data.image_set import Pictures
from wherefrom.models.encoders import LatentEncoder


class Emoji(PicturesDataModule):
    """Real drawings with captions in several styles, built from packages.

    Args:
        options: Styles, size and filters.
        encoder: See `PicturesDataModule`.
        store: See `PicturesDataModule`.
        batch_size: See `PicturesDataModule`.
        seed: See `PicturesDataModule`.
        exclude: See `PicturesDataModule`.
        flip_share: See `PicturesDataModule`.
        caption_dropout: See `PicturesDataModule`.
        copies: Near-duplicates planted in the training set.
    """

    def __init__(
        self,
        options: EmojiOptions = EmojiOptions(),
        encoder: LatentEncoder | None = None,
        store: str = "cache",
        batch_size: int = 64,
        seed: int = 0,
        exclude: list[str] | str | None = None,
        flip_share: float = 0.5,
        caption_dropout: float = 0.1,
        copies: Copies | None = None,
    ) -> None:
        super().__init__(encoder, store, batch_size, seed, exclude, flip_share, caption_dropout)
        self.options, self.copies = options, copies

    def load(self) -> tuple[Pictures, Pictures]:
        """The training pictures and the held-out (concept, style) pairs."""
        pictures = build_emoji(self.store, self.options)
        train, validation = (pictures.where("split", split) for split in ("train", "validation"))
        return train if self.copies is None else plant(train, self.copies), validation
