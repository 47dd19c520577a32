"""Artifacts: folders with a manifest, written atomically and reused only if their identity matches.

Each artifact holds a `manifest.json` beside `.safetensors`, `.parquet` and `.npy` files. The manifest's *identity* is
what must match for the artifact to be reused; its *provenance* is only recorded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from filelock import FileLock

MANIFEST = "manifest.json"
# Of a message about settings that differ: levels of dotted keys, lines for one list, characters of a value.
_DEPTH, _LINES, _LONG = 8, 5, 80
_TEMPORARY = ".tmp"
_WRITE_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS}
Identity = Mapping[str, Any]


class ArtifactMismatchError(ValueError):
    """Raised when an artifact on disk was built with other settings than those requested."""


class StorageError(OSError):
    """Raised when writing fails (no space left, file too large, no permission); completed parts are kept."""


def canonical_json(value: Any) -> str:
    """Serialises to JSON with sorted keys and exact floats: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def identity_hash(identity: Identity) -> str:
    """Hashes an identity to sixteen hexadecimal digits."""
    return hashlib.blake2b(canonical_json(identity).encode(), digest_size=8).hexdigest()


def hash_file(path: Path) -> str:
    """Computes the BLAKE2b hash of a file's bytes (32 hexadecimal digits)."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def provenance() -> dict[str, Any]:
    """Collects git commit, library versions and hardware: recorded with each artifact, never compared."""
    versions = {}
    for name in ("wherefrom", "torch", "diffusers", "transformers", "lightning", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "git_commit": commit,
        "versions": versions,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Converts a failed write below `path` into a `StorageError` that names it and says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno not in _WRITE_ERRORS:
            raise
        raise StorageError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or choose another folder, then run "
            "the same "
            "command again: finished parts are kept and it goes on from them."
        ) from error
    except Exception as error:
        # safetensors reports I/O failures as its own exception type, which is not an OSError.
        if type(error).__name__ != "SafetensorError" or "os error" not in str(error):
            raise
        raise StorageError(
            f"Cannot write {path}: {error}. Free some space or choose another folder, then run the same command again: "
            "finished parts are kept and it goes on from them."
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path and renames it to `path` if the block succeeds, so no reader sees a partial file.

    Raises:
        StorageError: The file could not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _clear_killed_writes(folder: Path) -> None:
    """Deletes what killed writes left below a folder that nobody else is writing to."""
    for temporary in folder.rglob(f".*{_TEMPORARY}"):
        if temporary.is_file():
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically.

    Raises:
        StorageError: The file could not be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_manifest(folder: Path, identity: Identity, **extra: Any) -> None:
    """Writes `manifest.json`: the identity, the provenance and extra entries.

    Raises:
        StorageError: The file could not be written.
    """
    write_json(folder / MANIFEST, {"identity": dict(identity), "provenance": provenance(), **extra})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads `manifest.json` of an artifact.

    Raises:
        FileNotFoundError: The folder holds no manifest, so it is not a complete artifact.
        ValueError: The manifest is not valid JSON.
    """
    path = folder / MANIFEST
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds no {MANIFEST}: it is not an artifact of wherefrom, or not whole."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Delete the folder and make it again.") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise ValueError(f"{path} is damaged: it names no identity. Delete the folder and make it again.")
    result: dict[str, Any] = manifest
    return result


def check_identity(folder: Path, identity: Identity) -> None:
    """Raises if an artifact was built with another identity.

    Raises:
        ArtifactMismatchError: Names every setting that differs, with both values.
    """
    refuse_differences(folder, read_manifest(folder)["identity"], identity)


def refuse_differences(folder: Path, stored: Identity, wanted: Identity) -> None:
    """Refuses what is in a folder where it was made with other settings.

    Raises:
        ArtifactMismatchError: Names every setting that differs, with both values.
    """
    lines = differences(stored, json.loads(canonical_json(dict(wanted))))
    if lines:
        raise ArtifactMismatchError(
            f"{folder} was made with other settings:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nChoose another folder or restore the settings."
        )


def differences(stored: Any, wanted: Any, key: str = "") -> list[str]:
    """One line for each setting that differs, by its dotted key; long values are shortened.

    Args:
        stored: JSON values on disk.
        wanted: JSON values that are asked for.
        key: Dotted key of both.
    """
    if stored == wanted:
        return []
    if isinstance(stored, dict) and isinstance(wanted, dict) and key.count(".") < _DEPTH:
        return [
            line
            for name in sorted(stored.keys() | wanted.keys())
            for line in differences(stored.get(name), wanted.get(name), f"{key}.{name}" if key else name)
        ]
    if isinstance(stored, list) and isinstance(wanted, list):
        pairs = list(zip_longest(stored, wanted))
        lines = [line for place, (a, b) in enumerate(pairs) for line in differences(a, b, f"{key}.{place}")]
        more = len(lines) - _LINES
        return lines if more <= 0 else [*lines[:_LINES], f"{key}: and {more} more"]
    return [f"{key}: on disk {_shortened(stored)}, asked for {_shortened(wanted)}"]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[: _LONG // 2]} … {text[-_LONG // 4 :]}"


class Store:
    """Folder of artifacts, looked up by kind and hash of identity.

    Args:
        root: Where the artifacts live; created if missing.

    Attributes:
        touched: Folders of the artifacts that were found or built so far -> whether they were built: a run's lineage.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.touched: dict[Path, bool] = {}

    def path(self, kind: str, identity: Identity) -> Path:
        """Returns the folder where the artifact with this identity is or will be."""
        return self.root / kind / identity_hash(identity)

    def find(self, kind: str, identity: Identity) -> Path | None:
        """Returns the artifact's folder if it is complete, else None."""
        folder = self.path(kind, identity)
        if not (folder / MANIFEST).exists():
            return None
        check_identity(folder, identity)
        self.touched.setdefault(folder, False)
        return folder

    def partial(self, kind: str, identity: Identity) -> Path:
        """Returns the folder of an unfinished artifact, from which an interrupted run resumes."""
        folder = self.path(kind, identity)
        return folder.with_name(folder.name + ".partial")

    @contextmanager
    def lock(self, kind: str, identity: Identity) -> Iterator[None]:
        """Locks an artifact while one run builds it; another run that needs it waits, then finds it.

        A lock is released when its process ends. It is reentrant within a process.

        Raises:
            StorageError: The lock file could not be written.
        """
        file = self.root / ".locks" / f"{kind}-{identity_hash(identity)}"
        with storage_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(file, is_singleton=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def make(self, kind: str, identity: Identity, build: Callable[[Path], Mapping[str, Any] | None]) -> Path:
        """Returns the artifact's folder, building it first if it is missing.

        `build` receives the partial folder (which may hold files of an interrupted run) and may return extra manifest
        entries. The folder is renamed when complete.

        Raises:
            StorageError: The artifact could not be written; the partial folder stays for the next run.
        """
        result = self.find(kind, identity)
        if result is not None:
            return result
        folder, partial = self.path(kind, identity), self.partial(kind, identity)
        with self.lock(kind, identity), storage_errors(partial):
            result = self.find(kind, identity)
            if result is not None:
                return result
            partial.mkdir(parents=True, exist_ok=True)
            extra = build(partial) or {}
            write_manifest(partial, identity, **extra)
            _clear_killed_writes(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.replace(folder)
        self.touched[folder] = True
        return folder
