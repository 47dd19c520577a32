"""Settings of schedulers: those of sampling are let through, those of training are identities, others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from tests.support.pipelines import TRAINED, stable_diffusion
from wherefrom.models.noise_schedule import noise_schedule_of
from wherefrom.models.pipeline import load_model

PLAIN = DDIMScheduler(**TRAINED)


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**TRAINED, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        DDIMScheduler(**TRAINED, clip_sample=True, timestep_spacing="trailing", thresholding=True),
        EulerDiscreteScheduler(**TRAINED, use_karras_sigmas=True, interpolation_type="log_linear"),
        DPMSolverMultistepScheduler(**TRAINED, algorithm_type="sde-dpmsolver++", solver_order=3, use_lu_lambdas=True),
        UniPCMultistepScheduler(**TRAINED, solver_type="bh1", predict_x0=False),
        LCMScheduler(**TRAINED, original_inference_steps=40, timestep_scaling=9.0),
        # As pipelines are found that were given another scheduler: settings of the one before are left over.
        DDIMScheduler.from_config(EulerDiscreteScheduler(**TRAINED, use_karras_sigmas=True, sigma_max=9.0).config),
    ],
)
def test_how_images_are_sampled_is_no_matter(scheduler: Any) -> None:
    schedule, plain = noise_schedule_of(scheduler), noise_schedule_of(PLAIN)
    assert schedule.identity() == plain.identity()
    torch.testing.assert_close(schedule.signal, plain.signal)


def test_what_the_network_was_trained_with_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"rescale_betas_zero_snr": True},
        {"prediction_type": "v_prediction"},
        {"beta_end": 0.013},
        {"trained_betas": [0.01] * 1000},
        {"num_train_timesteps": 500},
    ]
    prints = set()
    for number, change in enumerate(changes):
        scheduler = DDIMScheduler(**{**TRAINED, "steps_offset": 1, "clip_sample": False, **change})
        prints.add(load_model(str(stable_diffusion(tmp_path / str(number), scheduler=scheduler))).fingerprint())
    assert len(prints) == len(changes)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            EulerDiscreteScheduler(timestep_type="continuous"),
            "EulerDiscreteScheduler with timestep_type = 'continuous'",
        ),
        (CogVideoXDDIMScheduler(), r"CogVideoXDDIMScheduler with snr_shift_scale = 3.0"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas = True"),
        (UniPCMultistepScheduler(flow_shift=3.0), r"flow_shift = 3.0"),
        (DDIMScheduler(prediction_type="sample"), "prediction_type 'sample' is not supported"),
    ],
)
def test_what_decides_more_than_is_known_is_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_schedule_of(scheduler)


@pytest.mark.parametrize("made", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_an_unknown_setting_is_refused_by_name(made: Any) -> None:
    made.register_to_config(noise_offset=0.1, _of_nobody=True, unused=None)
    with pytest.raises(ValueError, match=rf"{type(made).__name__} with noise_offset = 0.1 is not supported"):
        noise_schedule_of(made)


def test_levels_that_were_set_by_hand_are_refused() -> None:
    scheduler = DDIMScheduler(**TRAINED)
    scheduler.set_timesteps(5)
    noise_schedule_of(scheduler)
    scheduler.alphas_cumprod = DDIMScheduler(**TRAINED, rescale_betas_zero_snr=True).alphas_cumprod
    with pytest.raises(ValueError, match=r"DDIMScheduler: its noise levels \(alphas_cumprod\) are not those of its"):
        noise_schedule_of(scheduler)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(5)
    noise_schedule_of(flow)
    flow.set_shift(6.0)
    with pytest.raises(ValueError, match=r"its noise levels \(shift\) are not those of its configuration"):
        noise_schedule_of(flow)
