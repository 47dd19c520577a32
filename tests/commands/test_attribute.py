"""A run of attribution through the command line: what it leaves, goes on from, and refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import evaluate
from tests.support.adapters import kohya, lora, made, save, targets
from tests.support.tiny import (
    attribution_config,
    one_process,
    tiny_latents,
    tiny_pipeline,
    tiny_unet,
)
from wherefrom.attributors import PixelSimilarity, Query, TrainingData
from wherefrom.commands.attribute import attribute, read_run
from wherefrom.data.image_folder import build_image_folder
from wherefrom.data.image_set import ImageSet
from wherefrom.metrics.null_distribution import p_values
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import generate
from wherefrom.rankings.ranking_file import read_ranking
from wherefrom.rankings.score_table import ScoreTable
from wherefrom.reports.query_section import ReportOptions
from wherefrom.runtime.artifacts import ArtifactMismatchError, Store, identity_hash

ROOT = Path(__file__).parents[2]
COUNT, HELD_OUT = 16, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs share images, model and store."""
    return tmp_path_factory.mktemp("attribution")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished run of two prompts."""
    queries = {"prompts": ["a big red square", "blue circle"], "sampling_steps": 2}
    return attributed(folder, "run", queries=queries)


def attributed(folder: Path, name: str, *options: str, **settings: Any) -> Path:
    evaluate.main(["attribute", "-c", str(attribution_config(folder, name, **settings)), *options])
    return folder / name


def quick(folder: Path, name: str, *options: str, **settings: Any) -> Path:
    """A run with the attributor that costs nothing."""
    return attributed(folder, name, *options, **{"attributor": {"class_path": "PixelSimilarity"}, **settings})


def test_a_run_leaves_a_complete_sorted_ranking(run: Path, folder: Path) -> None:
    table = pq.read_table(run / "ranking.parquet")
    assert table.column_names == ["query", "rank", "image", "score", "p_value"]
    rows = table.to_pylist()
    queries = sorted({row["query"] for row in rows})
    assert len(queries) == 2
    for query in queries:
        part = [row for row in rows if row["query"] == query]
        assert [row["rank"] for row in part] == list(range(1, COUNT + 1))
        assert [row["score"] for row in part] == sorted((row["score"] for row in part), reverse=True)
        assert {row["image"] for row in part} == {f"train/train-{index:03d}.png" for index in range(COUNT)}
        assert {round(row["p_value"] * (1 + HELD_OUT), 9) for row in part} <= set(range(1, HELD_OUT + 2))
    assert [row["query"] for row in rows] == sorted(row["query"] for row in rows)


def test_the_p_values_are_those_of_the_held_out_images(run: Path) -> None:
    rows = pq.read_table(run / "ranking.parquet").to_pylist()
    for query in {row["query"] for row in rows}:
        null = load_file(run / "scores" / f"{identity_hash({'query': query})}.safetensors")["null"]
        assert len(null) == HELD_OUT
        part = [row for row in rows if row["query"] == query]
        expected = p_values(np.array([row["score"] for row in part]), null)
        assert [row["p_value"] for row in part] == expected.tolist()


def test_a_run_leaves_manifest_images_and_report(run: Path, folder: Path) -> None:
    manifest = read_run(run)
    identity = manifest["identity"]
    assert manifest["complete"] is True
    assert identity["model"] == load_model(str(folder / "pipeline")).fingerprint()
    assert identity["attributor"]["grid"]["timesteps"] == 2
    assert {prompt for _, prompt in identity["queries"]} == {"a big red square", "blue circle"}
    assert manifest["provenance"]["versions"]["torch"]
    for query, _ in identity["queries"]:
        facts = manifest["facts"][query]
        assert facts["query_loss_rise"] == pytest.approx(0.01, rel=0.011)
        image = read_image(query_file(run, query))
        assert image.shape == (8, 8, 3)
    page = (run / "report.html").read_text()
    for words in ("a big red square", "blue circle", "CC0-1.0", "author 1", "attribution by unlearning"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    drawn = generate(
        load_model(str(folder / "pipeline")), prompts=["blue circle"], seed=0, shape=(4, 4, 4), sampling_steps=2
    )[0]
    (query,) = (query for query, prompt in identity["queries"] if prompt == "blue circle")
    assert query == drawn.id
    assert np.array_equal(read_image(query_file(run, query)), drawn.pixels)


def query_file(run: Path, query: str) -> Path:
    return run / "queries" / f"{identity_hash({'query': query})}.png"


def read_image(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Each file's inode and time of writing."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_call_scores_nothing_again(run: Path, folder: Path) -> None:
    before = files(run / "scores"), files(folder / "store")
    ranking = (run / "ranking.parquet").read_bytes()
    evaluate.main(["attribute", "-c", str(folder / "run.yaml")])
    assert (files(run / "scores"), files(folder / "store")) == before
    assert len(before[0]) == 2
    assert (run / "ranking.parquet").read_bytes() == ranking


def test_a_cut_ranking_names_the_first_and_keeps_the_scores_of_all(run: Path, folder: Path) -> None:
    shutil.copytree(run, folder / "cut")
    queries = {"prompts": ["a big red square", "blue circle"], "sampling_steps": 2}
    cut = attributed(folder, "cut", "--cut", "3", queries=queries)
    whole, table = pq.read_table(run / "ranking.parquet"), ScoreTable(cut / "scores_of_all")
    first = whole.filter(pc.less_equal(whole["rank"], 3))
    assert pq.read_table(cut / "ranking.parquet").equals(first), "p-values too"
    for query, (ids, scores) in read_ranking(run).items():
        result, best = table.top(query, len(ids))
        assert result == ids
        np.testing.assert_array_equal(best, scores)
    with pytest.raises(ValueError, match="Attribute without a cut"):
        evaluate.main(
            ["retrieval", "--teacher", str(cut), "--rankings", f"run={run}", "--output", str(folder / "retrieval")]
        )


def test_what_is_missing_of_a_run_is_made_again(run: Path, folder: Path) -> None:
    ranking = read_ranking(run)
    kept, gone = sorted((run / "scores").iterdir())
    gone.unlink()
    (run / "ranking.parquet").unlink()
    before = files(run / "scores")
    evaluate.main(["attribute", "-c", str(folder / "run.yaml")])
    assert files(run / "scores")[kept] == before[kept]
    assert gone.exists()
    for query, (ids, scores) in read_ranking(run).items():
        assert ids == ranking[query][0]
        assert np.array_equal(scores, ranking[query][1])


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--attributor.init_args.grid.timesteps", "3"], ["attributor.grid.timesteps: on disk 2, asked for 3"]),
        (["--attributor.init_args.unlearning.steps", "2"], ["attributor.unlearning.steps: on disk 1, asked for 2"]),
        (["--queries.prompts", "[dark stripe]"], ["blue circle", "dark stripe", "queries.prompts.0: on disk"]),
        (
            ["--data.init_args.exclude", "[train/train-003.png]"],
            ["data.init_args.exclude: on disk None, asked for ['train/train-003.png']"],
        ),
    ],
)
def test_a_folder_made_with_other_settings_is_refused(
    run: Path, folder: Path, options: list[str], shown: list[str]
) -> None:
    before = files(run)
    with pytest.raises(ArtifactMismatchError, match=r"was made with other settings") as caught:
        evaluate.main(["attribute", "-c", str(folder / "run.yaml"), *options])
    for words in shown:
        assert words in str(caught.value)
    assert files(run) == before


def test_excluded_images_are_not_ranked(run: Path, folder: Path) -> None:
    less = quick(folder, "less", "--data.init_args.exclude", "[train/train-003.png]")
    ((ids, _),) = read_ranking(less).values()
    assert len(ids) == COUNT - 1
    assert "train/train-003.png" not in ids
    with pytest.raises(ValueError, match=r"exclude names 1 ids"):
        quick(folder, "nobody", "--data.init_args.exclude", "[nobody]")


def test_an_unknown_group_is_an_error_before_anything_is_scored(run: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"The data set has no column 'painter'; it has .*author.*license"):
        quick(folder, "groups", "--report.groups", "[painter]")
    assert not (folder / "groups").exists()
    assert ReportOptions().columns(images(folder)) == ["author"]


def images(folder: Path) -> ImageSet:
    return build_image_folder(Store(folder / "store"), folder / "pictures")


def image(folder: Path, name: str, size: tuple[int, int] = (8, 8)) -> Path:
    path = folder / name
    pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_image_files_are_queries(run: Path, folder: Path) -> None:
    given = [{"file": str(folder / "pictures" / "train" / "train-002.png"), "prompt": "grey"}]
    given.append({"file": str(image(folder, "mine.png")), "prompt": ""})
    out = quick(folder, "files", queries={"images": given})
    rankings = read_ranking(out)
    assert [name.rsplit("-", 1)[0] for name in rankings] == ["mine", "train-002"]
    ids, scores = rankings[next(name for name in rankings if name.startswith("train"))]
    assert ids[0] == "train/train-002.png"
    assert scores[0] == pytest.approx(1.0, abs=1e-6)
    assert "The prompt is not known" in (out / "report.html").read_text()


def test_an_image_is_attributed_without_a_prompt(run: Path, folder: Path) -> None:
    given = [{"file": str(image(folder, "found.png")), "prompt": ""}]
    out = attributed(folder, "unknown prompt", queries={"images": given})
    ((ids, _),) = read_ranking(out).values()
    assert len(ids) == COUNT


@pytest.mark.parametrize("size", [(9, 8), (16, 16)])
def test_an_image_of_another_size_is_refused_or_resized(run: Path, folder: Path, size: tuple[int, int]) -> None:
    name = f"{size[0]} by {size[1]}"
    given = {"images": [{"file": str(image(folder, f"{name}.png", size)), "prompt": "red"}]}
    message = rf"by.*\.png is {size[0]} × {size[1]} pixels, the images of this run are 8 × 8.*queries\.resize"
    with pytest.raises(ValueError, match=message):
        quick(folder, name, queries=given)
    out = quick(folder, f"{name} resized", "--queries.resize", "true", queries=given)
    (drawn,) = (out / "queries").iterdir()
    assert read_image(drawn).shape == (8, 8, 3)


def test_a_region_is_attributed_beside_its_image(run: Path, folder: Path) -> None:
    regions = [{"of": "blue circle", "box": [0, 0, 8, 8]}, {"of": "blue circle", "box": [0, 0, 2, 8]}]
    queries = {"prompts": ["blue circle"], "sampling_steps": 2, "regions": regions}
    out = attributed(folder, "regions", queries=queries)
    result = {name.partition(", ")[2]: dict(zip(*ranking, strict=True)) for name, ranking in read_ranking(out).items()}
    assert set(result) == {"", "box 0,0,8,8", "box 0,0,2,8"}
    rounding = 1e-2 * float(np.std(list(result[""].values())))  # the scores are differences in float32
    assert result["box 0,0,8,8"] == pytest.approx(result[""], abs=rounding), "a box around all of the image is no box"
    assert result["box 0,0,2,8"] != pytest.approx(result[""], rel=1e-2)
    assert "box 0,0,2,8; the rest is shown faded" in (out / "report.html").read_text()
    with pytest.raises(ValueError, match=r"PixelSimilarity cannot attribute a region"):
        quick(folder, "regions of pixels", queries=queries)


def test_scores_by_part_are_written_and_shown(run: Path, folder: Path) -> None:
    out = attributed(
        folder,
        "parts",
        "--attributor.init_args.breakdown",
        "{timestep_bands: 2, captions: true}",
        queries={"prompts": ["blue circle"], "sampling_steps": 2},
    )
    rows = pq.read_table(out / "parts.parquet").to_pylist()
    ((ids, scores),) = read_ranking(out).values()
    parts = {row["part"]: {} for row in rows}
    for row in rows:
        parts[row["part"]][row["image"]] = row["score"]
    assert list(parts) == ["timesteps 0 to 0", "timesteps 500 to 500", "caption 1"]
    low, high, caption = parts.values()
    assert [(low[image] + high[image]) / 2 for image in ids] == pytest.approx(scores.tolist(), rel=1e-9)
    assert [caption[image] for image in ids] == pytest.approx(scores.tolist(), rel=1e-9)
    page = (out / "report.html").read_text()
    assert page.index("By part of the score") < page.index("timesteps 500 to 500") < page.index("caption 1")
    (out / "report.html").unlink()
    evaluate.main(
        [
            "attribute",
            "-c",
            str(folder / "parts.yaml"),
            "--attributor.init_args.breakdown",
            "{timestep_bands: 2, captions: true}",
        ]
    )
    assert (out / "report.html").read_text() == page, "parts of a finished query are read again"
    assert not (run / "parts.parquet").exists()


def test_an_adapter_is_added_and_recorded(run: Path, folder: Path, tmp_path: Path) -> None:
    layers = made(targets(load_model(str(folder / "pipeline")).denoiser, (".attn2.to_k",)), lora)
    file = save(tmp_path / "style.safetensors", kohya(layers))
    words = ("--lora", f"['{file}:0.8']")
    result = quick(folder, "adapted", *words)
    manifest = read_run(result)
    assert [(each["name"], each["weight"]) for each in manifest["adapters"]] == [("style.safetensors", 0.8)]
    assert manifest["identity"]["model"] != read_run(run)["identity"]["model"]
    assert "adapters" not in read_run(run)
    assert "with LoRA style.safetensors at 0.8" in (result / "report.html").read_text()
    with pytest.raises(ArtifactMismatchError, match=r"lora"):
        quick(folder, "adapted", "--lora", f"['{file}']")


def test_a_model_that_is_broken_is_an_error(folder: Path, tmp_path: Path) -> None:
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_out.bias[0] = float("nan")
    broken = tiny_pipeline(tmp_path / "pipeline", unet=unet)
    source = attribution_config(folder, "source")  # leaves images where they are shared
    assert source.exists()
    with pytest.raises(ValueError, match=r"not finite|is nan|no finite numbers"):
        attributed(folder, "broken", "--output", str(tmp_path / "out"), "--model", str(broken))
    assert not (tmp_path / "out" / "ranking.parquet").exists()


def test_an_unfinished_run_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    data = tiny_latents(3)

    class Interrupted(PixelSimilarity):
        def compare(self, query: Query, images: Any) -> Any:
            if query.id == "second":
                raise KeyboardInterrupt
            return super().compare(query, images)

    queries = [Query(name, "", np.full((8, 8, 3), 200, dtype=np.uint8)) for name in ("first", "second")]
    arguments: dict[str, Any] = {
        "data": TrainingData(data.images),
        "model": None,
        "queries": queries,
        "store": Store(tmp_path / "store"),
        "runner": one_process(),
    }
    with pytest.raises(KeyboardInterrupt):
        attribute(tmp_path / "out", attributor=Interrupted(), **arguments)
    with pytest.raises(ValueError, match=r"is not complete: run the same .* again"):
        read_run(tmp_path / "out")
    before = files(tmp_path / "out" / "scores")
    said: list[str] = []
    results = attribute(tmp_path / "out", attributor=PixelSimilarity(), **arguments, log=said.append)
    assert said[0].startswith("1 of 2 queries are already done")
    assert [scores.query.id for scores in results] == ["first", "second"]
    assert before.items() <= files(tmp_path / "out" / "scores").items()
    assert read_run(tmp_path / "out")["complete"]
    assert pq.read_table(tmp_path / "out" / "ranking.parquet").column_names == ["query", "rank", "image", "score"]


def test_a_user_sees_one_line_and_not_a_traceback(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attribute", "-c", str(folder / "run.yaml"), "--report.groups", "[painter]"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: The data set has no column 'painter'; it has ")


FULL_DISK = """
import resource, sys
import evaluate
from wherefrom.runtime.artifacts import StorageError

