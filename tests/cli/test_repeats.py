"""A folder whose images training saw differently often, from the words to ranking and page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from tests.support.user_world import UserWorld
from wherefrom.api import AttributionOptions, attribute_images
from wherefrom.cli import main
from wherefrom.metrics.null_distribution import p_values

SET = {"grid.timesteps": 2, "noise_samples": 16, "fisher.samples_per_image": 1}


def test_repeats_are_in_ranking_and_page_and_p_values_are_of_one_copy(world: UserWorld, empty: Path) -> None:
    images = Path("images").resolve()
    shutil.copytree(world.images, images)
    metadata = images / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    repeats = {f"train/{row['file_name']}": 1 + index % 3 for index, row in enumerate(rows)}
    metadata.write_text(
        "".join(json.dumps({**row, "repeats": repeats[f"train/{row['file_name']}"]}) + "\n" for row in rows)
    )
    words = ["--model", str(world.model), "--images", str(images), *world.query, "--method", "influence"]
    options = [word for key, value in SET.items() for word in ("--set", f"{key}={value}")]
    main(["attribute", *words, *options, "--output", "run"])
    table = pq.read_table("run/ranking.parquet").to_pydict()
    assert table["repeats"] == [repeats[name] for name in table["image"]]
    (file,) = Path("run/scores").iterdir()
    kept = load_file(file)
    weights = np.array([repeats[name] for name in sorted(repeats)])
    np.testing.assert_allclose(kept["scores"], kept["per_copy"] * weights)
    chances = dict(zip(sorted(repeats), p_values(kept["per_copy"], kept["null"]), strict=True))
    assert table["p_value"] == [chances[name] for name in table["image"]]
    assert not np.array_equal(p_values(kept["scores"], kept["null"]), p_values(kept["per_copy"], kept["null"]))

    page = Path("run/report.html").read_text()
    assert page.count('<p class="p">repeats 3</p>') == sum(count == 3 for count in repeats.values())
    assert "How often an epoch of training saw the image" in page
    Path("run/report.html").unlink()
    main(["report", "run"])
    assert Path("run/report.html").read_text() == page

    (same,) = attribute_images(
        str(world.model),
        str(images),
        [(str(world.generated), "a red square")],
        method="influence",
        options=AttributionOptions(settings=SET, progress=False),
    )
    assert same.table()["p_value"].tolist() == table["p_value"]
    assert same.table()["repeats"].tolist() == [str(number) for number in table["repeats"]]
    assert same.plot().axes[0].get_xlabel().startswith("score of one copy")
