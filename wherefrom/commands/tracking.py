"""Logging to W&B: configuration, metrics, ranked images and artifacts with their lineage.

Lineage follows the manifests: every artifact carries its identity, is named by its hash, and lists the artifacts it was
built from. Large files are added by reference and not uploaded, unless requested.
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
from wherefrom.runtime.ranges import check_ranges

if TYPE_CHECKING:
    import wandb

RESULTS = ("retrieval.json", "counterfactual.json", "lds.json", "customized.json")
_ROWS = ("rows", "lines")


@dataclass(frozen=True)
class Tracking:
    """W&B settings of a run.

    Attributes:
        project: W&B project; empty disables logging. WANDB_MODE=offline logs to disk, for `wandb sync`.
        entity: W&B entity; None uses the default.
        name: Name of the run; None uses its folder's.
        upload: Upload the files of artifacts; otherwise only path, size and hash are logged.
        top: Number of training images per query in the table.
    """

    project: str = ""
    entity: str | None = None
    name: str | None = None
    upload: bool = False
    top: int = 10

    def __post_init__(self) -> None:
        check_ranges(top=self.top)


def artifact_of(folder: Path, kind: str, inputs: Sequence[str] = (), upload: bool = False) -> wandb.Artifact:
    """Creates a W&B artifact of a folder, named by kind and hash of its identity (or by the folder, if it has none).

    Args:
        folder: The folder.
        kind: Type of the artifact.
        inputs: Names of the artifacts that it was built from.
        upload: Upload its files; otherwise they are added by reference.
    """
    import wandb

    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    identity = manifest.get("identity")
    name = folder.name if identity is None else identity_hash(identity)
    metadata = {"identity": identity, "provenance": manifest.get("provenance"), "inputs": list(inputs)}
    artifact = wandb.Artifact(f"{kind}-{name}", type=kind, metadata=metadata)
    if upload:
        artifact.add_dir(str(folder))
    else:
        artifact.add_reference(folder.resolve().as_uri())
    return artifact


def log_lineage(run: wandb.Run, folder: Path, kind: str, inputs: Mapping[Path, str], upload: bool) -> None:
    """Logs a folder as the run's output artifact, and the artifacts it was built from as inputs.

    Offline runs cannot declare inputs: they are logged as artifacts, and still named in the output's metadata.

    Args:
        run: The W&B run.
        folder: Output folder of the run.
        kind: Type of the output artifact.
        inputs: Folder -> type of each input artifact.
        upload: See `artifact_of`.
    """
    used = [artifact_of(path, each, upload=upload) for path, each in inputs.items()]
    for artifact in used:
        if run.offline:
            run.log_artifact(artifact)
        else:
            run.use_artifact(artifact)
    run.log_artifact(artifact_of(folder, kind, [artifact.name for artifact in used], upload))


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
    """Logs a finished run to W&B; does nothing without a project.

    Args:
        tracking: W&B settings.
        job: Name of the command, the job type of the run.
        folder: Run folder.
        config: Configuration of the command.
        store: Store whose artifacts the run used or built.
        results: Scores of its queries, if it attributed any.
        images: Training images, for the table of ranked images.
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
                values = [scores.facts[name] for scores in results if name in scores.facts]
                run.summary[f"mean {name}"] = float(np.mean(values))
        touched = {} if store is None else {path: path.parent.name for path in store.touched}
        log_lineage(run, folder, job, touched, tracking.upload)
    finally:
        run.finish()


def ranked(results: Sequence[Scores], images: ImageSet, top: int) -> wandb.Table:
    """Builds a table of the first images of each query, with generated and training image.

    Args:
        results: Scores of the queries.
        images: The training images.
        top: Number of images per query.
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
    """Logs the rows of a result as a table, and its numbers to the summary."""
    import wandb

    record = content if isinstance(content, dict) else {}
    rows: list[dict[str, Any]] = next((record[key] for key in _ROWS if key in record), [])
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
    """Flattens nested dictionaries and lists to one row: {"loss": {"own": [1, 2]}} becomes {"loss.own.0": 1, …}."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, list):
            flat |= _flat({str(place): each for place, each in enumerate(value)}, f"{name}.")
        else:
            flat[name] = value
    return flat
