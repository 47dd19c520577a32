"""LightningModules: thin wiring around the parts in `wherefrom`."""

from lightning_modules.autoencoder import Autoencoder
from lightning_modules.custom_diffusion import CustomDiffusion
from lightning_modules.latent_diffusion import LatentDiffusion
from lightning_modules.ranker import LearningToRank
from lightning_modules.unlearning import Unlearning

__all__ = ["Autoencoder", "CustomDiffusion", "LatentDiffusion", "LearningToRank", "Unlearning"]
