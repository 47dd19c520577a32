"""Agreement with a teacher: torchmetrics, brute force, cases by hand, what must not matter, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from numpy.typing import NDArray
from scipy.stats import sem
from torchmetrics.retrieval import RetrievalMAP, RetrievalRecall

import evaluate
from tests.support.tiny import attribution_config
from wherefrom.commands.complete_rankings import check_comparable, read_complete_rankings
from wherefrom.commands.evaluate_retrieval import as_table, named_folders, retrieval, retrieval_scores
from wherefrom.distillation.teacher_set import Features, TeacherSet, write_teacher_set
from wherefrom.metrics.retrieval import Cutoff
from wherefrom.rankings.ranking_file import RANKING, write_ranking
from wherefrom.runtime.artifacts import read_manifest, write_json, write_manifest

N, QUERIES = 40, ("first", "second", "third")
IMAGES = [f"image {index:02d}" for index in range(N)]


def scores_of(seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(len(QUERIES), N))


def run_folder(
    folder: Path, scores: NDArray[np.float64], shuffle: int = 0, queries: tuple[str, ...] = QUERIES, **identity: Any
) -> Path:
    """What `evaluate.py attribute` leaves, as far as it is read here; images and queries in any order."""
    random = np.random.default_rng(shuffle)
    order = random.permutation(N)
    ids = [IMAGES[index] for index in order]
    folder.mkdir(parents=True)
    rows = random.permutation(len(queries))
    write_ranking(folder, {queries[row]: (ids, scores[row][order]) for row in rows})
    said = {"model": "m", "training_pictures": "t", "queries": [[name, f"prompt of {name}"] for name in queries]}
    write_manifest(folder, {**said, **identity}, complete=True, cut=None)
    return folder


def test_it_is_torchmetrics_own(tmp_path: Path) -> None:
    teacher, method = scores_of(0), scores_of(1)
    result = retrieval(
        tmp_path, run_folder(tmp_path / "t", teacher), {"m": run_folder(tmp_path / "m", method, 5)}, depths=[7, 0.5]
    )
    ranks = torch.from_numpy(np.argsort(np.argsort(-teacher, axis=1), axis=1))
    positive = torch.sigmoid(torch.from_numpy(method))  # torchmetrics leaves out what is not positive
    indexes = torch.arange(len(QUERIES))[:, None].expand(-1, N).flatten()
    by_name = {(row.metric, row.k.number): row for row in result}
    assert set(by_name) == {("mAP", 7), ("mAP", 20), ("Recall", 1), ("Recall", 7), ("Recall", 20)}
    for (metric, k), row in by_name.items():
        own = RetrievalMAP() if metric == "mAP" else RetrievalRecall(top_k=k)
        expected = own(positive.flatten(), (ranks < k).flatten(), indexes=indexes)
        assert row.mean == pytest.approx(float(expected), rel=1e-6)
        assert row.count == len(QUERIES)


def brute_force(teacher: NDArray[np.float64], method: NDArray[np.float64], k: int) -> tuple[float, float]:
    """Average precision and recall, one place after the other."""
    relevant = {IMAGES[index] for index in np.argsort(-teacher)[:k]}
    ranked = [IMAGES[index] for index in np.argsort(-method)]
    precisions = [
        sum(name in relevant for name in ranked[: place + 1]) / (place + 1)
        for place, name in enumerate(ranked)
        if name in relevant
    ]
    return sum(precisions) / k, len(relevant & set(ranked[:k])) / k


@pytest.mark.parametrize("k", [1, 3, 40])
def test_means_and_errors_by_brute_force(tmp_path: Path, k: int) -> None:
    teacher, method = scores_of(2), scores_of(3)
    method += teacher
    rows = retrieval(
        tmp_path, run_folder(tmp_path / "t", teacher), {"m": run_folder(tmp_path / "m", method)}, None, [k]
    )
    values = np.array([brute_force(a, b, k) for a, b in zip(teacher, method, strict=True)])
    for metric, column in (("mAP", 0), ("Recall", 1)):
        (row,) = [row for row in rows if row.metric == metric and row.k.number == k]
        assert row.mean == pytest.approx(values[:, column].mean(), rel=1e-12)
        assert row.error == pytest.approx(sem(values[:, column]), rel=1e-9, abs=1e-15)


def test_the_teacher_agrees_with_itself_and_its_reverse_least(tmp_path: Path) -> None:
    teacher = scores_of(4)
    own, reverse = run_folder(tmp_path / "t", teacher, 1), run_folder(tmp_path / "r", -teacher, 2)
    rows = retrieval(tmp_path, own, {"itself": run_folder(tmp_path / "s", teacher, 3), "reverse": reverse}, None, [10])
    assert [row.mean for row in rows if row.method == "itself"] == [1.0] * 3
    (worst,) = [row.mean for row in rows if row.method == "reverse" and row.metric == "mAP"]
    assert worst == pytest.approx(np.mean([(index + 1) / (31 + index) for index in range(10)]))
    assert [row.mean for row in rows if row.method == "reverse" and row.metric == "Recall"] == [0.0, 0.0]


def teacher_folder(folder: Path, scores: NDArray[np.float64], width: int = N, **identity: Any) -> Path:
    order = np.random.default_rng(9).permutation(N)
    rows = np.argsort(-scores[:, order], axis=1)[:, :width].astype(np.int32)
    images = tuple(IMAGES[index] for index in order)
    prompts = tuple(f"prompt of {name}" for name in QUERIES)
    ordered = np.take_along_axis(scores[:, order], rows, axis=1).astype(np.float32)
    features = {"x": Features(np.zeros((N, 2), np.float32), np.zeros((3, 2), np.float32))}
    write_teacher_set(folder, TeacherSet(images, images, QUERIES, prompts, rows, ordered, features, identity))
    return folder


def test_a_teacher_set_is_as_good_as_its_run(tmp_path: Path) -> None:
    teacher, method = scores_of(5), run_folder(tmp_path / "m", scores_of(6))
    of_set = retrieval(tmp_path / "a", teacher_folder(tmp_path / "set", teacher, model="m"), {"m": method})
    assert of_set == retrieval(tmp_path / "b", run_folder(tmp_path / "run", teacher), {"m": method})
    swapped = retrieval(tmp_path / "c", method, {"m": teacher_folder(tmp_path / "again", teacher)})
    assert [row.metric for row in swapped] == [row.metric for row in of_set]
    with pytest.raises(ValueError, match=r"ranks 12 of 40 training images: .* the whole set"):
        retrieval(tmp_path, teacher_folder(tmp_path / "cut", teacher, 12), {"m": method})
    with pytest.raises(ValueError, match="are of other models: m and another"):
        retrieval(tmp_path, teacher_folder(tmp_path / "other", teacher, model="another"), {"m": method})


def test_more_queries_than_the_teachers_are_left_out(tmp_path: Path) -> None:
    teacher, scores = run_folder(tmp_path / "t", scores_of(0)), scores_of(1)
    more = run_folder(tmp_path / "more", np.concatenate([scores, -scores[:1]]), 0, (*QUERIES, "fourth"))
    same = run_folder(tmp_path / "same", scores)
    assert retrieval(tmp_path, teacher, {"m": more}) == retrieval(tmp_path, teacher, {"m": same})


@pytest.mark.parametrize(
    ("k", "number"), [(10, 10), (10.0, 10), (1, 1), (40, 40), (0.5, 20), (0.0042, 1), (0.034, 1), (0.0385, 2)]
)
def test_depths(k: float, number: int) -> None:
    assert Cutoff.of(k, 40).number == number
    assert Cutoff.of(500 / 118_287, 118_287).number == 500


@pytest.mark.parametrize("k", [0, -1, 2.5, 41])
def test_wrong_depths_are_refused(k: float) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 40, the number of training images; given {k}"):
        Cutoff.of(k, 40)


def test_rankings_that_tell_no_images_apart_do_not_agree_by_their_names(tmp_path: Path) -> None:
    teacher = scores_of(0)
    teacher[:, :] = np.where(teacher > 1, 1.0, 0.0)  # ties, broken by name
    flat = run_folder(tmp_path / "flat", np.zeros((3, N)))
    halves = run_folder(tmp_path / "halves", np.repeat([[1.0, 0.0]], N // 2, axis=1).repeat(3, axis=0))
    rows = retrieval(tmp_path, run_folder(tmp_path / "t", teacher), {"flat": flat, "halves": halves}, None, [10])
    by_name = {(row.method, row.metric, row.k.number): row.mean for row in rows}
    assert by_name["flat", "Recall", 10] == pytest.approx(10 / N)
    assert by_name["flat", "Recall", 1] == pytest.approx(1 / N)
    chance = sum(1 / place + (place - 1) / place * 9 / 39 for place in range(1, N + 1)) / N
    assert by_name["flat", "mAP", 10] == pytest.approx(chance)
    first = [sum(index < N // 2 for index in np.lexsort((IMAGES, -row))[:10]) for row in teacher]
    assert by_name["halves", "Recall", 10] == pytest.approx(np.mean(first) / 10 * 10 / (N // 2))
    teachers = teacher_folder(tmp_path / "set", np.zeros((3, N)))
    with pytest.raises(ValueError, match="gives all 40 images the same score for query 'first'"):
        retrieval(tmp_path, teachers, {"flat": flat}, None, [10])
    assert retrieval(tmp_path, tmp_path / "t", {"flat": teachers}, None, [10])[0].mean == pytest.approx(chance)


def test_the_table(tmp_path: Path) -> None:
    teacher = run_folder(tmp_path / "t", scores_of(0))
    rows = retrieval(tmp_path, teacher, {"abu": teacher}, run_folder(tmp_path / "c", scores_of(0)), [0.25, 3])
    assert as_table(rows).splitlines() == [
        "| ranking | mAP(10 = 25.00%) | mAP(3) | Recall@1 | Recall@10 = 25.00% | Recall@3 | n |",
        "|---|---|---|---|---|---|---|",
        "| abu | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 3 |",
        "| ceiling | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | 3 |",
    ]
    one = run_folder(tmp_path / "one", scores_of(0)[:1], 0, QUERIES[:1])
    (row, *_) = retrieval_scores("x", read_complete_rankings(one), read_complete_rankings(teacher), [Cutoff(3)])
    assert (row.error, row.count) == (None, 1)
    assert "1.000 ± – " in as_table([row])


def rewritten(change: Callable[[dict[str, list[Any]]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        columns = pq.read_table(folder / RANKING).to_pydict()
        change(columns)
        pq.write_table(pa.table(columns), folder / RANKING)

    return apply


def manifest(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        result = read_manifest(folder)
        identity = {name: changes.pop(name) for name in list(changes) if name in result["identity"]}
        write_json(folder / "manifest.json", {**result, **changes, "identity": {**result["identity"], **identity}})

    return apply


def cut(columns: dict[str, list[Any]]) -> None:
    kept = [index for index, rank in enumerate(columns["rank"]) if rank <= 30 or columns["query"][index] != "second"]
    for name in columns:
        columns[name] = [columns[name][index] for index in kept]


def rename(columns: dict[str, list[Any]]) -> None:
    columns["image"] = ["other" if name == "image 07" else name for name in columns["image"]]


def repeat(columns: dict[str, list[Any]]) -> None:
    columns["image"][3] = columns["image"][2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (manifest(complete=False), "is not complete: run the same command again"),
        (manifest(cut=100), "is truncated: it keeps only the first 100 images"),
        (manifest(model="n"), "are of other models: n and m"),
        (manifest(training_pictures="u"), "are of other training images: u and t"),
        (
            manifest(queries=[["first", "else"]]),
            "different queries named 'first': the prompts are 'else' and 'prompt of first'",
        ),
        (rewritten(cut), "not at all for query 'second'"),
        (rewritten(repeat), r"ranking.parquet ranks 'image \d\d' (twice|not at all) for query 'first'"),
        (rewritten(rename), "rank other training images: 40 and 40; only one of them has 'image 07', 'other'"),
        (
            rewritten(lambda columns: columns["rank"].reverse()),
            "not sorted by query and rank, from 1 on, at query 'first'",
        ),
        (rewritten(lambda columns: columns.pop("rank")), "cannot be read|no column 'rank'"),
        (rewritten(lambda columns: [values.clear() for values in columns.values()]), "no rows, or empty cells"),
        (lambda folder: (folder / RANKING).write_bytes(b"x"), "ranking.parquet cannot be read"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    teacher, method = run_folder(tmp_path / "t", scores_of(0)), run_folder(tmp_path / "m", scores_of(1))
    change(method)
    with pytest.raises(ValueError, match=message) as caught:
        retrieval(tmp_path, teacher, {"m": method})
    assert str(method) in str(caught.value)
    assert not (tmp_path / "retrieval.json").exists()


def test_missing_queries_are_named(tmp_path: Path) -> None:
    teacher = run_folder(tmp_path / "t", scores_of(0))
    other = run_folder(tmp_path / "m", scores_of(1), 0, ("first", "b", "c"))
    with pytest.raises(
        ValueError, match=r"does not rank 2 of the 3 queries .*'second', 'third'; it has 'b', 'c', 'first'"
    ):
        retrieval(tmp_path, teacher, {"m": other})
    with pytest.raises(FileNotFoundError, match="holds no manifest"):
        retrieval(tmp_path, teacher, {"m": tmp_path / "none"})
    with pytest.raises(ValueError, match="There is nothing to compare"):
        retrieval(tmp_path, teacher, {})
    with pytest.raises(ValueError, match="There is no k"):
        retrieval(tmp_path, teacher, {"m": teacher}, None, [])


def test_only_the_ceiling_may_come_from_another_model(tmp_path: Path) -> None:
    teacher, other = run_folder(tmp_path / "t", scores_of(0)), run_folder(tmp_path / "m", scores_of(1), model="seed 1")
    assert {row.method for row in retrieval(tmp_path, teacher, {}, other)} == {"ceiling"}
    nobody = run_folder(tmp_path / "n", scores_of(1), model=None)
    check_comparable(read_complete_rankings(teacher), read_complete_rankings(nobody))
    with pytest.raises(ValueError, match="are of other models"):
        retrieval(tmp_path, teacher, {"m": other})


def test_names_of_rankings() -> None:
    assert named_folders(["a=x/y", "b=c=d"]) == {"a": Path("x/y"), "b": Path("c=d")}
    for wrong, message in (
        (["a"], "'a' is not name=folder"),
        (["=a"], "'=a' is not name=folder"),
        (["a=b", "a=c"], "'a' is used twice"),
        (["ceiling=b"], "'ceiling' is the name of the ceiling"),
    ):
        with pytest.raises(ValueError, match=message):
            named_folders(wrong)


def test_kept_rankings_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, again, method = (run_folder(tmp_path / name, scores_of(seed), seed) for seed, name in enumerate("tam"))
    output = tmp_path / "out"
    arguments = ["--teacher", str(teacher), "--ceiling", str(again), "--rankings", f"m={method}", f"t={teacher}"]
    evaluate.main(["retrieval", *arguments, "--output", str(output), "--k", "[0.1, 10]"])
    result = json.loads((output / "retrieval.json").read_text())
    assert (result["pictures"], result["queries"]) == (N, list(QUERIES))
    assert result["rankings"] == {"m": str(method), "t": str(teacher)}
    assert [row["method"] for row in result["rows"]] == ["m"] * 5 + ["t"] * 5 + ["ceiling"] * 5
    assert [row["k"]["number"] for row in result["rows"][:5]] == [4, 10, 1, 4, 10]
    direct = retrieval(tmp_path, teacher, {"m": method, "t": teacher}, again, [0.1, 10])
    assert [row["mean"] for row in result["rows"]] == [row.mean for row in direct]
    assert capsys.readouterr().out == as_table(direct) + "\n"
    file = tmp_path / "random.yaml"
    file.write_text("class_path: Random\n")
    with pytest.raises(ValueError, match="attributors need --model and --data"):
        evaluate.main(["retrieval", *arguments, "--output", str(output), "--methods", json.dumps([str(file)])])


def test_methods_are_run_and_measured_through_the_command_line(tmp_path: Path) -> None:
    content = yaml.safe_load(attribution_config(tmp_path).read_text())
    content |= {"attributor": {"class_path": "PixelSimilarity"}, "output": str(tmp_path / "teacher")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    evaluate.main(["attribute", "-c", str(tmp_path / "run.yaml")])
    del content["attributor"]
    for name, method in (("pixel", "PixelSimilarity"), ("random", "Random")):
        (tmp_path / f"{name}.yaml").write_text(f"class_path: {method}\n")
    content |= {"methods": ["pixel.yaml", "random.yaml"], "output": str(tmp_path / "out"), "k": [2, 0.25]}
    content |= {"teacher": str(tmp_path / "teacher"), "ceiling": str(tmp_path / "teacher")}
    content |= {"rankings": [f"kept={tmp_path / 'teacher'}"]}
    (tmp_path / "retrieval.yaml").write_text(yaml.safe_dump(content))
    evaluate.main(["retrieval", "-c", str(tmp_path / "retrieval.yaml")])
    result = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    by_method = {row["method"]: row["mean"] for row in result["rows"] if row["metric"] == "mAP" and row["k"]["share"]}
    assert list(by_method) == ["kept", "pixel", "random", "ceiling"]
    assert by_method["kept"] == by_method["pixel"] == by_method["ceiling"] == 1.0 > by_method["random"]
    assert (
        read_complete_rankings(tmp_path / "out" / "random").images
        == read_complete_rankings(tmp_path / "teacher").images
    )
