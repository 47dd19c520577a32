"""Random adapters in the layouts of every trainer, and what they add to a weight in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK, ALPHA = 2, 3.0
Parts = dict[str, Tensor]
# (weight's shape, generator) -> parts by the endings that kohya's trainer and LyCORIS write.
Make = Callable[[tuple[int, ...], torch.Generator], Parts]


def _random(*shape: int, of: torch.Generator) -> Tensor:
    return 0.3 * torch.randn(shape, generator=of)


def lora(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """Of a linear layer or of a whole convolution (LoCon)."""
    window = (1,) * (len(shape) - 2)
    return {
        "lora_down.weight": _random(RANK, *shape[1:], of=random),
        "lora_up.weight": _random(shape[0], RANK, *window, of=random),
        "alpha": torch.tensor(ALPHA),
    }


def tucker_lora(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """LoCon with a convolution between two of 1 x 1; of a linear layer as plain LoRA."""
    if len(shape) == 2:
        return lora(shape, random)
    return {
        "lora_down.weight": _random(RANK, shape[1], 1, 1, of=random),
        "lora_mid.weight": _random(RANK, RANK, *shape[2:], of=random),
        "lora_up.weight": _random(shape[0], RANK, 1, 1, of=random),
        "alpha": torch.tensor(ALPHA),
    }


def loha(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """Two low-rank products of the flattened weight."""
    inputs = int(torch.Size(shape[1:]).numel())
    sides = {"a": (shape[0], RANK), "b": (RANK, inputs)}
    parts = {f"hada_w{n}_{side}": _random(*size, of=random) for n in "12" for side, size in sides.items()}
    return {**parts, "alpha": torch.tensor(ALPHA)}


def tucker_loha(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """LoHa whose sides of a convolution are in Tucker form."""
    if len(shape) == 2:
        return loha(shape, random)
    parts: Parts = {"alpha": torch.tensor(ALPHA)}
    for n in "12":
        parts[f"hada_t{n}"] = _random(RANK, RANK, *shape[2:], of=random)
        parts[f"hada_w{n}_a"] = _random(RANK, shape[0], of=random)
        parts[f"hada_w{n}_b"] = _random(RANK, shape[1], of=random)
    return parts


def whole_lokr(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """Both factors whole; LyCORIS writes an alpha that says nothing then."""
    return {
        "lokr_w1": _random(2, 2, of=random),
        "lokr_w2": _random(shape[0] // 2, shape[1] // 2, *shape[2:], of=random),
        "alpha": torch.tensor(999.0),
    }


def low_lokr(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """Both factors in low rank."""
    inputs = int(torch.Size(shape[2:]).numel())
    return {
        "lokr_w1_a": _random(2, RANK, of=random),
        "lokr_w1_b": _random(RANK, 2, of=random),
        "lokr_w2_a": _random(shape[0] // 2, RANK, of=random),
        "lokr_w2_b": _random(RANK, shape[1] // 2 * inputs, of=random),
        "alpha": torch.tensor(ALPHA),
    }


def tucker_lokr(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """The second factor of a convolution in Tucker form."""
    if len(shape) == 2:
        return low_lokr(shape, random)
    return {
        "lokr_w1": _random(2, 2, of=random),
        "lokr_t2": _random(RANK, RANK, *shape[2:], of=random),
        "lokr_w2_a": _random(RANK, shape[0] // 2, of=random),
        "lokr_w2_b": _random(RANK, shape[1] // 2, of=random),
        "alpha": torch.tensor(ALPHA),
    }


def dora_of_outputs(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """DoRA whose norm is of each output's weights."""
    return {**lora(shape, random), "dora_scale": 1 + _random(shape[0], *(1,) * (len(shape) - 1), of=random)}


