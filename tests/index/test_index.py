"""The search of an index: right by brute force, and the same however the index came about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.made import RANKER, brute_force, built, embeddings, names, opened, same, table, unit
from wherefrom.index import Embeddings, Index, catalog_rows
from wherefrom.index.__main__ import main
from wherefrom.runtime.artifacts import write_manifest

COUNT = 700
IDS, VECTORS, QUERIES = names(COUNT), unit(COUNT), unit(40, seed=1)
LISTS = "IVF8,Flat"
TYPES = ["Flat", LISTS, "IVF8,SQ8", "IVF8,PQ4x4fs", "SQ8", "HNSW8", "HNSW8,SQ8", "PCA12,HNSW8", "IVF8,SQ8,RFlat"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def copy_of(store: Path, folder: Path, factory: str, **further: object) -> Path:
    return Path(shutil.copytree(built(store, IDS, VECTORS, factory, **further), folder))


class TestSearch:
    @pytest.mark.parametrize("k", [1, 10, COUNT])
    def test_flat_is_brute_force_in_float64(self, store: Path, k: int) -> None:
        for query, hits in zip(QUERIES, opened(built(store, IDS, VECTORS)).search(embeddings(QUERIES), k), strict=True):
            ids, scores = brute_force(IDS, VECTORS, query, k)
            assert list(hits.images) == ids
            assert hits.scores == pytest.approx(scores, rel=1e-14, abs=1e-15)
            assert hits.rows["image"].to_pylist() == ids
            assert hits.rows["license"].to_pylist() == [f"licence {name}" for name in ids]
            assert hits.rows["captions"].to_pylist() == [[f"caption of {name}"] for name in ids]

    @pytest.mark.parametrize("factory", TYPES)
    @pytest.mark.parametrize("mmap", [True, False])
    def test_batches_do_not_matter(self, store: Path, factory: str, mmap: bool) -> None:
        index = opened(built(store, IDS, VECTORS, factory), mmap=mmap)
        together = index.search(embeddings(QUERIES), 12)
        alone = [hits for query in QUERIES for hits in index.search(embeddings(query[None]), 12)]
        assert same(together, alone)
        assert same(together, index.search(embeddings(QUERIES[::-1].copy()), 12)[::-1])
        assert all(len(set(hits.images)) == 12 and (np.diff(hits.scores) <= 0).all() for hits in together)

    def test_all_lists_are_brute_force(self, store: Path) -> None:
        folder = built(store, IDS, VECTORS, LISTS)
        result = opened(folder, search="nprobe=8").search(embeddings(QUERIES), 20)
        for query, hits in zip(QUERIES, result, strict=True):
            ids, scores = brute_force(IDS, VECTORS, query, 20)
            assert list(hits.images) == ids
            assert hits.scores == pytest.approx(scores, abs=1e-6)
        few = opened(folder, search="nprobe=1").search(embeddings(QUERIES), 20)
        assert not all(a.images == b.images for a, b in zip(few, result, strict=True))

    def test_settings_of_the_build_are_the_default(self, store: Path, tmp_path: Path) -> None:
        index = opened(built(tmp_path, IDS, VECTORS, LISTS, search="nprobe=8"))
        all_lists = opened(built(store, IDS, VECTORS, LISTS), search="nprobe=8")
        assert same(index.search(embeddings(QUERIES), 20), all_lists.search(embeddings(QUERIES), 20))

    @pytest.mark.parametrize("factory", TYPES)
    def test_as_many_as_there_are_can_be_asked_for(self, store: Path, factory: str) -> None:
        # One list of eight holds too few, and a graph may not reach all.
        index = opened(built(store, IDS, VECTORS, factory))
        for hits in index.search(embeddings(QUERIES[:3]), COUNT):
            assert sorted(hits.images) == sorted(IDS)
        assert len(index.search(embeddings(QUERIES[:3]), COUNT - 5)[2].images) == COUNT - 5

    def test_ties_are_broken_by_id(self, tmp_path: Path) -> None:
        distinct = unit(5)
        vectors = np.repeat(distinct, 60, axis=0)  # more copies than are found at first
        ids = names(300)
        for factory in ("Flat", "IVF2,Flat"):
            index = opened(built(tmp_path, ids, vectors, factory), search="nprobe=2" if "IVF" in factory else None)
            (hits,) = index.search(embeddings(distinct[:1]), 7)
            assert list(hits.images) == sorted(ids[:60])[:7], factory


class TestChanges:
    @pytest.mark.parametrize("factory", TYPES)
    def test_removed_images_are_gone_and_k_are_found(self, store: Path, tmp_path: Path, factory: str) -> None:
        index = opened(copy_of(store, tmp_path / "index", factory))
        best = [hits.images for hits in index.search(embeddings(QUERIES[:5]), 40)]
        gone = {name for images in best for name in images}
        assert index.remove(gone) == ()
        for opening in (index, opened(tmp_path / "index"), opened(tmp_path / "index", mmap=False)):
            assert len(opening) == COUNT - len(gone)
            assert opening.removed == gone
            for hits in opening.search(embeddings(QUERIES[:5]), 40):
                assert len(set(hits.images)) == 40
                assert gone.isdisjoint(hits.images)
            assert sorted(opening.search(embeddings(QUERIES[:1]), len(opening))[0].images) == sorted(set(IDS) - gone)

    def test_flat_after_removal_is_as_if_built_without(self, store: Path, tmp_path: Path) -> None:
        index = opened(copy_of(store, tmp_path / "index", "Flat"))
        index.remove(IDS[10:200:3])
        kept = [place for place in range(COUNT) if IDS[place] not in index.removed]
        without = opened(built(tmp_path / "store", [IDS[place] for place in kept], VECTORS[kept]))
        assert same(index.search(embeddings(QUERIES), 30), without.search(embeddings(QUERIES), 30))

    def test_vectors_of_removed_images_leave_the_file_where_the_type_can(self, store: Path, tmp_path: Path) -> None:
        for factory in ("Flat", LISTS):
            folder = copy_of(store, tmp_path / factory, factory)
            index = opened(folder)
            secret = VECTORS[3].tobytes()
            assert secret in next(folder.glob("index-*")).read_bytes()
            index.remove([IDS[3]])
            (file,) = folder.glob("index-*")
            assert secret not in file.read_bytes()
            assert len(list(folder.iterdir())) == 4  # the files of the state before are gone

    @pytest.mark.parametrize("factory", ["Flat", LISTS, "HNSW8", "IVF8,SQ8,RFlat"])
    def test_a_removed_image_comes_back_only_when_restored(self, store: Path, tmp_path: Path, factory: str) -> None:
        folder = copy_of(store, tmp_path / "index", factory)
        index = opened(folder, search=None if factory in ("Flat", "HNSW8") else "nprobe=8")
        name, vector = IDS[5], VECTORS[5:6]
        shard = (
            built(tmp_path / "store", [name, "another"], np.concatenate([vector, unit(1, 9)]), factory, like=folder)
            if factory != "HNSW8"
            else built(tmp_path / "store", [name, "another"], np.concatenate([vector, unit(1, 9)]), factory)
        )
        index.remove([name])
        assert index.add(table([name]), embeddings(vector)) == (name,)
        index.merge(shard)
        (hits,) = index.search(embeddings(vector), 1)
        assert hits.images[0] != name
        assert "another" in index.rows["image"].to_pylist()
        index.restore([name])
        assert index.removed == frozenset()
        assert opened(folder).search(embeddings(vector), 1)[0].images[0] != name
        assert index.add(table([name]), embeddings(vector)) == ()
        assert index.search(embeddings(vector), 1)[0].images == (name,)
        assert len(index) == COUNT + 1

    def test_what_a_shard_took_down_leaves_the_whole(self, store: Path, tmp_path: Path) -> None:
        index = opened(copy_of(store, tmp_path / "index", "Flat"))
        shard = built(tmp_path / "store", ["a", "b"], unit(2, 9))
        assert opened(shard).remove(["a", IDS[7]]) == (IDS[7],)
        index.merge(shard)
        assert index.removed == {"a", IDS[7]}
        assert set(index.rows["image"].to_pylist()) == (set(IDS) - {IDS[7]}) | {"b"}
        assert index.search(embeddings(VECTORS[7:8]), 1)[0].images != (IDS[7],)

    def test_a_batch_added_is_as_if_built_with_it(self, store: Path, tmp_path: Path) -> None:
        index = opened(built(tmp_path, IDS[:400], VECTORS[:400]))
        index.add(table(IDS[400:401]), embeddings(VECTORS[400:401]))
        index.add(table(IDS[401:]), embeddings(VECTORS[401:]))
        whole = opened(built(store, IDS, VECTORS))
        assert same(index.search(embeddings(QUERIES), 25), whole.search(embeddings(QUERIES), 25))
        assert same(index.search(embeddings(QUERIES[:2]), COUNT), whole.search(embeddings(QUERIES[:2]), COUNT))

    @pytest.mark.parametrize("factory", ["Flat", LISTS, "IVF8,SQ8", "SQ8", "HNSW8", "IVF8,SQ8,RFlat"])
    def test_merged_shards_are_as_if_built_in_one_go(self, store: Path, tmp_path: Path, factory: str) -> None:
        whole = built(store, IDS, VECTORS, factory)
        like = whole if factory not in ("Flat", "HNSW8") else None
        parts = [
            built(tmp_path, IDS[first:last], VECTORS[first:last], factory, like=like)
            for first, last in ((0, 150), (150, 151), (151, COUNT))
        ]
        index = opened(parts[0])
        index.merge(*parts[1:])
        assert sorted(index.rows["image"].to_pylist()) == sorted(IDS)
        settings = {"search": "nprobe=8"} if "IVF" in factory else {}
        k = 20 if factory != "HNSW8" else COUNT  # another graph may miss an image, but not all of them
        one, other = (opened(folder, **settings).search(embeddings(QUERIES), k) for folder in (parts[0], whole))
        if factory == "Flat":
            assert same(one, other)
        for a, b in zip(one, other, strict=True):
            assert a.images == b.images
            assert a.scores == pytest.approx(b.scores, abs=1e-6)
        assert all(len(opened(part)) == size for part, size in zip(parts[1:], (1, COUNT - 151), strict=True))

    def test_keys_are_never_used_twice(self, tmp_path: Path) -> None:
        # The vector of a removed image stays in a graph: under a key used again it would answer for the new image.
        index = opened(built(tmp_path, IDS[:50], VECTORS[:50], "HNSW8"))
        index.remove(IDS[40:50])
        index.add(table(["new"]), embeddings(-VECTORS[45:46]))
        (hits,) = index.search(embeddings(VECTORS[45:46]), 41)
        assert hits.images[-1] == "new"

    def test_a_change_that_fails_leaves_everything(self, store: Path, tmp_path: Path) -> None:
        folder = copy_of(store, tmp_path / "index", "Flat")
        index, before = opened(folder), sorted(path.name for path in folder.iterdir())
        bad = unit(3, 5)
        bad[2, 0] = np.nan
        with pytest.raises(ValueError, match=r"Embedding 2 has length nan"):
            index.add(table(["x", "y", "z"]), embeddings(bad))
        assert sorted(path.name for path in folder.iterdir()) == before
        assert len(opened(folder)) == len(index) == COUNT

    def test_what_a_kill_left_half_written_does_not_count(self, store: Path, tmp_path: Path) -> None:
        folder = copy_of(store, tmp_path / "index", "Flat")
        (folder / "index-000002.faiss").write_bytes(b"half")
        index = opened(folder)
        assert len(index) == COUNT
        index.remove(IDS[:1])
        assert len(opened(folder)) == COUNT - 1
        assert len(list(folder.glob("index-*"))) == 1


class TestRefusals:
    @pytest.fixture
    def folder(self, store: Path, tmp_path: Path) -> Path:
        return copy_of(store, tmp_path / "index", "Flat")

    def test_another_rankers_vectors(self, folder: Path, tmp_path: Path) -> None:
        other = {**RANKER, "weights": "other"}
        with pytest.raises(ValueError, match="The ranker is another than the index's"):
            Index(folder, ranker=other)
        with pytest.raises(ValueError, match=r"queries' ranker is another .*'other'.*'abc'"):
            Index(folder).search(Embeddings(QUERIES, other), 3)
        with pytest.raises(ValueError, match="embeddings' ranker is another"):
            Index(folder).add(table(["x"]), Embeddings(unit(1), other))
        manifest = json.loads((folder / "manifest.json").read_text())
        shard = Path(shutil.copytree(folder, tmp_path / "shard"))
        write_manifest(shard, {**manifest["identity"], "ranker": other}, index=manifest["index"])
        with pytest.raises(ValueError, match="shard is another"):
            Index(folder).merge(shard)

    @pytest.mark.parametrize("k", [0, -1, COUNT + 1])
    def test_a_k_that_cannot_be_found(self, folder: Path, k: int) -> None:
        with pytest.raises(ValueError, match=rf"between 1 and the {COUNT} images of the index; given {k}"):
            opened(folder).search(embeddings(QUERIES), k)
        index = opened(folder)
        index.remove(IDS[:1])
        with pytest.raises(ValueError, match=f"the {COUNT - 1} images"):
            index.search(embeddings(QUERIES), COUNT)

    @pytest.mark.parametrize(
        ("vectors", "message"),
        [
            (unit(2, width=15), "queries have 15 numbers, the index 16"),
            (unit(2) * np.float32(np.nan), "Embedding 0 has length nan"),
            (unit(2) * np.array([[1], [np.inf]], np.float32), "Embedding 1 has length (inf|nan)"),
            (unit(2) * np.float32(2), "Embedding 0 has length 2;"),
            (unit(2) * np.float32(0.5), "Embedding 0 has length 0.5;"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_queries_that_are_no_unit_vectors(self, folder: Path, vectors: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            opened(folder).search(embeddings(vectors), 3)

    def test_embeddings_that_are_no_matrix(self) -> None:
        for wrong in (unit(1)[0], np.zeros((2, 16), np.int64)):
            with pytest.raises(ValueError, match="matrix of floats"):
                embeddings(wrong)

    def test_batches_that_do_not_fit(self, folder: Path) -> None:
        index = opened(folder)
        with pytest.raises(ValueError, match=r"2 images and vectors of shape \(1, 16\) do not fit"):
            index.add(table(["x", "y"]), embeddings(unit(1)))
        with pytest.raises(ValueError, match=r"\(1, 3\) do not fit"):
            index.add(table(["x"]), embeddings(unit(1, width=3)))
        with pytest.raises(ValueError, match=f"1 images are in the index already, such as '{IDS[4]}'"):
            index.add(table(["x", IDS[4]]), embeddings(unit(2)))
        with pytest.raises(ValueError, match="more than once, such as 'x'"):
            catalog_rows(["x", "y", "x"], [["a"]] * 3)
        with pytest.raises(ValueError, match="may not be called 'key'"):
            catalog_rows(["x"], [["a"]], {"key": ["1"]})

    def test_shards_that_do_not_fit(self, folder: Path, store: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"'IVF8,Flat'.* one 'Flat'"):
            opened(folder).merge(built(store, IDS, VECTORS, LISTS))
        with pytest.raises(ValueError, match="in the index already"):
            opened(folder).merge(built(store, IDS, VECTORS))
        lists = copy_of(store, tmp_path / "lists", LISTS)
        apart = built(tmp_path, names(300, 5000), unit(300, 8), LISTS)
        with pytest.raises(ValueError, match="trained on different samples"):
            opened(lists).merge(apart)
        with pytest.raises(ValueError, match="cannot be reused"):
            built(tmp_path, IDS, VECTORS, "Flat", like=lists)

    def test_a_restore_of_what_was_not_removed(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="'stranger' was not removed"):
            opened(folder).restore(["stranger"])

    @pytest.mark.parametrize("kind", ["index", "rows", "removed"])
    @pytest.mark.parametrize("damage", ["cut", "changed", "gone", "foreign"])
    def test_damaged_files(self, folder: Path, tmp_path: Path, kind: str, damage: str) -> None:
        (file,) = folder.glob(f"{kind}-*")
        content = file.read_bytes()
        if damage == "gone":
            file.unlink()
        elif damage == "foreign":
            other = built(tmp_path, names(20, 9000), unit(20, 3))
            opened(other).remove(names(1, 9000))
            file.write_bytes(next(other.glob(f"{kind}-*")).read_bytes())
        else:
            changed = content[:-1] + bytes([content[-1] ^ 1])
            file.write_bytes(content[: len(content) // 2] if damage == "cut" else changed)
        with pytest.raises(ValueError, match=f"{file.name}.*(is missing|does not match its manifest)"):
            opened(folder)

    def test_unverified_files_are_still_read_with_care(self, folder: Path) -> None:
        (file,) = folder.glob("index-*")
        file.write_bytes(b"x" * file.stat().st_size)
        with pytest.raises(ValueError, match="is not a FAISS index"):
            opened(folder, verify=False)

    def test_folders_that_are_no_index(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="not an artifact"):
            opened(tmp_path)
        write_manifest(tmp_path, {"some": "thing"})
        with pytest.raises(ValueError, match="but not an index"):
            opened(tmp_path)

    def test_settings_that_the_type_lacks(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="'nprobe=4' do not fit"):
            opened(folder, search="nprobe=4")

    def test_a_gpu_that_is_not_there(self, folder: Path) -> None:
        faiss = pytest.importorskip("faiss")
        if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
            assert same(
                opened(folder, gpu=True).search(embeddings(QUERIES), 9), opened(folder).search(embeddings(QUERIES), 9)
            )
        else:
            with pytest.raises(ValueError, match=r"no GPU here: .*wherefrom\[gpu\]"):
                opened(folder, gpu=True)


class TestCommandLine:
    def test_take_downs_are_kept_and_listed(
        self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = copy_of(store, tmp_path / "index", "Flat")
        (best,) = opened(folder).search(embeddings(QUERIES[:1]), 3)
        listed = tmp_path / "take_downs.txt"
        listed.write_text(f"\ufeff{best.images[1]} \t\r\n\nnot there\n", encoding="utf-8")
        with pytest.raises(ValueError, match="1 of 3 ids are not in the index, such as 'not there', so nothing"):
            main(["remove", str(folder), best.images[0], "--file", str(listed)])
        assert not opened(folder).removed
        main(["remove", str(folder), best.images[0], "--file", str(listed), "--unknown"])
        printed = capsys.readouterr().out
        assert "not in the index, and kept out from now on: not there" in printed
        assert f"{COUNT - 2} images can be found; 3 were removed" in printed
        assert opened(folder).search(embeddings(QUERIES[:1]), 1)[0].images == (best.images[2],)
        main(["removed", str(folder)])
        assert capsys.readouterr().out.split("\n")[:-1] == sorted([*best.images[:2], "not there"])
        main(["restore", str(folder), "not there"])
        assert "2 were removed" in capsys.readouterr().out

    def test_mistakes_change_nothing(self, store: Path, tmp_path: Path) -> None:
        folder = copy_of(store, tmp_path / "index", "Flat")
        with pytest.raises(ValueError, match="No image is named"):
            main(["remove", str(folder)])
        with pytest.raises(ValueError, match="was not removed"):
            main(["restore", str(folder), IDS[0]])
        with pytest.raises(FileNotFoundError):
            main(["remove", str(tmp_path / "nothing"), IDS[0]])
        assert not opened(folder).removed
