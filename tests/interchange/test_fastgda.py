"""FastGDA's files: small ones in the same layout, what is wrong with them, and a ranker there and back."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from wherefrom.distillation.ranker import Ranker, load_ranker
from wherefrom.distillation.teacher_set import read_teacher_set
from wherefrom.interchange.__main__ import main
from wherefrom.interchange.fastgda import read_fastgda_ranker, read_fastgda_teacher, write_fastgda_ranker
from wherefrom.runtime.artifacts import ArtifactMismatchError

N, Q, T, M = 30, 5, 3, 12


def train_content(seed: int = 0) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """`influence_train.pkl` and the neighbours, made the way FastGDA describes its files."""
    random = np.random.default_rng(seed)
    near = np.stack([random.permutation(N) for _ in range(Q)])
    influence = random.normal(size=(Q, M)).astype(np.float32)
    order = np.argsort(-influence, axis=1)
    rank = np.take_along_axis(near[:, :M], order, axis=1)
    return {"influence_subset": influence, "rank_influence_subset": order, "rank": rank}, near


def coco(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> Path:
    """FastGDA's `data/coco`, small."""
    random = np.random.default_rng(1)
    content, near = train_content()
    change(content)
    (folder / "query_train").mkdir(parents=True)
    (folder / "influence_train.pkl").write_bytes(pickle.dumps({"random": content}))
    (folder / "query_train" / "nn_dino.pkl").write_bytes(pickle.dumps({"fixed": {"rank": near}}))
    influence = random.normal(size=(T, N))
    test = {"influence": influence, "rank": np.argsort(-influence, axis=1)}
    (folder / "influence_test.pkl").write_bytes(pickle.dumps({"random": test}))
    for name, width in (("dino", 6), ("clip_text", 4)):
        place = folder / "feats" / name
        place.mkdir(parents=True)
        for file, count in (("data", N), ("train_query", Q), ("test_query", T)):
            np.save(place / f"{file}_feats.npy", random.normal(size=(count, width)).astype(np.float32))
    return folder


def test_rankings_and_features_of_the_training_queries(tmp_path: Path) -> None:
    folder = coco(tmp_path)
    content, _ = train_content()
    teacher = read_fastgda_teacher(folder)
    np.testing.assert_array_equal(teacher.rows, content["rank"])
    np.testing.assert_array_equal(teacher.scores, -np.sort(-content["influence_subset"], axis=1))
    assert (np.diff(teacher.scores) <= 0).all()
    assert teacher.images[:2] == ("row 000000", "row 000001")
    assert teacher.queries == tuple(f"train {index:04d}" for index in range(Q))
    assert not teacher.is_complete
    both = teacher.concatenated(["dino", "clip_text"])
    assert (both.training.shape, both.queries.shape) == ((N, 10), (Q, 10))
    np.testing.assert_array_equal(both.queries[:, :6], np.load(folder / "feats" / "dino" / "train_query_feats.npy"))


def test_rankings_of_the_test_queries_are_of_all_images(tmp_path: Path) -> None:
    teacher = read_fastgda_teacher(coco(tmp_path), "test", ["dino"])
    assert teacher.is_complete
    assert teacher.rows.shape == (T, N)
    assert list(teacher.features) == ["dino"]
    assert (np.diff(teacher.scores) <= 0).all()


def test_low_scores_may_be_the_influential_ones(tmp_path: Path) -> None:
    """The direction is that of `rank`: negated influence with the same ranks is the same teacher."""
    usual = read_fastgda_teacher(coco(tmp_path / "usual"))

    def negate(content: dict[str, Any]) -> None:
        content["influence_subset"] = -content["influence_subset"]

    turned = read_fastgda_teacher(coco(tmp_path / "turned", negate))
    np.testing.assert_array_equal(turned.rows, usual.rows)
    np.testing.assert_array_equal(turned.scores, usual.scores)


def test_all_queries_alike_say_nothing_of_the_direction(tmp_path: Path) -> None:
    def flatten(content: dict[str, Any]) -> None:
        content["influence_subset"][:2] = 0.5

    assert read_fastgda_teacher(coco(tmp_path, flatten)).scores[0].tolist() == [0.5] * M


def test_many_queries_are_checked_in_blocks(tmp_path: Path) -> None:
    folder, count = coco(tmp_path), 600
    random = np.random.default_rng(2)
    influence = random.normal(size=(count, N))
    rank = np.argsort(-influence, axis=1)
    np.save(folder / "feats" / "dino" / "test_query_feats.npy", np.zeros((count, 6), np.float32))
    np.save(folder / "feats" / "clip_text" / "test_query_feats.npy", np.zeros((count, 4), np.float32))
    (folder / "influence_test.pkl").write_bytes(pickle.dumps({"random": {"influence": influence, "rank": rank}}))
    np.testing.assert_array_equal(read_fastgda_teacher(folder, "test").rows, rank)
    rank[513, 3] = rank[513, 4]
    (folder / "influence_test.pkl").write_bytes(pickle.dumps({"random": {"influence": influence, "rank": rank}}))
    with pytest.raises(ValueError, match=rf"query 513 must name each of 0 to 29 once\. {rank[513, 4]} is named twice"):
        read_fastgda_teacher(folder, "test")


