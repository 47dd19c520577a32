"""The diagonal Fisher information against a loop over single images, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny import moved_copy, one_process, tiny_latents, tiny_model
from wherefrom.curvature import DiagonalMatrix, FisherSettings, fit_diagonal, load_diagonal
from wherefrom.curvature.diagonal import FisherPass
from wherefrom.data.encoded_images import EncodedImages
from wherefrom.models.conditioning import PROMPT
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store

DATA = tiny_latents(5, captions=2)


def names_of(model: DiffusionModel, subset: Subset = "cross_attention_kv") -> list[str]:
    return list(select_weights(model.denoiser, subset))


def brute_force(
    model: DiffusionModel, data: EncodedImages, names: list[str], settings: FisherSettings
) -> tuple[dict[str, Tensor], set[tuple[int, int]]]:
    """The mean of squared gradients of one image at a time, from the formulas; also the (timestep, caption) drawn."""
    noise_samples = FisherPass(model, data, names, settings, 1).noise_samples
    parameters = {name: parameter for name, parameter in model.denoiser.named_parameters() if name in names}
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    alphas, seen, count = model.noise_schedule.signal.square(), set(), 0
    model.denoiser.requires_grad_(True)
    for image in range(len(data)):
        for flip in range(2 if settings.flips else 1):
            for visit in range(settings.samples_per_image):
                key = (torch.tensor([value]) for value in (image, flip, visit))
                timestep, caption, noise_key = noise_samples(*key)
                latent, alpha = data.latents_at(image, flip), alphas[timestep[0]]
                noise = keyed_random.normal(noise_key, latent.shape, torch.float64)[0]
                noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
                states = data.conditioning_at(image, caption)[PROMPT]
                output = model.denoiser(noisy[None], timestep, encoder_hidden_states=states).sample[0]
                loss = (alpha.sqrt() * noise - (1 - alpha).sqrt() * latent - output).square().mean()
                for total, gradient in zip(
                    totals.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True
                ):
                    total += gradient.square()
                seen.add((int(timestep), int(caption)))
                count += 1
    model.denoiser.requires_grad_(False)
    return {name: total / count for name, total in totals.items()}, seen


def one_pass(model: DiffusionModel, names: list[str], settings: FisherSettings, batch_size: int) -> dict[str, Tensor]:
    work = FisherPass(model, DATA, names, settings, batch_size)
    work.step(range(2))
    work.step(range(2, len(DATA)))
    return work.mean()


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert result.keys() == expected.keys()
    for name, values in expected.items():
        # A bias before a group norm has gradient 0 up to rounding, whose square is no number to compare.
        torch.testing.assert_close(result[name], values, rtol=rtol, atol=1e-24, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("subset", ["cross_attention_kv", "all"])
@pytest.mark.parametrize("flips", [True, False])
def test_the_fisher_equals_a_loop_over_single_images(subset: Subset, flips: bool) -> None:
    model = tiny_model()
    names, settings = names_of(model, subset), FisherSettings(samples_per_image=3, seed=4, flips=flips)
    expected, seen = brute_force(model, DATA, names, settings)
    assert len(seen) == len(DATA) * 3 * (1 + flips)
    assert {caption for _, caption in seen} == {0, 1}
    work = FisherPass(model, DATA, names, settings, 256)
    work.step(range(len(DATA)))
    assert work.samples == len(seen)
    assert_same(work.mean(), expected, 1e-8 if subset == "all" else 1e-10)


def test_flips_and_seeds_are_other_samples() -> None:
    model = tiny_model()
    names = names_of(model)
    result = [
        one_pass(model, names, settings, 64)[names[0]]
        for settings in (FisherSettings(3), FisherSettings(3, flips=False), FisherSettings(3, seed=1))
    ]
    for index, left in enumerate(result):
        for right in result[index + 1 :]:
            assert not torch.allclose(left, right, rtol=1e-3)


def test_the_timesteps_of_an_image_cover_the_schedule_evenly() -> None:
    work = FisherPass(tiny_model(), DATA, [], FisherSettings(samples_per_image=10), 1)
    flip, visit = (part.flatten() for part in torch.meshgrid(torch.arange(2), torch.arange(10), indexing="ij"))
    timestep, _, keys = work.noise_samples(torch.full((20,), 3), flip, visit)
    ordered = timestep.sort().values
    assert int(ordered[0]) >= 0
    assert int(ordered[-1]) < 1000
    around = torch.cat([ordered.diff(), ordered[:1] + 1000 - ordered[-1:]])
    assert int(around.max()) < 100  # twenty uniform draws would leave a gap of 180 on average
    assert len(keys.unique()) == 20


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model = tiny_model()
    names, settings = names_of(model), FisherSettings(samples_per_image=2)
    assert_same(one_pass(model, names, settings, batch_size), one_pass(model, names, settings, 256), 1e-11)


def test_damping_is_relative_to_each_tensors_mean() -> None:
    fisher = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[10.0], [30.0]])}
    gradients = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[2.0], [-4.0]])}
    steps = DiagonalMatrix(fisher, 0.5).precondition(gradients)
    torch.testing.assert_close(steps["a"], torch.tensor([1 / 2, 1 / 4]))
    torch.testing.assert_close(steps["b"], torch.tensor([[2 / 20], [-4 / 40]]))
    undamped = DiagonalMatrix(fisher, 0.0).precondition({"a": gradients["a"]})
    torch.testing.assert_close(undamped["a"], torch.tensor([1.0, 1 / 3]))


def test_a_zero_in_the_fisher_needs_damping() -> None:
    fisher, gradients = {"layer.weight": torch.tensor([0.0, 2.0])}, {"layer.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"'layer\.weight' is not finite.*Set damping above 0"):
        DiagonalMatrix(fisher, 0.0).precondition(gradients)
    torch.testing.assert_close(
        DiagonalMatrix(fisher, 1.0).precondition(gradients)["layer.weight"], torch.tensor([1, 1 / 3])
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_fisher_that_cannot_be_one_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"'w' holds negative or non-finite values"):
        DiagonalMatrix({"w": torch.tensor([1.0, bad])})


@pytest.mark.parametrize(("damping", "visits"), [(-0.1, 1), (0.1, 0)])
def test_settings_that_make_no_sense_are_refused(damping: float, visits: int) -> None:
    with pytest.raises(ValueError, match=r"must not be negative; given -0\.1|must be at least 1; given 0"):
        _ = DiagonalMatrix({}, damping), FisherSettings(visits)


def test_weights_that_are_not_numbers_are_found_in_the_gradient() -> None:
    model = tiny_model()
    names = names_of(model)
    with torch.no_grad():
        dict(model.denoiser.named_parameters())["conv_out.bias"][0] = float("nan")
    work = FisherPass(model, DATA, names, FisherSettings(1), 8)
    with pytest.raises(ValueError, match=r"The gradient of '.*' is not finite: check the model's weights"):
        work.step(range(2))


def fitted(root: Path, model: DiffusionModel, **options: Any) -> tuple[DiagonalMatrix, Path]:
    store = Store(root)
    fisher = fit_diagonal(
        model,
        data=DATA,
        names=names_of(model),
        store=store,
        runner=one_process(),
        settings=FisherSettings(1),
        **options,
    )
    (folder,) = (root / "fisher").iterdir()
    return fisher, folder


def test_the_fisher_is_kept_and_found_again(tmp_path: Path) -> None:
    model = tiny_model()
    chunks: list[tuple[int, int]] = []
    first, folder = fitted(tmp_path, model, progress=lambda done, total: chunks.append((done, total)))
    assert chunks == [(1, 1)]
    again, _ = fitted(tmp_path, model, progress=lambda done, total: chunks.append((done, total)))
    assert chunks == [(1, 1)]
    loaded = load_diagonal(folder, model)
    for name, values in first.fisher.items():
        assert torch.equal(again.fisher[name], values)
        assert torch.equal(loaded.fisher[name], values)
    fit_diagonal(
        model, data=DATA, names=names_of(model), store=Store(tmp_path), runner=one_process(), settings=FisherSettings(2)
    )
    assert len(list((tmp_path / "fisher").iterdir())) == 2


def test_the_fisher_of_another_model_is_refused_unless_declared(tmp_path: Path) -> None:
    base = tiny_model()
    custom = moved_copy(base)
    fisher, folder = fitted(tmp_path, base)
    message = (
        rf"{base.fingerprint()}, but the model to unlearn is {custom.fingerprint()}.*curvature_from declares nothing"
    )
    with pytest.raises(ValueError, match=message):
        load_diagonal(folder, custom)
    with pytest.raises(ValueError, match=r"curvature_from declares 'something else'"):
        load_diagonal(folder, custom, curvature_from="something else")
    loaded = load_diagonal(folder, custom, curvature_from=base.fingerprint())
    assert all(torch.equal(loaded.fisher[name], values) for name, values in fisher.fisher.items())


def test_the_fisher_of_other_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    fisher, folder = fitted(tmp_path, model)
    gradients = {name: torch.ones_like(value) for name, value in select_weights(model.denoiser, "attention").items()}
    with pytest.raises(ValueError, match=r"holds none for weight '.*attn1.*made for other weights"):
        fisher.precondition(gradients)
    wide = tiny_model(channels=(8, 24))
    with pytest.raises(ValueError, match=r"weight '.*' has shape \(16, 12\), in the model to unlearn \(24, 12\)"):
        load_diagonal(folder, wide, curvature_from=model.fingerprint())


def test_a_folder_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        load_diagonal(tmp_path, tiny_model())
