"""Sizes of images and of their latents: the model's own, and which others it can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wherefrom.models.diffusion import DiffusionModel

# Where diffusers' autoencoders list the widths of their encoders' blocks; each block but the last halves the sides.
_BLOCKS = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels")
Size = tuple[int, int]  # (height, width) in pixels


def words_of(size: Sequence[int]) -> str:
    """A (height, width) as people write it: width first."""
    return f"{size[1]} × {size[0]}"


def reduction_of(autoencoder: Any) -> int:
    """Pixels of a latent's side.

    Args:
        autoencoder: One of diffusers' autoencoders: KL, tiny (TAESD), asymmetric, deep compression (DC).

    Raises:
        ValueError: Its configuration does not say.
    """
    config: Any = autoencoder.config
    stated = config if isinstance(config, Mapping) else vars(config)
    for name in _BLOCKS:
        if stated.get(name):
            return int(2 ** (len(stated[name]) - 1))
    for holder in (stated, vars(autoencoder)):
        ratio = holder.get("spatial_compression_ratio")
        if ratio:
            return int(ratio)
    raise ValueError(
        f"The configuration of the autoencoder ({type(autoencoder).__name__}) does not say by how much it reduces "
        f"images ({', '.join(_BLOCKS)} or spatial_compression_ratio), so sizes of latents are not known."
    )


def latent_sides(network: Any) -> Size:
    """(height, width) of the latents that a network was made for.

    Raises:
        ValueError: Its configuration does not say.
    """
    stated: Any = getattr(network.config, "sample_size", None)
    if isinstance(stated, int):
        return stated, stated
    if isinstance(stated, list | tuple) and len(stated) == 2:
        return int(stated[0]), int(stated[1])
    raise ValueError(
        f"The configuration of the model ({type(network).__name__}) does not say which size its images have: give one "
        "in the option 'size'."
    )


def reduction(model: DiffusionModel) -> int:
    """Pixels of a latent's side.

    Raises:
        ValueError: The model has no encoder.
    """
    if model.encoder is None:
        raise ValueError("The model has no encoder, so the size of its images is not known.")
    return reduction_of(model.encoder.vae)


def own_size(model: DiffusionModel) -> Size:
    """(height, width) in pixels of the images that a model was made for: its latents' times the reduction.

    Raises:
        ValueError: The model has no encoder, or its configuration does not say.
    """
    factor = reduction(model)
    height, width = latent_sides(model.denoiser)
    return height * factor, width * factor


def size_step(model: DiffusionModel) -> int:
    """Pixels of which each side of an image must be a multiple: the reduction, times the side of a patch."""
    return reduction(model) * model.family.patch


def latent_shape_of(model: DiffusionModel, size: Size) -> tuple[int, int, int]:
    """(C, H, W) of the latents of images of this size.

    Raises:
        ValueError: The model cannot take images of this size; says which it can.
    """
    step = size_step(model)
    if any(side < step or side % step for side in size):
        raise ValueError(
            f"size: images of {words_of(size)} pixels do not suit the model, whose images have sides that are "
            f"multiples of {step}. Choose another size."
        )
    factor = reduction(model)
    rows, columns = (side // factor for side in size)
    try:
        model.family.check_sides(rows, columns)
    except ValueError as error:
        raise ValueError(f"size: images of {words_of(size)} pixels do not suit the model. {error}") from error
    config: Any = model.denoiser.config
    return int(config.in_channels), rows, columns
