"""Frozen parts given by path: a local folder, a hub id, or a model that a Python package carries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from wherefrom.models.adapter_states import adapter_identity
from wherefrom.models.autoencoders import latent_of
from wherefrom.models.conditioning import Conditioning, concatenated, prompt_embeddings
from wherefrom.models.package_paths import resolve_path
from wherefrom.models.pixels import to_float
from wherefrom.runtime.tensor_hash import hash_tensors

_DECODING = ("decoder.", "post_quant_conv.")
Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Evaluation mode and no gradients: what is frozen is neither trained nor averaged."""
    return module.eval().requires_grad_(False)


def longer_than(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> list[int]:
    """Positions of the captions of more tokens than these, the special ones included."""
    if not captions:
        return []
    tokens: Any = tokenizer(list(captions), verbose=False).input_ids
    return [position for position, row in enumerate(tokens) if len(row) > length]


class CaptionEncoder:
    """Turns captions into prompt embeddings of a fixed length without a mask, as Stable Diffusion does.

    Args:
        model: A transformers text model; its first output is used.
        tokenizer: The tokenizer that belongs to it.
        length: Tokens per caption; shorter captions are padded, longer ones are cut.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.model, self.tokenizer, self.length = freeze(model), tokenizer, length

    @classmethod
    def from_pretrained(cls, path: str, length: int = 77) -> CaptionEncoder:
        """Loads model and tokenizer from a folder, a hub id or `package:NAME/FOLDER`."""
        folder = resolve_path(path)
        return cls(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), length)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def prepared(self, caption: str) -> str:
        """The caption as the pipeline hands it to the tokenizer."""
        return caption

    @torch.no_grad()
    def encode(self, captions: Sequence[str], batch_size: int = 64) -> Conditioning:
        """Conditioning of each caption, on the CPU."""
        texts = [self.prepared(caption) for caption in captions]
        starts = range(0, len(texts), batch_size)
        return concatenated([self.embed(texts[start : start + batch_size]).cpu() for start in starts])

    def embed(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of a few captions, on the model's device; gradients reach its trainable parts."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return prompt_embeddings(self.model(tokens.input_ids.to(self.device))[0])

    def cut(self, captions: Sequence[str]) -> list[int]:
        """Positions of the captions that are longer than what the model reads, so that their ends are lost."""
        return longer_than(self.tokenizer, captions, self.length)

    def sized(self, size: tuple[int, int]) -> None:
        """Does nothing: the model is not conditioned on the images' (height, width)."""

    def identity(self) -> dict[str, Any]:
        """What decides the embeddings: weights, how strongly adapters count, tokenizer and length."""
        words = sorted(self.tokenizer.get_vocab().items())
        return {
            "text_encoder": hash_tensors(self.model.state_dict()),
            "tokenizer": hashlib.blake2b(repr(words).encode(), digest_size=8).hexdigest(),
            "length": self.length,
            **adapter_identity(self.model),
        }


class LatentEncoder:
    """Turns images into scaled latents and captions into conditioning.

    Args:
        vae: A diffusers autoencoder, or where to load one from.
        text: A `CaptionEncoder`, or where to load one from.
        length: Tokens per caption, when `text` is a path.
    """

    def __init__(self, vae: AutoencoderKL | str, text: CaptionEncoder | str, length: int = 77) -> None:
        loaded = (
            AutoencoderKL.from_pretrained(resolve_path(vae), low_cpu_mem_usage=False).float()
            if isinstance(vae, str)
            else vae
        )
        self.vae = freeze(loaded)
        self.text = CaptionEncoder.from_pretrained(text, length) if isinstance(text, str) else text

    @property
    def scale(self) -> tuple[float, float]:
        """(shift, factor): a latent is (z - shift) * factor."""
        config: Any = self.vae.config
        return float(getattr(config, "shift_factor", None) or 0.0), float(config.scaling_factor)

    @torch.no_grad()
    def encode_pixels(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
        """The scaled mean latent of images in [-1, 1], on the CPU."""
        parameter = next(self.vae.parameters())
        shift, factor = self.scale
        mean = latent_of(self.vae, pixels.to(parameter.device, parameter.dtype))
        return ((mean - shift) * factor).float().cpu()

    def encode_image(self, pixels: UInt8[NDArray[np.uint8], "h w 3"]) -> Float[Tensor, "c i j"]:
        """The scaled mean latent of one image, on the CPU."""
        return self.encode_pixels(to_float(torch.from_numpy(np.array(pixels)))[None])[0]

    @torch.no_grad()
    def decode_images(self, latents: Float[Tensor, "b c i j"]) -> UInt8[NDArray[np.uint8], "b h w 3"]:
        """uint8 images from scaled latents."""
        return ((self.decode(latents).float().cpu() + 1.0) * 127.5).round().byte().movedim(1, -1).numpy()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c i j"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [-1, 1] from scaled latents."""
        parameter = next(self.vae.parameters())
        shift, factor = self.scale
        decoded: Tensor = self.vae.decode((latents.to(parameter.device, parameter.dtype) / factor) + shift).sample
        return decoded.clamp(-1, 1)

    def identity(self) -> dict[str, Any]:
        """What decides latents and conditioning; the decoder decides neither."""
        weights = self.vae.state_dict().items()
        encoding = {name: value for name, value in weights if not name.startswith(_DECODING)}
        return {"vae": hash_tensors(encoding), "scale": list(self.scale), **self.text.identity()}

    def decoder_identity(self) -> str:
        """What decides the image of a latent."""
        weights = self.vae.state_dict().items()
        decoding = hash_tensors({name: value for name, value in weights if name.startswith(_DECODING)})
        return f"{decoding}/{self.scale}"
