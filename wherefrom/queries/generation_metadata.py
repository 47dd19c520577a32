"""What a generated image says of itself: prompt, negative prompt, seed, model, LoRAs, as programs write them.

Read are the web UI's settings (AUTOMATIC1111, Forge, SD.Next; PNG text `parameters`, Exif UserComment), ComfyUI's graph
(`prompt`), and JSON of SwarmUI, Fooocus, InvokeAI, NovelAI, Draw Things and of scripts with diffusers' own argument
names. All of it is untrusted text: nothing is run, followed or looked up, and only what is certain is taken for the
prompt. Nothing here imports PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from wherefrom.queries.comfy_graph import is_graph, read_graph
from wherefrom.queries.embedded_text import EmbeddedText, read_embedded_texts, texts_of_image
from wherefrom.queries.infotext import has_weights, is_infotext, parse_infotext, without_networks
from wherefrom.queries.json_settings import parse_json, read_json_settings, settings_of

__all__ = ["GenerationMetadata", "read_generation_metadata"]

_SHOWN = 2000  # characters of a prompt
_VALUE = 400  # of another value
_MOST_SETTINGS = 60
_LONGEST_XMP = 1 << 18
_WEB_UI, _COMFY = "web UI settings (AUTOMATIC1111)", "ComfyUI graph"
_DREAM = re.compile(r'^"(?P<prompt>(?:[^"\\]|\\.)*)"\s+(?P<flags>-.*)$', re.DOTALL)
_DREAM_FLAGS = {"-s": "Steps", "-S": "Seed", "-C": "CFG scale", "-A": "Sampler"}
_XMP_TEXTS = ("{http://ns.adobe.com/exif/1.0/}UserComment", "{http://purl.org/dc/elements/1.1/}description")


@dataclass(frozen=True)
class GenerationMetadata:
    """What an image file says of how it was made. Only the prompt is ever used, and only where none is given.

    Attributes:
        source: Who wrote it, and where it stood.
        prompt: The prompt as the text encoder saw it, without tags of LoRAs; None where it is not certain.
        negative: The negative prompt.
        settings: Seed, steps, sampler, model and others, by the web UI's names.
        loras: Names and weights; None where the weight is not stated.
        notes: What could not be told, or was not interpreted.
    """

    source: str
    prompt: str | None = None
    negative: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    loras: tuple[tuple[str, float | None], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def model_hash(self) -> str | None:
        """The web UI's short hash of the checkpoint, in small letters; None where there is none."""
        stated = self.settings.get("Model hash", "").strip().lower()
        return stated if re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{10}|[0-9a-f]{64}", stated) else None

    def table(self) -> dict[str, str]:
        """Name -> value, shortened, for pages and the console."""
        rows = {"Written by": self.source}
        if self.prompt is not None:
            rows["Prompt"] = self.prompt[:_SHOWN]
        if self.negative:
            rows["Negative prompt"] = self.negative[:_SHOWN]
        if self.loras:
            named = (
                name[:_VALUE] if weight is None else f"{name[:_VALUE]} ({weight:g})" for name, weight in self.loras
            )
            rows["LoRAs"] = ", ".join(named)[:_SHOWN]
        shown = list(self.settings.items())[:_MOST_SETTINGS]
        return rows | {name[:80]: value[:_VALUE] for name, value in shown if name not in rows}

    def as_json(self) -> dict[str, Any]:
        """Its parts by name, shortened, for a run's record."""
        kept = dict(list(self.settings.items())[:_MOST_SETTINGS])
        short = replace(
            self,
            negative=None if self.negative is None else self.negative[:_SHOWN],
            settings={name[:80]: value[:_VALUE] for name, value in kept.items()},
        )
        return {**asdict(short), "loras": [list(each) for each in self.loras], "notes": list(self.notes)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> GenerationMetadata:
        """What `as_json` gave."""
        loras = tuple((str(name), None if weight is None else float(weight)) for name, weight in stored["loras"])
        return cls(**{**stored, "loras": loras, "notes": tuple(stored["notes"])})


def read_generation_metadata(image: str | Path | Image.Image) -> GenerationMetadata | None:
    """What an image says of itself; None where it says nothing that is known here.

    Args:
        image: A PNG, JPEG or WebP file, or an image that Pillow has opened.

    Raises:
        OSError: The file cannot be opened.
    """
    texts, notes = texts_of_image(image) if isinstance(image, Image.Image) else read_embedded_texts(Path(image))
    found = [each for text in texts for each in _readings(text, texts)]
    if not found:
        return _plain(texts, notes)
    first, *others = sorted(found, key=lambda each: each.prompt is None)
    said = tuple(dict.fromkeys([*notes, *(note for each in found for note in each.notes)]))
    prompts = {" ".join(each.prompt.split()): each.source for each in found if each.prompt is not None}
    if len(prompts) > 1:
        sources = " and ".join(prompts.values())
        said = (*said, f"it states different prompts ({sources}): none of them is used")
        return replace(first, prompt=None, notes=said)
    missing = {name: value for each in others for name, value in each.settings.items() if name not in first.settings}
    loras = first.loras or next((each.loras for each in others if each.loras), ())
    return replace(first, settings={**first.settings, **missing}, loras=loras, notes=said)


def _readings(text: EmbeddedText, texts: Sequence[EmbeddedText]) -> list[GenerationMetadata]:
    """What one text says."""
    if text.place == "XMP":
        return [each for inner in _of_xmp(text) for each in _readings(inner, texts)]
    key, value = text.key.lower(), text.text.strip()
    for name in ("prompt", "workflow"):  # ComfyUI's WebP: Exif tags that begin with the name
        if text.place == "Exif" and value.startswith(f"{name}:"):
            key, value = name, value.removeprefix(f"{name}:")
    place = f"{text.place} {text.key}" if text.place != "PNG text" else f"PNG text {key!r}"
    parsed = parse_json(value) if value.startswith("{") else None
    if parsed is not None and is_graph(parsed):
        graph = read_graph(parsed)
        weights = _weight_note(graph.prompt, "ComfyUI")
        return [
            GenerationMetadata(
                f"{_COMFY}, {place}",
                graph.prompt,
                graph.negative,
                graph.settings,
                tuple(graph.loras),
                (*graph.notes, *weights),
            )
        ]
    if key == "workflow" and parsed is not None:
        if any(other.key.lower() == "prompt" or other.text.startswith("prompt:") for other in texts):
            return []  # the same, as it was drawn on the screen
        return [
            GenerationMetadata(
                f"ComfyUI workflow, {place}",
                notes=("it has ComfyUI's workflow but not the graph that was run: its prompt is not guessed",),
            )
        ]
    stated = read_json_settings(parsed, key)
    if stated is not None:
        prompt, loras = (None, []) if stated.prompt is None else without_networks(stated.prompt)
        return [
            GenerationMetadata(
                f"{stated.program}, {place}",
                prompt,
                stated.negative,
                stated.settings,
                (*stated.loras, *loras),
                (*stated.notes, *_weight_note(prompt, stated.program)),
            )
        ]
    if key == "dream":
        return _dream(value, place)
    if (key == "parameters" and parsed is None and value) or is_infotext(value):
        typed, negative, settings = parse_infotext(value)
        prompt, loras = without_networks(typed)
        source, notes = f"{_WEB_UI}, {place}", tuple(_weight_note(prompt, "the web UI"))
        return [GenerationMetadata(source, prompt, negative, settings, tuple(loras), notes)]
    return []


def _weight_note(prompt: str | None, program: str) -> list[str]:
    if prompt is None or not has_weights(prompt):
        return []
    return [
        f"{program} reads brackets in its prompt as attention, such as (word:1.2): they are not interpreted here, and "
        "the prompt is encoded as it stands"
    ]


def _plain(texts: Sequence[EmbeddedText], notes: Sequence[str]) -> GenerationMetadata | None:
    """What a script wrote as texts by name: `prompt`, `negative_prompt`, `seed` and others."""
    named = {text.key.lower().replace(" ", "_"): text.text for text in texts if text.place == "PNG text"}
    prompt = named.get("prompt", "").strip()
    if not prompt or prompt.startswith(("{", "[")):
        broken = bool(prompt) or any(text.key.lower() in ("parameters", "workflow") for text in texts)
        said = (*notes, "its settings are of no form that is known here") if broken else tuple(notes)
        return GenerationMetadata("unknown", notes=said) if said else None
    typed, loras = without_networks(prompt)
    return GenerationMetadata(
        "PNG texts by name", typed, named.get("negative_prompt"), settings_of(named), tuple(loras), tuple(notes)
    )


def _dream(value: str, place: str) -> list[GenerationMetadata]:
    """InvokeAI's first form: `"a prompt" -s 50 -S 123 -W 512 -H 512 -C 7.5 -A k_lms`."""
    found = _DREAM.match(value[:_SHOWN])
    if found is None:
        return []
    words = found["flags"].split()
    settings = {
        shown: next(
            word.removeprefix(flag) or after
            for word, after in zip(words, [*words[1:], ""], strict=True)
            if word.startswith(flag)
        )
        for flag, shown in _DREAM_FLAGS.items()
        if any(word.startswith(flag) for word in words)
    }
    return [GenerationMetadata(f"InvokeAI, {place}", found["prompt"], None, settings)]


def _of_xmp(text: EmbeddedText) -> list[EmbeddedText]:
    """The comment and description of an XMP packet, which refers to nothing outside."""
    if len(text.text) > _LONGEST_XMP or "<!DOCTYPE" in text.text or "<!ENTITY" in text.text:
        return []
    start, end = text.text.find("<"), text.text.rfind(">")
    try:
        root = ElementTree.fromstring(text.text[start : end + 1])
    except (ElementTree.ParseError, ValueError):
        return []
    result = []
    for name in _XMP_TEXTS:
        for element in list(root.iter(name))[:4]:
            whole = "".join(element.itertext()).strip()
            if whole:
                result.append(EmbeddedText("XMP text", name.rpartition("}")[2], whole))
    return result
