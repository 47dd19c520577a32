"""Two processes get the numbers of one: Fisher information, unlearning, scores, training, and the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

import evaluate
import train
from tests.support import processes  # noqa: F401  whose server has imported torch
from tests.support.tiny import (
    LENGTH,
    attribution_config,
    one_process,
    text_folder,
    tiny_latents,
    tiny_model,
    tiny_pipeline,
    tiny_vae,
    training_config,
)
from wherefrom.attributors import AttributionByUnlearning, JourneyTRAK, Query, TrainingData
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.curvature import EKFAC, DiagonalFisher, DiagonalMatrix, FisherSettings
from wherefrom.gradients.loss_grid import LossGrid, LossSamples
from wherefrom.gradients.projection import Projection
from wherefrom.gradients.query_loss import QueryLatent, QueryLoss
from wherefrom.models.encoders import CaptionEncoder, LatentEncoder
from wherefrom.models.parameter_subsets import select_weights, trainable
from wherefrom.models.sampling import Trajectory
from wherefrom.rankings.ranking_file import order_of, read_ranking
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.distributed import Runner

ROOT = Path(__file__).parents[2]
COUNT = 140  # more than one chunk of 128, so that both processes have work


# EK-FAC divides by small eigenvalues in a basis that rounding turns a little where they are alike.
KINDS = {
    "scores": 1e-9,
    "null": 1e-9,
    "loss": 1e-9,
    "fisher": 1e-9,
    "gradient": 1e-9,
    "plus scores": 1e-7,
    "journey scores": 1e-7,
    "ekfac": 1e-6,
}


def numbers(folder: Path, runner: Runner) -> dict[str, Tensor]:
    """Fisher information, EK-FAC, gradient of a query, and scores of a tiny model in float64."""
    text = CaptionEncoder.from_pretrained(str(text_folder(folder / "pipeline")), LENGTH)
    model, data = tiny_model(encoder=LatentEncoder(tiny_vae(), text)), tiny_latents(COUNT)
    attributor = AttributionByUnlearning(
        "all",
        unlearning=UnlearningSettings(steps=2, noise_samples=160, relative_loss_increase=0.05, measurement_samples=160),
        grid=LossGrid(timesteps=2),
        curvature=DiagonalFisher(FisherSettings(samples_per_image=1)),
    )
    held_out = tiny_latents(6, seed=1)
    training = TrainingData(data.images, data, held_out.images, held_out)
    attributor.fit(training, model, Store(folder / f"store{runner.world_size}"), runner)
    assert isinstance(attributor.curvature_matrix, DiagonalMatrix)
    plus = AttributionByUnlearning(
        "cross_attention",
        unlearning=UnlearningSettings(noise_samples=160, relative_loss_increase=0.01, measurement_samples=160),
        grid=LossGrid(timesteps=2),
        curvature=EKFAC(FisherSettings(samples_per_image=1)),
    )
    plus.fit(training, model, Store(folder / f"store{runner.world_size}"), runner)
    latent = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    query = Query("query", "a red square", np.zeros((8, 8, 3), dtype=np.uint8), latent)
    (scores,) = attributor.score([query])
    (plus_scores,) = plus.score([query])
    trajectory = Trajectory((999, 499), torch.stack([latent.flip(0), latent]))
    journey = JourneyTRAK(projection=Projection(128), grid=LossSamples(noise_samples=1), resamplings=5)
    journey.fit(training, model, Store(folder / f"store{runner.world_size}"), runner)
    (journey_scores,) = journey.score([replace(query, trajectory=trajectory)])
    weights = select_weights(model.denoiser, "all")
    loss = QueryLoss(model, QueryLatent("query", latent, text.encode(["a red square"]).at(0)), 0, runner)
    with trainable(model.denoiser, weights):
        gradient = loss.gradient(weights, 0, 160)
    return {
        "scores": torch.from_numpy(scores.scores),
        "null": torch.from_numpy(scores.null),
        "loss": torch.tensor(loss.value(160)),
        "journey scores": torch.from_numpy(journey_scores.scores),
        "plus scores": torch.from_numpy(plus_scores.scores),
        **{
            f"ekfac/{name}": step.contiguous()
            for name, step in plus.curvature_matrix.precondition(
                {name: gradient[name] for name in select_weights(model.denoiser, "cross_attention")}
            ).items()
        },
        **{f"fisher/{name}": value for name, value in attributor.curvature_matrix.fisher.items()},
        **{f"gradient/{name}": value for name, value in gradient.items()},
    }


def process(rank: int, folder: Path, world_size: int) -> None:
    """One of the processes; rank 0 and the last one leave what they got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world_size)
    save_file(numbers(folder, Runner.current(torch.device("cpu"))), folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


def test_fisher_unlearning_and_scores_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "pipeline")
    start_processes(process, (tmp_path, 2), nprocs=2, start_method="forkserver")
    expected = numbers(tmp_path, one_process())
    both = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    ids = tiny_latents(COUNT).ids
    for result in both:
        assert result.keys() == expected.keys()
        for kind, rtol in KINDS.items():
            names = [name for name in expected if name.startswith(kind)]
            scale = max(float(expected[name].abs().max()) for name in names)
            for name in names:
                torch.testing.assert_close(
                    result[name],
                    expected[name],
                    rtol=rtol,
                    atol=rtol / 100 * scale,
                    msg=lambda text, n=name: f"{n}: {text}",
                )
        assert np.array_equal(order_of(ids, result["scores"].numpy()), order_of(ids, expected["scores"].numpy()))
    assert float(expected["scores"].std()) > 1e-4
    assert float(expected["plus scores"].std()) > 1e-6


