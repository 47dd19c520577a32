"""PixArt: a transformer told T5 token states under a mask."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from wherefrom.models.families.base import TransformerDenoiser, unpack_masked

PIXART_SIZE = 3  # PixArt's height, width and their ratio


class PixArtDenoiser(TransformerDenoiser):
    """PixArt's transformer: below the token states, their mask and, in the larger models, the image's size.

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