def set_key(name: str, make: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[name] = make(content)

    return change


def poke(name: str, at: tuple[int, int], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[name][at] = value

    return change


def turn_one(content: dict[str, Any]) -> None:
    content["influence_subset"][1] *= -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("rank"), r"no entry \['random'\]\['rank'\]; it has 'influence_subset'"),
        (set_key("rank", lambda content: content["rank"][:, :-1]), "must have the same shape"),
        (set_key("rank", lambda content: content["rank"].tolist()), "'rank' is list; it must be whole numbers"),
        (set_key("rank", lambda content: content["rank"] + 0.5), "'rank' is float64 of shape"),
        (set_key("influence_subset", lambda content: content["influence_subset"][0]), r"\(12,\); it must be floats"),
        (poke("rank", (2, 3), N), "'rank' names image 30 of a training set of 30 images"),
        (poke("rank", (2, 3), -1), "'rank' names image -1"),
        (set_key("rank", lambda content: np.tile(content["rank"][:, :1], M)), "ranks 'row .*' twice"),
        (poke("rank_influence_subset", (1, 0), M), "query 1 must name each of 0 to 11 once"),
        (poke("influence_subset", (3, 1), np.nan), "query 3 has the influence nan"),
        (set_key("rank_influence_subset", lambda content: np.tile(np.arange(M), (Q, 1))), "neither up nor down"),
        (turn_one, "highest scores in query 0, the lowest in 1"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    folder = coco(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        read_fastgda_teacher(folder)
    assert str(folder) in str(caught.value)


def test_files_of_other_queries_are_refused(tmp_path: Path) -> None:
    folder = coco(tmp_path)
    near = folder / "query_train" / "nn_dino.pkl"
    content, rank = train_content(7)
    near.write_bytes(pickle.dumps({"fixed": {"rank": rank[:, :M]}}))
    with pytest.raises(ValueError, match=r"nn_dino.pkl: image \d+, which query 0 ranks, is not among its neighbours"):
        read_fastgda_teacher(folder)
    near.write_bytes(pickle.dumps({"fixed": {"rank": rank[:-1]}}))
    with pytest.raises(ValueError, match="neighbours of 4 queries, but 5 are ranked"):
        read_fastgda_teacher(folder)
    near.write_bytes(pickle.dumps({"fixed": content}["fixed"]))
    with pytest.raises(ValueError, match=r"no entry \['fixed'\]\['rank'\]"):
        read_fastgda_teacher(folder)
    near.unlink()
    read_fastgda_teacher(folder)


def test_features_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = coco(tmp_path)
    with pytest.raises(ValueError, match="no features 'clip'; it has clip_text, dino"):
        read_fastgda_teacher(folder, features=["clip"])
    file = folder / "feats" / "dino" / "data_feats.npy"
    whole = np.load(file)
    bad = whole.copy()
    bad[17, 2] = np.nan
    np.save(file, bad)
    with pytest.raises(ValueError, match="Row 17 of the features 'dino' of training holds a number that is not finite"):
        read_fastgda_teacher(folder)
    np.save(file, whole[:-1])
    with pytest.raises(ValueError, match="different training sets: clip_text 30, dino 29"):
        read_fastgda_teacher(folder)
    np.save(file, whole.astype(int))
    with pytest.raises(ValueError, match=r"features are \(rows, width\) floats"):
        read_fastgda_teacher(folder)
    np.save(file, whole.astype(object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"data_feats.npy is not an array of numbers"):
        read_fastgda_teacher(folder)
    np.save(file, whole)
    np.save(folder / "feats" / "dino" / "train_query_feats.npy", np.zeros((Q + 1, 6)))
    with pytest.raises(ValueError, match=r"'dino' of queries have shape \(6, 6\); 5 rows needed"):
        read_fastgda_teacher(folder)
    (folder / "feats" / "dino" / "train_query_feats.npy").unlink()
    with pytest.raises(FileNotFoundError, match="train_query_feats"):
        read_fastgda_teacher(folder)


def test_a_teacher_set_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = coco(tmp_path / "coco"), tmp_path / "teacher"
    images = [f"{index:012d}" for index in range(N)]
    table = {"image": images, "caption": [f"an image of {index}" for index in range(N)]}
    pq.write_table(pa.table(table), tmp_path / "pictures.parquet")
    pq.write_table(pa.table({"query": list("abcde"), "prompt": list("vwxyz")}), tmp_path / "queries.parquet")
    names = ["--images", str(tmp_path / "pictures.parquet"), "--queries", str(tmp_path / "queries.parquet")]
    main(["fastgda-teacher", str(folder), str(output), *names])
    assert capsys.readouterr().out == f"{output}: 5 queries, 12 of 30 images each; features clip_text, dino\n"
    teacher, direct = read_teacher_set(output), read_fastgda_teacher(folder)
    assert teacher.images == tuple(images)
    assert (teacher.queries, teacher.prompts) == (tuple("abcde"), tuple("vwxyz"))
    np.testing.assert_array_equal(teacher.rows, direct.rows)
    np.testing.assert_array_equal(teacher.scores, direct.scores)
    for name, both in direct.features.items():
        np.testing.assert_array_equal(teacher.features[name].training, both.training)
        np.testing.assert_array_equal(teacher.features[name].queries, both.queries)
    with pytest.raises(ArtifactMismatchError, match="was made with other settings"):
        main(["fastgda-teacher", str(folder), str(output), "--part", "test"])
    pq.write_table(pa.table({"query": ["a"], "prompt": ["v"]}), tmp_path / "queries.parquet")
    with pytest.raises(ValueError, match="has 1 rows, but FastGDA's files have 5"):
        main(["fastgda-teacher", str(folder), str(tmp_path / "other"), *names])


def state_dict() -> dict[str, torch.Tensor]:
    """The checkpoint's layout, written out."""
    random = torch.Generator().manual_seed(0)
    sizes = {"layers.0": (8, 10), "layers.1": (8, 8), "layers.2": (8, 8), "output_layer": (7, 8)}
    state = {}
    for name, (rows, columns) in sizes.items():
        state[f"mlp.{name}.weight"] = torch.randn(rows, columns, generator=random)
        state[f"mlp.{name}.bias"] = torch.randn(rows, generator=random)
    return {**state, "scale": torch.tensor([-3.0]), "bias": torch.tensor([0.5])}


def test_a_ranker_of_theirs_gives_its_own_formula(tmp_path: Path) -> None:
    state = state_dict()
    torch.save(state, tmp_path / "dino.pth")
    ranker = read_fastgda_ranker(tmp_path / "dino.pth").double()
    features = torch.randn(6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def embedded(rows: torch.Tensor) -> torch.Tensor:
        for index in range(3):
            rows = torch.relu(rows @ state[f"mlp.layers.{index}.weight"].double().T + state[f"mlp.layers.{index}.bias"])
        return rows @ state["mlp.output_layer.weight"].double().T + state["mlp.output_layer.bias"]

    cosines = F.cosine_similarity(embedded(features[:2])[:, None], embedded(features[2:])[None], dim=-1)
    torch.testing.assert_close(ranker(features[:2], features[2:]), -3 * cosines + 0.5)


def test_a_ranker_goes_there_and_back(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "theirs.pth")
    arguments = [str(tmp_path / "theirs.pth"), str(tmp_path / "ours")]
    with pytest.raises(ValueError, match="A ranker of 10 inputs may take several features"):
        main(["fastgda-ranker", *arguments])
    main(["fastgda-ranker", *arguments, "--features", "dino", "clip_text"])
    ranker, features = load_ranker(tmp_path / "ours")
    assert features == ["dino", "clip_text"]
    assert ranker.sizes == {"inputs": 10, "width": 8, "hidden": 3, "outputs": 7, "dropout": 0.1}
    main(["to-fastgda-ranker", str(tmp_path / "ours"), str(tmp_path / "back.pth")])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state_dict().keys()
    for name, tensor in state_dict().items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)


def test_the_published_widths_name_their_features(tmp_path: Path) -> None:
    for width, features in ((768, ["dino"]), (1280, ["dino+clip_text"])):
        write_fastgda_ranker(tmp_path / "file.pth", Ranker(width, width=4, hidden=3, outputs=4))
        main(["fastgda-ranker", str(tmp_path / "file.pth"), str(tmp_path / str(width))])
        assert load_ranker(tmp_path / str(width))[1] == features


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch marker",)


def changed(**changes: Any) -> Any:
    state = state_dict() | {name.replace("/", "."): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (Hostile(), "is not a state dict of tensors"),
        ([1, 2], "is not a state dict of tensors by name"),
        ({"state_dict": state_dict()}, "is not a state dict of tensors by name"),
        ({}, "has no matrix 'mlp.output_layer.weight'; it has nothing"),
        (changed(scale=None), r"'scale' has shape \(missing\), a ranker of 3 hidden layers and 10 inputs has \(1,\)"),
        (changed(**{"mlp/layers/1/bias": None}), r"'mlp.layers.1.bias' has shape \(missing\)"),
        (changed(**{"mlp/layers/1/weight": torch.ones(8, 9)}), r"'mlp.layers.1.weight' has shape \(8, 9\)"),
        (changed(**{"mlp/output_layer/weight": torch.ones(7)}), "no matrix 'mlp.output_layer.weight'"),
        (changed(extra=torch.ones(1)), "'extra' has shape .* has no such tensor"),
        (changed(bias=torch.tensor([float("nan")])), "'bias' holds a number that is not finite"),
    ],
)
def test_what_is_no_ranker_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        read_fastgda_ranker(tmp_path / "file.pth")
    assert not (tmp_path / "marker").exists()


def test_what_is_not_there_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no ranker .*none\.pth"):
        read_fastgda_ranker(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match=r"cut\.pth is not a state dict"):
        read_fastgda_ranker(tmp_path / "cut.pth")
    with pytest.raises(SystemExit):
        main(["unknown"])
