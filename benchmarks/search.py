"""How long a search takes, and what it finds of what an exact one finds.

    python -m benchmarks.search --sizes 100000 1000000
    python -m benchmarks.search --sizes 10000000 --kinds manifold    (about 32 GB of disk, half an hour)

Vectors of two kinds, unit length, 768 numbers, float16 on disk: `manifold`, of intrinsic dimension 50 (a Gaussian of 50
numbers through tanh and two random matrices, and a little noise), as embeddings are; `random`, uniform on the sphere,
the worst case: all are nearly as far. Everything is seeded, made in chunks and resumed.

For each size and index: p50 and p99 of single queries, k = 100, through `Index.search` with rows; warm, and cold, which
means the first query after the index file was dropped from the page cache (`resident_after_drop` says how much of it
stayed) and opened again; `processor` is time on the processor, which a busy machine (`load_average`) changes less
than time on the wall; recall@100 against the exact search; bytes on disk and in memory. How many lists are probed is
the cheapest setting that reaches the recall on other queries.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from numpy.typing import NDArray

from experiments.support.arguments import script_parser
from wherefrom.index import Embeddings, Index, build_index
from wherefrom.runtime.artifacts import Store, provenance, write_json
from wherefrom.runtime.console import Console
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.mapped_arrays import write_array
from wherefrom.runtime.optional_dependencies import require_faiss

WIDTH, INTRINSIC, HIDDEN, NOISE = 768, 50, 256, 0.02
CHUNK, K, RECALL = 65536, 100, 0.95
KINDS = ("manifold", "random")
# Compressed codes find many candidates fast, and kept vectors put them in order.
FACTORIES = {
    100_000: ["Flat", "HNSW32", "IVF1024,SQ8", "PCAR128,IVF1024,PQ64x4fsr,Refine(SQfp16)"],
    1_000_000: ["PCAR128,IVF1024,PQ64x4fsr,Refine(SQfp16)"],
    # Codes of vectors, not of residuals (`fsr`): their tables are made once for a query, not for each list.
    10_000_000: ["PCAR128,IVF4096,PQ64x4fs,Refine(SQ8)"],
}
SAMPLES = {100_000: 65_536, 1_000_000: 65_536, 10_000_000: 655_360}  # at least 40 vectors a list


def chunks(kind: str, count: int, seed: int = 0, of: str = "training") -> Iterator[NDArray[np.float16]]:
    """Unit vectors, chunk by chunk; each chunk is drawn from its own seed."""
    key = [seed, KINDS.index(kind), int(of == "queries")]
    shared = np.random.default_rng([seed, KINDS.index(kind)])
    first = (shared.standard_normal((INTRINSIC, HIDDEN)) * 1.5 / INTRINSIC**0.5).astype(np.float32)
    second = (shared.standard_normal((HIDDEN, WIDTH)) / HIDDEN**0.5).astype(np.float32)
    for number, start in enumerate(range(0, count, CHUNK)):
        random, rows = np.random.default_rng([*key, number]), min(CHUNK, count - start)
        if kind == "manifold":
            inner = random.standard_normal((rows, INTRINSIC), dtype=np.float32)
            vectors = np.tanh(inner @ first) @ second
            vectors += NOISE * random.standard_normal((rows, WIDTH), dtype=np.float32)
        else:
            vectors = random.standard_normal((rows, WIDTH), dtype=np.float32)
        yield (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def on_disk(folder: Path, kind: str, count: int) -> NDArray[np.float16]:
    """The training vectors, made where they are missing."""
    path = folder / f"{kind}-{count}.npy"
    if not path.exists():
        write_array(path, (count, WIDTH), chunks(kind, count), np.float16)
    vectors: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    return vectors


def queries_of(kind: str, count: int) -> NDArray[np.float32]:
    """Queries of the same distribution, exactly of unit length."""
    vectors = np.concatenate(list(chunks(kind, count, of="queries"))).astype(np.float32)
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def exact(vectors: NDArray[np.float16], queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Positions of the k nearest of each query, streamed."""
    best = np.full((len(queries), 0), 0.0, np.float32)
    result = np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(vectors), CHUNK):
        scores = queries @ vectors[start : start + CHUNK].astype(np.float32).T
        best = np.concatenate([best, scores], axis=1)
        places = np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape)
        result = np.concatenate([result, places], axis=1)
        top = np.argpartition(-best, min(k, best.shape[1]) - 1, axis=1)[:, :k]
        best, result = np.take_along_axis(best, top, 1), np.take_along_axis(result, top, 1)
    return result


