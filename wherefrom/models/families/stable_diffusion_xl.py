"""Stable Diffusion XL: two text encoders, a pooled vector and size ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from wherefrom.models.conditioning import POOLED, PROMPT, Conditioning, Shape
from wherefrom.models.encoders import CaptionEncoder
from wherefrom.models.families.base import UNET_REFUSED, ModelFamily, PipelineParts, token_limit
from wherefrom.models.prompt_encoders import PromptEncoder

TIME_IDS = "time_ids"
SIZE_IDS = 6  # original height and width, top and left of the crop, height and width asked for


class SDXLPrompts(PromptEncoder):
    """SDXL: both CLIPs' penultimate states side by side, the second's pooled vector, and the image's size.

    The size ids say that images were neither resized nor cropped, as diffusers' pipeline does by default.

    Args:
        models: The two text encoders; the second has a projection.
        tokenizers: Theirs.
        lengths: Tokens per caption.
        size: (height, width) of the images in pixels.
        empty_is_zero: The empty caption is zeros rather than states, as the base model was trained.
    """

    writes_out = True

    def __init__(
        self,
        models: Sequence[nn.Module],
        tokenizers: Sequence[PreTrainedTokenizerBase],
        lengths: Sequence[int],
        size: tuple[int, int],
        empty_is_zero: bool = True,
    ) -> None:
        super().__init__(models, tokenizers, lengths, size)
        self.empty_is_zero = empty_is_zero

    def embed(self, captions: Sequence[str]) -> Conditioning:
        """See `CaptionEncoder`."""
        assert self.size is not None
        (first, _), (second, pooled) = (self.penultimate(which, captions) for which in (0, 1))
        states = torch.cat([first, second], dim=-1)
        if self.empty_is_zero:
            said = torch.tensor([caption != "" for caption in captions], device=states.device)
            states, pooled = states * said[:, None, None], pooled * said[:, None]
        ids = torch.tensor([*self.size, 0, 0, *self.size]).to(pooled).expand(len(captions), -1)
        return Conditioning({PROMPT: states, POOLED: pooled, TIME_IDS: ids})

    def identity(self) -> dict[str, Any]:
        """See `PromptEncoder`."""
        return {**super().identity(), "empty_is_zero": self.empty_is_zero}


class StableDiffusionXL(ModelFamily):
    """SDXL's U-Net: beside the prompt embeddings, the pooled vector of the second text encoder and six size ids.

    Args:
        network: The U-Net.
    """

    networks: ClassVar[tuple[type[nn.Module], ...]] = (UNet2DConditionModel,)
    description: ClassVar[str] = "a U-Net of Stable Diffusion XL"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    refused_settings: ClassVar[Mapping[str, str]] = UNET_REFUSED
    latent_statistics: ClassVar[bool] = True

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.pooled = self.config.projection_class_embeddings_input_dim - SIZE_IDS * self.config.addition_time_embed_dim

    @classmethod
    def accepts(cls, network: nn.Module) -> bool:
        """See `ModelFamily`."""
        config: Any = getattr(network, "config", None)
        return super().accepts(network) and config.addition_embed_type == "text_time"

    def __call__(
        self,
        network: nn.Module,
        noisy: Float[Tensor, "b c h w"],
        times: Tensor,
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c h w"]:
        """See `ModelFamily`."""
        added = {"text_embeds": conditioning[POOLED], "time_ids": conditioning[TIME_IDS]}
        output: Tensor = network(
            noisy, times, encoder_hidden_states=conditioning[PROMPT], added_cond_kwargs=added, return_dict=False
        )[0]
        return output

    def conditioning(self) -> Mapping[str, Shape]:
        """See `ModelFamily`."""
        width = self.config.cross_attention_dim
        return {
            PROMPT: (None, width if isinstance(width, int) else None),
            POOLED: (self.pooled,),
            TIME_IDS: (SIZE_IDS,),
        }

    def prompt_encoder(self, parts: PipelineParts) -> CaptionEncoder:
        """See `ModelFamily`."""
        models, tokenizers = parts.text(["", "_2"])
        lengths = [token_limit(*pair) for pair in zip(models, tokenizers, strict=True)]
        zero = bool(getattr(parts.pipeline.config, "force_zeros_for_empty_prompt", True))
        return SDXLPrompts(models, tokenizers, lengths, parts.image_size, zero)
