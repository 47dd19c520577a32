"""Stable Diffusion XL: two text encoders, a pooled vector and size ids."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from wherefrom.models.families.base import Denoiser, unpack

SIZE_IDS = 6  # SDXL: original height and width, top and left of the crop, height and width asked for


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
