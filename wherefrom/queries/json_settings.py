"""How an image was made, as programs write it in JSON: SwarmUI, Fooocus, InvokeAI, NovelAI, Draw Things, scripts.

Each becomes one flat form with the web UI's names (`Steps`, `CFG scale`, …). diffusers itself writes nothing into
images; scripts and Spaces that use it write the pipeline's arguments (`prompt`, `num_inference_steps`, …).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wherefrom.queries.infotext import number_of

# A program's own name -> the web UI's.
_NAMES: Mapping[str, str] = {
    "steps": "Steps",
    "num_inference_steps": "Steps",
    "sampler": "Sampler",
    "sampler_name": "Sampler",
    "scheduler": "Schedule type",
    "cfg_scale": "CFG scale",
    "cfgscale": "CFG scale",
    "guidance_scale": "CFG scale",
    "scale": "CFG scale",
    "seed": "Seed",
    "model": "Model",
    "base_model": "Model",
    "model_name": "Model",
    "model_weights": "Model",
    "model_hash": "Model hash",
    "base_model_hash": "Model hash",
    "clip_skip": "Clip skip",
    "resolution": "Size",
    "size": "Size",
}
_DIFFUSERS = {"negative_prompt", "num_inference_steps", "guidance_scale", "seed", "scheduler", "model", "height"}
_LONGEST = 400  # characters of a setting


@dataclass
class JsonFindings:
    """What a JSON value says of one image.

    Attributes:
        program: Who wrote it.
        prompt: The prompt; None where there is none or it is not certain.
        negative: The negative prompt.
        settings: By the web UI's names.
        loras: Names and weights.
        notes: What was not certain.
    """

    program: str
    prompt: str | None = None
    negative: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    loras: list[tuple[str, float | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_json(text: str) -> Any:
    """A JSON value; None where the text is no JSON, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_json_settings(value: Any, key: str) -> JsonFindings | None:
    """What a JSON object says, by whose form it has; None if it is of no form that is known.

    Args:
        value: The parsed JSON.
        key: Keyword of the text that held it.
    """
    if not isinstance(value, dict):
        return None
    each = {str(name).strip().lower().replace(" ", "_"): part for name, part in list(value.items())[:1000]}
    if isinstance(each.get("sui_image_params"), dict):
        return _swarm(each)
    if key == "invokeai_metadata" or "positive_prompt" in each:
        return _invoke(each)
    if isinstance(each.get("image"), dict) and "prompt" in each["image"]:
        return _old_invoke(each)
    if "base_model" in each and "prompt" in each:
        return _fooocus(each)
    if "uc" in each and ("prompt" in each or "v4_prompt" in each):
        return _novel(each)
    if "uc" in each and isinstance(each.get("c"), str):
        return _draw_things(each)
    if isinstance(each.get("prompt"), str) and _DIFFUSERS & set(each):
        return _flat("JSON settings", each)
    return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _flat(program: str, each: Mapping[str, Any], negative: str = "negative_prompt") -> JsonFindings:
    found = JsonFindings(program, _text(each.get("prompt")), _text(each.get(negative)), settings_of(each))
    loras = each.get("loras")
    for entry in loras[:100] if isinstance(loras, list) else []:
        if isinstance(entry, list | tuple) and len(entry) >= 2 and isinstance(entry[0], str):
            found.loras.append((entry[0], number_of(entry[1])))
        elif isinstance(entry, dict):
            name = _named(entry)
            if name is not None:
                found.loras.append((name, number_of(entry.get("weight"))))
    return found


def _named(entry: Mapping[str, Any]) -> str | None:
    """The name in InvokeAI's `{"model": {"name": …}}` or `{"lora": {"model_name": …}}`, and in flat entries."""
    for key in ("model", "lora"):
        inner = entry.get(key)
        if isinstance(inner, dict):
            return _text(inner.get("name")) or _text(inner.get("model_name"))
    return next((text for key in ("name", "model", "file", "lora") if (text := _text(entry.get(key)))), None)


def settings_of(each: Mapping[str, Any]) -> dict[str, str]:
    """The settings among a program's own names, by the web UI's."""
    result: dict[str, str] = {}
    for name, shown in _NAMES.items():
        value = each.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            result.setdefault(shown, str(value)[:_LONGEST])
    width, height = each.get("width"), each.get("height")
    if isinstance(width, int | str) and isinstance(height, int | str) and "Size" not in result:
        result["Size"] = f"{width}x{height}"[:40]
    return result


def _swarm(each: Mapping[str, Any]) -> JsonFindings:
    told: dict[str, Any] = each["sui_image_params"]
    found = _flat("SwarmUI", {**told, "loras": None}, "negativeprompt")
    names, weights = (_listed(told.get(key)) for key in ("loras", "loraweights"))
    for place, name in enumerate(names):
        found.loras.append((name, number_of(weights[place]) if place < len(weights) else None))
    return found


def _listed(value: Any) -> list[str]:
    """SwarmUI writes lists as such, or as one text with commas."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(part).strip() for part in parts[:100] if str(part).strip()]


def _invoke(each: Mapping[str, Any]) -> JsonFindings:
    model = each.get("model")
    flat = {**each, "prompt": each.get("positive_prompt")}
    if isinstance(model, dict):
        flat |= {"model": _text(model.get("name")) or _text(model.get("model_name")), "model_hash": model.get("hash")}
    found = _flat("InvokeAI", flat)
    for end in ("positive_style_prompt", "negative_style_prompt"):
        if _text(each.get(end)) and each[end] != each.get(end.replace("_style", "")):
            found.notes.append(f"InvokeAI's {end} ({each[end][:100]!r}) went to a text encoder beside the prompt")
    return found


def _old_invoke(each: Mapping[str, Any]) -> JsonFindings:
    image: dict[str, Any] = each["image"]
    prompt = image.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], dict):
        prompt = prompt[0].get("prompt")
    elif isinstance(prompt, list):
        prompt = None
    own = {"model_weights": each.get("model_weights"), "model_hash": each.get("model_hash")}
    found = _flat("InvokeAI", {**own, **image, "prompt": prompt})
    if found.prompt is None:
        found.notes.append("InvokeAI blended several prompts: they are not one")
    return found


def _fooocus(each: Mapping[str, Any]) -> JsonFindings:
    found = _flat("Fooocus", each)
    full = each.get("full_prompt")
    texts = [text for text in (full if isinstance(full, list) else [full]) if isinstance(text, str)]
    if texts and texts != [found.prompt]:
        found.notes.append(
            f"Fooocus gave the text encoder {len(texts)} texts with its styles; the prompt as it was typed is used"
        )
    return found


def _novel(each: Mapping[str, Any]) -> JsonFindings:
    found = _flat("NovelAI", each, "uc")
    told = each.get("v4_prompt")
    caption = told.get("caption") if isinstance(told, dict) else None
    if isinstance(caption, dict):
        found.prompt = _text(caption.get("base_caption")) or found.prompt
        if caption.get("char_captions"):
            found.notes.append("NovelAI had captions of characters beside the prompt; they are not used")
    return found


def _draw_things(each: Mapping[str, Any]) -> JsonFindings:
    entries = each.get("lora")
    return _flat("Draw Things", {**each, "prompt": each.get("c"), "loras": entries}, "uc")
