"""Settings of an adapter that stand beside its tensors: peft's `adapter_config.json`, and diffusers' file header.

Only settings that change nothing, or whose effect is reproduced here, are accepted: an allow-list.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_KINDS = ("LORA", "LOHA", "LOKR")
# How layers were chosen, trained and first filled, of which the tensors themselves are the result.
_WITHOUT_EFFECT = re.findall(
    r"\w+",
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules
    exclude_modules lora_dropout rank_dropout rank_dropout_scale module_dropout init_weights layers_to_transform
    layers_pattern megatron_core loftq_config eva_config corda_config lora_ga_config runtime_config qalora_group_size
    decompose_both decompose_factor use_effective_conv2d use_dora ensure_weight_tying
    """,
)
_REPRODUCED = frozenset({"lora_alpha", "alpha", "alpha_pattern", "use_rslora", "r", "rank_pattern"})
_USUAL_ALPHA = 8.0  # peft's, where the settings leave it out
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base's weights too
_HEADER = "lora_adapter_metadata"
_COMPONENTS = ("unet", "transformer", "text_encoder_2", "text_encoder_3", "text_encoder")
_NAME = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class LayerScales:
    """How strongly the layers of one component count.

    Attributes:
        alpha: α; None is each layer's rank, so that the scale is 1.
        alphas: Layer -> its own α; names may be ends of a layer's.
        rank: Rank of layers whose tensors do not say it.
        ranks: Layer -> its own such rank.
        root: Divide by the rank's root (rsLoRA) and not by the rank.
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank: float | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)
    root: bool = False

    def of(self, module: str, rank: int | None) -> float:
        """The scale of a layer.

        Args:
            module: Its name.
            rank: Its tensors' rank, where they have one.
        """
        alpha = _of(module, self.alphas, self.alpha)
        used = _of(module, self.ranks, self.rank) if rank is None else float(rank)
        if alpha is None or not used:
            return 1.0
        return alpha / (math.sqrt(used) if self.root else used)


def _of(module: str, named: Mapping[str, float], usual: float | None) -> float | None:
    return next((value for name, value in named.items() if _matches(name, module)), usual)


def _matches(name: str, module: str) -> bool:
    bare = name.removeprefix("^")
    return module == bare or (bare == name and module.endswith(f".{name}"))


@dataclass(frozen=True)
class AdapterSettings:
    """Scales by component: `unet` or `transformer`, `text_encoder`, …; `""` stands for any other.

    Attributes:
        scales: Component -> scales.
    """

    scales: Mapping[str, LayerScales] = field(default_factory=dict)

    def of(self, *components: str) -> LayerScales:
        """The scales of a component, by any of its names."""
        there = [self.scales[each] for each in (*components, "") if each in self.scales]
        return there[0] if there else LayerScales()


def _number(settings: Mapping[str, Any], name: str, where: str) -> float | None:
    value = settings.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {name} should be a number; found {value!r}.")
    return float(value)


def _scales(settings: Mapping[str, Any], where: str) -> LayerScales:
    """Scales from peft's settings.

    Raises:
        ValueError: A setting has an effect that is not reproduced, or a value is of another kind.
    """
    for name, value in settings.items():
        if name in _WITHOUT_EFFECT or name in _REPRODUCED:
            continue
        if name == "init_lora_weights" and (value is None or isinstance(value, bool) or value in _INITIAL):
            continue
        if value and not (name == "bias" and value == "none"):
            raise ValueError(
                f"{where} sets {name} to {str(value)[:60]!r}, whose effect is not known here, so that this adapter "
                "would not be the one that was trained. Merge it into its base with the code that trained it."
            )
    own = _number(settings, "lora_alpha", where)
    alpha = _number(settings, "alpha", where) if own is None else own
    return LayerScales(
        alpha=_USUAL_ALPHA if alpha is None else alpha,
        alphas=_named(settings, "alpha_pattern", where),
        rank=_number(settings, "r", where),
        ranks=_named(settings, "rank_pattern", where),
        root=bool(settings.get("use_rslora")),
    )


def _named(settings: Mapping[str, Any], key: str, where: str) -> dict[str, float]:
    """Numbers of single layers, whose names peft takes for regular expressions; nothing here is run as one."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{where}: {key} should be names with numbers; found {str(patterns)[:60]!r}.")
    named: dict[str, float] = {}
    for pattern in patterns:
        name = str(pattern).removesuffix("$").replace("\\.", ".")
        number = _number(patterns, pattern, where)
        if not _NAME.fullmatch(name.removeprefix("^")) or number is None:
            raise ValueError(f"{where}: {str(pattern)[:80]!r} in {key} is no name of a layer with a number.")
        named[name] = number
    return named


def peft_settings(path: Path) -> AdapterSettings:
    """The settings that peft wrote beside an adapter.

    Raises:
        ValueError: The file is damaged, or of a kind of adapter or with a setting that is not supported.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} should hold peft's settings by name; it does not.")
    kind = str(settings.get("peft_type", "LORA")).upper()
    if kind not in _KINDS:
        raise ValueError(
            f"{path}: adapters of peft's kind {kind[:30]} are not supported; {', '.join(_KINDS)} are. Merge it into "
            "its base with peft (merge_and_unload), and give the merged model."
        )
    return AdapterSettings({"": _scales(settings, str(path))})


def header_settings(header: Mapping[str, str], path: Path) -> AdapterSettings:
    """The settings that diffusers wrote into a file's header; none where it wrote none.

    Raises:
        ValueError: They are damaged, or one has an effect that is not reproduced.
    """
    text = header.get(_HEADER)
    if text is None:
        return AdapterSettings()
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {_HEADER} in its header is no JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: {_HEADER} in its header should hold settings by name; it does not.")
    sorted_out: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        component = next((each for each in _COMPONENTS if key.startswith(f"{each}.")), "")
        sorted_out.setdefault(component, {})[key.removeprefix(f"{component}.") if component else key] = value
    return AdapterSettings({each: _scales(found, f"{path} ({each})") for each, found in sorted_out.items()})
