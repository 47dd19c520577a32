"""What `attribute` and `compare` are asked for: flags over a small YAML file, and the record that a run keeps of it."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from wherefrom.cli.run_sizes import bucket_numbers, size_text
from wherefrom.data.split_names import split_named
from wherefrom.models.adapter_sources import check_place, local_files, parse_adapter

RECORD = "wherefrom.yaml"
DEFAULT_METHOD = "abu_plus"
# Keys that decide nothing that is computed.
_FREE = ("output", "store", "device")
# A run's own record also says what its files held.
_RECORDED = ("inputs", "stated")
# Texts of which the empty one says something.
_TEXTS = ("one_caption", "trigger")
_LISTS: Mapping[str, type] = {"queries": dict, "lora": str, "method": str, "regions": dict, "groups": str, "split": str}


@dataclass(frozen=True)
class Request:
    """What a run is asked for; the names are those of the YAML file.

    Attributes:
        model: A diffusers pipeline (folder or hub id), a single file, or a trainer's checkpoint.
        base: The pipeline from which comes what the model's file or checkpoint lacks.
        images: Folder of the training images with their captions.
        queries: Each `{image, prompt}`, `{image}` alone, whose file may state its prompt, or `{prompt}` alone, whose
            image is drawn.
        regions: Parts of the queries, each `{of, box}` or `{of, mask}`; see `QueryRegion`.
        method: Packaged methods, or YAML files.
        settings: Values that replace the methods' own.
        quick: A first look.
        lora: Adapters that were trained on the model: a file, a folder or a hub id; `:WEIGHT` may follow.
        output: The run folder.
        store: Folder for what is computed once.
        device: Where to compute.
        resize: Bring query images to the model's size.
        caption: Name of the caption column, or suffix of the caption files; "" finds it.
        layout: Layout of the folder; "" finds it.
        one_caption: The caption of all images of a folder without captions.
        trigger: What stands for `[trigger]` in captions.
        caption_lines: What the lines of a caption file are: each, first or whole.
        image_column: Name of the column of images, in a table that has several.
        split: Splits whose images are ranked, or `all`.
        null: Images never trained on: a split, a folder, or `none`.
        size: Size of all images: the side of a square, or WIDTHxHEIGHT; "" is the model's own.
        fit: How images are brought to it: crop, pad or stretch.
        pad_color: Colour of the margins of pad.
        exif: Turn photographs upright (apply), or not (ignore).
        alpha: Transparent images are put on white, or their transparency is dropped (drop).
        buckets: Aspect buckets: `{}` for the usual ones, or their numbers; None for one size.
        on_error: stop at training images that cannot be read, or skip them.
        seed: Seed of drawn images.
        sampling_steps: Sampling steps of these.
        guidance: Classifier-free guidance of these.
        eta: 0 is DDIM; 1 with all timesteps is DDPM.
        clip_skip: Captions and prompts are read this many layers before CLIP's last.
        top: Training images that the page shows for each query.
        groups: Columns whose shares are shown; none is all that group.
        title: Title of the page.
    """

    model: str = ""
    base: str = ""
    images: str = ""
    queries: tuple[Mapping[str, Any], ...] = ()
    regions: tuple[Mapping[str, Any], ...] = ()
    method: tuple[str, ...] = (DEFAULT_METHOD,)
    settings: Mapping[str, Any] | None = None
    quick: bool = False
    lora: tuple[str, ...] = ()
    output: str = ""
    store: str = "cache"
    device: str = ""
    resize: bool = False
    caption: str = ""
    layout: str = ""
    one_caption: str | None = None
    trigger: str | None = None
    caption_lines: str = ""
    image_column: str = ""
    split: tuple[str, ...] = ()
    null: str = ""
    size: str = ""
    fit: str = "crop"
    pad_color: str = "white"
    exif: str = "apply"
    alpha: str = "white"
    buckets: Mapping[str, Any] | None = None
    on_error: str = "stop"
    seed: int = 0
    sampling_steps: int = 50
    guidance: float = 2.0
    eta: float = 0.0
    clip_skip: int = 0
    top: int = 20
    groups: tuple[str, ...] = ()
    title: str = "Where did these images come from?"


def closest(name: str, names: Iterable[str]) -> str:
    """A hint at the name that was meant, or at all that there are."""
    known = list(names)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}."


def _typed(key: str, value: Any, default: Any, where: str) -> Any:
    """A value of the file in its key's type."""
    if key in _LISTS:
        each = _LISTS[key]
        listed = [value] if isinstance(value, each) else value
        if not isinstance(listed, list) or not all(isinstance(one, each) for one in listed):
            what = "mappings" if each is dict else "texts"
            raise ValueError(f"{where}: {key} takes a list of {what}; given {value!r}.")
        return tuple(listed)
    if key == "settings":
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: settings takes a mapping, such as {{unlearning.noise_samples: 500}}.")
        return dict(_flat(value))
    if key == "size":
        return size_text(value, f"{where}: size")
    if key == "buckets":
        return bucket_numbers(value, f"{where}: buckets")
    kind = str if key in _TEXTS else type(default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
        raise ValueError(f"{where}: {key} takes {names[kind]}; given {value!r}.")
    return value


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """`{a: {b: 1}}` as `a.b`: settings may be nested, as in a method's file."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def read_request(path: Path) -> dict[str, Any]:
    """The values of a YAML file.

    Raises:
        ValueError: There is no such file, it is no YAML mapping, or a key or a value is unknown.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"-c: there is no file {str(path)!r}.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no keys; write model, images, queries and method.")
    # YAML reads the bare key null, and the bare value, as nothing.
    tree = {"null" if key is None else key: value for key, value in tree.items()}
    if "null" in tree and tree["null"] is None:
        tree["null"] = "none"
    defaults = {each.name: each.default for each in fields(Request)}
    for key in tree:
        if key in _RECORDED:
            continue
        if key not in defaults:
            raise ValueError(f"{path}: there is no key {key!r}; {closest(str(key), defaults)}")
    values = {key: _typed(key, value, defaults[key], str(path)) for key, value in tree.items() if key not in _RECORDED}
    for query in values.get("queries", ()):
        _check_entry(query, "queries", ("image", "prompt"), path)
        if not query.get("image") and not query.get("prompt"):
            raise ValueError(f"{path}: a query has an image, a prompt, or both; given {query!r}.")
    for region in values.get("regions", ()):
        _check_entry(region, "regions", ("of", "box", "mask"), path)
        if "of" not in region:
            raise ValueError(f"{path}: a region says what it is a part `of`; given {region!r}.")
    return values


