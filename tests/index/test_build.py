"""Embedding and building: nothing is done twice, and nobody's place, batch or death changes a digit."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.support.made import RANKER, built, embeddings, names, opened, same, table, unit
from tests.support.runners import Alone
from wherefrom.distillation.ranker import Ranker
from wherefrom.index import Embeddings, build_index, embed, embed_training_set, ranker_identity
from wherefrom.index import build as build_module
from wherefrom.index import embeddings as embeddings_module
from wherefrom.index.embeddings import KIND, cosines
from wherefrom.index.engine import Engine
from wherefrom.runtime.artifacts import StorageError, Store
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.optional_dependencies import require_faiss

COUNT = 500
IDS, VECTORS, QUERIES = names(COUNT), unit(COUNT), unit(20, seed=1)
NAMES, TRAINING = ["a", "b"], {"pictures": "tiny"}
CPU = torch.device("cpu")


def ranker(scale: float = -1.5) -> Ranker:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = Ranker(7, width=9, hidden=2, outputs=16, dropout=0.5)
    with torch.no_grad():
        made.scale.fill_(scale)
    return made


def features(count: int = COUNT) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(count, width, generator=random) for width in (4, 3)]


def embedded(root: Path, runner: Runner | None = None, count: int = COUNT, **further) -> Embeddings:
    runner = Runner(CPU) if runner is None else runner
    return embed_training_set(
        ranker(), names=NAMES, features=features(count), training=TRAINING, store=Store(root), runner=runner, **further
    )


class TestEmbedding:
    @pytest.fixture(autouse=True)
    def _small_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embeddings_module, "_CHUNK", 64)

    def test_is_the_ranker_in_float64(self, tmp_path: Path) -> None:
        result, wide = embedded(tmp_path), ranker().double().eval()
        with torch.no_grad():
            raw = wide.mlp(torch.cat(features(), 1).double())
        assert result.vectors == pytest.approx(F.normalize(raw, dim=1).numpy(), abs=1e-6)
        assert result.ranker == ranker_identity(ranker(), NAMES)
        lengths = np.linalg.norm(result.vectors, axis=1)
        assert lengths == pytest.approx((raw.norm(dim=1) > 0).double().numpy(), abs=1e-6)
        assert lengths.sum() > 0.9 * COUNT

    def test_is_found_again_and_goes_on_after_an_interruption(self, tmp_path: Path) -> None:
        whole, seen = embedded(tmp_path / "whole"), []

        def stop(done: int, total: int) -> None:
            seen.append(done)
            if done == 256:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            embedded(tmp_path / "cut", progress=stop)
        parts = list((tmp_path / "cut").rglob("part-*.npy"))
        stamps = {path: path.stat().st_mtime_ns for path in parts}
        assert len(parts) == 4
        # Whoever goes on finds the same parts: nothing is embedded twice.
        embedded_again = []
        original = embeddings_module.embed
        embeddings_module.embed = lambda *a, **k: (embedded_again.append(len(a[1])), original(*a, **k))[1]
        try:
            result = embedded(tmp_path / "cut")
            assert sum(embedded_again) == COUNT - 256
            embedded(tmp_path / "cut")
            assert sum(embedded_again) == COUNT - 256
        finally:
            embeddings_module.embed = original
        assert np.array_equal(result.vectors, whole.vectors)
        assert stamps
        assert not list((tmp_path / "cut").rglob("part-*.npy"))

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_processes_share_the_work(self, tmp_path: Path, world_size: int) -> None:
        whole = embedded(tmp_path / "whole")
        for rank in reversed(range(world_size)):
            try:
                result = embedded(tmp_path / "shared", Alone(CPU, rank, world_size))
            except FileNotFoundError:
                assert rank > 0, "the first process, here the last, has the whole"
        assert np.array_equal(result.vectors, whole.vectors)

    def test_a_query_is_the_same_in_any_company(self) -> None:
        both = torch.cat(features(33), 1)
        made = ranker()
        made.train()  # dropout must not reach an embedding
        together = embed(made, both, NAMES)
        assert made.training
        assert np.array_equal(together, np.concatenate([embed(made, row[None], NAMES) for row in both]))
        assert np.array_equal(together[5:9], embed(made, both[5:9], NAMES))
        assert embed(made, both[:0], NAMES).shape == (0, 16)

    def test_what_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        store, runner = Store(tmp_path), Runner(CPU)
        with pytest.raises(ValueError, match="takes 7 features, but a give 4"):
            embed_training_set(
                ranker(), names=["a"], features=features()[:1], training=TRAINING, store=store, runner=runner
            )
        with pytest.raises(ValueError, match=r"features of \[2, 500\] images"):
            embed_training_set(
                ranker(),
                names=NAMES,
                features=[features()[0], features()[1][:2]],
                training=TRAINING,
                store=store,
                runner=runner,
            )
        with pytest.raises(ValueError, match=r"\[0\] images"):
            embed_training_set(
                ranker(), names=NAMES, features=features(0), training=TRAINING, store=store, runner=runner
            )
        for scale in (1.0, 0.0, float("nan")):
            with pytest.raises(ValueError, match=r"scale is .* needs a negative one"):
                embed_training_set(
                    ranker(scale), names=NAMES, features=features(), training=TRAINING, store=store, runner=runner
                )
        broken = features()
        broken[1][300, 1] = float("nan")
        with pytest.raises(ValueError, match="Embedding 300 has length nan"):
            embed_training_set(ranker(), names=NAMES, features=broken, training=TRAINING, store=store, runner=runner)
        assert Store(tmp_path).root.exists()
        assert not [path for path in (tmp_path / KIND).iterdir() if not path.name.endswith(".partial")]


def test_cosines_are_exact_and_alike_in_any_block() -> None:
    vectors, query = unit(9000, width=37), unit(1, seed=4, width=37)[0]
    result = cosines(vectors, query)
    assert result[:50] == pytest.approx([float(v.astype(float) @ query.astype(float)) for v in vectors[:50]], abs=1e-15)
    order = np.random.default_rng(0).permutation(9000)
    assert np.array_equal(cosines(vectors[order], query), result[order])
    assert np.array_equal([cosines(vector[None], query)[0] for vector in vectors[4000:4200]], result[4000:4200])


def killed(root: Path, factory: str) -> None:
    """Builds in a process of its own, which dies at 400 of 500 vectors."""

    def progress(done: int, total: int) -> None:
        if done == 400:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            # Threads do not survive a fork, and waiting for them would never end.
            require_faiss().omp_set_num_threads(1)
            built(root, IDS, VECTORS, factory, shard=100, progress=progress)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


class TestBuild:
    @pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW8"])
    @pytest.mark.parametrize("shard", [11, 64, 10_000])
    def test_shards_are_one_go(self, tmp_path: Path, factory: str, shard: int) -> None:
        one, other = (
            opened(
                built(tmp_path / name, IDS, VECTORS, factory, shard=size), search="nprobe=8" if "IVF" in factory else ""
            )
            for name, size in (("one", COUNT), ("other", shard))
        )
        assert same(one.search(embeddings(QUERIES), 20), other.search(embeddings(QUERIES), 20))

    @pytest.mark.parametrize("factory", ["Flat", "IVF8,SQ8"])
    def test_processes_share_the_shards(self, tmp_path: Path, factory: str) -> None:
        whole = opened(built(tmp_path / "whole", IDS, VECTORS, factory, shard=50))
        store = Store(tmp_path / "shared")
        one_rank = {"shard": 50, "factory": factory}
        training = {"pictures": f"{COUNT} from {IDS[0]}"}
        # The first process trains, and is killed before its shards; the second makes its own; the first comes again.
        for rank, kill in ((0, True), (1, False), (0, False)):
            calls: list[int] = []

            def progress(done: int, total: int, kill: bool = kill, calls: list[int] = calls) -> None:
                calls.append(done)
                if kill:
                    raise KeyboardInterrupt

            try:
                folder = build_index(
                    store,
                    runner=Alone(CPU, rank, 2),
                    rows=table(IDS),
                    embeddings=embeddings(VECTORS),
                    training=training,
                    progress=progress,
                    **one_rank,
                )
            except KeyboardInterrupt:
                assert kill
            assert len(calls) == (1 if kill else 5)
        assert same(whole.search(embeddings(QUERIES), 20), opened(folder).search(embeddings(QUERIES), 20))
        assert sorted(path.suffix for path in folder.iterdir()) == [".faiss", ".json", ".parquet", ".parquet"]

    @pytest.mark.parametrize("factory", ["Flat", "IVF8,SQ8", "HNSW8"])
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_a_killed_build_goes_on(self, tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build_module, "_BLOCK", 100)
        monkeypatch.setattr(build_module, "_SAVE_EVERY_S", 0.0)
        calls: list[int] = []
        killed(tmp_path / "killed", factory)
        folder = built(
            tmp_path / "killed", IDS, VECTORS, factory, shard=100, progress=lambda done, total: calls.append(done)
        )
        assert calls == [400, 500], "what was finished is not done again"
        whole = opened(built(tmp_path / "whole", IDS, VECTORS, factory))
        assert same(opened(folder).search(embeddings(QUERIES), 20), whole.search(embeddings(QUERIES), 20))

    @pytest.mark.parametrize(("factory", "part"), [("Flat", "shard-*"), ("Flat", "trained*"), ("HNSW8", "growing*")])
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_a_cut_part_is_made_again(
        self, tmp_path: Path, factory: str, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(build_module, "_BLOCK", 100)
        monkeypatch.setattr(build_module, "_SAVE_EVERY_S", 0.0)
        killed(tmp_path / "killed", factory)
        (cut, *_) = sorted((tmp_path / "killed").rglob(f"{part}.faiss"))
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        folder = built(tmp_path / "killed", IDS, VECTORS, factory, shard=100)
        assert f"{cut.name} is not a FAISS index that can be read" in caplog.text
        whole = opened(built(tmp_path / "whole", IDS, VECTORS, factory))
        assert same(opened(folder).search(embeddings(QUERIES), 20), whole.search(embeddings(QUERIES), 20))

    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_a_full_disk_leaves_no_file(self, tmp_path: Path) -> None:
        engine = Engine.make("Flat", VECTORS.shape[1])
        engine.add(VECTORS, np.arange(COUNT))
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
            try:
                engine.write(tmp_path / "index.faiss")
            except StorageError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not list(tmp_path.iterdir())

    def test_an_index_is_found_again_unless_something_differs(self, tmp_path: Path) -> None:
        calls: list[int] = []
        first = built(tmp_path, IDS, VECTORS, "IVF8,Flat", progress=lambda done, total: calls.append(done))
        assert built(tmp_path, IDS, VECTORS, "IVF8,Flat", progress=lambda done, total: calls.append(done)) == first
        assert calls == [COUNT]
        others = [{"factory": "Flat"}, {"seed": 1}, {"sample": 400}, {"removed": ["x"]}, {"like": first}]
        folders = {built(tmp_path, IDS, VECTORS, **{"factory": "IVF8,Flat", **other}) for other in others}
        assert len(folders | {first}) == 6

    def test_the_sample_is_seeded(self, tmp_path: Path) -> None:
        def centroids(place: str, **further: int) -> np.ndarray:
            folder = built(tmp_path / place, IDS, VECTORS, "IVF8,Flat", sample=400, **further)
            (file,) = folder.glob("index-*")
            engine = Engine.read(file)
            return np.stack([engine.ivf.quantizer.reconstruct(place) for place in range(8)])

        assert np.array_equal(centroids("a"), centroids("b"))
        assert not np.array_equal(centroids("a"), centroids("c", seed=1))

    @pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
    def test_what_was_taken_down_earlier_stays_out(self, tmp_path: Path, factory: str) -> None:
        gone = [IDS[3], IDS[70], "elsewhere"]
        folder = built(tmp_path, IDS, VECTORS, factory, removed=gone, shard=64)
        index = opened(folder)
        assert len(index) == COUNT - 2
        assert index.removed == set(gone)
        assert sorted(index.search(embeddings(QUERIES[:1]), COUNT - 2)[0].images) == sorted(set(IDS) - set(gone))
        assert index.add(table([IDS[3]]), embeddings(VECTORS[3:4])) == (IDS[3],)
        assert len(index.contents.engine) == COUNT - 2, "its vector is not in the file"

    def test_half_precision_is_taken(self, tmp_path: Path) -> None:
        half = VECTORS.astype(np.float16)
        result = opened(built(tmp_path, IDS, half)).search(embeddings(QUERIES), 5)
        scores = half.astype(np.float64) @ QUERIES.astype(np.float64).T
        for column, hits in zip(scores.T, result, strict=True):
            assert hits.scores == pytest.approx(np.sort(column)[::-1][:5], abs=1e-12)

    def test_what_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        def refused(message: str, ids=IDS, vectors=VECTORS, factory="Flat", **further) -> None:
            with pytest.raises(ValueError, match=message):
                built(tmp_path, ids, vectors, factory, **further)

        refused("FAISS cannot create an index 'Flot' of 16 dimensions", factory="Flot")
        refused("FAISS cannot create an index 'PQ5' of 16", factory="PQ5")
        refused("leave IDMap out", factory="IDMap,Flat")
        refused("'nprobe=2' do not fit", search="nprobe=2")
        refused(r"499 images and vectors of shape \(500, 16\)", ids=IDS[:-1])
        refused(r"cannot be trained on 500 vectors .*fewer lists", factory="IVF512,Flat")
        refused("must be at least 1; given 0", sample=0)
        refused("nothing to index", removed=IDS)
        broken = VECTORS.copy()
        broken[99, 2] = np.inf
        refused("Embedding 99 has length (inf|nan)", vectors=broken)
        with pytest.raises(ValueError, match="matrix of floats"):
            Embeddings(VECTORS[0], RANKER)
        assert not list((tmp_path / "index").glob("*/manifest.json"))
