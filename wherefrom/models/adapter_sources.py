"""Where adapters come from: files, folders and hub ids with weights, and what lies beside a pipeline.

Importing this loads neither PyTorch nor a library of models: the command line checks names by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LORA = "pytorch_lora_weights.safetensors"
_PEFT, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_USUAL = (LORA, _PEFT)
_PICKLED = tuple(f"{Path(name).stem}{suffix}" for name in _USUAL for suffix in (".bin", ".pt", ".ckpt"))
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHT = re.compile(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
_HUB = re.compile(r"[\w.-]+/[\w.-]+(?:/[\w. -]+)*", re.ASCII)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that is asked for.

    Attributes:
        place: A file, a folder or a hub id: `OWNER/NAME` or `OWNER/NAME/FILE.safetensors`.
        weight: How strongly it counts.

    Raises:
        ValueError: The place is empty, or the weight is zero or no number.
    """

    place: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.place.strip():
            raise ValueError("lora: a name is empty; give a file, a folder or a hub id.")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"lora: {self.place!r} at weight {self.weight} has no effect; leave it out, or weigh it.")

    def __str__(self) -> str:
        return self.place if self.weight == 1 else f"{self.place}:{self.weight:g}"


AdapterInput = str | Path | tuple[str | Path, float] | AdapterSource


def parse_adapter(given: AdapterInput) -> AdapterSource:
    """An adapter from `FILE`, `FILE:0.8`, or a pair of both.

    What follows the last colon is a weight only where it is a number and no file is called so as a whole.

    Raises:
        ValueError: The place is empty, the weight is zero or no number, or both readings are files.
    """
    if isinstance(given, AdapterSource):
        return given
    if isinstance(given, tuple):
        pair: tuple[Any, ...] = given
        if len(pair) != 2 or isinstance(pair[1], bool) or not isinstance(pair[1], int | float):
            raise ValueError(f"lora: {given!r} is no pair of a file and a weight.")
        return AdapterSource(str(pair[0]), float(pair[1]))
    text = str(given)
    found = None if isinstance(given, Path) else _WEIGHT.fullmatch(text)
    if found is None:
        return AdapterSource(text)
    if Path(text).exists():
        if Path(found[1]).exists():
            raise ValueError(
                f"lora: {text!r} is a file, and {found[1]!r} with a weight is another: rename one of them."
            )
        return AdapterSource(text)
    return AdapterSource(found[1], float(found[2]))


def is_hub_id(place: str) -> bool:
    """Whether a place could be a hub id, and not one on disk."""
    looks_local = place.startswith((".", "/", "~")) or "\\" in place or re.match(r"[A-Za-z]:", place)
    return not looks_local and _HUB.fullmatch(place) is not None and ".." not in place.split("/")


def check_place(source: AdapterSource) -> None:
    """Refuses a place where nothing is, before anything long.

    Raises:
        ValueError: There is no such file or folder and no hub id looks so, or it is a pickle.
    """
    path = Path(source.place)
    if path.is_file():
        _check_file(path)
    elif not path.is_dir() and not is_hub_id(source.place):
        raise ValueError(
            f"lora: there is no file {source.place!r}; give a .safetensors file, a folder that holds one, or a hub id "
            "(OWNER/NAME or OWNER/NAME/FILE.safetensors)."
        )


def _check_file(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise ValueError(
            f"lora: {path} is a pickle, and nothing is unpickled here. Save it as safetensors where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')."
        )
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"lora: {path} is no .safetensors file, the only kind of adapter that is read.")


def file_of(source: AdapterSource) -> Path:
    """The file of an adapter; one of the hub is loaded or found in its cache.

    Raises:
        ValueError: There is none, or several, or it is a pickle.
    """
    check_place(source)
    path = Path(source.place)
    if path.is_file():
        return path
    if path.is_dir():
        return _only(path, [each.name for each in sorted(path.iterdir()) if each.is_file()], source.place)
    return _from_hub(source.place)


def local_files(source: AdapterSource) -> list[Path]:
    """The files of an adapter on disk, for a record of what they hold; none of one of the hub.

    Raises:
        ValueError: A folder holds no adapter, or several.
    """
    if not Path(source.place).exists():
        return []
    file = file_of(source)
    settings = file.with_name(SETTINGS)
    return [file, *([settings] if file.name == _PEFT and settings.is_file() else [])]


def _only(folder: Path, names: Sequence[str], place: str) -> Path:
    return folder / _only_name(names, place)


def _only_name(names: Iterable[str], place: str) -> str:
    """The one adapter among the names of a folder's files."""
    listed = list(names)
    found = [name for name in listed if name.lower().endswith(".safetensors")]
    usual = [name for name in _USUAL if name in found]
    if len(usual) == 1:
        return usual[0]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(found[:6])
        raise ValueError(f"lora: {place} holds {len(found)} .safetensors files ({shown}); name the one that is meant.")
    pickled = [name for name in listed if name in _PICKLED]
    if pickled:
        _check_file(Path(place) / pickled[0])
    raise ValueError(f"lora: {place} holds no .safetensors file.")


def _from_hub(place: str) -> Path:
    """A file of the hub."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, name, *inside = place.split("/")
    unreachable = (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError)
    try:
        if inside:
            return Path(hf_hub_download(f"{owner}/{name}", "/".join(inside)))
        try:
            names = HfApi().list_repo_files(f"{owner}/{name}")
        except unreachable:
            kept = Path(snapshot_download(f"{owner}/{name}", local_files_only=True))
            return _only(kept, [each.name for each in sorted(kept.iterdir())], place)
        chosen = _only_name([each for each in names if "/" not in each], place)
        if chosen == _PEFT and SETTINGS in names:
            hf_hub_download(f"{owner}/{name}", SETTINGS)
        return Path(hf_hub_download(f"{owner}/{name}", chosen))
    except unreachable as error:
        raise ValueError(
            f"lora: {place!r} is neither a file here nor one of the hub that could be loaded; give a .safetensors "
            "file, or a hub id that is cached or within reach."
        ) from error


def files_beside(folder: Path, but: Iterable[Path] = ()) -> list[Path]:
    """Files of tensors at the top of a pipeline's folder, the usual adapter first.

    Args:
        folder: The folder.
        but: Files that are loaded anyway.

    Raises:
        ValueError: An adapter there is a pickle.
    """
    if not folder.is_dir():
        return []
    taken = {path.resolve() for path in but}
    for name in _PICKLED:
        if (folder / name).is_file() and not (folder / name).with_suffix(".safetensors").is_file():
            _check_file(folder / name)
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file() and path.resolve() not in taken]
    return sorted(found, key=lambda path: path.name != LORA)
