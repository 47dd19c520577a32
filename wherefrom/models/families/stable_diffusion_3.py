"""Stable Diffusion 3: a transformer that attends to image and text at once, trained by flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from wherefrom.models.conditioning import POOLED, PROMPT, Conditioning, Shape
from wherefrom.models.encoders import CaptionEncoder
from wherefrom.models.families.base import Belongs, PipelineParts, TransformerFamily, of_adapter, token_limit
from wherefrom.models.prompt_encoders import PromptEncoder

_T5_TOKENS = 256  # as diffusers' pipeline sets it where nothing else is asked for
# It attends to image and text at once: `add_…` and `to_add_out` are the text's side. Its attn2 is self-attention of the
# image (in version 3.5).
_TEXT_SIDE = (".attn.add_q_proj.", ".attn.add_k_proj.", ".attn.add_v_proj.", ".attn.to_add_out.", ".attn.norm_added_")
JOINT_ATTENTION: Mapping[str, Belongs] = {
    "cross_attention_kv": lambda name: ".attn.add_k_proj." in name or ".attn.add_v_proj." in name,
    "cross_attention": lambda name: any(part in name for part in _TEXT_SIDE),
    "attention": lambda name: ".attn." in name or ".attn2." in name,
    "all": lambda name: True,
    "adapter": of_adapter,
}


class SD3Prompts(PromptEncoder):
    """Stable Diffusion 3: both CLIPs' penultimate states side by side, then T5's; and both pooled vectors.

    Args:
        models: The two CLIPs and, unless it was left out to save memory, T5.
        tokenizers: Theirs.
        lengths: Tokens per caption of each.
        width: D of the transformer, to which CLIP's states are filled up.
        blank: Tokens of zeros that stand for T5, where it is missing.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        tokenizers: Sequence[PreTrainedTokenizerBase],
        lengths: Sequence[int],
        width: int,
        blank: int,
    ) -> None:
        super().__init__(models, tokenizers, lengths)
        self.width, self.blank = width, blank

    def embed(self, captions: Sequence[str]) -> Conditioning:
        """See `CaptionEncoder`."""
        (first, pooled), (second, pooled_too) = (self.penultimate(which, captions) for which in (0, 1))
        clip = torch.cat([first, second], dim=-1)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        if len(self.models) == 3:
            t5 = self.models[2](self.tokens(2, captions)[0])[0].to(clip)
        else:
            t5 = clip.new_zeros(len(captions), self.blank, self.width)
        pooled = torch.cat([pooled, pooled_too], dim=-1)
        return Conditioning({PROMPT: torch.cat([clip, t5], dim=1), POOLED: pooled.to(clip)})

    def identity(self) -> dict[str, Any]:
        """See `PromptEncoder`."""
        return {**super().identity(), "blank": 0 if len(self.models) == 3 else self.blank}


class StableDiffusion3(TransformerFamily):
    """Stable Diffusion 3's transformer: beside the prompt embeddings, the pooled vectors of both CLIPs.

    Args:
        network: The transformer.
    """

    networks: ClassVar[tuple[type[nn.Module], ...]] = (SD3Transformer2DModel,)
    description: ClassVar[str] = "a transformer of Stable Diffusion 3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    subsets: ClassVar[Mapping[str, Belongs]] = JOINT_ATTENTION

    def __call__(
        self,
        network: nn.Module,
        noisy: Float[Tensor, "b c h w"],
        times: Tensor,
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c h w"]:
        """See `ModelFamily`."""
        output: Tensor = network(
            noisy,
            encoder_hidden_states=conditioning[PROMPT],
            pooled_projections=conditioning[POOLED],
            timestep=times,
            return_dict=False,
        )[0]
        return output

    def conditioning(self) -> Mapping[str, Shape]:
        """See `ModelFamily`; the width is T5's, to which CLIP's embeddings are filled up."""
        return {PROMPT: (None, self.config.joint_attention_dim), POOLED: (self.config.pooled_projection_dim,)}

    def prompt_encoder(self, parts: PipelineParts) -> CaptionEncoder:
        """See `ModelFamily`."""
        suffixes = ["", "_2"] if parts.components.get("text_encoder_3") is None else ["", "_2", "_3"]
        models, tokenizers = parts.text(suffixes)
        lengths = [token_limit(*pair) for pair in zip(models[:2], tokenizers[:2], strict=True)]
        lengths += [min(_T5_TOKENS, token_limit(*pair)) for pair in zip(models[2:], tokenizers[2:], strict=True)]
        return SD3Prompts(models, tokenizers, lengths, self.config.joint_attention_dim, _T5_TOKENS)
