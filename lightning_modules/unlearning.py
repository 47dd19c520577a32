"""Unlearning one image under Lightning's loop, for ablations (Newton against SGD, which weights) and their curves."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from datamodules.images import ImageDataModule
from lightning_modules.result import LeavesResult
from wherefrom.attributors.unlearning.unlearner import Unlearner, UnlearningSettings
from wherefrom.curvature import Curvature, DiagonalFisher, FitContext, Identity
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.gradients.query_loss import QueryLatent
from wherefrom.models.parameter_subsets import Subset, select_weights
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import generate
from wherefrom.runtime.distributed import Runner


class Unlearning(LeavesResult):
    """Generates an image by the model and unlearns it; the data module's images are the training set.

    The data module's batches only count the steps: each step's noise is keyed by the step, not read from data. The
    trainer's `max_steps` must equal `settings.steps`.

    Args:
        model: The pretrained pipeline: folder or hub id.
        prompt: The prompt of the image that is generated and unlearned.
        weights: Which weights move.
        settings: How to unlearn.
        curvature: Estimator of F of the Newton step; not used where `settings.newton` is False.
        grid: Where the losses of held-out images are measured.
        seed: Seed of the image.
        save_to: File for the moved weights.
    """

    trains_on_images = False  # the model is trained already: none of the images is held out

    def __init__(
        self,
        model: str,
        *,
        prompt: str,
        weights: Subset = "cross_attention_kv",
        settings: UnlearningSettings = UnlearningSettings(),
        curvature: Curvature = DiagonalFisher(),
        grid: LossGrid = LossGrid(timesteps=10),
        seed: int = 0,
        save_to: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.diffusion = load_model(model)
        self.unet = self.diffusion.denoiser.requires_grad_(True)
        self.prompt, self.weights, self.settings = prompt, weights, settings
        self.curvature = curvature if settings.newton else Identity(recorded=curvature)
        self.grid, self.seed, self.save_to = grid, seed, save_to

    def setup(self, stage: str) -> None:
        """Hands the data module this model's encoder, so that latents and prompt embeddings are the model's own.

        Raises:
            ValueError: There is no data module with images, or `max_steps` is not `settings.steps`.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise ValueError("Unlearning needs a data module with the training images.")
        if self.trainer.max_steps != self.settings.steps:
            raise ValueError(
                f"trainer.max_steps is {self.trainer.max_steps}, settings.steps {self.settings.steps}: make them equal."
            )
        self.images = data
        data.encoder = self.diffusion.encoder
        if self.trainer.is_global_zero:
            data.prepare_data()
        self.trainer.strategy.barrier()
        data.setup()

    def on_fit_start(self) -> None:
        """Generates the image and fits the curvature."""
        encoder = self.diffusion.encoder
        assert encoder is not None
        encoder.vae.to(self.device)
        encoder.text.model.to(self.device)
        runner, train = Runner.current(self.device), self.images.train_latents
        shape = train.latent_shape
        query = generate(self.diffusion, prompts=[self.prompt], seed=self.seed, shape=shape)[0]
        assert query.latent is not None
        names = list(select_weights(self.unet, self.weights))
        fitted = self.curvature.matrix(FitContext(self.diffusion, train, names, self.images.store, runner))
        latent = QueryLatent(query.id, query.latent, encoder.text.encode([self.prompt]).at(0))
        self.unlearner = Unlearner(
            self.diffusion,
            query=latent,
            weights=self.weights,
            curvature=fitted,
            dataset_size=len(train),
            settings=self.settings,
            runner=runner,
        )

    def training_step(self, batch: object) -> None:
        """One step of ascent on the image's loss."""
        self.unlearner.step()
        self.optimizers().step()  # type: ignore[union-attr]  # counts the step; its parameters hold no gradients
        self.log("unlearning/alpha", self.unlearner.alphas[-1], on_step=True)

    def set_loss(self, data: EncodedImages) -> Float[Tensor, " n"]:
        """The present loss of each image of a set, on the grid."""
        work = LossPass(self.diffusion, data, self.grid, 256)
        work.step(range(len(data)))
        return work.losses.flatten(1).mean(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer that Lightning can count steps by.

        The ascent itself is `NewtonAscent` or `SGDAscent` in `Unlearner`.
        """
        return torch.optim.SGD(select_weights(self.unet, self.weights).values(), lr=0.0)

    def save_result(self) -> None:
        """Saves the moved weights."""
        if self.save_to is not None and self.trainer.is_global_zero:
            Path(self.save_to).parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.cpu().contiguous() for name, value in self.unlearner.values().items()}, self.save_to)