def recall(index: Index, ranker: dict[str, Any], queries: NDArray[np.float32], truth: NDArray[np.int64]) -> float:
    """Share of the truly nearest that the index finds."""
    hits = index.search(Embeddings(queries, ranker), truth.shape[1])
    pairs = zip(hits, truth, strict=True)
    return float(
        np.mean([len({int(name) for name in result.images} & set(true.tolist())) for result, true in pairs]) / K
    )


def latencies(
    index: Index, ranker: dict[str, Any], queries: NDArray[np.float32], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Milliseconds of each query alone, of the wall or of the processor."""
    times = []
    for query in queries:
        started = clock()
        index.search(Embeddings(query[None], ranker), K)
        times.append(1000 * (clock() - started))
    return times


def settings_of(factory: str) -> list[str]:
    """Search settings from the cheapest, for a factory string."""
    powers = [2**power for power in range(13)]
    if "IVF" in factory:
        lists = int(factory.split("IVF")[1].split(",")[0].split("_")[0])
        probes = [f"nprobe={probe}" for probe in powers if probe <= lists]
        refined = ["k_factor_rf=4", "k_factor_rf=16"] if "Refine" in factory else [""]
        coarse = f",quantizer_efSearch={2 * K}" if "_HNSW" in factory else ""
        return [",".join(filter(None, [probe + coarse, factor])) for factor in refined for probe in probes]
    return [f"efSearch={power}" for power in powers if power >= 64] if "HNSW" in factory else [""]


def choose(
    folder: Path, factory: str, ranker: dict[str, Any], queries: NDArray[np.float32], truth: NDArray[np.int64]
) -> str:
    """The fastest setting that reaches the recall, else the one that comes nearest."""
    reached: list[tuple[float, str]] = []
    missed: list[tuple[float, str]] = []
    given_up: set[str] = set()
    index = Index(folder, verify=False)
    for setting in settings_of(factory):
        family = setting.rpartition("k_factor_rf")[2]
        if family in given_up:
            continue
        index.contents.engine.configure(setting)
        result = recall(index, ranker, queries, truth)
        if result >= RECALL:
            reached.append((float(np.median(latencies(index, ranker, queries, time.process_time))), setting))
            given_up.add(family)
        else:
            missed.append((-result, setting))
    return min(reached or missed)[1]


def drop(path: Path) -> float:
    """Asks for a file to leave the page cache; returns the share of it that stayed (NaN where nobody can tell)."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
            pages = -(-len(view) // mmap.PAGESIZE)
            resident = (ctypes.c_ubyte * pages)()
            libc = ctypes.CDLL(None, use_errno=True)
            array = np.frombuffer(view, dtype=np.uint8)
            failed = libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(len(view)), resident)
            del array
            return float("nan") if failed else float((np.frombuffer(bytes(resident), np.uint8) & 1).mean())


def measure(
    folder: Path, setting: str, ranker: dict[str, Any], queries: NDArray[np.float32], truth: NDArray[np.int64]
) -> dict[str, Any]:
    """Everything of one index."""
    process = psutil.Process()
    gc.collect()
    before = process.memory_info()
    index = Index(folder, search=setting, verify=False)
    (file,) = folder.glob("index-*")
    warm_up = latencies(index, ranker, queries)
    warm, processor = latencies(index, ranker, queries), latencies(index, ranker, queries, time.process_time)
    after = process.memory_info()
    result = {
        "setting": setting,
        "recall@100": round(recall(index, ranker, queries, truth), 4),
        "warm_p50_ms": round(float(np.percentile(warm, 50)), 3),
        "warm_p99_ms": round(float(np.percentile(warm, 99)), 3),
        "processor_p50_ms": round(float(np.percentile(processor, 50)), 3),
        "processor_p99_ms": round(float(np.percentile(processor, 99)), 3),
        "load_average": round(os.getloadavg()[0], 1),
        "first_pass_p50_ms": round(float(np.percentile(warm_up, 50)), 3),
        "bytes_on_disk": sum(path.stat().st_size for path in folder.iterdir()),
        "index_bytes": file.stat().st_size,
        "memory_rss_bytes": after.rss - before.rss,
        "memory_of_its_own_bytes": after.rss - after.shared - before.rss + before.shared,  # not mapped from files
    }
    opening, cold, stayed = [], [], []
    for query in queries[:10]:
        del index
        gc.collect()
        stayed.append(drop(file))
        started = time.perf_counter()
        index = Index(folder, search=setting, verify=False)
        opening.append(1000 * (time.perf_counter() - started))
        cold += latencies(index, ranker, query[None])
    return result | {
        "cold_p50_ms": round(float(np.percentile(cold, 50)), 3),
        "cold_p99_ms": round(float(np.percentile(cold, 99)), 3),
        "cold_open_p50_ms": round(float(np.percentile(opening, 50)), 3),
        "resident_after_drop": round(float(np.mean(stayed)), 3),
    }


def main() -> None:
    """Measures, and keeps what it measured."""
    parser = script_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--factories", nargs="+", help="in place of those of the size")
    parser.add_argument("--queries", type=int, default=200, help="measured; a quarter as many choose the settings")
    parser.add_argument("--folder", type=Path, default=Path("runs/search"), help="vectors and indexes")
    parser.add_argument("--results", type=Path, default=Path("results/search.json"))
    options = parser.parse_args()
    console, store = Console(), Store(options.folder / "store")
    for size in options.sizes:
        for kind in options.kinds:
            known = min(FACTORIES, key=lambda count: abs(np.log(count / size)))
            console.log(f"{size:,} vectors, {kind}")
            vectors, ranker = on_disk(options.folder, kind, size), {"benchmark": kind}
            queries = queries_of(kind, options.queries + options.queries // 4)
            truth = exact(vectors, queries, K)
            # Captions as long as LAION's, on average.
            names = pa.array(np.arange(size)).cast(pa.large_string())
            captions = pa.LargeListArray.from_arrays(
                np.arange(size + 1), pa.array(["x" * 60], pa.large_string()).take(pa.array(np.zeros(size, np.int64)))
            )
            rows = pa.table({"image": names, "captions": captions})
            for factory in options.factories or FACTORIES[known]:
                console.log(f"  {factory}: build")
                started = time.perf_counter()
                folder = build_index(
                    store,
                    runner=Runner(torch.device("cpu")),
                    rows=rows,
                    embeddings=Embeddings(vectors, ranker),
                    training={"kind": kind, "count": size, "seed": 0},
                    factory=factory,
                    sample=SAMPLES[known],
                    progress=console.progress,
                )
                built = time.perf_counter() - started
                console.log(f"  {factory}: choose settings")
                setting = choose(folder, factory, ranker, queries[options.queries :], truth[options.queries :])
                result = measure(folder, setting, ranker, queries[: options.queries], truth[: options.queries])
                console.log(f"  {factory}: {result}")
                # Read anew: another size may have been measured meanwhile.
                results = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}}
                place = f"{kind}, {size}, {factory}"
                earlier = results["rows"].get(place, {}).get("build_s", 0.0)
                results["rows"][place] = {
                    "kind": kind,
                    "vectors": size,
                    "factory": factory,
                    "build_s": max(round(built, 1), earlier),  # an index that was found again took nothing
                    **result,
                    "command": "python -m benchmarks.search " + shlex.join(sys.argv[1:]),
                    "threads": require_faiss().omp_get_max_threads(),
                }
                results["provenance"] = provenance() | {"faiss": require_faiss().__version__, "cpus": os.cpu_count()}
                write_json(options.results, results)


if __name__ == "__main__":
    main()
