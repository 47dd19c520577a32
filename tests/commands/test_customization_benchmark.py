"""The customized-model benchmark: its lists, what is hidden where, its numbers, and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import evaluate
from tests.support.tiny import attribution_config, one_process, tiny_folder, tiny_pipeline
from wherefrom.attributors import AttributionByUnlearning, Attributor, PixelSimilarity, TrainingData
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.commands.customization_benchmark import (
    ROWS,
    ExemplarRetrieval,
    add_exemplars,
    benchmark,
    exemplar_images,
    summarise,
    without_new_words,
)
from wherefrom.commands.customization_tasks import Task, read_abc, read_all, read_tasks, tasks_by_kind
from wherefrom.curvature import DiagonalFisher, FisherSettings
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.models.customization import add_word, encoder_of, save_customized
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import QueryImage
from wherefrom.queries.types import Query, Scores
from wherefrom.runtime.artifacts import Store

CASES = ("test_objects", "test_styles")


def image(path: Path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    return path.name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test cases of two models, 3 exemplars and 2 images each, in the released layouts."""
    root = tmp_path_factory.mktemp("customized")
    tiny_pipeline(root / "pipeline")
    tiny_folder(root / "background", 12)
    tasks: list[dict[str, Any]] = []
    for first, case in enumerate(CASES):
        cases = []
        for index in range(2):
            name, seed = f"{case}-{index}", 1000 + 100 * first + 10 * index
            for number in range(3):
                image(root / "dataset" / "exemplar" / name / f"{number}.png", seed + number)
            for number in range(2):
                image(root / "synth" / name / f"{number}.png", seed + number)  # it draws its exemplars again
                tasks.append(
                    {
                        "synth_image_path": f"synth/{name}/{number}.png",
                        "prompt": f"a big <new1> square {number}",
                        "test_case": case,
                        "test_case_ind": index,
                        "model_path": f"models/{name}",
                        "train_prompt": "<new1> square",
                        "category": "square",
                    }
                )
            exemplars = [f"dataset/exemplar/{name}/{number}.png" for number in range(3)]
            cases.append(
                {"exemplar": exemplars, "synth": {"gpt": [f"synth/{name}/0.png"], "other": [f"synth/{name}/1.png"]}}
            )
            model = load_model(str(root / "pipeline"))
            random = torch.Generator().manual_seed(seed)
            for parameter in select_weights(model.denoiser, "cross_attention_kv").values():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
            add_word(encoder_of(model), "<new1>", torch.randn(12, generator=random))
            save_customized(root / "models" / name, str(root / "pipeline"), model, ["<new1>"])
        (root / "json").mkdir(exist_ok=True)
        (root / "json" / f"{case}.json").write_text(json.dumps(cases))
    (root / "tasks.json").write_text(json.dumps(tasks))
    return root


def background(root: Path, store: Store, latents: bool = False) -> TrainingData:
    images = build_image_folder(store, root / "background", ImageFolderOptions()).where("split", "train")
    if not latents:
        return TrainingData(images)
    encoder = load_model(str(root / "pipeline")).encoder
    assert encoder is not None
    return TrainingData(images, encode_image_set(images, encoder=encoder, store=store))


def test_both_layouts_are_read(root: Path) -> None:
    tasks = read_tasks(root / "tasks.json", root)
    assert [task.name for task in tasks] == [f"{case}/{index}" for case in CASES for index in range(2)]
    first = tasks[0]
    assert (first.case, first.caption, first.model) == ("test_objects", "<new1> square", root / "models/test_objects-0")
    assert [path.name for path in first.exemplars] == ["0.png", "1.png", "2.png"]
    assert [query.prompt for query in first.queries] == ["a big <new1> square 0", "a big <new1> square 1"]
    released = read_abc(root / "json" / "test_styles.json", root)
    assert released[1] == replace(
        tasks[3], model=None, caption="", queries=tuple(replace(each, prompt="") for each in tasks[3].queries)
    )
    assert {kind: [task.name for task in result] for kind, result in tasks_by_kind(tasks, ["test_styles"]).items()} == {
        "objects": ["test_objects/0", "test_objects/1"],
        "styles": ["test_styles/0", "test_styles/1"],
    }
    assert [task.name for task in read_all([root / "tasks.json"], root, 1)] == ["test_objects/0", "test_styles/0"]
    assert len(read_all([root / "json" / f"{case}.json" for case in CASES], root)) == 4


