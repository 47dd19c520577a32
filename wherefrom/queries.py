"""Queries: prompts to generate from the model, or picture files with the prompts that made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from wherefrom import keyed
from wherefrom.attributors.base import Query
from wherefrom.data.image_folder import UNREADABLE, draw
from wherefrom.diffusion import DiffusionModel, sample
from wherefrom.passes import Progress
from wherefrom.storage import hash_file, identity_hash


@dataclass(frozen=True)
class QueryPicture:
    """A picture file and its prompt.

    Attributes:
        file: The picture.
        prompt: The prompt that made it; "" where it is not known (it is never guessed).
    """

    file: str
    prompt: str


@dataclass(frozen=True)
class QuerySource:
    """Which queries to attribute.

    Attributes:
        prompts: Prompts to generate one picture each from.
        pictures: Picture files.
        seed: Seed of the generated pictures.
        sampling_steps: Sampling steps.
        guidance: Classifier-free guidance.
        eta: 0 is DDIM; 1 with all timesteps is DDPM.
        resize: Bring picture files to the model's size instead of refusing other sizes.
    """

    prompts: list[str] = field(default_factory=list)
    pictures: list[QueryPicture] = field(default_factory=list)
    seed: int = 0
    sampling_steps: int = 50
    guidance: float = 2.0
    eta: float = 0.0
    resize: bool = False


def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    seed: int,
    shape: tuple[int, int, int],
    sampling_steps: int = 50,
    guidance: float = 2.0,
    eta: float = 0.0,
    progress: Progress | None = None,
) -> list[Query]:
    """Draws one picture for each prompt; its id is a hash of model, decoder, prompt, seed and sampler.

    Args:
        model: The model, with its encoder.
        prompts: The prompts; a prompt that occurs twice gives two pictures.
        seed: Seed; each picture's noise is keyed by (seed, prompt, how often the prompt came before).
        shape: (C, H, W) of a latent.
        sampling_steps: Sampling steps.
        guidance: Classifier-free guidance.
        eta: See `QuerySource`.
        progress: Called with (done, total) sampling steps.

    Raises:
        ValueError: The model has no encoder.
    """
    if model.encoder is None:
        raise ValueError("Generating needs a model with an encoder.")
    if not prompts:
        return []
    repeats = [list(prompts[:index]).count(prompt) for index, prompt in enumerate(prompts)]
    keys = keyed.combine(seed, keyed.hash_texts(list(prompts)), torch.tensor(repeats))
    states, null = model.encoder.text.encode(prompts), model.encoder.text.encode([""])[0]
    latents = sample(model, states, null, keys, shape, sampling_steps, guidance, eta, progress).cpu()
    pixels = model.encoder.decode_images(latents)
    settings = {
        "model": model.fingerprint(),
        "decoder": model.encoder.decoder_identity(),
        "seed": seed,
        "steps": sampling_steps,
        "guidance": guidance,
        "eta": eta,
    }
    return [
        Query(identity_hash({**settings, "prompt": prompt, "repeat": repeat}), prompt, picture, latent)
        for prompt, repeat, picture, latent in zip(prompts, repeats, pixels, latents, strict=True)
    ]


def read_query(picture: QueryPicture, size: tuple[int, int], resize: bool = False) -> Query:
    """A query from a picture file; its id is the file's name and a hash of its bytes.

    Raises:
        ValueError: The file is missing, unreadable, or of another size than the model's.
    """
    path = Path(picture.file)
    if not path.is_file():
        raise ValueError(f"Query picture {path} is not a file.")
    try:
        pixels = draw(path, size[0] if resize else None)
    except UNREADABLE as error:
        raise ValueError(f"Query picture {path} cannot be read: {error}.") from error
    if pixels.shape[:2] != size:
        raise ValueError(
            f"Query picture {path} is {pixels.shape[1]} × {pixels.shape[0]} pixels, the model's pictures are "
            f"{size[1]} × {size[0]}. "
            "Resize it, or set queries.resize: true to use its largest centred square."
        )
    return Query(f"{path.stem}-{hash_file(path)[:8]}", picture.prompt, pixels)


def make_queries(
    model: DiffusionModel,
    source: QuerySource,
    latent_shape: tuple[int, int, int],
    size: tuple[int, int],
    progress: Progress | None = None,
) -> list[Query]:
    """All queries of a source: files first, so that a bad file is found before anything is generated.

    Raises:
        ValueError: There are none, a file is bad, or two have one id.
    """
    if not source.prompts and not source.pictures:
        raise ValueError(
            "There are no queries: give queries.prompts (to generate) or queries.pictures (files with prompts)."
        )
    read = [read_query(picture, size, source.resize) for picture in source.pictures]
    names = [query.id for query in read]
    if len(set(names)) < len(names):
        raise ValueError("A query picture is given twice.")
    drawn = generate(
        model, source.prompts, source.seed, latent_shape, source.sampling_steps, source.guidance, source.eta, progress
    )
    return read + drawn
