"""Two training images of the emoji world side by side, and whether a model still shows both objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from experiments.alignment import AlignmentJudge
from experiments.support.data import choose_prompts
from wherefrom.data.emoji import caption
from wherefrom.data.image_set import ImageSet
from wherefrom.models.conditioning import Conditioning
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import CaptionEncoder
from wherefrom.models.noise_schedule import sampling_scheduler
from wherefrom.models.pixels import to_float
from wherefrom.runtime import keyed_random

AMONG = 100  # captions that an object is recognised among: a block of 50 scenes
_NOISE = 901


@dataclass(frozen=True)
class Scene:
    """Two training images side by side.

    Attributes:
        id: Made of the two images' ids.
        prompt: The caption.
        concepts: What is on the left (A) and on the right (B).
        style: The style of both.
        pixels: The scene.
    """

    id: str
    prompt: str
    concepts: tuple[str, str]
    style: str
    pixels: UInt8[NDArray[np.uint8], "h w 3"]

    def box(self, name: str) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the left or the right half, or of the whole scene, in pixels."""
        height, width = self.pixels.shape[:2]
        return {
            "left": (0, 0, width // 2, height),
            "right": (width // 2, 0, width, height),
            "whole": (0, 0, width, height),
        }[name]


def make_scenes(images: ImageSet, rows: Sequence[int]) -> list[Scene]:
    """A scene of every two chosen images, in the style of the first.

    Args:
        images: The training images.
        rows: Images of distinct concepts that are there in every style (see `choose_prompts`).
    """
    concepts, styles, names = (images.columns[name] for name in ("concept", "style", "name"))
    where = {pair: row for row, pair in enumerate(zip(concepts, styles, strict=True))}
    scenes = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        other = where[concepts[second], styles[first]]
        scenes.append(
            Scene(
                f"{images.ids[first]}|{images.ids[other]}",
                caption(f"{names[first]} and {names[other]}", styles[first]),
                (concepts[first], concepts[other]),
                styles[first],
                np.concatenate([images.pixels[first], images.pixels[other]], axis=1),
            )
        )
    return scenes


def fits(text: CaptionEncoder, prompt: str) -> bool:
    """Whether the text encoder reads the prompt to its end: what it cuts off, the model never sees."""
    return len(text.tokenizer(prompt, truncation=True, max_length=text.length + 1).input_ids) <= text.length


@torch.no_grad()
def denoised(
    model: DiffusionModel,
    *,
    latents: Float[Tensor, "n c h w"],
    conditioning: Conditioning,
    keys: Int64[Tensor, " n"],
    timestep: int,
    steps: int,
) -> Float[Tensor, "n c h w"]:
    """The latents, noised to a timestep and denoised by DDIM from there, without guidance.

    Args:
        model: The model.
        latents: The latents.
        conditioning: Conditioning of their captions.
        keys: One key for each; the noise belongs to it.
        timestep: Where denoising begins.
        steps: Sampling steps that the whole way from T would have; the part of it below `timestep` is gone.

    Raises:
        ValueError: The timestep is not in the model's schedule.
    """
    if not 0 <= timestep < model.noise_schedule.steps:
        raise ValueError(f"The timestep must lie between 0 and {model.noise_schedule.steps - 1}; given {timestep}.")
    scheduler = sampling_scheduler(model.noise_schedule)
    scheduler.set_timesteps(steps)
    device, dtype = model.device, model.dtype
    noise = keyed_random.normal(keyed_random.combine(_NOISE, keys), latents.shape[1:], dtype).to(device)
    conditions = conditioning.to(device, dtype)
    current = model.noise_schedule.noisy(latents.to(device, dtype), torch.full((len(latents),), timestep), noise)
    for step in range(timestep, -1, -(model.noise_schedule.steps // steps)):
        output = model.predict(current, torch.full((len(current),), step, device=device), conditions)
        current = scheduler.step(output, step, current, eta=0.0, return_dict=False)[0]
    return current.cpu()


@dataclass(frozen=True)
class Admission:
    """A block of scenes, and which of them the model shows.

    Attributes:
        scenes: The scenes whose captions fit.
        latents: Their latents.
        shown: They, after noising and denoising.
        ranks: Rank, from 1, of the left and of the right object's caption among `AMONG`, shape (N, 2).
    """

    scenes: list[Scene]
    latents: Float[Tensor, "n c h w"]
    shown: UInt8[NDArray[np.uint8], "n h w 3"]
    ranks: Int64[NDArray[np.int64], "n 2"]

    def admitted(self) -> Int64[NDArray[np.int64], " m"]:
        """Positions of the scenes both of whose objects are recognised: in the top 5."""
        return np.flatnonzero((self.ranks <= 5).all(axis=1))


def judge_scenes(
    model: DiffusionModel, *, judge: AlignmentJudge, scenes: Sequence[Scene], seed: int, timestep: int, steps: int
) -> Admission:
    """Noises, denoises and judges a block of scenes; their objects are the captions that each is ranked among."""
    assert model.encoder is not None
    encoder = model.encoder
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
    latents = encoder.encode_pixels(to_float(pixels))
    keys = keyed_random.combine(seed, keyed_random.hash_texts([scene.id for scene in scenes]))
    conditioning = encoder.text.encode([scene.prompt for scene in scenes])
    shown = encoder.decode_images(
        denoised(model, latents=latents, conditioning=conditioning, keys=keys, timestep=timestep, steps=steps)
    )
    width = shown.shape[2] // 2
    sides = np.stack([shown[:, :, :width], shown[:, :, width:]], axis=1)
    ranks = judge.ranks(
        sides.reshape(-1, *sides.shape[2:]),
        [concept for scene in scenes for concept in scene.concepts],
        [scene.style for scene in scenes for _ in scene.concepts],
    ).reshape(-1, 2)
    # Judged with the others, so that every object has as many rivals; a cut caption is no query.
    kept = [row for row, scene in enumerate(scenes) if fits(encoder.text, scene.prompt)]
    return Admission([scenes[row] for row in kept], latents[kept], shown[kept], ranks[kept])


def admit(
    images: ImageSet, count: int, seed: int, judged: Callable[[Sequence[Scene]], Admission], most: int
) -> list[Admission]:
    """Blocks of scenes, until `count` are admitted or there are no more to try.

    Args:
        images: The training images.
        count: Scenes wanted.
        seed: Which scenes.
        judged: Judges a block.
        most: Blocks to try at most.

    Raises:
        ValueError: None is admitted.
    """
    rows = choose_prompts(images, most * AMONG, seed)
    blocks: list[Admission] = []
    for start in range(0, len(rows), AMONG):
        blocks.append(judged(make_scenes(images, rows[start : start + AMONG])))
        if sum(len(block.admitted()) for block in blocks) >= count:
            break
    if not any(len(block.admitted()) for block in blocks):
        raise ValueError(f"Of {most * AMONG // 2} scenes the model shows none; denoise from a lower timestep.")
    return blocks
