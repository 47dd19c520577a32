"""TRAK and D-TRAK against their formulas with the gradients of single images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.attribution import HELD_OUT, QUERY, TRAIN
from tests.support.tiny import moved_copy, one_process, tiny_encoder, tiny_model, tiny_pipeline
from wherefrom.attributors import TRAK, Scores, TrainingData
from wherefrom.attributors.trak import base
from wherefrom.attributors.trak import projected_features as module
from wherefrom.attributors.trak.projected_features import Kernel
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.gradients.projection import Projection
from wherefrom.gradients.query_loss import QueryLatent, QueryLoss
from wherefrom.models.diffusion import DiffusionModel, SquareOutput
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.models.pipeline import TEXT_SOURCE, load_model, save_pipeline
from wherefrom.runtime.artifacts import Store

GRID, P = LossGrid(timesteps=3), Projection(128)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(encoder=tiny_encoder(tmp_path_factory.mktemp("text") / "encoder"))


def trak(**options: Any) -> TRAK:
    return TRAK(**{"projection": P, "grid": GRID, "noise_samples": 8, **options})


def run(attributor: TRAK, model: DiffusionModel | None, root: Path, candidates: list[str] | None = None) -> Scores:
    data = TrainingData(TRAIN.images, TRAIN, HELD_OUT.images, HELD_OUT)
    attributor.fit(data, model, Store(root), one_process())
    (scores,) = attributor.score([QUERY], candidates)
    return scores


def loop_features(model: DiffusionModel) -> Tensor:
    """φ of each training image and flip: one loss at a time by autograd, then the product with the whole matrix."""
    parameters = select_weights(model.denoiser, "all")
    matrix = torch.cat(
        [
            P.rows(n, start=0, stop=v.numel(), device=torch.device("cpu"), dtype=torch.float64)
            for n, v in parameters.items()
        ]
    )
    grid, result = LossPass(model, TRAIN, GRID, 1), torch.zeros(len(TRAIN), 2, P.dimension, dtype=torch.float64)
    model.denoiser.requires_grad_(True)
    for image in range(len(TRAIN)):
        for item, flip in enumerate(grid.flip.tolist()):
            loss = grid.item_losses(torch.tensor([image]), torch.tensor([item])).sum()
            gradient = torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(parameters.values()))])
            result[image, flip] += gradient @ matrix / P.dimension**0.5 / (len(grid.flip) / 2)
    model.denoiser.requires_grad_(False)
    return result


@pytest.mark.parametrize("output", ["loss", "square_output"])
def test_it_equals_the_formula(model: DiffusionModel, tmp_path: Path, output: Any) -> None:
    each = SquareOutput(model) if output == "square_output" else model
    features = loop_features(each)
    asked = trak(output=output).query_features(each, [QUERY], one_process())[0][0]
    gram = features[:, 0].T @ features[:, 0]
    ridge = 0.01 * gram.trace() / P.dimension
    expected = features @ torch.linalg.inv(gram + ridge * torch.eye(P.dimension, dtype=torch.float64)) @ asked
    result = run(trak(output=output), model, tmp_path)
    np.testing.assert_allclose(result.scores, expected.amax(dim=1).numpy(), rtol=1e-6)
    mean = run(trak(output=output, flip="mean", absolute_lambda=float(ridge), relative_lambda=None), model, tmp_path)
    np.testing.assert_allclose(mean.scores, expected.mean(dim=1).numpy(), rtol=1e-6)
    assert result.null.shape == (len(HELD_OUT),)


def test_the_query_s_features_are_its_projected_gradient(model: DiffusionModel) -> None:
    assert model.encoder is not None
    assert QUERY.latent is not None
    query = QueryLatent(QUERY.id, QUERY.latent, model.encoder.text.encode([QUERY.prompt]).at(0))
    parameters = select_weights(model.denoiser, "all")
    model.denoiser.requires_grad_(True)
    gradient = QueryLoss(model, query, 0, one_process()).gradient(parameters, 0, 8)
    model.denoiser.requires_grad_(False)
    flat = torch.cat([value.flatten() for value in gradient.values()])
    matrix = torch.cat(
        [
            P.rows(n, start=0, stop=v.numel(), device=torch.device("cpu"), dtype=torch.float64)
            for n, v in parameters.items()
        ]
    )
    (result,) = trak().query_features(model, [QUERY], one_process())
    torch.testing.assert_close(result[0], flat @ matrix / P.dimension**0.5)


def test_how_the_work_is_cut_changes_nothing(
    model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(trak(), model, tmp_path / "a")
    monkeypatch.setattr(module, "_GRADIENT_BYTES", 1)
    result = run(trak(batch_size=5), model, tmp_path / "b")
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-6)
    few = run(trak(), model, tmp_path / "a", [TRAIN.ids[4], TRAIN.ids[1]])
    assert few.ids == (TRAIN.ids[4], TRAIN.ids[1])
    np.testing.assert_array_equal(few.scores, expected.scores[[4, 1]])


def test_queries_score_in_company_as_they_do_alone(
    model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_QUERIES_AT_A_TIME", 2)
    assert QUERY.latent is not None
    asked = [replace(QUERY, id=str(scale), latent=QUERY.latent * scale) for scale in (0.5, 1.0, 2.0)]
    attributor = trak()
    attributor.fit(TrainingData(TRAIN.images, TRAIN), model, Store(tmp_path), one_process())
    together, alone = list(attributor.score(asked)), [next(attributor.score([query])) for query in asked]
    assert [scores.query.id for scores in together] == ["0.5", "1.0", "2.0"]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-6)
    assert not np.allclose(together[0].scores, together[2].scores, rtol=1e-2)


def test_an_ensemble_is_the_mean_of_its_models(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "first")
    first = load_model(str(tmp_path / "first"))
    text = json.loads((tmp_path / "first" / TEXT_SOURCE).read_text())["path"]
    second = moved_copy(first)
    second.encoder = first.encoder
    save_pipeline(tmp_path / "second", second, text, torch.float32)
    alone = [run(trak(), load_model(str(tmp_path / name)), tmp_path).scores for name in ("first", "second")]
    assert not np.allclose(alone[0], alone[1], rtol=1e-2)
    both = run(trak(flip="mean", ensemble=[str(tmp_path / "second")]), first, tmp_path)
    means = [run(trak(flip="mean"), load_model(str(tmp_path / name)), tmp_path).scores for name in ("first", "second")]
    np.testing.assert_allclose(both.scores, np.mean(means, axis=0), rtol=1e-4, atol=1e-6)


def test_what_it_refuses(model: DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fit must run before score"):
        next(iter(trak().score([QUERY])))
    with pytest.raises(ValueError, match="TRAK needs a model"):
        run(trak(), None, tmp_path)
    with pytest.raises(ValueError, match="Give either a relative or an absolute lambda"):
        trak(absolute_lambda=1.0)
    with pytest.raises(ValueError, match=r"lambda must be positive, got -1\.0"):
        trak(relative_lambda=-1.0)
    with pytest.raises(ValueError, match="Unknown output 'noise'"):
        trak(output="noise")
    with pytest.raises(ValueError, match="noise_samples must be at least 1"):
        trak(noise_samples=0)
    with pytest.raises(ValueError, match=r"to 99 numbers is too small: it adds noise of 10%.*at least 100"):
        trak(projection=Projection(99))
    with pytest.raises(ValueError, match="All features are zero"):
        Kernel(torch.zeros(3, 2))
