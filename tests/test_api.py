"""What a notebook uses: one call, and scores that show themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import wherefrom
from tests.support.user_world import FEW, UserWorld, user_world
from wherefrom.api import AttributedImages, AttributionOptions, attribute_images, compare
from wherefrom.attributors import InfluenceFunction, PixelSimilarity
from wherefrom.commands.packaged_methods import QUICK, load_packaged, quick_settings
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.models.pipeline import load_model, load_pipeline
from wherefrom.queries.sources import QueryRegion
from wherefrom.reports.scores_view import ScoresView
from wherefrom.runtime.artifacts import Store

PIXEL = "pixel"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> UserWorld:
    return user_world(tmp_path_factory.mktemp("api"))


@pytest.fixture
def options(tmp_path: Path) -> AttributionOptions:
    return AttributionOptions(store=tmp_path / "store", progress=False)


@pytest.fixture
def queries(world: UserWorld) -> list[Any]:
    return [(world.generated, "a red square")]


@pytest.fixture
def scores(world: UserWorld, queries: list[Any], options: AttributionOptions) -> ScoresView:
    return attribute_images(world.model, world.images, queries, PIXEL, options)[0]


def test_every_form_of_a_model_and_of_images_gives_the_same(
    world: UserWorld, queries: list[Any], tmp_path: Path
) -> None:
    few = AttributionOptions(store=tmp_path / "store", progress=False, settings=FEW)
    image_set = build_image_folder(Store(tmp_path / "other"), world.images, ImageFolderOptions(size=8))
    tops = [
        attribute_images(model, images, queries, options=few)[0].top(16)
        for model, images in (
            (load_pipeline(str(world.model)), world.images),
            (load_model(str(world.model)), str(world.images)),
            (world.model, image_set),
        )
    ]
    assert tops[0] == tops[1] == tops[2]
    assert len(tops[0]) == 16
    assert max(abs(score) for _, score in tops[0]) > 0


def test_every_form_of_a_query_is_the_same_image(world: UserWorld, options: AttributionOptions) -> None:
    image = Image.open(world.generated)
    forms = (world.generated, str(world.generated), image, np.asarray(image.convert("RGB")))
    results = [attribute_images(world.model, world.images, [(form, "")], PIXEL, options)[0] for form in forms]
    assert len({tuple(each.top(16)) for each in results}) == 1
    drawn = attribute_images(world.model, world.images, ["a circle", (image, ""), "a circle"], PIXEL, options)
    assert [each.query.prompt for each in drawn] == ["a circle", "", "a circle"]
    assert not np.array_equal(drawn[0].query.pixels, drawn[2].query.pixels)


def test_scores_are_computed_when_they_are_asked_for_and_kept(world: UserWorld, options: AttributionOptions) -> None:
    results = attribute_images(world.model, world.images, ["a circle", "a square", "a stripe"], PIXEL, options)
    assert len(results) == 3
    assert repr(results) == "<scores of 3 queries by PixelSimilarity, 0 of them computed>"
    first = next(iter(results))
    assert repr(results).endswith("1 of them computed>")
    assert results[0] is first
    assert results[-1] is results[2]
    assert [each.query.prompt for each in results[1:]] == ["a square", "a stripe"]
    assert list(results) == [results[0], results[1], results[2]]
    with pytest.raises(IndexError):
        results[3]


def test_a_table_holds_the_ranking_with_what_the_folder_says(scores: ScoresView) -> None:
    table = scores.table()
    assert list(table.columns) == [
        "rank", "image", "score", "p_value", "caption", "author", "file_name", "license", "split",
    ]  # fmt: skip
    assert list(table["rank"]) == list(range(1, 17))
    assert list(zip(table["image"], table["score"], strict=True)) == scores.top(16)
    assert table["p_value"].is_monotonic_increasing
    row = scores.images.ids.index(table["image"][0])
    assert table["caption"][0] == scores.images.captions[row][0]
    assert table["author"][0] == scores.images.columns["author"][row]
    assert len(scores.table(3)) == 3
    with pytest.raises(ValueError, match="count must be at least 1, or None for all images; given 0"):
        scores.table(0)


def test_without_pandas_a_table_says_what_to_install(scores: ScoresView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'wherefrom\[notebook\]'"):
        scores.table()


def test_the_table_of_all_queries_names_them(world: UserWorld, options: AttributionOptions) -> None:
    results = attribute_images(world.model, world.images, ["a circle", "a square"], PIXEL, options)
    table = results.table(2)
    assert list(table["prompt"]) == ["a circle"] * 2 + ["a square"] * 2
    assert list(table.columns)[:4] == ["query", "prompt", "rank", "image"]


def test_scores_show_themselves(scores: ScoresView, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = scores.top(1)[0][0]
    assert repr(scores) == (
        f"<ScoresView of {scores.query.name!r}, 'a red square': 16 training images, the first is {first!r}>"
    )
    html = scores._repr_html_()
    assert html.count("<img ") == 1 + 10
    assert "a red square" in html
    assert "CC0-1.0" in html
    assert "<style" not in html
    assert "<script" not in html
    scores.show(3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3
    assert lines[1].split()[:1] == ["1"]
    assert first in lines[1]
    figure = scores.plot(5)
    assert len(figure.axes[0].patches) == 5
    figure.savefig(tmp_path / "plot.png")
    page = scores.save_report(tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "a red square" in page
    assert "Method" in page


def test_captions_cannot_break_out_of_a_notebook(world: UserWorld, options: AttributionOptions) -> None:
    image_set = build_image_folder(Store(options.store), world.images, ImageFolderOptions(size=8))
    evil = "<script>alert(1)</script> $x_"
    hostile = type(image_set)(
        image_set.ids,
        ((evil,),) * len(image_set),
        image_set.pixels,
        {**image_set.columns, "license": (evil,) * len(image_set)},
        "hostile",
    )
    result = attribute_images(world.model, hostile, [(world.generated, evil)], PIXEL, options)[0]
    assert "<script" not in result._repr_html_()
    assert "&lt;script&gt;" in result._repr_html_()
    result.plot().savefig(Path(options.store) / "plot.png")


def test_one_page_of_all_queries(world: UserWorld, options: AttributionOptions, tmp_path: Path) -> None:
    results = attribute_images(world.model, world.images, ["a circle", "a square"], PIXEL, options)
    page = results.save_report(tmp_path / "page.html").read_text()
    assert "a circle" in page
    assert "a square" in page
    assert results._repr_html_().count("<img ") == 2 * 11


def test_parts_of_an_image_follow_it(world: UserWorld, queries: list[Any], tmp_path: Path) -> None:
    method = InfluenceFunction(noise_samples=8, grid=LossGrid(timesteps=2))
    regions = [QueryRegion(str(world.generated), box=[0, 0, 4, 4])]
    few = AttributionOptions(store=tmp_path, progress=False, regions=regions)
    whole, part = attribute_images(world.model, world.images, queries, method, few)
    assert whole.query.region is None
    assert part.query.region is not None
    assert whole.top(16) != part.top(16)


def test_progress_is_shown_unless_it_is_switched_off(
    world: UserWorld, queries: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attribute_images(world.model, world.images, queries, PIXEL, AttributionOptions(store=tmp_path))[0]
    assert "query 1 of 1 is done: 'a red square'" in capsys.readouterr().err
    silent = AttributionOptions(store=tmp_path, progress=False)
    attribute_images(world.model, world.images, queries, PIXEL, silent)[0]
    assert "query" not in capsys.readouterr().err


def test_a_quick_look_is_called_one_on_its_page(world: UserWorld, queries: list[Any], tmp_path: Path) -> None:
    quick = AttributionOptions(store=tmp_path, progress=False, quick=True)
    page = attribute_images(world.model, world.images, queries, options=quick)[0].save_report(tmp_path / "page.html")
    assert "A quick look: at most 4 timesteps" in page.read_text()


def test_methods_are_compared_and_left_in_a_folder(world: UserWorld, queries: list[Any], tmp_path: Path) -> None:
    options = AttributionOptions(store=tmp_path / "store", progress=False)
    both = compare(
        world.model,
        images=world.images,
        queries=queries,
        methods=["pixel", "random"],
        output=tmp_path / "run",
        options=options,
    )
    assert list(both) == ["pixel", "random"]
    assert isinstance(both["pixel"][0], ScoresView)
    assert (tmp_path / "run" / "report.html").is_file()


class TestSettings:
    def test_the_default_method_takes_the_step_that_was_found_right(self) -> None:
        made: Any = load_packaged(["abu_plus"])["abu_plus"]
        assert made.unlearning.relative_loss_increase == 1.0
        given: Any = load_packaged(["abu_plus"], {"unlearning.relative_loss_increase": 0.3})["abu_plus"]
        assert given.unlearning.relative_loss_increase == 0.3
        other: Any = load_packaged(["abu"])["abu"]
        assert other.unlearning.relative_loss_increase == 0.2

    def test_a_users_own_file_keeps_its_step(self, tmp_path: Path) -> None:
        file = tmp_path / "abu_plus.yaml"
        file.write_text("class_path: AttributionByUnlearning\ninit_args: {unlearning: {relative_loss_increase: 0.2}}\n")
        made: Any = load_packaged([str(file)])["abu_plus"]
        assert made.unlearning.relative_loss_increase == 0.2

    def test_a_file_that_describes_no_method_is_refused_in_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("class_path: Nonsense\n")
        with pytest.raises(ValueError, match=r"mine\.yaml does not describe a method: .*Nonsense\.$"):
            load_packaged([str(file)])
        assert capsys.readouterr().err == ""

    def test_quick_never_takes_more_than_the_method_has_and_settings_win(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("class_path: AttributionByUnlearning\ninit_args: {grid: {timesteps: 2}}\n")
        assert quick_settings(file) == {key: value for key, value in QUICK.items() if key != "grid.timesteps"}
        made: Any = load_packaged([str(file)], {"unlearning.noise_samples": 7}, quick=True)["mine"]
        assert made.grid.timesteps == 2
        assert made.unlearning.noise_samples == 7
        assert made.unlearning.measurement_samples == QUICK["unlearning.measurement_samples"]

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"sampling_steps": 0}, "sampling_steps must be at least 1; given 0"),
            ({"guidance": float("nan")}, "guidance must be a number from 0 on; given nan"),
            ({"eta": 1.5}, "eta must lie between 0 and 1; given 1.5"),
            ({"seed": -1}, "seed must be a number from 0 on"),
        ],
    )
    def test_options_out_of_range_are_refused(self, values: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            AttributionOptions(**values)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": 5}, "model: a int is no model; give a loaded diffusers pipeline"),
        ({"model": "./nowhere"}, "model: there is no folder './nowhere'"),
        ({"images": "nowhere"}, "images: there is no folder or file 'nowhere'"),
        ({"queries": []}, "queries: there are none"),
        (
            {"queries": [("a", "b", "c")]},
            r"queries: \('a', 'b', 'c'\) is neither a prompt nor an",
        ),
        ({"queries": [("none.png", "x")]}, "queries: there is no image file 'none.png'"),
        ({"queries": [(np.zeros((8, 8)), "")]}, r"a uint8 array \(H, W, 3\); given float64 of shape \(8, 8\)"),
        ({"queries": [(np.zeros((9, 8, 3), np.uint8), "")]}, r"or set AttributionOptions\(resize=True\)"),
        ({"method": "pixle"}, "did you mean 'pixel'"),
        ({"settings": {"nothing": 1}}, "settings: no method has 'nothing'"),
        ({"method": PixelSimilarity(), "settings": {"a": 1}}, "an attributor that is given has its settings already"),
        ({"device": "cuda:9"}, "device: there is no 'cuda:9'"),
        ({"caption": "words"}, "AttributionOptions.caption"),
    ],
)
def test_mistakes_are_named_in_the_words_of_this_interface(
    world: UserWorld, queries: list[Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    asked = {"model": world.model, "images": world.images, "queries": queries, "method": PIXEL}
    own = {key: value for key, value in changes.items() if key not in asked}
    options = AttributionOptions(store=tmp_path, progress=False, **own)
    with pytest.raises(ValueError, match=said):
        attribute_images(**{**asked, **{key: value for key, value in changes.items() if key in asked}}, options=options)


def test_the_earlier_name_still_works_with_one_line(world: UserWorld, tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="attribute_pictures is now attribute_images") as warned:
        results = wherefrom.attribute_pictures(
            load_pipeline(str(world.model)),
            str(world.images),
            [(str(world.generated), "a red square")],
            PixelSimilarity(),
            store=tmp_path,
        )
    assert len(warned) == 1
    assert len(next(results).top(16)) == 16


class TestPublicNames:
    def test_each_is_there_and_listed(self) -> None:
        assert set(wherefrom.__all__) <= set(dir(wherefrom))
        for name in wherefrom.__all__:
            assert getattr(wherefrom, name) is not None
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            wherefrom.nothing  # noqa: B018

    def test_those_of_the_design_are_among_them(self) -> None:
        names = (
            "attribute_images load_pipeline Attributor Query Scores TrainingData AttributionByUnlearning "
            "InfluenceFunction InfluenceBank TRAK JourneyTRAK LearnedRanker Rerank compare evaluate_counterfactual "
            "linear_datamodeling_score Index __version__"
        )
        assert set(names.split()) <= set(wherefrom.__all__)

    def test_importing_the_package_imports_nothing_that_takes_long(self) -> None:
        code = "import sys, wherefrom; wherefrom.__version__; print({'torch', 'numpy', 'diffusers'} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "set()\n"

    def test_results_are_a_sequence(self) -> None:
        assert issubclass(AttributedImages, Sequence)
