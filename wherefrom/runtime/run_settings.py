"""Settings of a run, kept in its folder from the start: another run is refused before any work, not after it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from wherefrom.runtime.artifacts import (
    MANIFEST,
    canonical_json,
    read_manifest,
    refuse_differences,
    replacing,
)
from wherefrom.runtime.checked_files import read_object

SETTINGS = "settings.json"
_KEPT = "Delete it: what the run finished is kept"


def plain(value: Any) -> Any:
    """Settings as JSON holds them: data classes as dictionaries, paths as text, numbers as they are.

    Paths that exist are written in full, so that one file named in two ways is one setting.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        return str(Path(value).resolve()) if "/" in value and len(value) < 1000 and Path(value).exists() else value
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def check_settings(folder: Path, settings: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a folder that holds a run with other settings.

    Methods may join or leave a run: only those of both are compared. A folder of an earlier release holds no record of
    its settings; its methods' identities are compared with their manifests.

    Args:
        folder: The run folder.
        settings: What decides the run's results, as `plain` gives it.
        methods: Name of each method -> its identity.

    Raises:
        ArtifactMismatchError: Names every setting that differs, with both values.
    """
    file = folder / SETTINGS
    if not file.exists():
        _check_manifests(folder, methods)
        return
    stored = read_object(file, remedy=_KEPT)
    known = stored.pop("methods", {})
    wanted = json.loads(canonical_json({**settings}))
    of_both, settings_of_both = known.keys() & methods.keys(), stored.keys() & wanted.keys()
    refuse_differences(
        folder,
        {name: stored[name] for name in settings_of_both} | {"methods": {name: known[name] for name in of_both}},
        {name: wanted[name] for name in settings_of_both} | {"methods": {name: methods[name] for name in of_both}},
    )


def record_settings(folder: Path, settings: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the settings into the run folder; methods of earlier runs in it stay.

    Raises:
        StorageError: The file could not be written.
    """
    file = folder / SETTINGS
    earlier = read_object(file, ("methods",), _KEPT)["methods"] if file.exists() else {}
    text = canonical_json({**settings, "methods": {**earlier, **methods}})
    if not file.exists() or file.read_text() != text:
        with replacing(file) as temporary:
            temporary.write_text(text)


def _check_manifests(folder: Path, methods: Mapping[str, Mapping[str, Any]]) -> None:
    for name, identity in methods.items():
        # One method's run is the folder itself, several have a folder each.
        place: Path = next((each for each in (folder / name, folder) if (each / MANIFEST).exists()), folder)
        if (place / MANIFEST).exists():
            stored = read_manifest(place)["identity"]
            if "attributor" in stored:
                refuse_differences(place, {"attributor": stored["attributor"]}, {"attributor": identity})
