"""What a query's file says of its model and LoRAs, beside the model that is asked: differences are said."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from wherefrom.models.adapter_states import known_adapters
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.queries.generation_metadata import GenerationMetadata
from wherefrom.queries.types import Query
from wherefrom.runtime.console import Log, no_log

_BLOCK = 1 << 22
_OLD_START, _OLD_BYTES = 0x100000, 0x10000  # what the web UI hashed until 2023, to eight digits


def checked_queries(
    queries: Sequence[Query], model: DiffusionModel, *, checkpoint: Path | None = None, log: Log = no_log
) -> list[Query]:
    """The queries, whose metadata say what is not of this model; the same is logged, once for each image.

    Args:
        queries: The queries; those without metadata stay as they are.
        model: The model that is asked.
        checkpoint: The single file that it was loaded from, if it was.
        log: Receives the prompts that were taken from files, and the differences.
    """
    result, digests, said = [], dict[int, str](), set[str]()
    adapters = adapter_names(model)
    for query in queries:
        metadata = query.metadata
        if metadata is not None:
            differences = [*_hash_notes(metadata, checkpoint, digests), *_lora_notes(metadata, adapters)]
            metadata = replace(metadata, notes=(*metadata.notes, *differences))
            query = replace(query, metadata=metadata)
            if query.id not in said:
                for line in stated_lines(query):
                    log(line)
            said.add(query.id)
        result.append(query)
    return result


def stated_lines(query: Query) -> list[str]:
    """Lines for the console: the prompt that was taken from the file, and what must be known of the rest."""
    metadata = query.metadata
    if metadata is None:
        return []
    lines = [f"{query.id}: {note}" for note in metadata.notes]
    if query.own_prompt:
        lines.insert(0, f"prompt of {query.id}, from its own {metadata.source}: {query.prompt!r}; a given one wins")
    return lines


def adapter_names(model: DiffusionModel) -> list[str]:
    """Names of the LoRAs that are in a model, as far as they are known."""
    text = None if model.encoder is None else model.encoder.text
    parts: list[Any] = [model.denoiser, *getattr(text, "models", []), getattr(text, "model", None)]
    records = (record for part in parts if isinstance(part, nn.Module) for record in known_adapters(part))
    return list(dict.fromkeys(record.name for record in records))


def _stem(name: str) -> str:
    """A LoRA's name without folders, ending and the differences of spelling that programs make."""
    last = re.split(r"[/\\]", name.strip())[-1]
    return re.sub(r"[\s_\-.]+", "-", re.sub(r"\.(safetensors|pt|ckpt|bin)$", "", last, flags=re.IGNORECASE)).lower()


def _lora_notes(metadata: GenerationMetadata, adapters: Sequence[str]) -> list[str]:
    known = {_stem(name) for name in adapters}
    missing = [name for name, _ in metadata.loras if _stem(name) not in known]
    if not missing:
        return []
    has = f"it has {', '.join(adapters[:5])}" if adapters else "it has none"
    names = ", ".join(repr(name[:80]) for name in missing[:10])
    return [
        f"the image says that it was made with the LoRAs {names}, which are not known to be in this model ({has}): "
        "what they brought in cannot be found with it"
    ]


def checkpoint_hash(file: Path, digits: int) -> str:
    """The web UI's hash of a checkpoint file: its SHA-256, cut to 10 digits; the one of 8 digits is of a part of it."""
    made = hashlib.sha256()
    with file.open("rb") as stream:
        if digits == 8:
            stream.seek(_OLD_START)
            made.update(stream.read(_OLD_BYTES))
        else:
            while block := stream.read(_BLOCK):
                made.update(block)
    return made.hexdigest()[:digits]


def _hash_notes(metadata: GenerationMetadata, checkpoint: Path | None, digests: dict[int, str]) -> list[str]:
    stated = metadata.model_hash
    if stated is None or checkpoint is None:
        return []
    digits = len(stated)
    if digits not in digests:
        digests[digits] = checkpoint_hash(checkpoint, digits)
    if digests[digits] == stated:
        return []
    name = metadata.settings.get("Model", "")[:80]
    return [
        f"the image says that it was made by a model of hash {stated}{f' ({name})' if name else ''}, and "
        f"{checkpoint.name} has {digests[digits]}: it is another model"
    ]
