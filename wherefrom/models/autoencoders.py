"""Which autoencoders are taken: those that give one latent for an image, in the pipeline's own convention."""

from __future__ import annotations

from typing import Any

from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny
from jaxtyping import Float
from torch import Tensor

# The latent is the mean of a Gaussian, or (TAESD) what the encoder says.
_TAKEN = (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny)


def latent_of(vae: Any, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
    """The unscaled latent of images in [-1, 1]: the mean where the encoder gives a distribution."""
    encoded = vae.encode(pixels)
    latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
    return latents


def autoencoder_fault(vae: Any) -> str | None:
    """Why an autoencoder is not taken; None where it is."""
    # A subclass is taken for what it overrides: nothing of how images become latents and latents images.
    for kind in _TAKEN:
        if isinstance(vae, kind) and type(vae).encode is kind.encode and type(vae).decode is kind.decode:
            return None
    *first, last = [kind.__name__ for kind in _TAKEN]
    return (
        f"Its autoencoder is a {type(vae).__name__}, and only {', '.join(first)} and {last} (TAESD) give one latent "
        "for an image in these pipelines' convention"
    )