def test_lists_that_cannot_be_used_are_refused(root: Path, tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = json.loads((root / "tasks.json").read_text())

    def refused(match: str, content: Any, error: type[Exception] = ValueError, read: Any = read_tasks) -> None:
        file = tmp_path / "list.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(error, match=match):
            read(file, root)

    refused("is not valid JSON", "{")
    refused("should hold a list of entries", {})
    refused("should hold a list of entries", [])
    refused("should hold a list of entries", ["a"])
    refused(r"entry 1 should have 'prompt' of type str", [entries[0], {**entries[1], "prompt": 3}])
    refused(r"entry 0 should have 'test_case_ind' of type int", [{**entries[0], "test_case_ind": True}])
    refused("test_objects/7 is not in .* which has 2 entries", [{**entries[0], "test_case_ind": 7}])
    refused("leads out of", [{**entries[0], "synth_image_path": "../secret.png"}])
    refused("leads out of", [{**entries[0], "model_path": "/etc"}])
    refused("leads out of", [{**entries[0], "test_case": "../../x"}])
    refused("not a file in", [{**entries[0], "synth_image_path": "synth/nothing.png"}], FileNotFoundError)
    refused("two values of 'model_path'", [entries[0], {**entries[1], "model_path": "models/b"}])
    cases: list[dict[str, Any]] = json.loads((root / "json" / "test_styles.json").read_text())
    refused("entry 0 should have 'exemplar', a list of paths", [{**cases[0], "exemplar": []}], read=read_abc)
    refused(
        "entry 1 should have 'synth', lists of paths", [cases[0], {**cases[1], "synth": {"gpt": "x"}}], read=read_abc
    )
    tasks = read_tasks(root / "tasks.json", root)
    with pytest.raises(ValueError, match="there is no test case 'test_bamfg'; there are test_objects, test_styles"):
        tasks_by_kind(tasks, ["test_bamfg"])
    with pytest.raises(ValueError, match="the model test_objects/0 is in another file"):
        read_all([root / "tasks.json", root / "json" / "test_objects.json"], root)
    with pytest.raises(ValueError, match="limit must be positive; given 0"):
        read_all([root / "tasks.json"], root, 0)


def test_a_prompt_loses_its_new_words() -> None:
    assert without_new_words("photo of a <new1> cat") == "photo of a cat"
    assert without_new_words("<new1>, openmoji style") == "openmoji style"
    assert without_new_words("a cat , <new1> style") == "a cat, style"
    assert without_new_words("a <b") == "a <b"


class Known(Attributor):
    """Scores as a test says: by a function of image ids."""

    def __init__(self, score: Any) -> None:
        self.given = score
        self.asked: list[Query] = []

    def identity(self) -> dict[str, Any]:
        return {"method": "known"}

    def score(self, queries: Sequence[Query], candidates: Sequence[str] | None = None) -> Iterator[Scores]:
        ids = self.data.images.ids
        for query in queries:
            self.asked.append(query)
            yield Scores(query, ids, np.array([self.given(name) for name in ids], dtype=float), np.empty(0))

    def fit(self, data: TrainingData, *_: Any, **__: Any) -> None:
        self.data = data


def test_numbers_are_those_of_hand(root: Path, tmp_path: Path) -> None:
    tasks, store = read_tasks(root / "tasks.json", root), Store(tmp_path / "store")
    data, model = background(root, store), load_model(str(root / "pipeline"))
    # Exemplar 0 first, the twelve others next, exemplar 1, exemplar 2: ranks 1, 14 and 15.
    method = Known(lambda name: {"0": 9.0, "1": -1.0, "2": -2.0}[name[-1]] if name.startswith("exemplar") else 1.0)
    lines = benchmark(
        tmp_path / "run",
        tasks=tasks,
        styles=["test_styles"],
        methods={"known": method},
        base="base",
        base_model=model,
        background=data,
        store=store,
        runner=one_process(),
        k=2,
    )
    assert [(line.kind, line.models) for line in lines] == [("objects", 2), ("styles", 2)]
    for line in lines:
        assert line.recall == (pytest.approx(1 / 3), 0.0)
        assert line.precision == (pytest.approx((1 + 2 / 14 + 3 / 15) / 3), 0.0)
        assert line.cap == pytest.approx(2 / 3)
    rows = pq.read_table(tmp_path / "run" / ROWS).to_pylist()
    assert len(rows) == 8
    assert {row["first"] for row in rows} == {1}
    assert len(method.asked) == 8
    again = Known(lambda name: 1 / 0)
    assert (
        benchmark(
            tmp_path / "run",
            tasks=tasks,
            styles=["test_styles"],
            methods={"known": again},
            base="base",
            base_model=model,
            background=data,
            store=store,
            runner=one_process(),
            k=2,
        )
        == lines
    )
    assert again.asked == [], "what is finished is not scored again"


def test_errors_are_of_means_over_models() -> None:
    def row(task: str, recall: float, precision: float) -> ExemplarRetrieval:
        return ExemplarRetrieval("m", "objects", task, "q", "with", recall, precision, 1, 20, 0.5)

    (line,) = summarise([row("a", 0.0, 0.1), row("a", 0.2, 0.3), row("b", 0.5, 0.6), row("c", 0.3, 0.1)])
    means = np.array([0.1, 0.5, 0.3])
    assert line.recall == (pytest.approx(means.mean()), pytest.approx(means.std(ddof=1) / 3**0.5))
    means = np.array([0.2, 0.6, 0.1])
    assert line.precision == (pytest.approx(means.mean()), pytest.approx(means.std(ddof=1) / 3**0.5))
    assert (line.models, line.cap) == (3, 0.5)


def test_exemplars_are_hidden_once(root: Path, tmp_path: Path) -> None:
    task = read_tasks(root / "tasks.json", root)[0]
    data = background(root, Store(tmp_path))
    exemplars = exemplar_images(task, 8, data.images.columns)
    together = add_exemplars(data.images, exemplars)
    assert together.ids[-1] == "exemplar/test_objects/0/2"
    assert together.captions[-1] == ("<new1> square",)
    np.testing.assert_array_equal(np.asarray(together.pixels)[:12], data.images.pixels)
    np.testing.assert_array_equal(np.asarray(together.pixels)[12:], exemplars.pixels)
    with pytest.raises(ValueError, match="occur more than once"):
        add_exemplars(together, exemplars)
    with pytest.raises(ValueError, match="cannot be one set"):
        add_exemplars(data.images, exemplar_images(task, 4, data.images.columns))


def test_unlearning_uses_each_model_and_the_curvature_of_the_base(root: Path, tmp_path: Path) -> None:
    tasks, store = read_tasks(root / "tasks.json", root)[:2], Store(tmp_path / "store")
    data, model = background(root, store, latents=True), load_model(str(root / "pipeline"))

    def made() -> AttributionByUnlearning:
        settings = UnlearningSettings(noise_samples=32, measurement_samples=32, relative_loss_increase=0.01)
        return AttributionByUnlearning(
            "all", unlearning=settings, grid=LossGrid(timesteps=2), curvature=DiagonalFisher(FisherSettings(1))
        )

    method, seen = made(), []
    real = method.fit

    def fit(data: TrainingData, model: Any, *rest: Any, **named: Any) -> None:
        real(data, model, *rest, **named)
        seen.append((model.fingerprint(), method.curvature_matrix))

    method.fit = fit  # type: ignore[method-assign]
    base = str(root / "pipeline")
    words = ("with", "without")
    lines = benchmark(
        tmp_path / "run",
        tasks=tasks,
        styles=[],
        methods={"abu": method},
        base=base,
        base_model=model,
        background=data,
        store=store,
        runner=one_process(),
        words=words,
    )
    assert [(line.method, line.words) for line in lines] == [
        (method, word) for word in words for method in ("abu", "abu, by size")
    ]
    ranked: dict[str, list[float]] = {"abu": [], "abu, by size": []}
    for table in sorted((tmp_path / "run").glob("*-with/abu/ranking.parquet")):
        rows = pq.read_table(table).to_pylist()
        for query in dict.fromkeys(row["query"] for row in rows):
            own = {row["image"]: row["score"] for row in rows if row["query"] == query}
            for name, by in (("abu", own), ("abu, by size", {image: abs(score) for image, score in own.items()})):
                order = sorted(by, key=by.__getitem__, reverse=True)
                places = [place for place, image in enumerate(order, start=1) if image.startswith("exemplar/")]
                ranked[name].append(float(np.mean([(i + 1) / place for i, place in enumerate(places)])))
    for line in lines[:2]:
        assert line.precision[0] == pytest.approx(np.mean(ranked[line.method]), abs=1e-6)
    assert len({name for name, _ in seen}) == 2, "each customized model is unlearned"
    assert model.fingerprint() not in {name for name, _ in seen}
    own = made()
    own.fit(data, model, store, one_process())
    for _, curvature in seen:
        assert curvature is seen[0][1]
        for name, value in own.curvature_matrix.fisher.items():  # type: ignore[attr-defined]
            torch.testing.assert_close(curvature.fisher[name], value)
    fitted = made()
    fitted.share_curvature(model, data, store, one_process())
    assert fitted.identity() != own.identity()


def test_what_cannot_be_benchmarked_is_refused(root: Path, tmp_path: Path) -> None:
    tasks, store = read_tasks(root / "tasks.json", root), Store(tmp_path / "store")
    data, model = background(root, store), load_model(str(root / "pipeline"))

    def run(tasks: Sequence[Task], methods: dict[str, Attributor]) -> None:
        benchmark(
            tmp_path / "run",
            tasks=tasks,
            styles=[],
            methods=methods,
            base="base",
            base_model=model,
            background=data,
            store=store,
            runner=one_process(),
        )

    with pytest.raises(ValueError, match="nothing to benchmark"):
        run([], {"pixel": PixelSimilarity()})
    with pytest.raises(ValueError, match="nothing to benchmark"):
        run(tasks, {})
    with pytest.raises(ValueError, match="abu needs the customized model, but the task test_objects/0 names none"):
        run([replace(tasks[0], model=None)], {"abu": AttributionByUnlearning("all")})
    with pytest.raises(ValueError, match=r"names the model .*nowhere, which is not a folder"):
        run([replace(tasks[0], model=tmp_path / "nowhere")], {"pixel": PixelSimilarity()})
    odd = replace(tasks[0], queries=(QueryImage(str(tmp_path / "none.png"), ""),))
    with pytest.raises(ValueError, match="is not a file"):
        run([odd], {"pixel": PixelSimilarity()})


def test_the_command_finds_what_was_drawn_again(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixel = tmp_path / "pixel.yaml"
    pixel.write_text("class_path: PixelSimilarity\n")
    config = attribution_config(tmp_path, "run")
    content = json.loads(config.read_text())
    for name in ("attributor", "queries"):
        content.pop(name)
    content |= {
        "model": str(root / "pipeline"),
        "data": {"class_path": "ImageFolder", "init_args": {"folder": str(root / "background")}},
        "methods": [str(pixel)],
        "tasks": [str(root / "tasks.json")],
        "root": str(root),
        "styles": ["test_styles"],
        "k": 1,
    }
    config.write_text(json.dumps(content))
    evaluate.main(["customized", "-c", str(config)])
    said = capsys.readouterr().out
    assert "| pixel | objects | with | 0.333 ± 0.000 | 0.33 |" in said
    assert json.loads((tmp_path / "run" / "customized.json").read_text())["lines"][1]["kind"] == "styles"
    with pytest.raises(ValueError, match="takes its queries from the tasks"):
        evaluate.main(
            ["customized", "-c", str(config), "--output", str(tmp_path / "other"), "--queries.prompts", '["a"]']
        )
