"""clip-retrieval's layout: what others read there, and what comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.made import RANKER, embeddings, names, opened, table, unit
from wherefrom.index import build_index, catalog_rows
from wherefrom.interchange.clip_retrieval import read_clip_retrieval, write_clip_retrieval
from wherefrom.runtime.artifacts import ArtifactMismatchError, Store
from wherefrom.runtime.distributed import Runner

COUNT = 230
IDS, VECTORS, TRAINING = names(COUNT), unit(COUNT), {"pictures": "tiny"}


def write(folder: Path, part: int = 20, **further) -> Path:
    write_clip_retrieval(
        folder, rows=table(IDS), embeddings=embeddings(VECTORS), training=TRAINING, part=part, **further
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout(tmp_path: Path) -> None:
    write(tmp_path)
    vectors = sorted((tmp_path / "img_emb").iterdir())
    tables = sorted((tmp_path / "metadata").iterdir())
    # Padded: readers sort by name.
    assert [path.name for path in vectors] == [f"img_emb_{number:02d}.npy" for number in range(12)]
    assert [path.name for path in tables] == [f"metadata_{number:02d}.parquet" for number in range(12)]
    joined = np.concatenate([np.load(path) for path in vectors])
    assert joined.dtype == np.float16
    assert np.array_equal(joined, VECTORS.astype(np.float16))
    metadata = pa.concat_tables([pq.read_table(path) for path in tables]).to_pydict()
    assert metadata["image_path"] == metadata["id"] == IDS
    assert metadata["caption"] == [f"caption of {name}" for name in IDS]
    assert metadata["license"] == [f"licence {name}" for name in IDS]


def test_one_part_is_called_0(tmp_path: Path) -> None:
    rows = catalog_rows(["a", "b"], [["one", "two"], []], {"file_name": ["a.png", "b.png"]})
    write_clip_retrieval(tmp_path, rows=rows, embeddings=embeddings(unit(2)), training=TRAINING, dtype="float32")
    assert np.array_equal(np.load(tmp_path / "img_emb" / "img_emb_0.npy"), unit(2))
    metadata = pq.read_table(tmp_path / "metadata" / "metadata_0.parquet").to_pydict()
    assert metadata["image_path"] == ["a.png", "b.png"]
    assert metadata["caption"] == ["one", ""]
    back, _ = read_clip_retrieval(tmp_path)
    assert back.to_pydict() == rows.to_pydict()


@pytest.mark.parametrize("part", [3, 7, COUNT, 10_000])
def test_what_is_written_comes_back_into_an_index(tmp_path: Path, part: int) -> None:
    rows, read = read_clip_retrieval(write(tmp_path / "out", part, dtype="float32"), RANKER)
    assert np.array_equal(read.vectors, VECTORS)
    assert read.ranker == RANKER
    assert rows.select(table(IDS).column_names).equals(table(IDS))
    store, runner = Store(tmp_path / "store"), Runner(torch.device("cpu"))
    back = opened(build_index(store, runner=runner, rows=rows, embeddings=read, training={"of": "read"}))
    direct = opened(
        build_index(store, runner=runner, rows=table(IDS), embeddings=embeddings(VECTORS), training={"of": "direct"})
    )
    queries = embeddings(unit(5, seed=3))
    for a, b in zip(back.search(queries, 9), direct.search(queries, 9), strict=True):
        assert a.images == b.images
        assert np.array_equal(a.scores, b.scores)
        assert a.rows["license"].to_pylist() == b.rows["license"].to_pylist()


def test_an_interrupted_writing_goes_on(tmp_path: Path) -> None:
    whole = contents(write(tmp_path / "whole"))

    def stop(done: int, total: int) -> None:
        if done == 100:
            raise KeyboardInterrupt

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        write(folder, progress=stop)
    with pytest.raises(ValueError, match="is not complete"):
        read_clip_retrieval(folder)
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
    assert len(stamps) == 10
    (folder / "metadata" / "metadata_04.parquet").unlink()  # killed between the two files of a part
    write(folder)
    kept = {path for path in stamps if "_04" not in path.name}
    assert all(path.stat().st_mtime_ns == stamps[path] for path in kept)
    again = contents(folder)
    assert {name: again[name] for name in again if name != "manifest.json"} == {
        name: whole[name] for name in whole if name != "manifest.json"
    }


def test_a_folder_of_another_tool(tmp_path: Path) -> None:
    vectors = unit(12).astype(np.float16)
    for number in range(12):  # more than nine parts, without padding: 10 comes after 9, not after 1
        for kind in ("img_emb", "metadata"):
            (tmp_path / kind).mkdir(exist_ok=True)
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", vectors[number : number + 1])
        columns = {
            "image_path": [f"{number}.jpg"],
            "caption": [None if number == 3 else f"text {number}"],
            "width": [7],
        }
        pq.write_table(pa.table(columns), tmp_path / "metadata" / f"metadata_{number}.parquet")
    with pytest.raises(ValueError, match="does not say which encoder"):
        read_clip_retrieval(tmp_path)
    rows, read = read_clip_retrieval(tmp_path, {"encoder": "ViT-B/32"})
    assert read.ranker == {"encoder": "ViT-B/32"}
    assert np.array_equal(read.vectors, vectors)
    assert rows["image"].to_pylist() == [f"{number}.jpg" for number in range(12)]
    assert rows["captions"].to_pylist() == [[f"text {number}"] if number != 3 else [""] for number in range(12)]
    assert rows["width"].to_pylist() == ["7"] * 12


def test_damage_is_refused(tmp_path: Path) -> None:
    def refused(message: str, **ranker) -> None:
        with pytest.raises(ValueError, match=message):
            read_clip_retrieval(tmp_path, **ranker)

    refused("must hold img_emb/img_emb_0.npy")
    write(tmp_path, 100)
    refused("not of", ranker={"encoder": "other"})
    vectors, metadata = tmp_path / "img_emb" / "img_emb_1.npy", tmp_path / "metadata" / "metadata_1.parquet"
    whole, rows = vectors.read_bytes(), metadata.read_bytes()
    vectors.write_bytes(whole[:-1] + b"?")
    refused("img_emb_1.npy is missing or does not match")
    vectors.unlink()
    refused("with the same numbers")
    vectors.write_bytes(whole)
    (tmp_path / "manifest.json").unlink()  # now it is as another tool's
    own = {"ranker": RANKER}
    vectors.write_bytes(b"nonsense")
    refused("img_emb_1.npy is not a readable NumPy file", **own)
    np.save(vectors, np.array([{}], dtype=object))
    refused("img_emb_1.npy is not a readable NumPy file", **own)
    np.save(vectors, np.zeros((100, 16), np.int64))
    refused("int64 of shape", **own)
    np.save(vectors, VECTORS[100:199])
    refused("has 99 rows, .* 100", **own)
    np.save(vectors, unit(100, width=5))
    refused("vectors of 5 numbers, the parts before 16", **own)
    vectors.write_bytes(whole)
    metadata.write_bytes(b"nonsense")
    refused("metadata_1.parquet is not a readable table", **own)
    pq.write_table(pa.table({"caption": ["x"] * 100}), metadata)
    refused("neither 'id' nor 'image_path'", **own)
    metadata.write_bytes((tmp_path / "metadata" / "metadata_0.parquet").read_bytes())
    refused("more than once", **own)
    metadata.write_bytes(rows)
    assert len(read_clip_retrieval(tmp_path, RANKER)[0]) == COUNT


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", 100)
    with pytest.raises(ArtifactMismatchError, match="part: on disk 100, asked for 50"):
        write(tmp_path / "a", 50)
    for part, rows in ((0, table(IDS)), (10, table(IDS[:-1]))):
        with pytest.raises(ValueError, match="must be equally many"):
            write_clip_retrieval(
                tmp_path / "b", rows=rows, embeddings=embeddings(VECTORS), training=TRAINING, part=part
            )
    broken = VECTORS.copy()
    broken[150] = np.nan
    with pytest.raises(ValueError, match="Embedding 150 has length nan"):
        write_clip_retrieval(
            tmp_path / "c", rows=table(IDS), embeddings=embeddings(broken), training=TRAINING, part=100
        )
    rows = catalog_rows(["a"], [["b"]], {"caption": ["c"]})
    with pytest.raises(ValueError, match="may not be called 'caption'"):
        write_clip_retrieval(tmp_path / "d", rows=rows, embeddings=embeddings(unit(1)), training=TRAINING)
