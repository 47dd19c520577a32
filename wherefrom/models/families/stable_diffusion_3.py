"""Stable Diffusion 3: a transformer that attends to image and text at once, trained by flow matching."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from wherefrom.models.families.base import TransformerDenoiser, unpack


class SD3Denoiser(TransformerDenoiser):
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