for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        evaluate.main(["attribute", "-c", sys.argv[1]])
    except StorageError as error:
        print(error)
    else:
        sys.exit(f"no error at {limit}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file-size limit")
def test_a_full_disk_is_an_error_and_the_run_goes_on_afterwards(tmp_path: Path) -> None:
    attributor = {
        "class_path": "AttributionByUnlearning",
        "init_args": {
            "unlearning": {"noise_samples": 8, "measurement_samples": 8, "relative_loss_increase": None, "alpha": 1.0},
            "grid": {"timesteps": 2},
            "curvature": {"class_path": "DiagonalFisher", "init_args": {"fisher": {"samples_per_image": 1}}},
        },
    }
    config = attribution_config(tmp_path, attributor=attributor)
    # The first limit is met by the pixels, the second by the Fisher information, the third by the report.
    limits = ["3500", "15000", "22000"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(config), *limits],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    messages = done.stdout.strip().splitlines()
    assert len(messages) == len(limits)
    for message, where in zip(messages, ("image_folder", "fisher", "report.html"), strict=True):
        assert message.startswith(f"Cannot write {tmp_path}")
        assert where in message
        assert "File too large" in message
        assert "run the same command again: finished parts are kept" in message
    assert not list(tmp_path.rglob("*.tmp"))
    before = files(tmp_path / "store")
    evaluate.main(["attribute", "-c", str(config)])
    assert before == files(tmp_path / "store"), "all that costs time was kept"
    assert read_run(tmp_path / "run")["complete"]
