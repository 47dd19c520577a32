"""Customizes a model: cross-attention K/V and one new word learn a few exemplars (Kumari et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from datamodules.exemplars import ExemplarBatch, Exemplars
from lightning_modules.result import LeavesResult
from lightning_modules.schedule import stepped_per_batch
from wherefrom.models.conditioning import Conditioning
from wherefrom.models.customization import add_word, embedding_of, encoder_of, learned_word, save_customized
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.models.pipeline import load_model
from wherefrom.runtime import keyed_random
from wherefrom.training.keyed_batches import NOISE, LatentBatch


class CustomDiffusion(LeavesResult):
    """Fine-tunes K/V of the cross-attention and the embedding of one new word; the data module is `Exemplars`.

    All other weights, and the embeddings of all other words, stay as they are to the last bit.

    Args:
        base: The base model: folder or hub id.
        word: The new word, V*.
        start: The word of one token whose embedding it begins from.
        optimizer: Makes the optimizer from K/V and the embedding.
        scheduler: Makes the learning-rate schedule, stepped per batch.
        word_lr: Learning rate of the embedding; None gives it the optimizer's.
        prior_weight: Weight of the mean loss of the prior's images beside that of the exemplars.
        save_to: Folder for what the model has of its own.

    Raises:
        ValueError: The base cannot be customized, the new word is known to it, the start is not one token, or the
            weight is negative.
    """

    def __init__(
        self,
        base: str,
        *,
        word: str = "<new1>",
        start: str = "object",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        word_lr: float | None = None,
        prior_weight: float = 1.0,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        if prior_weight < 0:
            raise ValueError(f"prior_weight must not be negative; given {prior_weight}.")
        self.base, self.word, self.save_to = base, word, save_to
        self.optimizer, self.scheduler, self.word_lr = optimizer, scheduler, word_lr
        self.prior_weight = prior_weight
        self._model = (load_model(base),)  # in a tuple: what is frozen is no submodule, except for the denoiser
        self.denoiser = self._model[0].denoiser.requires_grad_(False)
        self.text = (encoder_of(self._model[0]),)
        begin = embedding_of(self.text[0], start)
        self.number = add_word(self.text[0], word, begin)
        self.embedding = nn.Parameter(begin)
        self.moved = select_weights(self.denoiser, "cross_attention_kv")
        for parameter in self.moved.values():
            parameter.requires_grad_(True)

    def setup(self, stage: str) -> None:
        """Refuses exemplars whose captions do not hold the new word.

        Raises:
            ValueError: A caption lacks it, or the data module is another one.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Exemplars):
            raise ValueError(f"CustomDiffusion learns from Exemplars, not from {type(data).__name__}.")
        for name, captions in zip(data.train_images.ids, data.train_images.captions, strict=True):
            lacking = [caption for caption in captions if self.word not in caption]
            if lacking:
                raise ValueError(
                    f"The caption {lacking[0]!r} of exemplar {name!r} lacks the new word {self.word}: captions say "
                    f'what it means, such as "photo of {self.word}".'
                )

    def on_fit_start(self) -> None:
        """Brings the text encoder to the denoiser's device."""
        self.text[0].model.to(self.device)

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        """The exemplars' mean loss, plus that of the prior times its weight.

        Raises:
            ValueError: The loss is not finite.
        """
        exemplars: ExemplarBatch = batch["exemplars"]
        loss = self._exemplar_losses(exemplars).mean()
        self.log("train/exemplars", loss, batch_size=len(exemplars.keys))
        if "prior" in batch and self.prior_weight:
            prior: LatentBatch = batch["prior"]
            kept = self._losses(prior, prior.conditioning).mean()
            self.log("train/prior", kept, batch_size=len(prior.keys))
            loss = loss + self.prior_weight * kept
        if not torch.isfinite(loss):
            raise ValueError(
                f"The training loss is {loss.item()} at step {self.global_step}. Lower the learning rate or set "
                "gradient_clip_val."
            )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(exemplars.keys))
        return loss

    def validation_step(self, batch: ExemplarBatch) -> None:
        """Logs the exemplars' loss at timesteps and noise that stay the same."""
        losses = self._exemplar_losses(batch)
        self.log("val/exemplars", losses.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)

    def _exemplar_losses(self, batch: ExemplarBatch) -> Tensor:
        distinct = sorted(set(batch.captions))  # often there is one: each is read once
        with learned_word(self.text[0], self.number, self.embedding):
            conditioning = self.text[0].embed(distinct)
        return self._losses(batch, conditioning.at([distinct.index(caption) for caption in batch.captions]))

    def _losses(self, batch: ExemplarBatch | LatentBatch, conditioning: Conditioning) -> Tensor:
        """One loss per example; timestep and noise depend only on the visit's key."""
        timesteps = (batch.times * self._model[0].noise_schedule.steps).long()
        noise = keyed_random.normal(
            keyed_random.combine(NOISE, batch.keys), batch.latents.shape[1:], batch.latents.dtype
        )
        return self._model[0].losses(batch.latents, conditioning, timesteps, noise)

    def model(self) -> DiffusionModel:
        """The customized model as it is now."""
        with torch.no_grad():
            table: Any = self.text[0].model
            table.get_input_embeddings().weight[self.number] = self.embedding
        return self._model[0]

    def configure_optimizers(self):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """The injected optimizer, with the injected schedule stepped per batch."""
        own = {} if self.word_lr is None else {"lr": self.word_lr}
        groups = [{"params": list(self.moved.values())}, {"params": [self.embedding], **own}]
        return stepped_per_batch(self.optimizer(groups), self.scheduler)

    def save_result(self) -> None:
        """Saves what the model has of its own."""
        if self.save_to is not None and self.trainer.is_global_zero:
            save_customized(Path(self.save_to), self.base, self.model(), [self.word])
