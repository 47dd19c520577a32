"""PixArt: a transformer conditioned on T5's prompt embeddings under a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from wherefrom.models.conditioning import MASK, PROMPT, Conditioning, Shape
from wherefrom.models.encoders import CaptionEncoder
from wherefrom.models.families.base import GROUNDED, PipelineParts, SavedAs, TransformerFamily, token_limit
from wherefrom.models.package_paths import resolve_path
from wherefrom.models.prompt_encoders import PromptEncoder

RESOLUTION, ASPECT_RATIO = "resolution", "aspect_ratio"
# Tokens that T5 reads, as diffusers' pipelines set it where nothing else is asked for.
_ALPHA_TOKENS, _SIGMA_TOKENS = 120, 300


class PixArtPrompts(PromptEncoder):
    """PixArt: T5's prompt embeddings under their mask, the mask, and in the larger models the image's size.

    Captions are put in small letters, as diffusers' pipeline does where it does not clean them of markup.
    """

    def prepared(self, caption: str) -> str:
        """In small letters, without blanks around."""
        return caption.lower().strip()

    def embed(self, captions: Sequence[str]) -> Conditioning:
        """See `CaptionEncoder`."""
        numbers, mask = self.tokens(0, captions)
        states = self.models[0](numbers, attention_mask=mask)[0]
        conditioning = {PROMPT: states, MASK: mask.to(states)}
        if self.size is not None:
            height, width = self.size
            sizes = torch.tensor([height, width, height / width]).to(states).expand(len(captions), -1)
            conditioning |= {RESOLUTION: sizes[:, :2], ASPECT_RATIO: sizes[:, 2:]}
        return Conditioning(conditioning)


def masked_captions(path: str, length: int) -> PixArtPrompts:
    """Prompt encoder of a small transformer of PixArt's class, by any text encoder.

    Args:
        path: Folder, hub id or `package:NAME/FOLDER` of text encoder and tokenizer.
        length: Tokens per caption.
    """
    folder = resolve_path(path)
    return PixArtPrompts([AutoModel.from_pretrained(folder)], [AutoTokenizer.from_pretrained(folder)], [length])


class PixArt(TransformerFamily):
    """PixArt's transformer: beside the prompt embeddings, their mask and, in the larger models, the image's size.

    The network also predicts a variance of each value (learned sigma), which the loss leaves out.

    Args:
        network: The transformer.
    """

    networks: ClassVar[tuple[type[nn.Module], ...]] = (PixArtTransformer2DModel,)
    description: ClassVar[str] = "a transformer of PixArt"
    pipelines: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    learned_variance: ClassVar[bool] = True
    refused_settings: ClassVar[Mapping[str, str]] = {"attention_type": GROUNDED}
    saved_as: ClassVar[SavedAs | None] = SavedAs("PixArtAlphaPipeline", "transformer")

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.sized = bool(getattr(network, "use_additional_conditions", False))

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
            timestep=times,
            encoder_attention_mask=conditioning[MASK],
            added_cond_kwargs={name: conditioning[name] if self.sized else None for name in (RESOLUTION, ASPECT_RATIO)},
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]

    def conditioning(self) -> Mapping[str, Shape]:
        """See `ModelFamily`; the width is T5's, before its embeddings are projected."""
        sizes: dict[str, Shape] = {RESOLUTION: (2,), ASPECT_RATIO: (1,)} if self.sized else {}
        return {PROMPT: (None, self.config.caption_channels or self.config.cross_attention_dim), MASK: (None,), **sizes}

    def prompt_encoder(self, parts: PipelineParts) -> CaptionEncoder:
        """See `ModelFamily`."""
        models, tokenizers = parts.text([""])
        most = _SIGMA_TOKENS if isinstance(parts.pipeline, PixArtSigmaPipeline) else _ALPHA_TOKENS
        length = min(most, token_limit(models[0], tokenizers[0]))
        return PixArtPrompts(models, tokenizers, [length], parts.image_size if self.sized else None)