def _check_entry(entry: Mapping[str, Any], what: str, keys: Sequence[str], path: Path) -> None:
    for key, value in entry.items():
        if key not in keys:
            raise ValueError(f"{path}: {what} have no key {key!r}; {closest(str(key), keys)}")
        if key != "box" and not isinstance(value, str):
            raise ValueError(f"{path}: {key} of {what} takes a text; given {value!r}.")


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words; values as in YAML.

    Raises:
        ValueError: A word is no `key=value`, or a value is no YAML.
    """
    import yaml

    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set takes key=value, such as unlearning.noise_samples=500; given {word!r}.")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {key.strip()}: {value!r} is no value: {' '.join(str(error).split())}.") from error
    return settings


def _place(name: str) -> str:
    """A path on disk as seen from everywhere; a hub id or a packaged name as it is."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def _hash(path: str) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def completed(request: Request, with_methods: bool = True) -> Request:
    """The request with paths as seen from everywhere and a folder of its own where none is named.

    Raises:
        ValueError: Something that every run needs is missing, or a file is.
    """
    for key, flag in (("model", "--model"), ("images", "--images")):
        if not getattr(request, key):
            raise ValueError(f"{flag} is missing: give it, or {key} in a -c file.")
    adapters = [parse_adapter(given) for given in request.lora]
    for adapter in adapters:
        check_place(adapter)
    if not request.queries:
        raise ValueError("--query is missing: give an image with its --prompt, or a --prompt alone to draw one.")
    for query in request.queries:
        if query.get("image") and not Path(query["image"]).is_file():
            raise ValueError(f"--query: there is no image file {query['image']!r}.")
    if request.top < 1:
        raise ValueError(f"--top must be at least 1; given {request.top}.")
    queries = tuple(
        {key: _place(value) if key == "image" else value for key, value in query.items()} for query in request.queries
    )
    regions = tuple(
        {key: _place(value) if key in ("of", "mask") else value for key, value in region.items()}
        for region in request.regions
    )
    methods = tuple(_place(name) if name.endswith((".yaml", ".yml")) else name for name in request.method)
    placed = replace(
        request,
        model=_place(request.model),
        base=_place(request.base) if request.base else "",
        lora=tuple(str(replace(adapter, place=_place(adapter.place))) for adapter in adapters),
        images=_place(request.images),
        null=request.null if request.null == "none" or split_named(request.null) else _place(request.null),
        queries=queries,
        regions=regions,
        method=methods,
    )
    return placed if placed.output else replace(placed, output=str(Path("wherefrom-runs") / _run_name(placed)))