# Plain gradient descent: Adam divides by gradients, so that rounding alone turns those that are zero.
SGD = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.init_args.lr", "0.1"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs training and attribution on two processes, at the same time: starting up is most of it."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "training").mkdir()
    (folder / "attribution").mkdir()
    training = ["train.py", "fit", "-c", str(training_config(folder / "training", "two")), *SGD]
    config = attribution_config(folder / "attribution", "two", COUNT)
    begun = [
        subprocess.Popen(
            [sys.executable, *command, "--trainer.devices", "2", "--trainer.strategy", "ddp"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in (training, ["evaluate.py", "attribute", "-c", str(config)])
    ]
    for process in begun:
        output, _ = process.communicate()
        assert process.returncode == 0, output[-4000:]
    return folder


@pytest.mark.filterwarnings("ignore")
def test_training_on_two_processes_gives_the_weights_of_one(commands: Path) -> None:
    folder = commands / "training"
    expected = train.main(["fit", "-c", str(training_config(folder, "one")), *SGD]).model.state_dict()
    start = torch.load(folder / "one" / "step=4.ckpt", weights_only=True)["state_dict"]
    checkpoint = torch.load(folder / "two" / "step=8.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    assert checkpoint["state_dict"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(checkpoint["state_dict"][name], value, rtol=1e-4, atol=1e-5)
    assert max(float((value - start[name]).abs().max()) for name, value in expected.items()) > 1e-2


def test_attribution_on_two_processes_gives_the_ranking_of_one(commands: Path) -> None:
    folder = commands / "attribution"
    one = attribution_config(folder, "one", store=str(folder / "store of one"))
    evaluate.main(["attribute", "-c", str(one)])
    ((query, (ids, expected)),) = read_ranking(folder / "one").items()
    found_ids, scores = read_ranking(folder / "two")[query]
    assert len(ids) == COUNT
    assert set(found_ids) == set(ids)
    result = scores[[found_ids.index(name) for name in ids]]
    # The command line computes in float32.
    assert np.abs(result - expected).max() <= 1e-2 * expected.std()
    assert spearmanr(result, expected).statistic >= 0.9999
    assert len(set(found_ids[:100]) & set(ids[:100])) >= 98
    assert (folder / "two" / "report.html").exists()
