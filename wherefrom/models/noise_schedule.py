"""Forward processes: how noise is added to an image, what the network predicts, and sampling.

Shape letters: B = batch, C = latent channels, H and W = latent height and width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from jaxtyping import Float, Int64
from torch import Tensor

from wherefrom.models.scheduler_settings import DECIDING, check_scheduler

Prediction = Literal["epsilon", "v_prediction", "flow"]
_OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting")
_OTHER_FLOWS = (*_OTHER_SIGMAS, "invert_sigmas", "shift_terminal", "stochastic_sampling")
_DECIDING_FLOW = ("num_train_timesteps", "shift")


class Step(NamedTuple):
    """Where a sampler stops.

    Attributes:
        timestep: The nearest timestep of the forward process.
        time: Time input of the network.
    """

    timestep: int
    time: float


class NoiseSchedule:
    """x_t = √ᾱ_t x + √(1 - ᾱ_t) ε, and what the network is asked to say of it (AbU, section 3).

    Args:
        scheduler: A diffusers scheduler with `alphas_cumprod`; its configuration names the prediction type.

    Raises:
        ValueError: The scheduler is of another kind, or predicts something other than noise or velocity.
    """

    deciding: tuple[str, ...] = DECIDING

    def __init__(self, scheduler: SchedulerMixin) -> None:
        config: Any = scheduler.config
        alphas = getattr(scheduler, "alphas_cumprod", None)
        prediction = getattr(config, "prediction_type", None)
        if alphas is None or prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{type(scheduler).__name__} with prediction_type {prediction!r} is not supported: the loss needs "
                "`alphas_cumprod` "
                "and a prediction_type of 'epsilon' or 'v_prediction'."
            )
        check_scheduler(scheduler)
        self.config = dict(config)
        self.prediction: Prediction = prediction
        self.signal = alphas.double().sqrt()
        self.spread = (1 - alphas.double()).sqrt()

    @property
    def steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.signal)

    def identity(self) -> dict[str, Any]:
        """What decides the process: settings, not the levels computed from them, whose last digits machines differ in.

        Schedulers that say nothing of a setting and those that leave it off describe the same process.
        """
        settings = {name: self.config.get(name) or None for name in self.deciding}
        return {"prediction": self.prediction, **settings}

    def scales(self, latents: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        """The factors of x and of ε in x_t, shaped to multiply the latents."""
        shape = (-1,) + (1,) * (latents.dim() - 1)
        index = timesteps.cpu()
        return (
            self.signal[index].to(latents.device, latents.dtype).reshape(shape),
            self.spread[index].to(latents.device, latents.dtype).reshape(shape),
        )

    def times(self, timesteps: Int64[Tensor, " b"]) -> Tensor:
        """Time input of the network at these timesteps."""
        return timesteps

    def noisy(
        self, latents: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, " b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """x_t."""
        signal, spread = self.scales(latents, timesteps)
        return signal * latents + spread * noise

    def target(
        self, latents: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, " b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """ε, or v = √ᾱ_t ε - √(1 - ᾱ_t) x."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self.scales(latents, timesteps)
        return signal * noise - spread * latents

    def sampler(self, steps: int, eta: float = 0.0) -> Sampler:
        """A sampler of this many steps."""
        return DDIM(self, steps, eta)


