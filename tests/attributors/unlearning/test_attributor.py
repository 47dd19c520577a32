"""Attribution by unlearning as a whole: the difference of losses, and what decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.attribution import HELD_OUT, QUERY, TRAIN
from tests.support.tiny import moved_copy, one_process, tiny_encoder, tiny_model
from wherefrom.attributors import AttributionByUnlearning, Query, Scores, TrainingData
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings, unlearn
from wherefrom.curvature import EKFAC, DiagonalFisher, EKFACMatrix, FisherSettings, IdentityMatrix, save_ekfac
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.gradients.query_loss import QueryLatent
from wherefrom.gradients.score_reduction import TimestepWeights, reduce_losses
from wherefrom.models.diffusion import DiffusionModel, Output, SquareOutput
from wherefrom.models.encoders import LatentEncoder
from wherefrom.models.parameter_subsets import moved_weights
from wherefrom.rankings.ranking_file import order_of
from wherefrom.runtime.artifacts import Store

GRID, FISHER = LossGrid(timesteps=2), FisherSettings(1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> LatentEncoder:
    return tiny_encoder(tmp_path_factory.mktemp("text") / "encoder")


@pytest.fixture
def model(encoder: LatentEncoder) -> DiffusionModel:
    return tiny_model(encoder=encoder)


def method(settings: dict[str, Any] | None = None, **options: Any) -> AttributionByUnlearning:
    chosen = UnlearningSettings(
        **{"noise_samples": 24, "measurement_samples": 24, "relative_loss_increase": 1e-2, **(settings or {})}
    )
    return AttributionByUnlearning(
        **{"weights": "all", "unlearning": chosen, "grid": GRID, "curvature": DiagonalFisher(FISHER), **options}
    )


def score(
    attributor: AttributionByUnlearning,
    model: DiffusionModel,
    store: Path,
    query: Query = QUERY,
    train: EncodedImages = TRAIN,
    held_out: EncodedImages | None = HELD_OUT,
    candidates: list[str] | None = None,
) -> Scores:
    data = TrainingData(train.images, train, None if held_out is None else held_out.images, held_out)
    attributor.fit(data, model, Store(store), one_process())
    (scores,) = attributor.score([query], candidates)
    return scores


def brute_force(model: DiffusionModel, query: Query, data: EncodedImages, settings: UnlearningSettings) -> np.ndarray:
    """Unlearn, measure before and after, subtract; without store, passes or attributor. By flip and timestep."""
    assert model.encoder is not None
    assert query.latent is not None
    latent = QueryLatent(query.id, query.latent, model.encoder.text.encode([query.prompt]).at(0))
    moved = unlearn(
        model,
        query=latent,
        weights="all",
        curvature=IdentityMatrix(),
        dataset_size=len(TRAIN),
        settings=settings,
        runner=one_process(),
    ).moved
    changes = []
    for values in ({}, moved):
        with moved_weights(model.denoiser, values):
            work = LossPass(model, data, GRID, 16)
            work.step(range(len(data)))
        changes.append(work.losses)
    return (changes[1] - changes[0]).mean(dim=(2, 4)).numpy()


@pytest.mark.parametrize("timestep_weights", ["equal", "spread"])
def test_a_score_is_the_change_of_a_images_loss(
    model: DiffusionModel, tmp_path: Path, timestep_weights: TimestepWeights
) -> None:
    attributor = method({"newton": False, "steps": 2}, timestep_weights=timestep_weights)
    scores = score(attributor, model, tmp_path)
    trained, held_out = (brute_force(model, QUERY, part, attributor.unlearning) for part in (TRAIN, HELD_OUT))
    weights = np.ones(2)
    if timestep_weights == "spread":
        every = trained.reshape(-1, 2)
        middle = np.sort(every, axis=0)[(len(every) - 1) // 2]  # the lower median, as torch takes it
        weights = 1 / np.sort(np.abs(every - middle), axis=0)[(len(every) - 1) // 2]
        weights /= weights.mean()
        assert weights.max() > 1.05
    for result, expected in ((scores.scores, trained), (scores.null, held_out)):
        np.testing.assert_allclose(result, (expected * weights).mean(axis=2).max(axis=1), rtol=1e-8, atol=1e-12)
    assert scores.ids == TRAIN.ids
    assert scores.facts["query_loss_rise"] == pytest.approx(1e-2, rel=0.011)
    assert scores.facts["alpha"] > 0
    assert np.ptp(scores.scores) > 1e-4


@pytest.mark.parametrize("step", ["loss", "square_output"])
@pytest.mark.parametrize("scored", ["loss", "square_output"])
def test_the_square_output_may_take_the_losss_place(
    model: DiffusionModel, tmp_path: Path, step: Output, scored: Output
) -> None:
    attributor = method({"newton": False}, step_output=step, score_output=scored, timestep_weights="equal")
    scores = score(attributor, model, tmp_path)
    assert model.encoder is not None
    assert QUERY.latent is not None
    latent = QueryLatent(QUERY.id, QUERY.latent, model.encoder.text.encode([QUERY.prompt]).at(0))
    settings = method({"newton": False}).unlearning
    stepped = SquareOutput(model) if step == "square_output" else model
    moved = unlearn(
        stepped,
        query=latent,
        weights="all",
        curvature=IdentityMatrix(),
        dataset_size=len(TRAIN),
        settings=settings,
        runner=one_process(),
    ).moved
    measured = []
    for values in ({}, moved):
        with moved_weights(model.denoiser, values):
            work = LossPass(SquareOutput(model) if scored == "square_output" else model, TRAIN, GRID, 16)
            work.step(range(len(TRAIN)))
        measured.append(work.losses)
    expected = (measured[1] - measured[0]).mean(dim=(2, 3, 4)).amax(dim=1).numpy()
    np.testing.assert_allclose(scores.scores, expected, rtol=1e-8, atol=1e-12)
    name = {"loss": "query_loss", "square_output": "query_square_output"}[step]
    assert scores.facts[f"{name}_rise"] == pytest.approx(1e-2, rel=0.011)


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown output 'output'; choose 'loss' or 'square_output'"):
        method(score_output="output")
    with pytest.raises(ValueError, match="Unknown timestep_weights 'none'; choose 'equal' or 'spread'"):
        method(timestep_weights="none")


@pytest.mark.parametrize("newton", [True, False])
def test_alpha_zero_gives_scores_of_exactly_zero(model: DiffusionModel, tmp_path: Path, newton: bool) -> None:
    scores = score(method({"relative_loss_increase": None, "alpha": 0.0, "newton": newton}), model, tmp_path)
    assert scores.scores.tolist() == [0.0] * len(TRAIN)
    assert scores.null.tolist() == [0.0] * len(HELD_OUT)
    assert scores.facts["query_loss_rise"] == 0.0
    assert np.isnan(scores.facts["split_half_reliability"])


def test_the_weights_come_back(model: DiffusionModel, tmp_path: Path) -> None:
    before = model.fingerprint()
    score(method(), model, tmp_path)
    assert model.fingerprint() == before


def test_the_batch_size_does_not_matter(model: DiffusionModel, tmp_path: Path) -> None:
    result = [score(method(batch_size=size), model, tmp_path / str(size)).scores for size in (7, 256)]
    np.testing.assert_allclose(result[0], result[1], rtol=1e-9, atol=1e-12)
    assert np.array_equal(order_of(TRAIN.ids, result[0]), order_of(TRAIN.ids, result[1]))


def test_candidates_are_scored_as_among_all(model: DiffusionModel, tmp_path: Path) -> None:
    whole = score(method(), model, tmp_path)
    chosen = [TRAIN.ids[6], TRAIN.ids[1]]
    part = score(method(), model, tmp_path, candidates=chosen)
    assert list(part.ids) == chosen
    np.testing.assert_allclose(part.scores, whole.scores[[6, 1]], rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="1 candidates are not training images, such as 'nobody'"):
        score(method(), model, tmp_path, candidates=["nobody"])


def test_the_mean_over_flips_is_a_variant(model: DiffusionModel, tmp_path: Path) -> None:
    largest, mean = (score(method(flip=flip), model, tmp_path).scores for flip in ("max", "mean"))
    assert (mean < largest).all()


def test_scores_are_found_again_for_the_same_model_only(model: DiffusionModel, tmp_path: Path) -> None:
    # Two models with the same keys and values, which stay where they are: only the other weights tell them apart.
    options = {
        "settings": {"relative_loss_increase": None, "alpha": 0.0, "newton": False},
        "weights": "cross_attention_kv",
    }
    first = score(method(**options), model, tmp_path)
    other = moved_copy(model)
    kept = {
        name: value
        for name, value in model.denoiser.state_dict().items()
        if ".attn2.to_k" in name or ".attn2.to_v" in name
    }
    other.denoiser.load_state_dict({**other.denoiser.state_dict(), **kept})
    assert score(method(**options), other, tmp_path).scores.tolist() == first.scores.tolist() == [0.0] * len(TRAIN)


def test_a_query_without_a_latent_is_encoded(model: DiffusionModel, tmp_path: Path) -> None:
    assert model.encoder is not None
    image = Query("picture", "", QUERY.pixels)
    encoded = Query("picture", "", QUERY.pixels, model.encoder.encode_image(QUERY.pixels))
    settings = {"newton": False}
    assert np.array_equal(
        score(method(settings), model, tmp_path / "a", image).scores,
        score(method(settings), model, tmp_path / "b", encoded).scores,
    )


def test_without_held_out_images_there_is_no_null(model: DiffusionModel, tmp_path: Path) -> None:
    scores = score(method(), model, tmp_path, held_out=None)
    assert scores.null.shape == (0,)
    assert len(scores.scores) == len(TRAIN)


def test_reliability_is_that_of_the_draws(model: DiffusionModel) -> None:
    random = torch.Generator().manual_seed(0)
    signal = torch.randn(200, 2, 1, 1, 1, generator=random)
    same = signal.expand(-1, -1, -1, 4, 3)
    assert method().reliability(same) == pytest.approx(1.0)
    noisy = same + 3 * torch.randn(200, 2, 1, 4, 3, generator=random)
    noise = torch.randn(200, 2, 1, 4, 3, generator=random)
    assert 0.3 < method().reliability(noisy) < 0.75
    assert abs(method().reliability(noise)) < 0.3
    assert np.isnan(method().reliability(same[..., :1, :1]))
    assert reduce_losses(same).shape == (200,)


def test_a_fisher_from_another_model_must_be_declared(model: DiffusionModel, tmp_path: Path) -> None:
    scores = score(method(), model, tmp_path)
    (fisher,) = (tmp_path / "fisher").iterdir()
    same = score(method(curvature=DiagonalFisher(FISHER, fisher_path=str(fisher))), model, tmp_path / "other")
    assert np.array_equal(same.scores, scores.scores)
    assert not (tmp_path / "other" / "fisher").exists()
    custom = moved_copy(model)
    with pytest.raises(ValueError, match="curvature_from declares nothing"):
        score(method(curvature=DiagonalFisher(FISHER, fisher_path=str(fisher))), custom, tmp_path)
    declared = method(curvature=DiagonalFisher(FISHER, fisher_path=str(fisher), curvature_from=model.fingerprint()))
    assert np.isfinite(score(declared, custom, tmp_path).scores).all()
    kept = DiagonalFisher(FISHER, fisher_path=str(kv_fisher(model, tmp_path)))
    with pytest.raises(ValueError, match="made for other weights"):
        score(method({"newton": True}, curvature=kept), model, tmp_path)


def kv_fisher(model: DiffusionModel, tmp_path: Path) -> Path:
    settings = {"relative_loss_increase": None, "alpha": 1e-6}
    score(method(settings, weights="cross_attention_kv"), model, tmp_path / "kv")
    (folder,) = (tmp_path / "kv" / "fisher").iterdir()
    return folder


def test_what_is_missing_is_named(model: DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a model and the latents"):
        method().fit(TrainingData(TRAIN.images), model, Store(tmp_path), one_process())
    with pytest.raises(ValueError, match="needs a model and the latents"):
        method().fit(TrainingData(TRAIN.images, TRAIN), None, Store(tmp_path), one_process())
    with pytest.raises(ValueError, match="fit must run before score"):
        list(method().score([QUERY]))
    with pytest.raises(ValueError, match="The model has no encoder"):
        score(method({"newton": False}), tiny_model(), tmp_path)


def test_the_work_is_counted(model: DiffusionModel, tmp_path: Path) -> None:
    data = TrainingData(TRAIN.images, TRAIN, HELD_OUT.images, HELD_OUT)
    work = method({"noise_samples": 10, "measurement_samples": 4, "steps": 2}).estimate(data, queries=3)
    losses = (9 + 4) * 2 * 2  # images, flips, timesteps
    assert work.once == losses + 3 * 9 * 2
    assert work.per_query == losses + 2 * (3 * 10 + 6 * 4)
    assert work.disk == 4 * losses * 4
    assert method({"newton": False}).estimate(data, 1).once == losses


def test_ekfac_takes_the_place_of_the_diagonal(model: DiffusionModel, tmp_path: Path) -> None:
    said: list[str] = []
    plus = method(curvature=EKFAC(FISHER, layers_per_pass=6))
    plus.fit(TrainingData(TRAIN.images, TRAIN), model, Store(tmp_path), one_process(), said.append)
    assert isinstance(plus.curvature_matrix, EKFACMatrix)
    assert said[0].startswith("EK-FAC of ")
    assert "the diagonal for" in said[0]
    (result,) = plus.score([QUERY])
    assert result.facts["query_loss_rise"] == pytest.approx(1e-2, rel=0.02)
    assert plus.identity()["curvature"] == "ekfac"
    diagonal = score(method(), model, tmp_path)
    assert result.facts["alpha"] != diagonal.facts["alpha"]
    assert not np.allclose(result.scores, diagonal.scores, rtol=1e-3)
    save_ekfac(tmp_path / "saved", plus.curvature_matrix, model)
    loaded = score(method(curvature=EKFAC(FISHER, fisher_path=str(tmp_path / "saved"))), model, tmp_path)
    np.testing.assert_allclose(loaded.scores, result.scores, rtol=1e-9)
    with pytest.raises(ValueError, match=r"curvature must be DiagonalFisher.*; given 'kfac'"):
        method(curvature="kfac")


def test_the_seconds_of_a_query_and_of_fit_are_told_apart(model: DiffusionModel, tmp_path: Path) -> None:
    attributor = method({"steps": 2})
    facts = score(attributor, model, tmp_path).facts
    assert 0 < facts["gradient_s"] < facts["unlearning_s"]
    assert set(attributor.fit_s) == {"curvature", "losses"}
    assert min(attributor.fit_s.values()) > 0
