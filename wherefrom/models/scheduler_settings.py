"""Which settings of a scheduler decide the process that a network was trained for, and which only how it samples."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

# What noise levels are computed from.
DECIDING = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
)
# Settings of all of diffusers' schedulers with `alphas_cumprod`, and of flow matching, that only samplers read.
_SAMPLING = frozenset(
    {
        "algorithm_type",
        "base_image_seq_len",
        "base_shift",
        "clip_sample",
        "clip_sample_range",
        "corrector_order",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "eta",
        "euler_at_final",
        "final_sigmas_type",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "max_image_seq_len",
        "max_shift",
        "original_inference_steps",
        "predict_x0",
        "predictor_order",
        "sample_max_value",
        "set_alpha_to_one",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "steps_offset",
        "tau_func",
        "thresholding",
        "time_shift_type",
        "timestep_scaling",
        "timestep_spacing",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    }
)
# Settings that are known to do nothing at these values only.
_AT = {"flow_shift": (1.0,), "timestep_type": ("discrete",)}
_KNOWN = {*DECIDING, *_SAMPLING, "prediction_type", "shift"}


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuses a scheduler whose settings decide more of the training process than is known.

    Args:
        scheduler: A pipeline's scheduler, of any class with `alphas_cumprod` or of flow matching.

    Raises:
        ValueError: A setting is unknown, or the noise levels were changed beside the configuration.
    """
    kind, config = type(scheduler).__name__, dict(getattr(scheduler, "config", {}))
    for name, value in config.items():
        known = name.startswith("_") or value in (None, False) or name in _KNOWN or value in _AT.get(name, ())
        if not known:
            raise ValueError(
                f"{kind} with {name} = {value!r} is not supported: it is not known whether the network was trained "
                "otherwise because of it. If it only says how to sample, remove it from the scheduler's configuration."
            )
    made: Any = type(scheduler)
    fresh, given = made.from_config(config), scheduler
    for name in ("alphas_cumprod", "_shift"):
        mine, usual = getattr(given, name, None), getattr(fresh, name, None)
        if mine is None or usual is None:
            continue
        pair = (torch.as_tensor(each).double().cpu() for each in (mine, usual))
        first, second = pair
        if first.shape != second.shape or not torch.allclose(first, second, rtol=0, atol=1e-6):
            raise ValueError(
                f"{kind}: its noise levels ({name.strip('_')}) are not those of its configuration: something set them "
                "by hand. Make them by the configuration: trained_betas, rescale_betas_zero_snr or shift."
            )