def dora_of_inputs(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """DoRA whose norm is of each input's weights, as LyCORIS takes it by default."""
    return {**lora(shape, random), "dora_scale": 1 + _random(1, shape[1], *(1,) * (len(shape) - 2), of=random)}


def dora_of_loha(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """LoHa under DoRA's norm."""
    return {**loha(shape, random), "dora_scale": 1 + _random(1, shape[1], *(1,) * (len(shape) - 2), of=random)}


def whole(shape: tuple[int, ...], random: torch.Generator) -> Parts:
    """The whole difference of the weight and of the bias."""
    return {"diff": _random(*shape, of=random)}


def summed(weight: Tensor, parts: Mapping[str, Tensor], strength: float = 1.0) -> Tensor:
    """The weight with an adapter in it: the trainers' own formulas, index by index."""
    p = {name: value.to(weight.dtype) for name, value in parts.items()}
    alpha = float(p["alpha"]) if "alpha" in p else None
    shape = weight.shape
    if "diff" in p:
        return weight + strength * p["diff"]
    if "lora_down.weight" in p:
        down, up = p["lora_down.weight"], p["lora_up.weight"].flatten(1)
        if "lora_mid.weight" in p:
            added = torch.einsum("or,rshw,si->oihw", up, p["lora_mid.weight"], down.flatten(1))
        else:
            added = (up @ down.flatten(1)).reshape(shape)
        added = added * (1.0 if alpha is None else alpha / down.shape[0])
    elif "hada_w1_a" in p:
        sides = []
        for n in "12":
            a, b = p[f"hada_w{n}_a"], p[f"hada_w{n}_b"]
            core = p.get(f"hada_t{n}")
            sides.append((a @ b).reshape(shape) if core is None else torch.einsum("ijhw,jq,ip->pqhw", core, b, a))
        added = sides[0] * sides[1] * ((alpha or 0.0) / RANK)
    else:
        left = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        if "lokr_w2" in p:
            right = p["lokr_w2"]
        elif "lokr_t2" in p:
            right = torch.einsum("ijhw,ip,jq->pqhw", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
        else:
            right = (p["lokr_w2_a"] @ p["lokr_w2_b"]).reshape(shape[0] // 2, shape[1] // 2, *shape[2:])
        added = torch.einsum("ab,cd...->acbd...", left, right).reshape(shape)
        if not ("lokr_w1" in p and "lokr_w2" in p):
            added = added * ((alpha or 0.0) / RANK)
    result = weight + strength * added
    if "dora_scale" not in p:
        return result
    norms = p["dora_scale"]
    axis = 1 if norms.shape[0] == shape[0] and norms.shape[1] == 1 else 0
    squares = result.square().movedim(axis, 0).sum(dim=0)
    if axis == 1:
        length = squares.flatten(1).sum(dim=1) if squares.dim() > 1 else squares
        return result * (norms.flatten() / length.sqrt()).reshape(-1, *(1,) * (len(shape) - 1))
    length = squares.flatten(1).sum(dim=1) if squares.dim() > 1 else squares
    return result * (norms.flatten() / length.sqrt()).reshape(1, -1, *(1,) * (len(shape) - 2))


def targets(model: nn.Module, words: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Linear layers and convolutions with one of the words in their names -> the shape of the weight."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(word in f".{name}" for word in words)
    }


def made(shapes: Mapping[str, tuple[int, ...]], make: Make, seed: int = 0) -> dict[str, Parts]:
    """Random parts of an adapter for each layer."""
    random = torch.Generator().manual_seed(seed)
    return {name: make(shape, random) for name, shape in shapes.items()}


def kohya(layers: Mapping[str, Parts], prefix: str = "lora_unet_") -> Parts:
    """In the names of kohya's trainer."""
    return {
        f"{prefix}{name.replace('.', '_')}.{part}": value
        for name, parts in layers.items()
        for part, value in parts.items()
    }


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    """Writes a safetensors file."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, dict(header or {}) or None)
    return path


@torch.no_grad()
def merge_into(model: nn.Module, layers: Mapping[str, Parts], strength: float = 1.0) -> None:
    """Puts an adapter into a model's own weights, in closed form."""
    for name, parts in layers.items():
        weight = model.get_submodule(name).get_parameter("weight")
        weight.copy_(summed(weight, parts, strength))
