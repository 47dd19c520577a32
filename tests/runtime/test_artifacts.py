"""Artifacts are whole or absent, refuse other settings, and survive a full disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from wherefrom.runtime.artifacts import (
    MANIFEST,
    ArtifactMismatchError,
    StorageError,
    Store,
    canonical_json,
    check_identity,
    hash_file,
    identity_hash,
    read_manifest,
    replacing,
    write_json,
    write_manifest,
)

IDENTITY = {"size": 32, "styles": ["a", "b"], "share": 0.1, "none": None}


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)


def test_identity_hash_is_pinned() -> None:
    """If this moves, every stored artifact is lost."""
    assert identity_hash(IDENTITY) == "40181eb60e200b3d"
    assert identity_hash(dict(reversed(IDENTITY.items()))) == "40181eb60e200b3d"
    assert identity_hash({**IDENTITY, "styles": ("a", "b")}) == "40181eb60e200b3d"
    assert identity_hash({**IDENTITY, "share": 0.1 + 2**-56}) != "40181eb60e200b3d"


def test_canonical_json_is_exact_and_refuses_what_json_cannot_say() -> None:
    assert canonical_json({"b": 0.1, "a": [1, None, "é"]}) == '{"a":[1,null,"\\u00e9"],"b":0.1}'
    assert json.loads(canonical_json(1 / 3)) == 1 / 3
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_hash_file_reads_every_block(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(3 << 20))
    zeros = hash_file(path)
    path.write_bytes(bytes((3 << 20) - 1) + b"\1")
    assert hash_file(path) != zeros
    assert len(zeros) == 32


def test_mismatch_shows_every_differing_field_with_both_values(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"size": 32, "seed": 1, "same": "x", "old": True})
    with pytest.raises(ArtifactMismatchError) as caught:
        check_identity(tmp_path, {"size": 64, "seed": 2, "same": "x", "new": 0.5})
    message = str(caught.value)
    assert str(tmp_path) in message
    for line in (
        "size: on disk 32, asked for 64",
        "seed: on disk 1, asked for 2",
        "old: on disk True, asked for None",
        "new: on disk None, asked for 0.5",
    ):
        assert line in message
    assert "same" not in message
    check_identity(tmp_path, {"old": True, "same": "x", "seed": 1, "size": 32})


def test_provenance_is_recorded_and_not_compared(tmp_path: Path) -> None:
    write_manifest(tmp_path, IDENTITY, extra=3)
    manifest = read_manifest(tmp_path)
    assert manifest["extra"] == 3
    assert manifest["provenance"]["versions"]["torch"]
    write_json(tmp_path / MANIFEST, {**manifest, "provenance": {}})
    check_identity(tmp_path, IDENTITY)


def test_reading_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not an artifact"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text('{"identity": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        read_manifest(tmp_path)


def test_make_builds_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    calls = []

    def build(folder: Path) -> Mapping[str, Any]:
        calls.append(folder)
        (folder / "x").write_text("1")
        return {"count": 1}

    assert store.find("kind", IDENTITY) is None
    made = store.make("kind", IDENTITY, build)
    assert made == store.make("kind", IDENTITY, build) == store.find("kind", IDENTITY) == store.path("kind", IDENTITY)
    assert len(calls) == 1
    assert (made / "x").read_text() == "1"
    assert read_manifest(made)["count"] == 1
    assert not store.partial("kind", IDENTITY).exists()
    assert store.make("kind", {**IDENTITY, "size": 33}, build) != made
    assert len(calls) == 2


def test_find_refuses_a_folder_whose_manifest_says_otherwise(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_manifest(store.path("kind", IDENTITY), {**IDENTITY, "size": 64})
    with pytest.raises(ArtifactMismatchError, match="size: on disk 64, asked for 32"):
        store.find("kind", IDENTITY)


def test_what_killed_writes_left_is_cleared_when_an_artifact_is_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def build(folder: Path) -> None:
        (folder / "deep").mkdir()
        for left in (folder / ".pixels.npy.123.tmp", folder / "deep" / ".a.json.4.tmp"):
            left.write_text("half")
        (folder / "kept.tmp").write_text("the user's")

    folder = store.make("images", IDENTITY, build)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["kept.tmp", MANIFEST]


def test_an_interrupted_build_is_absent_and_resumes_from_its_parts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    result: list[list[str]] = []

    def build(folder: Path) -> None:
        result.append(sorted(path.name for path in folder.iterdir()))
        for name in ("a", "b", "c"):
            if len(result) == 1 and name == "c":
                raise KeyboardInterrupt
            (folder / name).write_text(name)

    with pytest.raises(KeyboardInterrupt):
        store.make("kind", IDENTITY, build)
    assert store.find("kind", IDENTITY) is None
    made = store.make("kind", IDENTITY, build)
    assert result == [[], ["a", "b"]]
    assert sorted(path.name for path in made.iterdir()) == ["a", "b", "c", MANIFEST]


def test_replacing_shows_readers_the_old_or_the_new_file_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with replacing(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with replacing(path) as temporary:
        temporary.write_text("new, half")
        assert path.read_text() == "old"
    assert path.read_text() == "new, half"
    assert list(path.parent.iterdir()) == [path]


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    done = run(
        """
        import os, signal, sys
        from pathlib import Path
        from wherefrom.runtime.artifacts import replacing
        with replacing(Path(sys.argv[1])) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    import pyarrow as pa, pyarrow.parquet as pq
    from safetensors.numpy import save_file
    from wherefrom.data.image_set import write_image_set
    from wherefrom.runtime.artifacts import StorageError, Store, replacing, write_json

    root, writer = Path(sys.argv[1]), sys.argv[2]
    rng = np.random.default_rng(0)

    def images(folder, count):
        pixels = np.zeros((count, 32, 32, 3), np.uint8)
        write_image_set(folder, [str(i) for i in range(count)], [["x"]] * count, pixels, {})

    def plain(folder, count):
        with replacing(folder / "file") as temporary:
            temporary.write_bytes(bytes(3072 * count))

    def tensors(folder, count):
        with replacing(folder / "file") as temporary:
            save_file({"x": np.zeros(768 * count, np.float32)}, temporary)

    def table(folder, count):
        with replacing(folder / "file") as temporary:
            pq.write_table(pa.table({"x": rng.random(384 * count)}), temporary)

    def text(folder, count):
        write_json(folder / "file", ["x" * 3072] * count)

    write = {"images": images, "plain": plain, "tensors": tensors, "table": table, "text": text}[writer]
    store = Store(root)
    earlier = store.make("kind", {"count": 2}, lambda folder: write(folder, 2))
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    try:
        store.make("kind", {"count": 200}, lambda folder: write(folder, 200))
    except StorageError as error:
        assert str(store.partial("kind", {"count": 200})) in str(error), error
        assert "File too large" in str(error) and "Free some space" in str(error), error
    else:
        sys.exit("no error")
    assert store.find("kind", {"count": 2}) == earlier
    assert before == {path.name: path.read_bytes() for path in earlier.iterdir()}
    assert store.find("kind", {"count": 200}) is None
    left = [path.name for path in store.partial("kind", {"count": 200}).iterdir() if path.name.endswith(".tmp")]
    assert not left, left
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.make("kind", {"count": 200}, lambda folder: write(folder, 200))
    print("ok")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file-size limit")
@pytest.mark.parametrize("writer", ["plain", "text", "images", "table", "tensors"])
def test_a_full_disk_is_a_storage_error_and_costs_nothing_that_was_done(tmp_path: Path, writer: str) -> None:
    done = run(FULL_DISK, tmp_path, writer)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_errors_of_reading_are_not_called_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Store(tmp_path).make("kind", IDENTITY, lambda folder: {"x": (folder / "missing").read_text()})
    assert not isinstance(caught.value, StorageError)
