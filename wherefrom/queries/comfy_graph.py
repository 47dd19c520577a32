"""ComfyUI's graph in an image's `prompt`: which text the sampler was told, found by following its links.

A graph is `{id: {"class_type": …, "inputs": {name: value or [id, output]}}}`. Only what is certain is given: one
sampler, texts reached from its `positive` and `negative`; anything else is said and not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from wherefrom.queries.infotext import number_of

_MOST_NODES = 5000
_DEEPEST = 200

Node = Mapping[str, Any]
# Inputs that carry the text of a text encoding, by its class; other classes whose name has these words: `text`.
_ENCODERS: Mapping[str, tuple[str, ...]] = {
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("text_g", "text_l"),
    "CLIPTextEncodeSDXLRefiner": ("text",),
    "CLIPTextEncodeSD3": ("clip_l", "clip_g", "t5xxl"),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl"),
    "CLIPTextEncodeHunyuanDiT": ("bert", "mt5xl"),
    "CLIPTextEncodePixArtAlpha": ("text",),
    "CLIPTextEncodeLumina2": ("user_prompt",),
    "BNK_CLIPTextEncodeAdvanced": ("text",),
    "smZ CLIPTextEncode": ("text",),
}
# Conditioning that goes through one input unchanged in its words.
_THROUGH: Mapping[str, str] = {
    "FluxGuidance": "conditioning",
    "ConditioningZeroOut": "",  # its words are not seen
    "ConditioningSetTimestepRange": "conditioning",
    "ConditioningSetArea": "conditioning",
    "ConditioningSetAreaPercentage": "conditioning",
    "ConditioningSetMask": "conditioning",
    "CLIPSetLastLayer": "conditioning",
    "Reroute": "",
    "unCLIPConditioning": "conditioning",
    "ReferenceLatent": "conditioning",
}
# Nodes that give a text as it is written in one of their inputs.
_TEXTS: Mapping[str, tuple[str, ...]] = {
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
    "PrimitiveNode": ("value",),
    "String Literal": ("string",),
    "StringConstant": ("string",),
    "StringConstantMultiline": ("string",),
    "Text Multiline": ("text",),
    "Text box": ("text",),
    "Textbox": ("text",),
    "ShowText|pysssss": ("text",),
    "Simple String": ("string",),
    "CR Text": ("text",),
    "ttN text": ("text",),
    "easy positive": ("positive",),
    "easy negative": ("negative",),
}
_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
_CHECKPOINTS = {"ckpt_name": "Model", "unet_name": "Model"}
_SIZES = ("EmptyLatentImage", "EmptySD3LatentImage", "EmptyFlux2LatentImage", "EmptyHunyuanLatentVideo")


@dataclass
class ComfyFindings:
    """What a graph says of one image.

    Attributes:
        prompt: The positive text; None where it is not certain.
        negative: The negative text.
        settings: Seed, steps and their like by the web UI's names.
        loras: Names and weights of the LoRAs that the sampler's model went through.
        notes: What was not certain.
    """

    prompt: str | None = None
    negative: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    loras: list[tuple[str, float | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_graph(value: Any) -> bool:
    """Whether a JSON value is a graph as ComfyUI's interface runs it."""
    return (
        isinstance(value, dict)
        and 0 < len(value) <= _MOST_NODES
        and all(isinstance(node, dict) and isinstance(node.get("class_type"), str) for node in value.values())
    )


def read_graph(graph: Mapping[str, Node]) -> ComfyFindings:
    """Follows the only sampler's links to its texts, model and LoRAs."""
    result = ComfyFindings()
    samplers = [name for name in graph if _class(graph, name) in _SAMPLERS]
    if len(samplers) != 1:
        others = sorted({_class(graph, name) for name in graph if "sampler" in _class(graph, name).lower()})
        what = f"{len(samplers)} samplers" if samplers else "no sampler that is known here"
        listed = f" ({', '.join(others[:5])})" if others and not samplers else ""
        result.notes.append(f"its ComfyUI graph has {what}{listed}: which text made the image is not guessed")
        return result
    sampler = samplers[0]
    guider = _follow(graph, _inputs(graph, sampler).get("guider"))
    told = guider if guider is not None else sampler
    positive = "positive" if "positive" in _inputs(graph, told) else "conditioning"
    result.prompt = _text_of(graph, _inputs(graph, told).get(positive), positive, result.notes)
    if "negative" in _inputs(graph, told):
        result.negative = _text_of(graph, _inputs(graph, told).get("negative"), "negative", result.notes)
    _read_model(graph, _inputs(graph, told).get("model"), result)
    _read_settings(graph, sampler, told, result)
    return result


def _class(graph: Mapping[str, Node], name: str) -> str:
    return str(graph[name]["class_type"])


def _inputs(graph: Mapping[str, Node], name: str) -> Node:
    inputs = graph[name].get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _follow(graph: Mapping[str, Node], link: Any) -> str | None:
    """The node that a link comes from; None if the value is no link."""
    if isinstance(link, list) and len(link) == 2 and isinstance(link[0], str | int) and str(link[0]) in graph:
        return str(link[0])
    return None


