"""The short way in: one image, one pipeline, one folder of captioned images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from wherefrom.attributors import AttributionByUnlearning, Attributor, Scores, TrainingData
from wherefrom.data.encoded_images import encode_image_set, report_cut
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import model_from_pipeline
from wherefrom.queries.sources import QueryImage, QueryRegion, read_query, read_regions, with_regions
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Log, no_log
from wherefrom.runtime.distributed import Runner


def image_size(model: DiffusionModel) -> int:
    """Side in pixels of the images that a model draws: its latents' side times the autoencoder's reduction.

    Raises:
        ValueError: The model has no encoder.
    """
    if model.encoder is None:
        raise ValueError("The model has no encoder, so the size of its images is not known.")
    config: Any = model.denoiser.config
    reduction: int = 2 ** (len(model.encoder.vae.config.block_out_channels) - 1)
    return int(config.sample_size) * reduction


def attribute_images(
    pipeline: DiffusionPipeline,
    *,
    folder: str | Path,
    images: list[tuple[str, str]],
    attributor: Attributor | None = None,
    store: str | Path = "cache",
    resize: bool = False,
    regions: Sequence[QueryRegion] = (),
    log: Log = no_log,
) -> Iterator[Scores]:
    """Scores every image of a captioned folder for each (image file, prompt).

    Args:
        pipeline: A loaded diffusers text-to-image pipeline of a kind that `model_from_pipeline` reads.
        folder: The training images, in Hugging Face's `imagefolder` layout. Images of its validation split,
            which the model was never trained on, are the null of the p-values; a folder without one
            has no null.
        images: Image files and the prompts that made them ("" where a prompt is not known).
        attributor: The method; attribution by unlearning with its defaults if None.
        store: Folder for what is computed once.
        resize: Bring the images to the model's size instead of refusing other sizes.
        regions: Parts of the images (`of` names the file), each scored after its whole image.
        log: Receives lines about what is being done.

    Raises:
        ValueError: The pipeline, the folder or an image cannot be used; the message says why.
    """
    runner, kept = Runner.current(), Store(store)
    model = model_from_pipeline(pipeline).to(runner.device)
    assert model.encoder is not None
    report_cut(model.encoder.text, [prompt for _, prompt in images], "prompts")
    size = image_size(model)
    parts = read_regions(regions, [file for file, _ in images], (size, size))
    queries = [
        query
        for file, prompt in images
        for query in with_regions(file, read_query(QueryImage(file, prompt), (size, size), resize), parts)
    ]
    every = build_image_folder(kept, Path(folder), ImageFolderOptions(size=size))
    split = "split" in every.columns
    train = every.where("split", "train") if split else every
    null = every.where("split", "validation") if split else None
    data = TrainingData(
        train,
        encode_image_set(train, encoder=model.encoder, store=kept),
        null,
        None if null is None else encode_image_set(null, encoder=model.encoder, store=kept),
    )
    method = AttributionByUnlearning() if attributor is None else attributor
    method.check(queries)
    method.fit(data, model, kept, runner, log)
    yield from method.score(queries)
