"""`attribute`, `compare`, `budget` and `report`, from the words to what they leave on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from tests.support.user_world import FEW, SET, UserWorld
from wherefrom.api import AttributionOptions, attribute_images
from wherefrom.cli import main
from wherefrom.rankings.ranking_file import read_ranking

ROOT = Path(__file__).parents[2]
QUICK_NOTE = "A quick look: at most 4 timesteps and 200 noise samples"


def only_run() -> Path:
    (run,) = Path("wherefrom-runs").iterdir()
    return run


def test_one_line_leaves_a_ranking_and_a_report(
    world: UserWorld, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["attribute", *world.words, *world.query, *SET])
    run, printed = only_run(), capsys.readouterr()
    ((ids, scores),) = read_ranking(run).values()
    assert len(ids) == 16
    assert all(name.startswith("train/") for name in ids)
    table = pq.read_table(run / "ranking.parquet").to_pydict()
    assert all(0 <= p <= 1 for p in table["p_value"]), "the validation split is the null"
    page = (run / "report.html").read_text()
    assert "a red square" in page
    assert QUICK_NOTE not in page
    lines = printed.out.splitlines()
    assert lines[0].endswith("'a red square'")
    assert [line.split()[2] for line in lines[1:11]] == ids[:10]
    assert f"report:  {run / 'report.html'}" in lines
    assert "query 1 of 1 is done" in printed.err
    assert "estimate at" in printed.err
    # The default method is AbU+ with the step that was found right.
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["identity"]["attributor"]["curvature"] == "ekfac"
    assert manifest["facts"][table["query"][0]]["query_loss_rise"] == pytest.approx(1.0, rel=0.05)
    # The same from Python.
    (same,) = attribute_images(
        str(world.model),
        str(world.images),
        [(str(world.generated), "a red square")],
        options=AttributionOptions(settings=FEW, progress=False),
    )
    assert same.top(16) == list(zip(ids, scores.tolist(), strict=True))


def test_the_same_words_again_score_nothing_again(
    world: UserWorld, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["attribute", *world.words, *world.query, *SET, "--output", "run"]
    main(words)
    first = (Path("run") / "ranking.parquet").read_bytes()
    capsys.readouterr()
    main(["attribute", "-c", "run/wherefrom.yaml", "--output", "run"])
    assert "query 1 of 1 is done" not in capsys.readouterr().err
    assert (Path("run") / "ranking.parquet").read_bytes() == first
    with pytest.raises(ValueError, match="--output run holds another run: seed is not given there and 1 here"):
        main([*words, "--seed", "1"])


def test_images_are_drawn_read_and_cut_to_regions(world: UserWorld, empty: Path) -> None:
    file = Path("run.yaml")
    large = Image.open(world.generated).resize((20, 12))
    large.save("large.png")
    file.write_text(
        yaml.safe_dump(
            {
                "model": str(world.model),
                "images": str(world.images),
                "queries": [{"prompt": "a big circle"}, {"image": "large.png"}, {"prompt": "a big circle"}],
                "regions": [{"of": "large.png", "box": [0, 0, 4, 8]}],
                "settings": FEW,
                "resize": True,
                "sampling_steps": 2,
                "top": 3,
                "title": "Mine",
            }
        )
    )
    main(["attribute", "-c", "run.yaml", "--output", "run"])
    queries = json.loads(Path("run/manifest.json").read_text())["identity"]["queries"]
    assert [prompt for _, prompt, *_ in queries] == ["a big circle", "", "", "a big circle"]
    names = [name for name, *_ in queries]
    assert len(set(names)) == 4
    assert names[1].startswith("large-")
    assert names[2] == f"{names[1]}, box 0,0,4,8"
    page = Path("run/report.html").read_bytes()
    assert b"<h1><bdi>Mine</bdi></h1>" in page
    # The page once more is the same page.
    Path("run/report.html").unlink()
    main(["report", "run"])
    assert Path("run/report.html").read_bytes() == page
    main(["report", "run", "--top", "2", "--title", "Yours"])
    assert b"<h1><bdi>Yours</bdi></h1>" in Path("run/report.html").read_bytes()


def test_a_quick_look_is_called_one(world: UserWorld, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["attribute", *world.words, *world.query, "--quick", "--set", "fisher.samples_per_image=1"])
    run = only_run()
    assert QUICK_NOTE in (run / "report.html").read_text()
    assert QUICK_NOTE in capsys.readouterr().err
    attributor = json.loads((run / "manifest.json").read_text())["identity"]["attributor"]
    assert attributor["grid"]["timesteps"] == 4
    assert "quick" in run.name


def test_several_methods_are_compared(world: UserWorld, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        "class_path: InfluenceFunction\ninit_args: {noise_samples: 8, grid: {timesteps: 2}, curvature: diagonal}\n"
    )
    main(["compare", *world.words, *world.query, "--method", "pixel", "--method", "mine.yaml", "--output", "both"])
    assert pq.read_table("both/methods.parquet")["method"].to_pylist() == ["pixel", "mine"]
    printed = capsys.readouterr().out
    assert "  pixel: train/" in printed
    assert "  mine: train/" in printed
    pages = {path: path.read_bytes() for path in Path("both").rglob("report.html")}
    assert len(pages) == 3
    for path in pages:
        path.unlink()
    main(["report", "both"])
    assert {path: path.read_bytes() for path in Path("both").rglob("report.html")} == pages
    with pytest.raises(ValueError, match="--method stands once with attribute"):
        main(["attribute", *world.words, *world.query, "--method", "pixel", "--method", "mine.yaml"])


def test_a_method_without_a_model_encodes_nothing(world: UserWorld, empty: Path) -> None:
    main(["attribute", *world.words, *world.query, "--method", "pixel", "--output", "run"])
    assert json.loads(Path("run/manifest.json").read_text())["identity"]["latents"] is None
    (ids, _), *_ = read_ranking(Path("run")).values()
    assert len(ids) == 16


def test_the_budget_of_the_same_words(world: UserWorld, empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["budget", "attribute", *world.words, *world.query, "--prompt", "a circle", *SET])
    out = capsys.readouterr().out
    assert "| read 20 images of 8 × 8 |" in out
    assert "| draw the queries |" in out
    assert "abu_plus" in out
    assert "× 2" in out
    assert not Path("wherefrom-runs").exists()
    assert not Path("cache").exists()
    main(["budget", "compare", *world.words, *world.query, "--method", "abu", "--method", "influence", "--quick"])
    out = capsys.readouterr().out
    assert "| abu" in out
    assert "| influence" in out


def test_methods_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods"])
    out = capsys.readouterr().out
    starts = {line.split()[0] for line in out.splitlines() if not line.startswith(" ")}
    assert starts == {path.stem for path in (ROOT / "wherefrom" / "methods").glob("*.yaml")}
    assert "(the default)" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "abu_plsu"], "--method: 'abu_plsu' is neither a packaged method nor a YAML file; did you mean"),
        (["--method", "mine.yaml"], "--method: there is no file 'mine.yaml'."),
        (["--set", "grid.timestep=3"], "--set: no method has 'grid.timestep'"),
        (["--set", "unlearning.noise_samples=0"], "--method: abu_plus cannot be set up so:"),
        (["--set", "grid.timesteps=many"], "Expected a <class 'int'>. Got value: many"),
        (["--sampling-steps", "0"], "--sampling-steps must be at least 1; given 0."),
        (["--guidance", "-1"], "--guidance must be a number from 0 on"),
        (["--seed", "-1"], "--seed must be a number from 0 on"),
        (["--top", "0"], "--top must be at least 1; given 0."),
        (["--device", "cuda:7"], "--device: there is no 'cuda:7' on this machine; there is cpu"),
        (["--caption", "words"], "--caption"),
        (["--model", "./nowhere"], "--model: there is no folder './nowhere'"),
        (["--images", "nowhere"], "--images: there is no folder or file 'nowhere'."),
        (["--group", "artist"], "--group: the images have no column 'artist'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_the_commands_own_words(
    world: UserWorld, empty: Path, words: list[str], said: str
) -> None:
    with pytest.raises((ValueError, OSError)) as raised:
        main(["attribute", *world.words, *world.query, *SET, *words])
    assert said in str(raised.value)
    assert "queries." not in str(raised.value)


def test_an_image_of_another_size_is_refused_by_this_commands_option(world: UserWorld, empty: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("nine.png")
    with pytest.raises(
        ValueError, match=r"9 × 9 pixels, the images of this run are 8 × 8\. Resize it, or set --resize to"
    ):
        main(["attribute", *world.words, "--query", "nine.png", *SET])
    with pytest.raises(ValueError, match=r"--query: the image generated-.* is given twice"):
        main(["attribute", *world.words, *world.query, *world.query, *SET])


def test_pages_of_what_is_no_run_or_changed_are_refused(world: UserWorld, empty: Path) -> None:
    Path("other").mkdir()
    with pytest.raises(ValueError, match=r"other holds no wherefrom\.yaml"):
        main(["report", "other"])
    images = Path(shutil.copytree(world.images, "images"))
    words = ["--model", str(world.model), "--images", "images", *world.query, "--method", "pixel", "--output", "run"]
    main(["attribute", *words])
    with pytest.raises(ValueError, match="--top must be at least 1"):
        main(["report", "run", "--top", "0"])
    changed = next((images / "train").glob("*.png"))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(changed)
    with pytest.raises(ValueError, match="other training images than these"):
        main(["report", "run"])
    shutil.rmtree("images")
    with pytest.raises(ValueError, match=r"--images: the run's folder .* is not there any more"):
        main(["report", "run"])
    Path("run/manifest.json").unlink()
    with pytest.raises(ValueError, match="run holds no finished run"):
        main(["report", "run"])


def test_two_processes_rank_as_one(world: UserWorld, empty: Path) -> None:
    words = ["attribute", *world.words, *world.query, *SET, "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for count, name in ((1, "one"), (2, "two")):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        done = subprocess.run(
            [*launch, "-m", "wherefrom.cli", *words, "--output", name, "--store", f"store-{name}"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("report:  ") == 1, "one process prints"
    ((ids, scores),), ((others, values),) = (read_ranking(Path(name)).values() for name in ("one", "two"))
    assert ids == others
    assert values == pytest.approx(scores, rel=1e-3, abs=1e-9)
    assert torch.tensor(scores).abs().max() > 0