class FlowSchedule(NoiseSchedule):
    """x_s = (1 - s) x + s ε, of which the network says ε - x (rectified flow: Liu et al. 2023; Esser et al. 2024).

    Timestep t of T stands for the noise level s that the scheduler trains with, its shift included: levels rise with
    t, and the last is 1, noise alone. Spacing timesteps evenly therefore weighs levels as the shift does.

    Args:
        scheduler: diffusers' flow-matching Euler scheduler.

    Raises:
        ValueError: The scheduler is of another kind, or spaces its levels in another way than by a fixed shift.
    """

    deciding = _DECIDING_FLOW

    def __init__(self, scheduler: SchedulerMixin) -> None:
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(f"{type(scheduler).__name__} is not supported: flow matching needs its Euler scheduler.")
        self.config = dict(scheduler.config)
        others = [name for name in _OTHER_FLOWS if self.config.get(name)]
        if others:
            raise ValueError(
                f"FlowMatchEulerDiscreteScheduler with {others[0]} = {self.config[others[0]]!r} is not supported: its "
                "noise levels are not those of a fixed shift. Unset it in the scheduler's configuration."
            )
        check_scheduler(scheduler)
        self.prediction = "flow"
        # Noise levels before the pipeline shortens them for sampling; `sigmas` is the scheduler's word for s.
        fresh = FlowMatchEulerDiscreteScheduler.from_config(self.config)
        self.spread = fresh.sigmas.double().flip(0)
        self.signal = 1 - self.spread

    def times(self, timesteps: Int64[Tensor, " b"]) -> Tensor:
        """The noise level times T."""
        times: Tensor = (self.spread[timesteps.cpu()] * self.steps).float()
        return times.to(timesteps.device)

    def target(
        self, latents: Float[Tensor, "b c h w"], timesteps: Int64[Tensor, " b"], noise: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """ε - x."""
        return noise - latents

    def sampler(self, steps: int, eta: float = 0.0) -> Sampler:
        """A sampler of this many steps.

        Raises:
            ValueError: `eta` is not 0: no noise is added on the way.
        """
        if eta != 0:
            raise ValueError(f"eta must be 0 for a model of flow matching, whose sampler adds no noise; given {eta}.")
        return Euler(self, steps)


class Sampler:
    """Steps from noise to an image.

    Attributes:
        path: Where it stops, from noise to image.
        eta: Share of the posterior's noise that each step adds back.
    """

    path: list[Step]
    eta: float = 0.0

    def step(
        self, index: int, output: Float[Tensor, "b c h w"], latents: Float[Tensor, "b c h w"], noise: Tensor | None
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """The next latents, and the x̂₀ that the network's output means.

        Args:
            index: Which step of the path this is.
            output: What the network says.
            latents: Where we are.
            noise: This step's noise, where `eta` is not 0.
        """
        raise TypeError(f"{type(self).__name__} does not say how to step.")


class DDIM(Sampler):
    """DDIM (Song et al. 2021), by diffusers' scheduler.

    Args:
        schedule: The forward process.
        steps: How many steps.
        eta: See `Sampler`.
    """

    def __init__(self, schedule: NoiseSchedule, steps: int, eta: float) -> None:
        self.eta, self._scheduler = eta, sampling_scheduler(schedule)
        self._scheduler.set_timesteps(steps)
        self.path = [Step(timestep, timestep) for timestep in self._scheduler.timesteps.tolist()]

    def step(
        self, index: int, output: Float[Tensor, "b c h w"], latents: Float[Tensor, "b c h w"], noise: Tensor | None
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """See `Sampler`."""
        stepped: Any = self._scheduler.step(
            output, self.path[index].timestep, latents, eta=self.eta, variance_noise=noise
        )
        return stepped.prev_sample, stepped.pred_original_sample


class Euler(Sampler):
    """Euler's steps down the noise levels that diffusers' scheduler takes for this many steps.

    Args:
        schedule: A process of flow matching.
        steps: How many steps.
    """

    def __init__(self, schedule: FlowSchedule, steps: int) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(schedule.config)
        scheduler.set_timesteps(steps)
        self.levels = scheduler.sigmas.tolist()
        nearest = (schedule.spread[None] - scheduler.sigmas[:-1, None]).abs().argmin(dim=1).tolist()
        self.path = [Step(*each) for each in zip(nearest, scheduler.timesteps.tolist(), strict=True)]

    def step(
        self, index: int, output: Float[Tensor, "b c h w"], latents: Float[Tensor, "b c h w"], noise: Tensor | None
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """See `Sampler`."""
        level, following = self.levels[index], self.levels[index + 1]
        return latents + (following - level) * output, latents - level * output


def noise_schedule_of(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The forward process that a pipeline's scheduler belongs to.

    Raises:
        ValueError: It is not supported.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowSchedule(scheduler)
    return NoiseSchedule(scheduler)


def sampling_scheduler(schedule: NoiseSchedule) -> DDIMScheduler:
    """The DDIM scheduler of a forward process: steps end at the last timestep, latents are not clipped to [-1, 1]."""
    scheduler: DDIMScheduler = DDIMScheduler.from_config(
        schedule.config, clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing"
    )
    return scheduler


def pipeline_scheduler(schedule: NoiseSchedule) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler that a pipeline of a forward process samples with."""
    if isinstance(schedule, FlowSchedule):
        scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(schedule.config)
        return scheduler
    return sampling_scheduler(schedule)
