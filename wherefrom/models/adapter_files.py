"""Files of adapters, in every layout that trainers write, as layers and their parts.

diffusers (two generations), peft, kohya and LyCORIS, OneTrainer, ai-toolkit. A layer keeps the name that the file gives
it; `wherefrom.models.adapters` finds it in the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from wherefrom.models.adapter_settings import AdapterSettings, header_settings, peft_settings
from wherefrom.runtime.artifacts import hash_file

# How the key of a tensor ends -> which part of its layer it is. `[^.]+` is an adapter's name, which peft may write.
_ENDS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(f"(?:{end})$"), part)
    for end, part in (
        (
            r"\.lora_A(?:\.[^.]+)?\.weight|\.lora_down\.weight|[._]lora\.down\.weight|"
            r"\.lora_linear_layer\.down\.weight",
            "down",
        ),
        (r"\.lora_B(?:\.[^.]+)?\.weight|\.lora_up\.weight|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight", "up"),
        (r"\.lora_mid\.weight", "middle"),
        (r"\.alpha", "alpha"),
        (r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?", "magnitude"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.diff", "diff"),
        (r"\.diff_b", "diff_b"),
        (r"\.w_norm", "diff"),
        (r"\.b_norm", "diff_b"),
        *((rf"\.{name}(?:\.[^.]+)?", name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        *((rf"\.{name}(?:\.[^.]+)?", name) for name in ("hada_t1", "hada_t2", "lokr_t2")),
        *((rf"\.{name}(?:\.[^.]+)?", name) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
        *((rf"\.{name}(?:\.[^.]+)?", name) for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    )
)
# diffusers' first layout hangs a layer's adapter on its attention processor.
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)$")
_ADAPTER_WORDS = re.compile(
    r"(?:\.|_)(?:lora|hada|lokr|oft|boft|ia3|vera|glora|dora)(?:_|\.|$)|\.on_input$|\.diff(?:_b)?$"
)
_CHECKPOINT = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"


def split_key(key: str) -> tuple[str, str] | None:
    """(layer, part) of a tensor's key; None where it is no part of an adapter that is known."""
    for pattern, part in _ENDS:
        found = pattern.search(key)
        if found and found.start():
            layer = key[: found.start()]
            wrapped = _PROCESSOR.search(layer)
            if wrapped:
                layer = f"{layer[: wrapped.start()]}.to_{wrapped[1]}{'.0' if wrapped[1] == 'out' else ''}"
            return layer, part
    return None


@dataclass(frozen=True)
class FileLayer:
    """What an adapter's file holds for one layer.

    Attributes:
        parts: Part -> tensor.
        keys: Part -> its key in the file.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's file.

    Attributes:
        path: Where it is.
        digest: Hash of its bytes.
        layers: By the names that the file gives them.
        unknown: Keys that are no part of an adapter that is known.
        settings: Scales of layers that have no `alpha` of their own.
        base: The base that the file says it was trained for; empty where it says none.
    """

    path: Path
    digest: str
    layers: Mapping[str, FileLayer]
    unknown: tuple[str, ...]
    settings: AdapterSettings
    base: str

    @property
    def tensors(self) -> int:
        """How many tensors the file holds."""
        return sum(len(layer.keys) for layer in self.layers.values()) + len(self.unknown)


def _keys(path: Path) -> tuple[list[str], dict[str, str]]:
    """Keys and header of a file.

    Raises:
        ValueError: It is no whole safetensors file.
    """
    try:
        with safe_open(path, "pt") as stream:
            return list(stream.keys()), dict(stream.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {error}. Is it damaged, or not wholly loaded?"
        ) from error


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether tensors of these names are an adapter, of a kind that is known here or not."""
    return any(_ADAPTER_WORDS.search(key) for key in keys)


def is_checkpoint(keys: Iterable[str]) -> bool:
    """Whether tensors of these names are a whole model in one file."""
    return any(key.startswith(_CHECKPOINT) for key in keys)


def keys_of(path: Path) -> list[str]:
    """Names of a file's tensors, of which none is read.

    Raises:
        ValueError: It is no whole safetensors file.
    """
    return _keys(path)[0]


def _base(header: Mapping[str, str]) -> str:
    """What a file says of its base, shown to the user: no more than a name."""
    for key in ("ss_base_model_version", "modelspec.architecture", "base_model", "ss_sd_model_name"):
        said = re.sub(r"[^\w./ -]", "", header.get(key, ""))[:60].strip()
        if said:
            return said
    return ""


def read_adapter(path: Path) -> AdapterFile:
    """Reads an adapter's file, with `adapter_config.json` beside it where peft wrote it.

    Raises:
        ValueError: The file is damaged or no adapter, or its settings cannot be honoured.
    """
    names, header = _keys(path)
    if not is_adapter(names):
        what = "a whole model in one file: give it as the model" if is_checkpoint(names) else "no adapter"
        raise ValueError(f"{path} is {what}; its tensors are called {', '.join(repr(name) for name in names[:2])}.")
    config = path.with_name(ADAPTER_CONFIG)
    settings = (
        peft_settings(config) if path.name == ADAPTER_MODEL and config.is_file() else header_settings(header, path)
    )
    layers: dict[str, FileLayer] = {}
    unknown = []
    for key, tensor in load_file(path).items():
        found = split_key(key)
        if found is None or found[1] in layers.setdefault(found[0], FileLayer()).parts:
            unknown.append(key)  # a second tensor of the same part has no place either
            continue
        layers[found[0]].parts[found[1]] = tensor
        layers[found[0]].keys[found[1]] = key
    return AdapterFile(path, hash_file(path), layers, tuple(unknown), settings, _base(header))
