"""What a run over a folder of images works with: model, training images, queries; made without Lightning."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from wherefrom.attributors.base import Attributor
from wherefrom.commands.attribution_options import AttributionOptions as AttributionOptions
from wherefrom.commands.null_warnings import check_choice, warn_of_null
from wherefrom.commands.stated_generation import checked_queries
from wherefrom.data.encoded_images import encode_image_set, report_cut
from wherefrom.data.image_folder import UNREADABLE, ImageFolderOptions, build_image_folder, load_image
from wherefrom.data.image_set import ImageSet
from wherefrom.data.layouts.detection import OpenedImages, open_images
from wherefrom.models.adapter_sources import AdapterInput
from wherefrom.models.adapter_states import known_adapters
from wherefrom.models.clip_skip import with_clip_skip
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.image_sizes import own_size, words_of
from wherefrom.models.pipeline import load_model, model_from_pipeline
from wherefrom.queries.own_prompts import with_prompt
from wherefrom.queries.run_size import RunSize
from wherefrom.queries.sources import QueryImage, generate, read_query, read_regions, with_regions
from wherefrom.queries.types import Query, TrainingData
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.cli_errors import as_spoken
from wherefrom.runtime.console import Console
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.tensor_hash import hash_tensors

QueryInput = str | tuple[Any, str | None]


@dataclass(frozen=True)
class PreparedRun:
    """What a run works with; see `prepare_run`."""

    model: DiffusionModel
    data: TrainingData
    queries: list[Query]
    store: Store
    runner: Runner
    console: Console
    size: RunSize | None = None


def image_size(model: DiffusionModel) -> int:
    """Side in pixels of the square images that a model draws: its latents' side times the autoencoder's reduction.

    Raises:
        ValueError: The model has no encoder, its images are not square, or its configuration does not say.
    """
    height, width = own_size(model)
    if height != width:
        raise ValueError(f"The model's images are {words_of((height, width))}, so they have no one side.")
    return height


def open_model(model: Any, lora: Sequence[AdapterInput] = (), base: str | Path | None = None) -> DiffusionModel:
    """A model, a loaded pipeline's model, or the model at a path or hub id.

    Args:
        model: The model; a path is a pipeline's folder, a single file, or a trainer's checkpoint.
        lora: Adapters that are added to it; see `AttributionOptions`.
        base: See `AttributionOptions`.

    Raises:
        ImportError: There is an adapter, but peft is not installed.
        ValueError: It is none of these, or of a kind that is not supported; or an adapter does not fit, or the model is
            loaded already, so that it would be changed.
        OSError: The folder holds no whole pipeline.
    """
    if base is not None and not isinstance(model, str | Path):
        raise ValueError(
            "model: what is handed in is loaded already, and takes nothing from a base: leave out the option 'base'."
        )
    if lora and not isinstance(model, str | Path):
        raise ValueError(
            f"lora: the model is a loaded {type(model).__name__}, which would be changed. Load the adapter into "
            "the pipeline before (load_lora_weights, set_adapters), or give the model by its folder or hub id."
        )
    if isinstance(model, DiffusionModel):
        return model
    if isinstance(model, str | Path):
        # A name with a slash could be a hub id; what looks like a place on disk is not asked for there.
        path = Path(model)
        if not path.exists() and (path.is_absolute() or str(model).startswith(".") or str(model).count("/") != 1):
            raise ValueError(
                f"model: there is no folder {str(model)!r}, and no file; give a diffusers pipeline's folder or hub id, "
                "or a single .safetensors file."
            )
        try:
            return load_model(str(model), lora=lora, base=None if base is None else str(base))
        except OSError as error:
            if path.exists():
                raise
            raise ValueError(
                f"model: {str(model)!r} is neither a folder here nor a hub id that could be loaded; give a diffusers "
                "pipeline's folder, or a hub id that is cached or within reach."
            ) from error
    if not hasattr(model, "components"):
        raise ValueError(
            f"model: a {type(model).__name__} is no model; give a loaded diffusers pipeline, the folder or hub id of "
            "one, or a DiffusionModel."
        )
    return model_from_pipeline(model)


def read_training_data(
    images: str | Path | OpenedImages | ImageSet,
    *,
    model: DiffusionModel,
    options: AttributionOptions,
    store: Store,
    encode: bool,
    console: Console,
) -> TrainingData:
    """The ranked images at the model's size, and the null if there is one.

    Args:
        images: A folder, or file or name, in any layout that is known, or images.
        model: The model that was trained on them.
        options: Names the caption column, and says which images are ranked and which are the null.
        store: Where images and latents are kept.
        encode: Whether the method needs latents.
        console: Shows what is being read and encoded.

    Raises:
        ValueError: The folder or an image cannot be used, or none of the images is for training.
    """
    size = RunSize.of(model, options.size, options.framing)
    how = ImageFolderOptions.of_reading(
        options.reading, size=size.option, on_error=options.on_error, framing=size.framing
    )

    def read(folder: str | Path | OpenedImages) -> ImageSet:
        return build_image_folder(store, folder, how, console.progress)

    train, held_out, lines = options.choice.of(images if isinstance(images, ImageSet) else read(images), read)
    for each in (train, held_out):
        if each is not None:
            size.check_images(each)
    for line in lines:
        console.log(as_spoken(line))
    if not encode:
        return TrainingData(train, None, held_out, None)
    assert model.encoder is not None
    made = [
        None
        if each is None
        else encode_image_set(each, encoder=model.encoder, store=store, progress=console.progress, log=console.log)
        for each in (train, held_out)
    ]
    return TrainingData(train, made[0], held_out, made[1])


def check_query_files(queries: Iterable[QueryInput]) -> None:
    """Refuses queries that are of no use before anything long, such as loading a model.

    Raises:
        ValueError: There are none, one is of another form, or a file is missing.
    """
    listed = list(queries)
    if not listed:
        raise ValueError("queries: there are none; give image files with their prompts, or prompts to draw.")
    for query in listed:
        if isinstance(query, str):
            continue
        pair: Any = query
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], str | None)):
            raise ValueError(
                f"queries: {query!r} is neither a prompt nor an (image, prompt) pair; an unknown prompt is '', and "
                "None takes the one that the image file states."
            )
        if isinstance(query[0], str | Path) and not Path(query[0]).is_file():
            raise ValueError(f"queries: there is no image file {str(query[0])!r}.")


def _read(image: Any, prompt: str | None, size: RunSize, resize: bool) -> Query:
    """A query from a file, a PIL image or an array."""
    if isinstance(image, str | Path):
        return read_query(QueryImage(str(image), prompt), size, resize)
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(
                f"queries: an image is a file, a PIL image or a uint8 array (H, W, 3); given {array.dtype} of shape "
                f"{array.shape}."
            )
        image = Image.fromarray(array)
    stream = io.BytesIO()
    try:
        image.save(stream, "PNG")
        stream.seek(0)
        pixels = load_image(stream, *size.query_framing(resize))
    except UNREADABLE as error:
        raise ValueError(f"queries: a PIL image of mode {image.mode} cannot be used: {error}.") from error
    unfit = size.unfit((int(pixels.shape[0]), int(pixels.shape[1])))
    if unfit:
        raise ValueError(
            f"queries: an image is {pixels.shape[1]} × {pixels.shape[0]} pixels, {unfit}. Resize it, or set "
            "queries.resize: true to bring it there as training images are."
        )
    name = f"image-{hash_tensors({'pixels': torch.from_numpy(np.array(pixels))})[:8]}"
    return with_prompt(Query(name, "", pixels), image, prompt)


def make_query_list(
    model: DiffusionModel,
    queries: Sequence[QueryInput],
    *,
    options: AttributionOptions,
    console: Console,
    keep_trajectory: bool = False,
) -> list[Query]:
    """The queries in their order, each followed by its regions; files are read before anything is drawn.

    Raises:
        ValueError: An image or a region cannot be used, or an image is given twice.
    """
    size = RunSize.of(model, options.size, options.framing)
    if size.line():
        console.log(size.line())
    assert model.encoder is not None
    read = {n: _read(*each, size, options.resize) for n, each in enumerate(queries) if not isinstance(each, str)}
    prompts = [each if isinstance(each, str) else read[n].prompt for n, each in enumerate(queries)]
    report_cut(model.encoder.text, prompts, "prompts")
    names = [query.id for query in read.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"queries: the image {twice[0]} is given twice; results are told apart by it.")
    sources = [each if isinstance(each, str) else str(each[0]) for each in queries]
    sizes = {
        source: (int(read[n].pixels.shape[0]), int(read[n].pixels.shape[1])) if n in read else size.size
        for n, source in enumerate(sources)
    }
    regions = read_regions(options.regions, sources, sizes)
    places = [n for n, each in enumerate(queries) if isinstance(each, str)]
    if places:
        console.log("drawing the queries")
    drawn = generate(
        model,
        prompts=[sources[n] for n in places],
        seed=options.seed,
        shape=size.latent_shape,
        sampling_steps=options.sampling_steps,
        guidance=options.guidance,
        eta=options.eta,
        progress=console.progress,
        keep_trajectory=keep_trajectory,
    )
    whole = {**read, **dict(zip(places, drawn, strict=True))}
    return [query for n, of in enumerate(sources) for query in with_regions(of, whole[n], regions)]


def prepare_run(
    model: Any,
    *,
    images: str | Path | ImageSet,
    queries: Sequence[QueryInput],
    methods: Iterable[Attributor],
    options: AttributionOptions,
    runner: Runner,
) -> PreparedRun:
    """Loads the model, reads and encodes the training images, and reads or draws the queries.

    Args:
        model: See `open_model`.
        images: See `read_training_data`.
        queries: (image, prompt) pairs, and prompts to draw; an image is a file, a PIL image or a uint8 array.
        methods: Who will be asked; decides what is needed.
        options: How.
        runner: This process's place.

    Raises:
        ValueError: The model, the images or a query cannot be used; the message says why.
        OSError: There is no pipeline at that path.
    """
    check_query_files(queries)
    there = images if isinstance(images, ImageSet) else open_images(images, options.reading)
    check_choice(there, options.choice, options.reading)
    needs = frozenset(need for method in methods for need in method.requires)
    console, store = Console(options.progress and runner.is_main), Store(options.store)
    for line in () if isinstance(there, ImageSet) else there.lines:
        console.log(as_spoken(line))
    console.log("loading the model")
    opened = with_clip_skip(open_model(model, options.lora, options.base), options.clip_skip).to(runner.device)
    for adapter in known_adapters(opened.denoiser):
        console.log(f"with LoRA {adapter}")
    for note in opened.notes:
        console.log(note)
    made = make_query_list(opened, queries, options=options, console=console, keep_trajectory="trajectory" in needs)
    file = Path(model) if isinstance(model, str | Path) and Path(model).is_file() else None
    made = checked_queries(made, opened, checkpoint=file, log=console.log)
    console.log("reading the training images")
    encode = bool(needs & {"model", "gradients", "trajectory"})

    def read() -> TrainingData:
        return read_training_data(there, model=opened, options=options, store=store, encode=encode, console=console)

    if runner.is_main and runner.world_size > 1:
        read()  # the others find it in the store
    runner.barrier()
    data = read()
    if runner.is_main:
        warn_of_null(data.held_out, data.images, made)
    skipped = {Path(name).name for name in data.images.skipped}
    files = {Path(each[0]).name for each in queries if not isinstance(each, str) and isinstance(each[0], str | Path)}
    for name in sorted(files & skipped):
        console.log(f"the training image {name}, called like a query, could not be read: it is not among the ranked")
    size = RunSize.of(opened, options.size, options.framing)
    return PreparedRun(opened, data, made, store, runner, console, size)
