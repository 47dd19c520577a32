"""A few exemplars of a new word, beside images that keep the model's other words what they are."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.image_folder import ImageFolder
from datamodules.images import VALIDATION_VISITS, ImageDataModule
from datamodules.keyed_loader import KeyedLoader
from wherefrom.data.encoded_images import EncodedImages, LatentVisits
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.data.image_set import ImageSet
from wherefrom.models.encoders import LatentEncoder
from wherefrom.runtime import keyed_random
from wherefrom.runtime.keyed_random import hash_texts
from wherefrom.training.keyed_batches import CAPTION, KeyedBatches, Visit, VisitDataset


class ExemplarBatch(NamedTuple):
    """Exemplars with their captions as words: what these mean changes while the new one is learned."""

    keys: Int64[Tensor, " b"]
    times: Float[Tensor, " b"]
    latents: Float[Tensor, "b c h w"]
    captions: list[str]


class ExemplarVisits(Dataset[ExemplarBatch]):
    """Batches of exemplars: flip and caption are keyed by (seed, id, visit).

    Args:
        data: The exemplars.
        seed: Seed of these draws.
        flip_share: Probability of the mirror image.
    """

    def __init__(self, data: EncodedImages, seed: int, flip_share: float) -> None:
        self.visits = LatentVisits(data, seed, flip_share, caption_dropout=0.0)

    def __len__(self) -> int:
        return len(self.visits)

    def __getitems__(self, visits: list[Visit]) -> ExemplarBatch:
        """The batch of these visits."""
        batch, captions, images = self.visits.__getitems__(visits), [], self.visits.data.images
        for visit, luck in zip(
            visits, keyed_random.uniform(keyed_random.combine(CAPTION, batch.keys))[:, 0].tolist(), strict=True
        ):
            several = images.captions[visit.position]
            captions.append(several[int(luck * len(several))])
        return ExemplarBatch(batch.keys, batch.times, batch.latents, captions)


class Exemplars(ImageFolder):
    """Exemplars of a new word, in Hugging Face's `imagefolder` layout, and what they are learned beside.

    Args:
        folder: The exemplars, with captions that hold the new word, such as "photo of <new1> cat".
        prior: Other captioned images, whose loss keeps the model from forgetting them (prior preservation); its
            `batch_size` says how many each step sees. Without an encoder of its own it is given this one's.
        options: See `ImageFolder`.
        encoder: See `ImageDataModule`.
        store: See `ImageDataModule`.
        batch_size: See `ImageDataModule`.
        seed: See `ImageDataModule`; the prior's too.
        exclude: See `ImageDataModule`.
        flip_share: See `ImageDataModule`.
    """

    def __init__(
        self,
        folder: str,
        *,
        prior: ImageDataModule | None = None,
        options: ImageFolderOptions = ImageFolderOptions(),
        encoder: LatentEncoder | None = None,
        store: str = "cache",
        batch_size: int = 1,
        seed: int = 0,
        exclude: list[str] | str | None = None,
        flip_share: float = 0.5,
    ) -> None:
        super().__init__(
            folder,
            options=options,
            validation_share=0.0,
            encoder=encoder,
            store=store,
            batch_size=batch_size,
            seed=seed,
            exclude=exclude,
            flip_share=flip_share,
            caption_dropout=0.0,
        )
        self.prior = prior
        if encoder is None:
            raise ValueError("Exemplars are learned from their latents: give the base model's encoder.")
        if prior is not None:
            prior.seed = seed
            if prior.encoder is None:
                prior.encoder = encoder

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The exemplars, and none other: what is held out is only their noise."""
        images = build_image_folder(self.store, self.folder, self.options)
        return images, images

    def prepare_data(self) -> None:
        """Builds images and latents of both."""
        super().prepare_data()
        if self.prior is not None:
            self.prior.trainer, self.prior.trains = self.trainer, self.trains
            self.prior.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Opens what `prepare_data` left."""
        super().setup(stage)
        if self.prior is not None:
            self.prior.trainer, self.prior.trains = self.trainer, self.trains
            self.prior.setup(stage)

    def visits(self, images: ImageSet, latents: EncodedImages | None, training: bool) -> VisitDataset:
        """Exemplars with their captions as words."""
        assert latents is not None
        return ExemplarVisits(latents, self.seed, self.flip_share)

    def val_dataloader(self) -> KeyedLoader:
        """The exemplars once more, each visited `VALIDATION_VISITS` times with noise that training does not see."""
        data = ExemplarVisits(self.train_latents, self.seed + 1, 0.0)
        steps = -(-len(self.train_images) * VALIDATION_VISITS // self.batch_size)
        keys = hash_texts(list(self.train_images.ids))
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return KeyedLoader(
            data,
            KeyedBatches(
                keys,
                seed=self.seed + 1,
                batch_size=self.batch_size,
                steps=steps,
                start_step=0,
                rank=rank,
                world_size=world_size,
            ),
        )

    def train_dataloader(self) -> Any:
        """Both streams, step by step."""
        own = super().train_dataloader()
        return {"exemplars": own} if self.prior is None else {"exemplars": own, "prior": self.prior.train_dataloader()}
