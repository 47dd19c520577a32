"""Conditioning of a caption: a mapping of named tensors, which each model family declares.

Names are diffusers': `prompt_embeds` (one embedding a token), `pooled_prompt_embeds`, `prompt_attention_mask`,
`time_ids` (SDXL's sizes), `resolution` and `aspect_ratio` (PixArt's). All tensors share their leading axes (none for a
single caption, the batch, or images × captions); what follows them is one caption's and differs from name to name.

Shape letters: B = batch, L = tokens, D = width of a prompt embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PROMPT, POOLED, MASK = "prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"
EMBEDDINGS = (PROMPT, POOLED)  # what may be kept in half precision
Shape = tuple[int | None, ...]


class Conditioning(Mapping[str, Tensor]):
    """Named tensors with the same leading axes.

    Tensors may also be views of rows on disk, which are read where they are indexed.

    Args:
        tensors: The tensors by name.

    Raises:
        ValueError: There are none.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        if not tensors:
            raise ValueError("Conditioning holds no tensors; a network takes at least its prompt embeddings.")
        self._tensors: dict[str, Any] = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Conditioning({', '.join(f'{name} {tuple(each.shape)}' for name, each in self.items())})"

    # By identity, as tensors are compared: equal values are asked for name by name.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(int(each.nbytes) for each in self.values())

    @property
    def batch_size(self) -> int:
        """Length of the first axis."""
        return int(next(iter(self._tensors.values())).shape[0])

    def map(self, change: Callable[[Any], Any]) -> Conditioning:
        """The same names with each tensor changed."""
        return Conditioning({name: change(each) for name, each in self._tensors.items()})

    def at(self, *index: Any) -> Conditioning:
        """The entries at an index into the leading axes; None adds an axis."""
        return self.map(lambda each: each[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """On a device; floating-point tensors in this type of number, whole numbers and truth values as they are."""

        def moved(each: Tensor) -> Tensor:
            return each.to(device=device, dtype=dtype if each.is_floating_point() else None)

        return self.map(moved)

    def float(self) -> Conditioning:
        """What was kept in float16 as float32."""
        return self.map(lambda each: each.float() if each.dtype == torch.float16 else each)

    def cpu(self) -> Conditioning:
        """On the CPU."""
        return self.to("cpu")

    def double(self) -> Conditioning:
        """Floating-point tensors in float64."""
        return self.to(dtype=torch.float64)

    def expand(self, *count: int) -> Conditioning:
        """A single caption's conditioning with leading axes of these lengths; no memory is taken."""
        return self.map(lambda each: each.expand(*count, *each.shape))

    def dropped(self, drop: Bool[Tensor, " b"], empty: Conditioning) -> Conditioning:
        """A batch with the empty prompt in place of some captions (for classifier-free guidance)."""

        def chosen(name: str) -> Tensor:
            kept = self[name]
            return torch.where(drop.reshape(-1, *(1,) * (kept.dim() - 1)), empty[name], kept)

        return Conditioning({name: chosen(name) for name in self})


def concatenated(parts: Sequence[Conditioning]) -> Conditioning:
    """Batches, one after the other."""
    return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def prompt_embeddings(embeddings: Float[Tensor, "... l d"]) -> Conditioning:
    """The conditioning of a network that takes prompt embeddings alone, as Stable Diffusion 1 and 2 do."""
    return Conditioning({PROMPT: embeddings})


def check_declared(conditioning: Mapping[str, Any], declared: Mapping[str, Shape], network: str) -> None:
    """Refuses conditioning of a single caption that is not what a network's family declares.

    Args:
        conditioning: One caption's.
        declared: Shape by name; None is any length.
        network: The network's name, for the message.

    Raises:
        ValueError: A name is missing or unknown, or a shape differs.
    """
    if set(conditioning) != set(declared):
        raise ValueError(
            f"{network} takes {', '.join(declared)} of a caption, but the conditioning holds "
            f"{', '.join(conditioning)}: it was made for another kind of model. Encode the captions with the model's "
            "own text encoder."
        )
    width, given = declared[PROMPT][-1], int(conditioning[PROMPT].shape[-1])
    if width is not None and given != width:
        raise ValueError(
            f"The prompt embeddings are {given} wide, but the model takes {width}: they were made by another text "
            "encoder than the model's. Encode the captions with the model's own."
        )
    for name, shape in declared.items():
        actual = tuple(int(side) for side in conditioning[name].shape)
        fits = all(wanted in (None, side) for wanted, side in zip(shape, actual, strict=False))
        if len(actual) != len(shape) or not fits:
            wanted = "×".join("any" if side is None else str(side) for side in shape)
            raise ValueError(
                f"{name} of a caption has shape {actual}, but the model takes {wanted}: it was made by another text "
                "encoder than the model's. Encode the captions with the model's own."
            )
