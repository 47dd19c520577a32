"""Base of the encoders whose conditioning is more than prompt embeddings; each family's are in its file.

Shape letters: N = captions, L = tokens, D = width of a prompt embedding, P = width of a pooled vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from wherefrom.models.adapter_states import adapter_identity
from wherefrom.models.allowed_parts import TEXT_ENCODER, check_part
from wherefrom.models.encoders import CaptionEncoder, layers_before_last, longer_than
from wherefrom.runtime.tensor_hash import hash_tensors


class PromptEncoder(CaptionEncoder):
    """Base of the encoders of one or several text models, masks and sizes.

    Args:
        models: The text encoders.
        tokenizers: The tokenizer of each.
        lengths: Tokens per caption of each; shorter captions are padded, longer ones are cut.
        size: (height, width) in pixels of the images, where the model is conditioned on it.
    """

    writes_out = False

    def __init__(
        self,
        models: Sequence[nn.Module],
        tokenizers: Sequence[PreTrainedTokenizerBase],
        lengths: Sequence[int],
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(nn.ModuleList(models), tokenizers[0], min(lengths))
        self.models, self.tokenizers, self.lengths, self.size = list(models), list(tokenizers), list(lengths), size

    def tokens(self, which: int, captions: Sequence[str]) -> tuple[Int64[Tensor, "n l"], Int64[Tensor, "n l"]]:
        """Token numbers and mask for one of the text encoders."""
        result = self.tokenizers[which](
            self.written_out(self.tokenizers[which], captions),
            padding="max_length",
            truncation=True,
            max_length=self.lengths[which],
            return_tensors="pt",
        )
        return result.input_ids.to(self.device), result.attention_mask.to(self.device)

    def penultimate(self, which: int, captions: Sequence[str]) -> tuple[Float[Tensor, "n l d"], Float[Tensor, "n p"]]:
        """A CLIP's token states before its last layer, or more with `clip_skip`, and its pooled vector."""
        output: Any = self.models[which](self.tokens(which, captions)[0], output_hidden_states=True)
        return output.hidden_states[-(self.clip_skip + 2)], output[0]

    def skip_layers(self, skip: int) -> None:
        """See `CaptionEncoder`; the encoders beside the CLIPs read all their layers."""
        clips = [each for each in self.models if str(getattr(each, "config").model_type).startswith("clip")]  # noqa: B009
        for model in clips or self.models[:1]:
            self.clip_skip = layers_before_last(model, skip)

    def cut(self, captions: Sequence[str]) -> list[int]:
        """Positions of the captions that are longer than what one of the text encoders reads."""
        texts = [self.prepared(caption) for caption in captions]
        pairs = zip(self.tokenizers, self.lengths, strict=True)
        return sorted(
            {
                each
                for tokenizer, length in pairs
                for each in longer_than(tokenizer, self.written_out(tokenizer, texts), length)
            }
        )

    def sized(self, size: tuple[int, int]) -> None:
        """Sets the images' size, where the model is conditioned on it."""
        if self.size is not None:
            self.size = size

    def identity(self) -> dict[str, Any]:
        """What decides the conditioning: kind, weights, tokenizers, lengths and size, and what is unusual."""
        for model in self.models:
            check_part(model, TEXT_ENCODER)
        words = [sorted(each.get_vocab().items()) for each in self.tokenizers]
        pads = [each.pad_token_id for each in self.tokenizers]
        return {
            "text_encoder": f"{type(self).__name__}/{hash_tensors(self.model.state_dict())}",
            "tokenizer": hashlib.blake2b(repr((words, pads)).encode(), digest_size=8).hexdigest(),
            "length": self.lengths,
            **({} if self.size is None else {"size": list(self.size)}),
            **adapter_identity(self.model),
            **self.unusual(self.models, self.tokenizers),
        }
