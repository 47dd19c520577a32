"""How each architecture is called: (noisy latents, time, conditioning) -> prediction.

What a network is told of a caption travels as one tensor: its token states and, below them, whatever else it is told
(pooled vectors, a mask, the image's size), laid out in rows of the same width and filled up with zeros. A network
that is told nothing else gets the token states as they are. So a caption is one row of `EncodedImages.states` and of a
query whatever the architecture, and can be dropped, expanded and mapped from disk as such.

Shape letters: B = batch, L = tokens, D = width of a token state, E = what else there is, R = rows of both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
                "autoencoder than the model's. Encode the images with the model's own."
            )
        width = self.width()
        if width is not None and rows[1] != width:
            raise ValueError(
                f"The caption states are {rows[1]} wide, but the model takes {width}: they were made by another text "
                "encoder than the model's. Encode the captions with the model's own."
            )


class TransformerDenoiser(Denoiser):
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
                    f"side of a patch{limit}. Choose another size of the images."
                )
