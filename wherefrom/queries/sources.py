"""Queries: prompts to generate from the model, or image files with the prompts that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from wherefrom.data.encoded_images import report_cut
from wherefrom.data.image_folder import UNREADABLE, load_image
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.image_sizes import reduction_of
from wherefrom.models.sampling import Trajectory, sample
from wherefrom.queries.own_prompts import with_prompt
from wherefrom.queries.regions import Region
from wherefrom.queries.run_size import RunSize, run_size
from wherefrom.queries.types import Query
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import hash_file, identity_hash
from wherefrom.runtime.console import Progress
from wherefrom.runtime.ranges import check_ranges


@dataclass(frozen=True)
class QueryImage:
    """An image file and its prompt.

    Attributes:
        file: The image.
        prompt: The prompt that made it; "" where it is not known (it is never guessed); None takes the one that the
            file itself states (`generation_metadata`), and "" where it states none.
    """

    file: str
    prompt: str | None = None


@dataclass(frozen=True)
class QueryRegion:
    """A part of a query's image, attributed beside the whole image.

    Attributes:
        of: The prompt or the image file whose image it is a part of; a file's name alone where it is unique.
        box: [left, top, right, bottom] in image pixels; right and bottom are the first outside.
        mask: A mask file instead: white is inside, grey partly.

    Raises:
        ValueError: Both box and mask are given, or neither.
    """

    of: str
    box: list[int] | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        if (self.box is None) == (self.mask is None):
            raise ValueError(
                f"A region is either a box or a mask; that of {self.of!r} has box {self.box} and mask {self.mask!r}."
            )

    def read(self, size: tuple[int, int]) -> Region:
        """The region of an image of this (height, width).

        Raises:
            ValueError: The box is no part of the image, or the mask cannot be used.
        """
        return Region.from_box(self.box, size) if self.box is not None else Region.from_file(str(self.mask), size)


@dataclass(frozen=True)
class QuerySource:
    """Which queries to attribute.

    Attributes:
        prompts: Prompts to generate one image each from.
        images: Image files.
        regions: Parts of these images, each a query of its own beside the whole.
        seed: Seed of the generated images.
        sampling_steps: Sampling steps.
        guidance: Classifier-free guidance.
        eta: 0 is DDIM; 1 with all timesteps is DDPM.
        resize: Bring image files to the model's size instead of refusing other sizes.

    Raises:
        ValueError: A number is out of its range.
    """

    prompts: list[str] = field(default_factory=list)
    images: list[QueryImage] = field(default_factory=list)
    regions: list[QueryRegion] = field(default_factory=list)
    seed: int = 0
    sampling_steps: int = 50
    guidance: float = 2.0
    eta: float = 0.0
    resize: bool = False

    def __post_init__(self) -> None:
        check_ranges(seed=self.seed, sampling_steps=self.sampling_steps, guidance=self.guidance, eta=self.eta)


def generate(
    model: DiffusionModel,
    *,
    prompts: Sequence[str],
    seed: int,
    shape: tuple[int, int, int],
    sampling_steps: int = 50,
    guidance: float = 2.0,
    eta: float = 0.0,
    progress: Progress | None = None,
    keep_trajectory: bool = False,
) -> list[Query]:
    """Draws one image for each prompt; its id is a hash of model, decoder, prompt, seed and sampler.

    Args:
        model: The model, with its encoder.
        prompts: The prompts; a prompt that occurs twice gives two images.
        seed: Seed; each image's noise is keyed by (seed, prompt, how often the prompt came before).
        shape: (C, H, W) of a latent.
        sampling_steps: Sampling steps.
        guidance: Classifier-free guidance.
        eta: See `QuerySource`.
        progress: Called with (done, total) sampling steps.
        keep_trajectory: Keep what each sampling step predicted: as many latents more for each query as there are
            steps. The images and their ids are the same.

    Raises:
        ValueError: The model has no encoder.
    """
    if model.encoder is None:
        raise ValueError("Generating needs a model with an encoder.")
    if not prompts:
        return []
    repeats = [list(prompts[:index]).count(prompt) for index, prompt in enumerate(prompts)]
    keys = keyed_random.combine(seed, keyed_random.hash_texts(list(prompts)), torch.tensor(repeats))
    factor = reduction_of(model.encoder.vae)
    model.encoder.text.sized((shape[1] * factor, shape[2] * factor))
    conditioning, empty = model.encoder.text.encode(prompts), model.encoder.text.encode([""]).at(0)
    seen: dict[int, Tensor] = {}

    def watch(timestep: int, predicted: Tensor) -> None:
        seen[timestep] = predicted.cpu()

    latents = sample(
        model,
        conditioning=conditioning,
        empty=empty,
        keys=keys,
        shape=shape,
        steps=sampling_steps,
        guidance=guidance,
        eta=eta,
        progress=progress,
        watch=watch if keep_trajectory else None,
    ).cpu()
    predicted = torch.stack(list(seen.values()), dim=1) if keep_trajectory else [None] * len(prompts)
    trajectories = [None if each is None else Trajectory(tuple(seen), each) for each in predicted]
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
        Query(
            identity_hash({**settings, "prompt": prompt, "repeat": repeat}),
            prompt,
            image,
            latent,
            trajectory=trajectory,
        )
        for prompt, repeat, image, latent, trajectory in zip(
            prompts, repeats, pixels, latents, trajectories, strict=True
        )
    ]


def read_query(image: QueryImage, size: RunSize | tuple[int, int], resize: bool = False) -> Query:
    """A query from an image file; its id is the file's name and a hash of its bytes.

    Args:
        image: The file and its prompt.
        size: The run's size; a (height, width) is brought about as usual.
        resize: Bring the image to it, or to its bucket, instead of refusing other sizes.

    Raises:
        ValueError: The file is missing, unreadable, or of another size than the run's.
    """
    wanted = run_size(size)
    path = Path(image.file)
    if not path.is_file():
        raise ValueError(f"Query image {path} is not a file.")
    try:
        pixels = load_image(path, *wanted.query_framing(resize))
    except UNREADABLE as error:
        raise ValueError(f"Query image {path} cannot be read: {error}.") from error
    unfit = wanted.unfit((int(pixels.shape[0]), int(pixels.shape[1])))
    if unfit:
        raise ValueError(
            f"Query image {path} is {pixels.shape[1]} × {pixels.shape[0]} pixels, {unfit}. "
            "Resize it, or set queries.resize: true to bring it there as training images are."
        )
    return with_prompt(Query(f"{path.stem}-{hash_file(path)[:8]}", "", pixels), path, image.prompt)


def read_regions(
    regions: Sequence[QueryRegion], known: Sequence[str], size: tuple[int, int] | Mapping[str, tuple[int, int]]
) -> dict[str, list[Region]]:
    """Regions by what they are a part of.

    Args:
        regions: The regions.
        known: Prompts and image files that are attributed.
        size: (height, width) of the images; by what they are of, where they differ.

    Raises:
        ValueError: A region is of something that is not attributed, is given twice, or cannot be used.
    """
    result: dict[str, list[Region]] = {}
    for each in regions:
        named = [source for source in known if source == each.of] or [
            source for source in known if Path(source).name == each.of and Path(source).is_file()
        ]
        if len(named) > 1:
            raise ValueError(f"queries.regions: several images are called {each.of!r}; give its whole path.")
        if not named:
            raise ValueError(
                f"queries.regions: {each.of!r} is neither a prompt nor an image file of this run; there are "
                f"{', '.join(map(repr, known))}."
            )
        region = each.read(size[named[0]] if isinstance(size, Mapping) else size)
        others = result.setdefault(named[0], [])
        if region.name in [other.name for other in others]:
            raise ValueError(f"queries.regions: {region.name} of {each.of!r} is given twice.")
        others.append(region)
    return result


def with_regions(source: str, query: Query, regions: Mapping[str, Sequence[Region]]) -> list[Query]:
    """The query, and each region of what it was made from."""
    return [query, *(replace(query, region=region) for region in regions.get(source, ()))]


def make_queries(
    model: DiffusionModel,
    *,
    source: QuerySource,
    latent_shape: tuple[int, int, int],
    size: RunSize | tuple[int, int],
    progress: Progress | None = None,
    keep_trajectory: bool = False,
) -> list[Query]:
    """All queries of a source, each followed by its regions: files first.

    So a bad file is found before anything is generated.

    Raises:
        ValueError: There are none, a file or a region is bad, or two have one id.
    """
    if not source.prompts and not source.images:
        raise ValueError(
            "There are no queries: give queries.prompts (to generate) or queries.images (files with prompts)."
        )
    read = [read_query(image, size, source.resize) for image in source.images]
    names = [query.id for query in read]
    if len(set(names)) < len(names):
        raise ValueError("A query image is given twice.")
    files = [image.file for image in source.images]
    drawn_size = run_size(size).size
    sizes = dict.fromkeys(source.prompts, drawn_size) | {
        file: (int(query.pixels.shape[0]), int(query.pixels.shape[1])) for file, query in zip(files, read, strict=True)
    }
    regions = read_regions(source.regions, [*files, *source.prompts], sizes)
    if model.encoder is not None:
        prompts = [*source.prompts, *(query.prompt for query in read)]
        report_cut(model.encoder.text, prompts, "prompts")
    drawn = generate(
        model,
        prompts=source.prompts,
        seed=source.seed,
        shape=latent_shape,
        sampling_steps=source.sampling_steps,
        guidance=source.guidance,
        eta=source.eta,
        progress=progress,
        keep_trajectory=keep_trajectory,
    )
    result = zip([*files, *source.prompts], [*read, *drawn], strict=True)
    return [query for of, whole in result for query in with_regions(of, whole, regions)]