def _text_of(graph: Mapping[str, Node], link: Any, side: str, notes: list[str]) -> str | None:
    """The one text that a conditioning comes from."""
    encoders = list(dict.fromkeys(_encoders(graph, link, side, notes)))
    if len(encoders) != 1:
        if encoders:
            notes.append(f"its ComfyUI graph joins {len(encoders)} texts as {side}: they are not one prompt")
        return None
    node = encoders[0]
    names = _ENCODERS.get(_class(graph, node), ("text",))
    texts = [_literal(graph, _inputs(graph, node).get(name)) for name in names if name in _inputs(graph, node)]
    known = list(dict.fromkeys(text for text in texts if text))
    if None in texts or not texts:
        notes.append(f"the {side} text of its ComfyUI graph is made by a node that is not known here")
        return None
    if len(known) > 1:
        notes.append(f"its ComfyUI graph gives several text encoders different {side} texts")
        return None
    return known[0] if known else ""


def _encoders(graph: Mapping[str, Node], link: Any, side: str, notes: list[str]) -> Iterator[str]:
    """The text encodings that a conditioning comes from."""
    node, output = _follow(graph, link), link[1] if isinstance(link, list) and len(link) == 2 else 0
    for _ in range(_DEEPEST):
        if node is None:
            notes.append(f"the {side} input of its ComfyUI graph's sampler leads to no text")
            return
        kind, inputs = _class(graph, node), _inputs(graph, node)
        if kind in _ENCODERS or ("TextEncode" in kind and isinstance(inputs.get("text"), str | list)):
            yield node
            return
        if kind == "ConditioningZeroOut":
            notes.append(f"the {side} text of its ComfyUI graph is zeroed out")
            return
        if "positive" in inputs and "negative" in inputs:  # ControlNet and its like: two conditionings through one node
            link = inputs["negative" if output == 1 else "positive"]
        elif kind in ("ConditioningCombine", "ConditioningConcat", "ConditioningAverage"):
            for name in inputs:
                if name.startswith("conditioning") and _follow(graph, inputs[name]) is not None:
                    yield from _encoders_below(graph, inputs[name], side, notes)
            return
        elif _THROUGH.get(kind):
            link = inputs.get(_THROUGH[kind])
        else:
            links = [value for value in inputs.values() if _follow(graph, value) is not None]
            if kind != "Reroute" or len(links) != 1:
                notes.append(f"the {side} of its ComfyUI graph goes through {kind[:60]}, which is not known here")
                return
            link = links[0]
        node, output = _follow(graph, link), link[1] if isinstance(link, list) and len(link) == 2 else 0
    notes.append("its ComfyUI graph goes round in a circle")


def _encoders_below(graph: Mapping[str, Node], link: Any, side: str, notes: list[str]) -> Iterator[str]:
    """One branch of a join; a join below it counts as a text of its own, so that depth stays bounded."""
    node = _follow(graph, link)
    kind = "" if node is None else _class(graph, node)
    if node is not None and kind.startswith(("ConditioningCombine", "ConditioningConcat", "ConditioningAverage")):
        yield node
    else:
        yield from _encoders(graph, link, side, notes)


def _literal(graph: Mapping[str, Node], value: Any) -> str | None:
    """A text that stands in the graph, in this input or in a node that only holds it."""
    for _ in range(_DEEPEST):
        if isinstance(value, str):
            return value
        node = _follow(graph, value)
        if node is None:
            return None
        kind, inputs = _class(graph, node), _inputs(graph, node)
        links = [each for each in inputs.values() if _follow(graph, each) is not None]
        if kind == "Reroute" and len(links) == 1:
            value = links[0]
            continue
        name = next((name for name in _TEXTS.get(kind, ()) if name in inputs), None)
        if name is None:
            return None
        value = inputs[name]
    return None


def _read_model(graph: Mapping[str, Node], link: Any, result: ComfyFindings) -> None:
    """LoRAs and the checkpoint, from the sampler upwards."""
    node = _follow(graph, link)
    for _ in range(_DEEPEST):
        if node is None:
            return
        kind, inputs = _class(graph, node), _inputs(graph, node)
        if isinstance(inputs.get("lora_name"), str):
            result.loras.insert(0, (inputs["lora_name"], number_of(inputs.get("strength_model"))))
        elif "Lora" in kind:
            result.loras += [
                (str(each["lora"]), number_of(each.get("strength")))  # rgthree's Power Lora Loader
                for each in inputs.values()
                if isinstance(each, dict) and each.get("on") and isinstance(each.get("lora"), str)
            ]
        for name, shown in _CHECKPOINTS.items():
            if isinstance(inputs.get(name), str):
                result.settings[shown] = inputs[name]
                return
        node = _follow(graph, inputs.get("model"))


def _read_settings(graph: Mapping[str, Node], sampler: str, told: str, result: ComfyFindings) -> None:
    """What the sampler and the nodes that feed it say by number."""
    sources = [_inputs(graph, sampler), _inputs(graph, told)]
    for name in ("noise", "sampler", "sigmas"):
        node = _follow(graph, _inputs(graph, sampler).get(name))
        if node is not None:
            sources.append(_inputs(graph, node))
    for key, shown in (
        ("steps", "Steps"),
        ("sampler_name", "Sampler"),
        ("scheduler", "Schedule type"),
        ("cfg", "CFG scale"),
        ("seed", "Seed"),
        ("noise_seed", "Seed"),
        ("denoise", "Denoising strength"),
    ):
        for inputs in sources:
            value = inputs.get(key)
            if isinstance(value, str | int | float) and not isinstance(value, bool) and shown not in result.settings:
                result.settings[shown] = str(value)
    latent = _follow(graph, _inputs(graph, sampler).get("latent_image"))
    if latent is not None and _class(graph, latent) in _SIZES:
        width, height = (_inputs(graph, latent).get(side) for side in ("width", "height"))
        if isinstance(width, int) and isinstance(height, int):
            result.settings["Size"] = f"{width}x{height}"