def record_of(request: Request) -> dict[str, Any]:
    """What a run folder keeps of its request: everything that decides the results, and what its files hold."""
    default = Request()
    said = {
        each.name: _plain(getattr(request, each.name))
        for each in fields(Request)
        if each.name not in _FREE and getattr(request, each.name) not in (getattr(default, each.name), None)
    }
    said["method"] = list(request.method)
    files = [query["image"] for query in request.queries if query.get("image")]
    files += [region["mask"] for region in request.regions if region.get("mask")]
    files += [name for name in request.method if name.endswith((".yaml", ".yml"))]
    files += [str(path) for given in request.lora for path in local_files(parse_adapter(given))]
    stated = _stated(request)
    inputs = {path: _hash(path) for path in files if Path(path).is_file()}
    return {**said, "inputs": inputs, **({"stated": stated} if stated else {})}


def _stated(request: Request) -> dict[str, dict[str, Any]]:
    """What image files without a given prompt say of how they were made: the prompt that is used, and the rest."""
    from wherefrom.queries.generation_metadata import read_generation_metadata

    asked = [query["image"] for query in request.queries if query.get("image") and "prompt" not in query]
    found = {path: read_generation_metadata(path) for path in asked if Path(path).is_file()}
    return {path: each.as_json() for path, each in found.items() if each is not None}


def _plain(value: Any) -> Any:
    """A value as YAML holds it."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def _run_name(request: Request) -> str:
    """Readable, and another one for other settings: method, first query, hash of the request."""
    record = record_of(request)
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
    first = request.queries[0]
    name = Path(first["image"]).stem if first.get("image") else first["prompt"]
    method = Path(request.method[0]).stem if len(request.method) == 1 else "comparison"
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return "-".join(part for part in (method, words, "quick" if request.quick else "", digest) if part)


def claim(request: Request, write: bool) -> Path:
    """The run folder, if it is new or holds the same run.

    Args:
        request: A completed request.
        write: Leave the record there.

    Raises:
        ValueError: The folder holds another run; what differs is named.
        StorageError: The folder could not be written.
    """
    import yaml

    from wherefrom.runtime.artifacts import replacing

    folder, record = Path(request.output), record_of(request)
    path = folder / RECORD
    if path.is_file():
        there = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        lines = [
            f"{key} is {_shown(there.get(key))} there and {_shown(record.get(key))} here"
            for key in sorted(there.keys() | record.keys())
            if there.get(key) != record.get(key)
        ]
        if lines:
            raise ValueError(
                f"--output {folder} holds another run: {'; '.join(lines)}. Choose another --output, or leave it out: "
                "every run has a folder of its own."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} exists and holds no run of this command; choose another.")
    elif write:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
            head = f"# What this run was asked for; -c {RECORD} asks for it again.\n"
            temporary.write_text(head + text, encoding="utf-8")
    return folder


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)
