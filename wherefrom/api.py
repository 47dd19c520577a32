"""The short way in: one picture, one pipeline, one folder of captioned pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from wherefrom.attributors import AttributionByUnlearning, Attributor, Scores, TrainingData
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.data.latents import encode_pictures, report_cut
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import model_from_pipeline
from wherefrom.queries.sources import QueryPicture, QueryRegion, read_query, read_regions, with_regions
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.console import Say, silent
from wherefrom.runtime.distributed import Runner


def picture_size(model: DiffusionModel) -> int:
    """Side in pixels of the pictures that a model draws: its latents' side times the autoencoder's reduction.

    Raises:
        ValueError: The model has no encoder.
    """
    if model.encoder is None:
        raise ValueError("The model has no encoder, so the size of its pictures is not known.")
    config: Any = model.denoiser.config
    reduction: int = 2 ** (len(model.encoder.vae.config.block_out_channels) - 1)
    return int(config.sample_size) * reduction


def attribute_pictures(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    pictures: list[tuple[str, str]],
    attributor: Attributor | None = None,
    store: str | Path = "cache",
    resize: bool = False,
    regions: Sequence[QueryRegion] = (),
    say: Say = silent,
) -> Iterator[Scores]:
    """Scores every picture of a captioned folder for each (picture file, prompt).

    Args:
        pipeline: A loaded diffusers text-to-image pipeline of a kind that `model_from_pipeline` reads.
        folder: The training pictures, in Hugging Face's `imagefolder` layout. Pictures of its validation split,
            which the model was never trained on, are the null of the p-values; a folder without one
            has no null.
        pictures: Picture files and the prompts that made them ("" where a prompt is not known).
        attributor: The method; attribution by unlearning with its defaults if None.
        store: Folder for what is computed once.
        resize: Bring the pictures to the model's size instead of refusing other sizes.
        regions: Parts of the pictures (`of` names the file), each scored after its whole picture.
        say: Is told what is being done.

    Raises:
        ValueError: The pipeline, the folder or a picture cannot be used; the message says why.
    """
    runner, kept = Runner.current(), Store(store)
    model = model_from_pipeline(pipeline).to(runner.device)
    assert model.encoder is not None
    report_cut(model.encoder.text, [prompt for _, prompt in pictures], "prompts")
    size = picture_size(model)
    parts = read_regions(regions, [file for file, _ in pictures], (size, size))
    queries = [
        query
        for file, prompt in pictures
        for query in with_regions(file, read_query(QueryPicture(file, prompt), (size, size), resize), parts)
    ]
    every = build_image_folder(kept, Path(folder), ImageFolderOptions(size=size))
    split = "split" in every.columns
    train = every.where("split", "train") if split else every
    null = every.where("split", "validation") if split else None
    data = TrainingData(
        train,
        encode_pictures(train, model.encoder, kept),
        null,
        None if null is None else encode_pictures(null, model.encoder, kept),
    )
    method = AttributionByUnlearning() if attributor is None else attributor
    method.check(queries)
    method.fit(data, model, kept, runner, say)
    yield from method.score(queries)
