"""Pretrained encoders of the papers' baselines: CLIP (open_clip), DINO and DINOv2 (transformers), and AbC's maps.

Each loads from a local folder or a hub id in its library's format, with that library's preprocessing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from wherefrom.features.base import ImageEncoder, Pixels, TextEncoder, signed_pixels
from wherefrom.models.encoders import freeze
from wherefrom.runtime.tensor_hash import hash_tensors

WEIGHT, BIAS = "weight", "bias"


def _pil_images(pixels: Pixels) -> list[Image.Image]:
    rounded = ((signed_pixels(pixels) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1)
    arrays: UInt8[NDArray[np.uint8], "n h w 3"] = rounded.cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def _open_clip_name(path: str) -> str:
    """Adds open_clip's prefix to a folder; hub ids (`hf-hub:…`) and model names are unchanged."""
    return f"local-dir:{path}" if Path(path).is_dir() else path


class OpenCLIPImageEncoder(ImageEncoder):
    """CLIP image embeddings, before normalisation (the paper's: ViT-B/32).

    Args:
        path: A folder with `open_clip_config.json` and weights, a hub id such as
            `hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K`, or a model name of open_clip.
        pretrained: For a model name: its tag of pretrained weights, or a file.
        batch_size: Images per batch.

    Raises:
        ValueError: A model name without `pretrained`: its weights would be random.
    """

    def __init__(self, path: str, pretrained: str | None = None, batch_size: int = 64) -> None:
        self.model, self.preprocess, _ = _open_clip(path, pretrained)
        self.batch_size = batch_size

    @torch.no_grad()
    def encode_images(self, pixels: Pixels) -> Float[Tensor, "n d"]:
        """Encodes images to one vector each, float32 on the CPU."""
        parameter = next(self.model.parameters())

        def encode(images: Sequence[Image.Image]) -> Tensor:
            batch = torch.stack([self.preprocess(image) for image in images]).to(parameter.device, parameter.dtype)
            model: Any = self.model
            vectors: Tensor = model.encode_image(batch)
            return vectors

        return _in_batches(_pil_images(pixels), self.batch_size, encode)

    def identity(self) -> dict[str, Any]:
        """Identity of the encoder: weights and preprocessing."""
        return {"image_encoder": hash_tensors(self.model.state_dict()), "preprocess": repr(self.preprocess)}


class OpenCLIPTextEncoder(TextEncoder):
    """CLIP text embeddings, before normalisation.

    Args:
        path: As for `OpenCLIPImageEncoder`.
        pretrained: As there.
        batch_size: Captions per batch.

    Raises:
        ValueError: A model name without `pretrained`: its weights would be random.
    """

    def __init__(self, path: str, pretrained: str | None = None, batch_size: int = 256) -> None:
        self.model, _, self.tokenizer = _open_clip(path, pretrained)
        self.batch_size = batch_size

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """Encodes captions to one vector each, float32 on the CPU."""
        device = next(self.model.parameters()).device

        def encode(texts: Sequence[str]) -> Tensor:
            model: Any = self.model
            vectors: Tensor = model.encode_text(self.tokenizer(list(texts)).to(device))
            return vectors

        return _in_batches(list(captions), self.batch_size, encode)

    def identity(self) -> dict[str, Any]:
        """Identity of the encoder: weights and tokenizer."""
        words = repr(self.tokenizer(["identity of the tokenizer"]).tolist())
        return {"text_encoder": hash_tensors(self.model.state_dict()), "tokenizer": words}


def _open_clip(path: str, pretrained: str | None) -> tuple[nn.Module, Callable[[Image.Image], Tensor], Any]:
    import open_clip

    name = _open_clip_name(path)
    if pretrained is None and not name.startswith(("local-dir:", "hf-hub:")):
        raise ValueError(
            f"{path!r} is no folder; for a model name of open_clip give `pretrained` (a tag or a file of weights), "
            "and for the hub write 'hf-hub:' before the id. Without weights its features would be random."
        )
    loaded: Any = open_clip.create_model_from_pretrained(name, pretrained)
    model, preprocess = loaded
    return freeze(model), preprocess, open_clip.get_tokenizer(name)


class TransformersImageEncoder(ImageEncoder):
    """Class-token features of a vision transformer (DINO ViT-B/16, DINOv2 with registers, …).

    Args:
        path: A folder or hub id in transformers' format, such as `facebook/dino-vitb16` or
            `facebook/dinov2-with-registers-large`.
        batch_size: Images per batch.
    """

    def __init__(self, path: str, batch_size: int = 32) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.model = freeze(AutoModel.from_pretrained(path).float())
        self.processor: Any = AutoImageProcessor.from_pretrained(path)
        self.batch_size = batch_size

    @torch.no_grad()
    def encode_images(self, pixels: Pixels) -> Float[Tensor, "n d"]:
        """Encodes images to one vector each, float32 on the CPU."""
        device = next(self.model.parameters()).device

        def encode(images: Sequence[Image.Image]) -> Tensor:
            inputs = self.processor(images=list(images), return_tensors="pt").to(device)
            states: Tensor = self.model(**inputs).last_hidden_state
            return states[:, 0]

        return _in_batches(_pil_images(pixels), self.batch_size, encode)

    def identity(self) -> dict[str, Any]:
        """Identity of the encoder: weights and preprocessing."""
        return {"image_encoder": hash_tensors(self.model.state_dict()), "preprocess": self.processor.to_dict()}


def _in_batches(items: Sequence[Any], batch_size: int, encode: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    parts = [encode(items[start : start + batch_size]).float().cpu() for start in range(0, len(items), batch_size)]
    return torch.cat(parts)


class MappedEncoder(ImageEncoder):
    """Encoder followed by a learned linear map with bias: one of the two maps of AbC (Wang et al. 2023).

    Args:
        encoder: Encoder of the features.
        file: A `.safetensors` file with `weight` (out, in) and `bias` (out).

    Raises:
        ValueError: The file holds other tensors.
    """

    def __init__(self, encoder: ImageEncoder, file: str) -> None:
        tensors = load_file(file)
        weight, bias = tensors.get(WEIGHT), tensors.get(BIAS)
        if weight is None or bias is None or weight.dim() != 2 or bias.shape != weight.shape[:1]:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise ValueError(f"{file} must hold 'weight' (out, in) and 'bias' (out); it holds {shapes}.")
        self.encoder, self.file, self.weight, self.bias = encoder, file, weight.float(), bias.float()

    def encode_images(self, pixels: Pixels) -> Float[Tensor, "n d"]:
        """Encodes images to one mapped vector each, float32 on the CPU.

        Raises:
            ValueError: The features have another width than the map.
        """
        features = self.encoder.encode_images(pixels)
        if features.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"{self.file} maps {self.weight.shape[1]} features, but the encoder gives {features.shape[1]}: it was "
                "learned for another encoder."
            )
        return features @ self.weight.T + self.bias

    def identity(self) -> dict[str, Any]:
        """Identity of the encoder: that of the features, and the map."""
        return {**self.encoder.identity(), "map": hash_tensors({WEIGHT: self.weight, BIAS: self.bias})}
