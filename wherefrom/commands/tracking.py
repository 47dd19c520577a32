"""What a run did, in wandb: its configuration, numbers, ranked images and artifacts, with where they came from.

Lineage is that of our manifests: every artifact carries its identity, is named by its hash, and lists the names of what
it was made from. Large files are named by reference, not uploaded, unless asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wherefrom.data.image_set import ImageSet
from wherefrom.queries.types import Scores
from wherefrom.runtime.artifacts import MANIFEST, Store, identity_hash, read_manifest

if TYPE_CHECKING:
    import wandb

RESULTS = ("retrieval.json", "counterfactual.json", "lds.json", "customized.json")
_ROWS = ("rows", "lines")


@dataclass(frozen=True)
class Tracking:
    """Where wandb keeps a run.

    Attributes:
        project: wandb's project; empty keeps nothing. WANDB_MODE=offline keeps it on disk, for `wandb sync`.
        entity: wandb's entity; None is the user's own.
        name: The run's name; None takes its folder's.
        upload: Upload the artifacts' files; else wandb knows them by path, size and hash.
        top: Training images of each query in the table.
    """

    project: str = ""
    entity: str | None = None
    name: str | None = None
    upload: bool = False
    top: int = 10


def artifact_of(folder: Path, kind: str, inputs: Sequence[str] = (), upload: bool = False) -> wandb.Artifact:
    """A folder as wandb's artifact, named by kind and hash of its identity (or by the folder, where it has none).

    Args:
        folder: The folder.
        kind: wandb's type.
        inputs: Names of the artifacts that it was made from.
        upload: Upload its files; else they are named by reference.
    """
    import wandb

    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    identity = manifest.get("identity")
    name = folder.name if identity is None else identity_hash(identity)
    metadata = {"identity": identity, "provenance": manifest.get("provenance"), "inputs": list(inputs)}
    made = wandb.Artifact(f"{kind}-{name}", type=kind, metadata=metadata)
    if upload:
        made.add_dir(str(folder))
    else:
        made.add_reference(folder.resolve().as_uri())
    return made


def log_lineage(run: wandb.Run, folder: Path, kind: str, inputs: Mapping[Path, str], upload: bool) -> None:
    """A folder as the run's output, and what it was made from as its inputs.

    Offline wandb takes no inputs: they are logged as artifacts, and named in the output's metadata all the same.

    Args:
        run: wandb's run.
        folder: What the run made.
        kind: Its type.
        inputs: Folder -> type of what it was made from.
        upload: See `artifact_of`.
    """
    known = [artifact_of(path, each, upload=upload) for path, each in inputs.items()]
    for artifact in known:
        if run.offline:
            run.log_artifact(artifact)
        else:
            run.use_artifact(artifact)
    run.log_artifact(artifact_of(folder, kind, [artifact.name for artifact in known], upload))


def track(
    tracking: Tracking,
    *,
    job: str,
    folder: Path,
    config: Mapping[str, Any],
    store: Store | None = None,
    results: Sequence[Scores] = (),
    images: ImageSet | None = None,
) -> None:
    """Logs a finished run of `evaluate.py`; nothing where no project is named.

    Args:
        tracking: Where to.
        job: The command.
        folder: Its run folder.
        config: The command line's settings.
        store: What it found or made on its way.
        results: Scores of its queries, where it attributed any.
        images: The training images, for the table of ranked ones.
    """
    if not tracking.project:
        return
    import wandb

    run = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        name=tracking.name or folder.name,
        job_type=job,
        dir=str(folder),
        config={"command": job, **json.loads(json.dumps(config, default=str))},
    )
    try:
        for name in RESULTS:
            if (folder / name).exists():
                _log_result(run, Path(name).stem, json.loads((folder / name).read_text()))
        if results and images is not None:
            run.log({"ranked": ranked(results, images, tracking.top)})
            facts = {name for scores in results for name in scores.facts}
            for name in sorted(facts):
                result = [scores.facts[name] for scores in results if name in scores.facts]
                run.summary[f"mean {name}"] = float(np.mean(result))
        touched = {} if store is None else {path: path.parent.name for path in store.touched}
        log_lineage(run, folder, job, touched, tracking.upload)
    finally:
        run.finish()


def ranked(results: Sequence[Scores], images: ImageSet, top: int) -> wandb.Table:
    """A row for each of the first images of each query, with both images.

    Args:
        results: Scores of the queries.
        images: The training images.
        top: How many of each query.
    """
    import wandb

    where = {name: index for index, name in enumerate(images.ids)}
    shown = ("query", "prompt", "generated", "rank", "image", "score", "training image", "caption", "license")
    columns: list[str | int] = list(shown)
    table = wandb.Table(columns=columns)
    licenses = images.columns.get("license")
    for scores in results:
        generated = wandb.Image(scores.query.pixels)
        for rank, (name, score) in enumerate(scores.top(top), start=1):
            row = where[name]
            image = wandb.Image(np.asarray(images.pixels[row]))
            terms = licenses[row] if licenses else "unknown"
            table.add_data(
                scores.query.name,
                scores.query.prompt,
                generated,
                rank,
                name,
                score,
                image,
                images.captions[row][0],
                terms,
            )
    return table


def _log_result(run: wandb.Run, name: str, content: Any) -> None:
    """Rows of a result as a table; its single numbers in the summary."""
    import wandb

    told = content if isinstance(content, dict) else {}
    rows: list[dict[str, Any]] = next((told[key] for key in _ROWS if key in told), [])
    flat = [_flat(row) for row in rows]
    if flat:
        columns: list[str | int] = list(dict.fromkeys(key for row in flat for key in row))
        run.log({name: wandb.Table(columns=columns, data=[[row.get(str(key)) for key in columns] for row in flat])})
    for row in flat:
        method = str(row.get("method", row.get("ranking", "")))
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                run.summary["/".join(part for part in (name, method, key) if part)] = value


def _flat(row: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested dictionaries and short lists as one row: {"loss": {"own": [1, 2]}} becomes {"loss.own.0": 1, …}."""
    result: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            result |= _flat(value, f"{name}.")
        elif isinstance(value, list):
            result |= _flat({str(place): each for place, each in enumerate(value)}, f"{name}.")
        else:
            result[name] = value
    return result
