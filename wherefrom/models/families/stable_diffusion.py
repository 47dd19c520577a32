"""Stable Diffusion 1 and 2, and ours: a U-Net conditioned on prompt embeddings alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from wherefrom.models.conditioning import PROMPT, Conditioning, Shape
from wherefrom.models.encoders import CaptionEncoder
from wherefrom.models.families.base import UNET_REFUSED, ModelFamily, PipelineParts, SavedAs, token_limit

_SAID_MORE = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")


class StableDiffusion(ModelFamily):
    """A network conditioned on the caption's prompt embeddings alone.

    Args:
        network: The U-Net, or any module that is called like one.

    Raises:
        ValueError: The U-Net takes conditioning besides the caption.
    """

    networks: ClassVar[tuple[type[nn.Module], ...]] = (UNet2DConditionModel,)
    description: ClassVar[str] = "a U-Net of Stable Diffusion 1 or 2"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    refused_settings: ClassVar[Mapping[str, str]] = UNET_REFUSED
    saved_as: ClassVar[SavedAs | None] = SavedAs(
        "StableDiffusionPipeline",
        "unet",
        {
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
        },
    )

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        for name in _SAID_MORE if isinstance(network, UNet2DConditionModel) else ():
            if getattr(self.config, name) is not None:
                raise ValueError(
                    f"A U-Net with {name} {getattr(self.config, name)!r} is not supported: it takes more conditioning "
                    "than the caption. Those of Stable Diffusion 1, 2 and XL are."
                )

    def __call__(
        self,
        network: nn.Module,
        noisy: Float[Tensor, "b c h w"],
        times: Tensor,
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c h w"]:
        """See `ModelFamily`."""
        output: Tensor = network(noisy, times, encoder_hidden_states=conditioning[PROMPT], return_dict=False)[0]
        return output

    def conditioning(self) -> Mapping[str, Shape]:
        """See `ModelFamily`."""
        width = getattr(self.config, "cross_attention_dim", None)
        return {PROMPT: (None, width if isinstance(width, int) else None)}

    def prompt_encoder(self, parts: PipelineParts) -> CaptionEncoder:
        """See `ModelFamily`."""
        (model,), (tokenizer,) = parts.text([""])
        if getattr(model.config, "use_attention_mask", False):
            raise parts.unsupported("Its text encoder reads captions under a mask (use_attention_mask)")
        return CaptionEncoder(model, tokenizer, token_limit(model, tokenizer))
