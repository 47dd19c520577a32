"""LightningModules: thin wiring around the parts in `wherefrom`."""

from lightning_modules.autoencoder import Autoencoder
from lightning_modules.latent_diffusion import LatentDiffusion

__all__ = ["Autoencoder", "LatentDiffusion"]
