"""How each architecture is called: (noisy latents, time, conditioning) -> prediction.

What a network is told of a caption travels as one tensor: its token states and, below them, whatever else it is told
(pooled vectors, a mask, the picture's size), laid out in rows of the same width and filled up with zeros. A network
that is told nothing else gets the token states as they are. So a caption is one row of `LatentSet.states` and of a
query whatever the architecture, and can be dropped, expanded and mapped from disk as such.

Shape letters: B = batch, L = tokens, D = width of a token state, E = what else there is, R = rows of both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

SIZE_IDS = 6  # SDXL: original height and width, top and left of the crop, height and width asked for
PIXART_SIZE = 3  # PixArt's height, width and their ratio


def pack(tokens: Float[Tensor, "b l d"], extra: Float[Tensor, "b e"]) -> Float[Tensor, "b r d"]:
    """Token states and what else there is, as one tensor."""
    width = tokens.shape[-1]
    below = F.pad(extra.to(tokens), (0, -extra.shape[1] % width)).unflatten(1, (-1, width))
    return torch.cat([tokens, below], dim=1)


def unpack(packed: Float[Tensor, "b r d"], count: int) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b e"]]:
    """Token states and `count` further numbers, from what `pack` made of them."""
    tokens = packed.shape[1] - -(-count // packed.shape[2])
    return packed[:, :tokens], packed[:, tokens:].flatten(1)[:, :count]


def unpack_masked(packed: Float[Tensor, "b r d"], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token states, a mask of as many numbers as there are tokens, and `count` further numbers."""
    rows, width = packed.shape[1:]
    below = -(-(rows + count) // (width + 1))  # the rows that L mask values and the rest fill, where L = rows - below
    tokens, extra = unpack(packed, rows - below + count)
    return tokens, extra[:, : tokens.shape[1]], extra[:, tokens.shape[1] :]


class Denoiser:
    """A network that is told the caption's token states alone: Stable Diffusion 1 and 2, and ours.

    Args:
        network: The network.

    Raises:
        ValueError: It is told something that is not supported.
    """

    def __init__(self, network: nn.Module) -> None:
        self.config: Any = getattr(network, "config", None)

    def __call__(
        self, network: nn.Module, noisy: Float[Tensor, "b c h w"], times: Tensor, packed: Float[Tensor, "b r d"]
    ) -> Float[Tensor, "b c h w"]:
        """The network's output.

        Args:
            network: The network, with whatever weights it has now.
            noisy: x_t.
            times: What it is told of t.
            packed: What it is told of the caption.
        """
        output: Tensor = network(noisy, times, encoder_hidden_states=packed, return_dict=False)[0]
        return output

    def width(self) -> int | None:
        """D, where the configuration says it."""
        width = getattr(self.config, "cross_attention_dim", None)
        return width if isinstance(width, int) else None

    def check(self, latent: tuple[int, int, int], rows: tuple[int, int]) -> None:
        """Refuses latents and conditioning that the network cannot take, before anything long.

        Args:
            latent: (C, H, W).
            rows: (R, D) of the conditioning.

        Raises:
            ValueError: The number of channels, a side or the width of a token state is wrong.
        """
        channels = getattr(self.config, "in_channels", latent[0])
        if latent[0] != channels:
            raise ValueError(
                f"The latents have {latent[0]} channels, but the model takes {channels}: they were made by another "
                "autoencoder than the model's. Encode the pictures with the model's own."
            )
        width = self.width()
        if width is not None and rows[1] != width:
            raise ValueError(
                f"The caption states are {rows[1]} wide, but the model takes {width}: they were made by another text "
                "encoder than the model's. Encode the captions with the model's own."
            )


class SDXLDenoiser(Denoiser):
    """SDXL's U-Net: below the token states, the pooled vector of the second text encoder and six size ids.

    Args:
        network: The U-Net.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.pooled = self.config.projection_class_embeddings_input_dim - SIZE_IDS * self.config.addition_time_embed_dim

    def __call__(
        self, network: nn.Module, noisy: Float[Tensor, "b c h w"], times: Tensor, packed: Float[Tensor, "b r d"]
    ) -> Float[Tensor, "b c h w"]:
        """See `Denoiser`."""
        tokens, extra = unpack(packed, self.pooled + SIZE_IDS)
        added = {"text_embeds": extra[:, : self.pooled], "time_ids": extra[:, self.pooled :]}
        output: Tensor = network(
            noisy, times, encoder_hidden_states=tokens, added_cond_kwargs=added, return_dict=False
        )[0]
        return output


class _Transformer(Denoiser):
    """A transformer over patches of the latents."""

    def check(self, latent: tuple[int, int, int], rows: tuple[int, int]) -> None:
        """See `Denoiser`; the sides must be whole patches, and no more than the model has positions for."""
        super().check(latent, rows)
        patch, most = self.config.patch_size, getattr(self.config, "pos_embed_max_size", None)
        for side in latent[1:]:
            if side % patch or (most is not None and side > most * patch):
                limit = "" if most is None else f", and no more than {most * patch}"
                raise ValueError(
                    f"The latents are {latent[1]} × {latent[2]}, but their sides must be multiples of {patch}, the "
                    f"side of a patch{limit}. Choose another size of the pictures."
                )


class PixArtDenoiser(_Transformer):
    """PixArt's transformer: below the token states, their mask and, in the larger models, the picture's size.

    It also says how sure it is of each value (a learned variance), which the loss leaves out.

    Args:
        network: The transformer.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.sized = bool(getattr(network, "use_additional_conditions", False))

    def width(self) -> int | None:
        """Of T5's token states, before they are projected."""
        width: int | None = self.config.caption_channels or self.config.cross_attention_dim
        return width

    def __call__(
        self, network: nn.Module, noisy: Float[Tensor, "b c h w"], times: Tensor, packed: Float[Tensor, "b r d"]
    ) -> Float[Tensor, "b c h w"]:
        """See `Denoiser`."""
        tokens, mask, size = unpack_masked(packed, PIXART_SIZE if self.sized else 0)
        added = {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]} if self.sized else None
        output: Tensor = network(
            noisy,
            encoder_hidden_states=tokens,
            timestep=times,
            encoder_attention_mask=mask,
            added_cond_kwargs=added or {"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]


class SD3Denoiser(_Transformer):
    """Stable Diffusion 3's transformer: below the token states, the pooled vectors of both CLIPs.

    Args:
        network: The transformer.
    """

    def width(self) -> int | None:
        """Of T5's token states, to which CLIP's are filled up."""
        width: int = self.config.joint_attention_dim
        return width

    def __call__(
        self, network: nn.Module, noisy: Float[Tensor, "b c h w"], times: Tensor, packed: Float[Tensor, "b r d"]
    ) -> Float[Tensor, "b c h w"]:
        """See `Denoiser`."""
        tokens, pooled = unpack(packed, self.config.pooled_projection_dim)
        output: Tensor = network(
            noisy, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=times, return_dict=False
        )[0]
        return output


def denoiser_of(network: nn.Module) -> Denoiser:
    """How a network is called, by its class; any other module is called like Stable Diffusion's U-Net.

    Raises:
        ValueError: A U-Net is told something else beside the caption.
    """
    if isinstance(network, SD3Transformer2DModel):
        return SD3Denoiser(network)
    if isinstance(network, PixArtTransformer2DModel):
        return PixArtDenoiser(network)
    if not isinstance(network, UNet2DConditionModel):
        return Denoiser(network)
    config: Any = network.config
    if config.addition_embed_type == "text_time":
        return SDXLDenoiser(network)
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"A U-Net with {name} {getattr(config, name)!r} is not supported: it is told more than the caption. "
                "Those of Stable Diffusion 1, 2 and XL are."
            )
    return Denoiser(network)
