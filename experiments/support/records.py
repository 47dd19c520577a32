"""Records of results: JSON that is written after every row, found again by the next run, and gone on with.

Records that are committed hold the names of the release that wrote them, so a row is looked up by those: settings by
their stable names, and files by what they say rather than by how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from wherefrom.runtime.artifacts import identity_hash
from wherefrom.runtime.stable_names import SETTINGS, stable

# The file of an experiment when a committed record was written -> what `experiment_identity` says of it now.
_WRITTEN_WITH = {"bf6ca0065e16d235f30b90e39047725d": "6946d4cd6fb890a3"}


def read_record(path: Path) -> dict[str, Any]:
    """What earlier runs found; empty if there were none."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def plain_options(options: Mapping[str, Any], *left_out: str) -> dict[str, Any]:
    """A script's options as JSON holds them, without some."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in options.items()
        if name not in left_out
    }


def recorded_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings such as `unlearning.noise_samples` by the names that records hold for ever."""
    first = {now: name for name, now in SETTINGS.items()} | {"images": "pictures"}
    return {".".join(first.get(part, part) for part in name.split(".")): value for name, value in settings.items()}


def experiment_identity(path: Path) -> str:
    """Hash of what decides a training in an experiment file: comments, loggers and folders do not."""
    content = yaml.safe_load(path.read_text())
    deciding = {name: stable(content[name]) for name in ("seed_everything", "model", "data")}
    return identity_hash({**deciding, "max_steps": content["trainer"]["max_steps"]})


def recorded_experiment(written: str) -> str:
    """The experiment's identity in a record, where earlier releases wrote a hash of the file."""
    return _WRITTEN_WITH.get(written, written)
