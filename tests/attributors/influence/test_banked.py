"""The influence bank against influence functions and against its formula, one gradient at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.attribution import FISHER, GRID, OTHER, QUERY, TRAIN, run
from tests.support.tiny import one_process, tiny_encoder, tiny_model
from wherefrom.attributors import InfluenceBank, InfluenceFunction, TrainingData
from wherefrom.attributors.influence.gradient_bank import Compression, largest
from wherefrom.attributors.influence.token_factors import TokenGradients
from wherefrom.curvature import EKFAC, DiagonalFisher, Identity
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.gradients.query_loss import QueryLoss
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import select_weights, trainable
from wherefrom.runtime.artifacts import Store

WHOLE = Compression("eigenbasis")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return tiny_model(encoder=tiny_encoder(tmp_path_factory.mktemp("text") / "encoder"))


def bank(**options: Any) -> InfluenceBank:
    settings = {
        "noise_samples": 12,
        "grid": GRID,
        "curvature": EKFAC(FISHER),
        "compression": WHOLE,
        "half": False,
        **options,
    }
    return InfluenceBank(**{"weights": "cross_attention_kv", **settings})


@pytest.mark.parametrize(
    ("weights", "keep"),
    [("cross_attention_kv", "factors"), ("cross_attention_kv", "eigenbasis"), ("all", "eigenbasis")],
)
@pytest.mark.parametrize("curvature", [EKFAC(FISHER), DiagonalFisher(FISHER), Identity()])
def test_a_whole_bank_is_the_influence_function(
    model: DiffusionModel, tmp_path: Path, curvature: Any, weights: Any, keep: Any
) -> None:
    settings: dict[str, Any] = {"curvature": curvature, "weights": weights, "timestep_weights": "equal"}
    result = run(bank(**settings, compression=Compression(keep)), model, tmp_path, QUERY, OTHER)
    exact = run(InfluenceFunction(noise_samples=12, grid=GRID, **settings), model, tmp_path, QUERY, OTHER)
    for mine, theirs in zip(result, exact, strict=True):
        np.testing.assert_allclose(mine.scores, theirs.scores, rtol=1e-7, atol=1e-9 * np.abs(theirs.scores).max())
        np.testing.assert_allclose(mine.null, theirs.null, rtol=1e-7, atol=1e-9 * np.abs(theirs.null).max())


def test_each_timestep_is_divided_by_its_gradients_length(model: DiffusionModel, tmp_path: Path) -> None:
    attributor = bank(curvature=Identity())
    (result,) = run(attributor, model, tmp_path)
    (plain,) = run(bank(curvature=Identity(), timestep_weights="equal"), model, tmp_path)
    parameters = select_weights(model.denoiser, "cross_attention_kv")
    losses, rows = LossPass(model, TRAIN, GRID, 64), []
    items = len(losses.flip)
    for image in range(len(TRAIN)):
        with PerSampleGradients(model.denoiser, list(parameters)) as tap:
            own = losses.item_losses(torch.full((items,), image), torch.arange(items))
            by_name = dict(tap.per_sample(own))
            rows.append(torch.cat([by_name[name].flatten(1) for name in parameters], dim=1))
    gradients = torch.stack(rows)  # images, items, numbers
    with trainable(model.denoiser, parameters):
        query = QueryLoss(model, attributor.query_latent(QUERY), 0, one_process()).gradient(parameters, 0, 12)
    products = gradients @ torch.cat([query[name].flatten() for name in parameters]) / len(TRAIN)
    steps = losses.timestep.unique()
    lengths = [gradients[:, (losses.timestep == t) & (losses.flip == 0)].square().sum(2).mean().sqrt() for t in steps]
    weights = 1 / torch.stack(lengths)
    weights /= weights.mean()
    by_flip = torch.zeros(len(TRAIN), 2, dtype=torch.float64)
    for step, weight in zip(steps, weights, strict=True):
        for flip in (0, 1):
            by_flip[:, flip] += weight * products[:, (losses.timestep == step) & (losses.flip == flip)].mean(1) / 3
    np.testing.assert_allclose(result.scores, by_flip.amax(1).numpy(), rtol=1e-7)
    assert not np.allclose(result.scores, plain.scores, rtol=1e-3)


def test_the_second_order_grows_as_the_square_of_the_first(model: DiffusionModel, tmp_path: Path) -> None:
    upright = {"grid": LossGrid(timesteps=3, flips=False)}
    (first,) = run(bank(**upright), model, tmp_path)
    attributor = bank(**upright, second_order=0.4)
    (result,) = run(attributor, model, tmp_path)
    spread = first.scores.std()
    np.testing.assert_allclose(result.scores, first.scores + 0.4 * first.scores**2 / spread, rtol=1e-9)
    np.testing.assert_allclose(result.null, first.null + 0.4 * first.null**2 / spread, rtol=1e-9)
    (few,) = attributor.score([QUERY], [TRAIN.ids[7], TRAIN.ids[2]])
    np.testing.assert_allclose(few.scores, result.scores[[7, 2]], rtol=1e-9)
    (mirrored,) = run(bank(), model, tmp_path)
    (corrected,) = run(bank(second_order=0.4), model, tmp_path)
    assert np.all(corrected.scores > mirrored.scores)
    assert attributor.identity() != bank(**upright).identity()


def test_the_more_numbers_are_kept_the_closer_are_the_scores(model: DiffusionModel, tmp_path: Path) -> None:
    (whole,) = run(bank(), model, tmp_path)
    for keep in ("eigenbasis", "rademacher"):
        errors = []
        for dimension in (20, 400, 8000):
            (result,) = run(bank(compression=Compression(keep, dimension)), model, tmp_path)  # type: ignore[arg-type]
            errors.append(float(np.abs(result.scores - whole.scores).max() / np.abs(whole.scores).max()))
        assert errors[0] > errors[1] > errors[2], keep
        assert errors[2] < 0.2, keep
    (factors,) = run(bank(compression=Compression()), model, tmp_path)
    np.testing.assert_allclose(factors.scores, whole.scores, rtol=1e-7)
    for compression in (WHOLE, Compression()):
        (halved,) = run(bank(half=True, compression=compression), model, tmp_path)
        assert 0 < np.abs(halved.scores - whole.scores).max() < 2e-3 * np.abs(whole.scores).max()


def test_it_says_how_large_a_bank_will_be(model: DiffusionModel, tmp_path: Path) -> None:
    for compression in (Compression(), WHOLE, Compression("sparse", 300)):
        said: list[str] = []
        store = Store(tmp_path / compression.keep)
        data = TrainingData(TRAIN.images, TRAIN)
        bank(compression=compression, half=True).fit(data, model, store, one_process(), said.append)
        (logged,) = [float(word) for line in said if "bank" in line for word in line.split() if word[0].isdigit()][-1:]
        (rows,) = store.root.glob("bank/*/rows.npy")
        assert logged * 2**20 == pytest.approx(rows.stat().st_size, abs=2**20 / 200 + 200)


def test_the_largest_coordinates_are_found_over_all_tensors() -> None:
    numbers = {"b": torch.tensor([1.0, 5.0]), "a": torch.tensor([3.0, 5.0, 0.0])}
    result = largest(numbers, 3)
    assert {name: where.tolist() for name, where in result.items()} == {"a": [0, 1], "b": [1]}
    assert sum(len(where) for where in largest(numbers, None).values()) == 5


@pytest.mark.parametrize("compression", [Compression(), Compression("eigenbasis", 300)], ids=lambda each: each.keep)
def test_blocks_batches_and_candidates_change_nothing(
    model: DiffusionModel, tmp_path: Path, compression: Compression
) -> None:
    together = run(bank(compression=compression), model, tmp_path / "a", QUERY, OTHER)
    (alone,) = run(bank(compression=compression, batch_size=5), model, tmp_path / "b", OTHER)
    np.testing.assert_allclose(together[1].scores, alone.scores, rtol=1e-9)
    np.testing.assert_allclose(together[1].null, alone.null, rtol=1e-9)
    attributor = bank(compression=compression)
    attributor.fit(TrainingData(TRAIN.images, TRAIN), model, Store(tmp_path / "a"), one_process())
    (few,) = attributor.score([QUERY], [TRAIN.ids[7], TRAIN.ids[2]])
    assert few.ids == (TRAIN.ids[7], TRAIN.ids[2])
    np.testing.assert_allclose(few.scores, together[0].scores[[7, 2]], rtol=1e-9)


def test_what_it_refuses(model: DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="InfluenceBank needs a model"):
        run(bank(), None, tmp_path)
    with pytest.raises(ValueError, match="fit must run before score"):
        next(iter(bank().score([QUERY])))
    with pytest.raises(ValueError, match="noise_samples must be at least 1; given 0"):
        bank(noise_samples=0)
    with pytest.raises(ValueError, match="second_order must not be negative; given -1"):
        bank(second_order=-1.0)
    with pytest.raises(ValueError, match="Unknown compression 'first'"):
        Compression("first", 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="A sparse projection needs a dimension"):
        Compression("sparse")
    with pytest.raises(ValueError, match="at least 1 number; given dimension 0"):
        Compression("eigenbasis", 0)
    with pytest.raises(ValueError, match="Factors have no dimension to choose"):
        Compression("factors", 8)
    with pytest.raises(ValueError, match=r"is not the weight of a linear layer.*choose weights cross_attention_kv"):
        run(bank(weights="all", compression=Compression()), model, tmp_path)
    query_side = next(name for name, _ in model.denoiser.named_parameters() if ".attn2.to_q." in name)
    gradients = TokenGradients(LossPass(model, TRAIN, GRID, 64), [query_side], None, half=False)
    with pytest.raises(ValueError, match=r"is not fed with the caption states themselves.*such as eigenbasis"):
        gradients.rows(range(2))
