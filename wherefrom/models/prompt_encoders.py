"""What the released models are told of a caption: several text encoders, pooled vectors, masks and sizes.

Shape letters: N = captions, L = tokens, D = width of a token state, P = width of a pooled vector, R = rows in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from wherefrom.models.encoders import CaptionEncoder, longer_than
from wherefrom.models.families.base import pack
from wherefrom.models.package_paths import resolve_path
from wherefrom.runtime.tensor_hash import hash_tensors


class PromptEncoder(CaptionEncoder):
    """Base of the encoders that give more than one text encoder's token states; the rows are those of `pack`.

    Args:
        models: The text encoders.
        tokenizers: The tokenizer of each.
        lengths: Tokens per caption of each; shorter captions are padded, longer ones are cut.
        size: (height, width) in pixels of the images, where the model is told it.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        tokenizers: Sequence[PreTrainedTokenizerBase],
        lengths: Sequence[int],
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(nn.ModuleList(models), tokenizers[0], min(lengths))
        self.models, self.tokenizers, self.lengths, self.size = list(models), list(tokenizers), list(lengths), size

    def prepared(self, caption: str) -> str:
        """The caption as the pipeline hands it to the tokenizers."""
        return caption

    def tokens(self, which: int, captions: Sequence[str]) -> tuple[Int64[Tensor, "n l"], Int64[Tensor, "n l"]]:
        """Token numbers and mask for one of the text encoders."""
        result = self.tokenizers[which](
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.lengths[which],
            return_tensors="pt",
        )
        return result.input_ids.to(self.device), result.attention_mask.to(self.device)

    def penultimate(self, which: int, captions: Sequence[str]) -> tuple[Float[Tensor, "n l d"], Float[Tensor, "n p"]]:
        """A CLIP's token states before its last layer, and its pooled vector."""
        output: Any = self.models[which](self.tokens(which, captions)[0], output_hidden_states=True)
        return output.hidden_states[-2], output[0]

    def rows(self, captions: Sequence[str]) -> Float[Tensor, "n r d"]:
        """What the model is told of these captions."""
        raise TypeError(f"{type(self).__name__} does not say what its model is told.")

    @torch.no_grad()
    def encode(self, captions: Sequence[str], batch_size: int = 64) -> Float[Tensor, "n r d"]:
        """What the model is told of each caption, on the CPU."""
        texts = [self.prepared(caption) for caption in captions]
        starts = range(0, len(texts), batch_size)
        return torch.cat([self.rows(texts[start : start + batch_size]).cpu() for start in starts])

    def cut(self, captions: Sequence[str]) -> list[int]:
        """Positions of the captions that are longer than what one of the text encoders reads."""
        texts = [self.prepared(caption) for caption in captions]
        pairs = zip(self.tokenizers, self.lengths, strict=True)
        return sorted({each for tokenizer, length in pairs for each in longer_than(tokenizer, texts, length)})

    def sized(self, size: tuple[int, int]) -> None:
        """Says how large the images are, where the model is told it."""
        if self.size is not None:
            self.size = size

    def identity(self) -> dict[str, Any]:
        """What decides the rows: kind, weights, tokenizers, lengths and size."""
        words = [sorted(each.get_vocab().items()) for each in self.tokenizers]
        pads = [each.pad_token_id for each in self.tokenizers]
        return {
            "text_encoder": f"{type(self).__name__}/{hash_tensors(self.model.state_dict())}",
            "tokenizer": hashlib.blake2b(repr((words, pads)).encode(), digest_size=8).hexdigest(),
            "length": self.lengths,
            **({} if self.size is None else {"size": list(self.size)}),
        }


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

    def rows(self, captions: Sequence[str]) -> Float[Tensor, "n r d"]:
        """See `PromptEncoder`."""
        assert self.size is not None
        (first, _), (second, pooled) = (self.penultimate(which, captions) for which in (0, 1))
        states = torch.cat([first, second], dim=-1)
        if self.empty_is_zero:
            said = torch.tensor([caption != "" for caption in captions], device=states.device)
            states, pooled = states * said[:, None, None], pooled * said[:, None]
        ids = torch.tensor([*self.size, 0, 0, *self.size]).to(pooled).expand(len(captions), -1)
        return pack(states, torch.cat([pooled, ids], dim=1))

    def identity(self) -> dict[str, Any]:
        """See `PromptEncoder`."""
        return {**super().identity(), "empty_is_zero": self.empty_is_zero}


class PixArtPrompts(PromptEncoder):
    """PixArt: T5's token states under their mask, the mask, and in the larger models the image's size.

    Captions are put in small letters, as diffusers' pipeline does where it does not clean them of markup.
    """

    def prepared(self, caption: str) -> str:
        """In small letters, without blanks around."""
        return caption.lower().strip()

    def rows(self, captions: Sequence[str]) -> Float[Tensor, "n r d"]:
        """See `PromptEncoder`."""
        numbers, mask = self.tokens(0, captions)
        states = self.models[0](numbers, attention_mask=mask)[0]
        extra = mask.to(states)
        if self.size is not None:
            height, width = self.size
            sizes = torch.tensor([height, width, height / width]).to(states).expand(len(captions), -1)
            extra = torch.cat([extra, sizes], dim=1)
        return pack(states, extra)


def masked_captions(path: str, length: int) -> PixArtPrompts:
    """What a small transformer of PixArt's class is told, by any text encoder.

    Args:
        path: Folder, hub id or `package:NAME/FOLDER` of text encoder and tokenizer.
        length: Tokens per caption.
    """
    folder = resolve_path(path)
    return PixArtPrompts([AutoModel.from_pretrained(folder)], [AutoTokenizer.from_pretrained(folder)], [length])


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

    def rows(self, captions: Sequence[str]) -> Float[Tensor, "n r d"]:
        """See `PromptEncoder`."""
        (first, pooled), (second, pooled_too) = (self.penultimate(which, captions) for which in (0, 1))
        clip = torch.cat([first, second], dim=-1)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        if len(self.models) == 3:
            t5 = self.models[2](self.tokens(2, captions)[0])[0].to(clip)
        else:
            t5 = clip.new_zeros(len(captions), self.blank, self.width)
        return pack(torch.cat([clip, t5], dim=1), torch.cat([pooled, pooled_too], dim=-1))

    def identity(self) -> dict[str, Any]:
        """See `PromptEncoder`."""
        return {**super().identity(), "blank": 0 if len(self.models) == 3 else self.blank}
