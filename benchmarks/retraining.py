"""How long counterfactual evaluation takes for a model, and what share of that is spent outside the training step.

    python -m benchmarks.retraining --threads 2

Trains the recipe once as `evaluate.py counterfactual` does, from the start of `fit` to the saved pipeline, with
Lightning's profiler beside it. A training step is forward, backward and optimizer; outside it are start-up, batches,
checkpoints, callbacks, loggers, the held-out loss and saving. Images, latents and conditioning are in the store
before the clock starts, as they are for all models of a sweep but the first.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import torch
import yaml

import train
from experiments.support.arguments import script_parser
from lightning_modules.launch.recipe import Recipe
from wherefrom.counterfactual.retraining import RetrainingJob
from wherefrom.runtime.artifacts import write_json
from wherefrom.runtime.console import duration

RESULT = Path("results/emoji/retraining.json")
STEP = "run_training_batch"


def with_profiler(recipe: Path, folder: Path, steps: int | None) -> Path:
    """The recipe, with Lightning's profiler writing to the folder."""
    config = yaml.safe_load(recipe.read_text())
    for part in ("model", "data"):
        config[part] = yaml.safe_load((recipe.parent / config[part]).read_text())
    config["trainer"]["profiler"] = {
        "class_path": "lightning.pytorch.profilers.SimpleProfiler",
        "init_args": {"dirpath": str(folder), "filename": "profile"},
    }
    if steps is not None:
        config["trainer"] |= {"max_steps": steps, "val_check_interval": steps}
        config["model"]["init_args"]["scheduler"] = None
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def seconds_in_steps(folder: Path) -> float:
    """What the profiler says of the training steps.

    Raises:
        ValueError: It says nothing of them.
    """
    for line in next(folder.glob("*profile*.txt")).read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 4 and cells[1] == STEP:
            return float(re.sub(r"[^0-9.e+-]", "", cells[4]))
    raise ValueError(f"The profile in {folder} has no line for {STEP}.")


def main() -> None:
    """Measures and prints."""
    parser = script_parser(__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("configs/experiment/emoji_1k.yaml"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="fewer steps: a quick look, which is not recorded")
    parser.add_argument("--store", default="cache")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as temporary:
        first, folder = Path(temporary) / "first", Path(temporary) / "second"
        for place in (first, folder):
            place.mkdir()
        # A model of one step before: images, latents and libraries are then where a sweep's next model finds them.
        Recipe(with_profiler(options.recipe, first, 1), options.store, train.main).train(RetrainingJob((), 0), first)
        recipe = Recipe(with_profiler(options.recipe, folder, options.steps), options.store, train.main)
        started = time.monotonic()
        recipe.train(RetrainingJob((), 0), folder)
        wall = time.monotonic() - started
        inside = seconds_in_steps(folder)
    print(
        f"{options.threads} threads: {duration(wall)} a model; {1 - inside / wall:.1%} of it outside the training step"
    )
    if options.steps is None:
        write_json(
            RESULT.with_stem(f"retraining_{options.threads}_threads"),
            {
                "command": f"python -m benchmarks.retraining --threads {options.threads}",
                "seconds": wall,
                "outside_the_step": 1 - inside / wall,
            },
        )


if __name__ == "__main__":
    main()
