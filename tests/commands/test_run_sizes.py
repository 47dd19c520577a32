"""One size for all of a run: the model's own, another that is asked for, and aspect buckets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolder
from lightning_modules.launch.runs import shapes, training_data
from tests.support import pipelines
from tests.support.folders import make, paint, write_metadata
from wherefrom.api import AttributionOptions, attribute_images
from wherefrom.attributors.similarity import PixelSimilarity
from wherefrom.cli.entry import main
from wherefrom.cli.run_sizes import bucket_numbers, size_of, size_text
from wherefrom.data.aspect_buckets import Buckets
from wherefrom.data.encoded_images import EncodedImages, LatentVisits, encode_image_set
from wherefrom.data.framing import Framing
from wherefrom.data.image_files import load_image
from wherefrom.data.image_folder import ImageFolderOptions, build_image_folder
from wherefrom.data.image_set import ImageSet
from wherefrom.data.mscoco import CocoOptions
from wherefrom.data.webdataset import ShardOptions
from wherefrom.gradients.loss_grid import LossGrid, LossPass
from wherefrom.gradients.query_loss import encode_query
from wherefrom.models.conditioning import Conditioning
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model
from wherefrom.queries.run_size import RunSize, check_latents, run_size
from wherefrom.queries.sources import QueryImage, QuerySource, generate, make_queries
from wherefrom.queries.types import Query
from wherefrom.runtime.artifacts import Store

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd": pipelines.stable_diffusion,
    "sdxl": pipelines.stable_diffusion_xl,
    "pixart": pipelines.pixart,
    "sd3": lambda folder: pipelines.stable_diffusion_3(folder, t5=False),
}
BUCKETS = Framing(buckets=Buckets(8, 4, 16, 4))
SHAPES = [(20, 10), (16, 16), (10, 20), (9, 9), (40, 10), (22, 11), (12, 24)]  # width, height
FEW = {
    "grid.timesteps": 2,
    "unlearning.noise_samples": 4,
    "unlearning.measurement_samples": 4,
    "unlearning.relative_loss_increase": 0.001,
    "fisher.samples_per_image": 1,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sizes")


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    place = root / "images"
    rows = make(place, len(SHAPES))
    for number, size in enumerate(SHAPES):
        paint(place / f"{number}.png", number, size)
    write_metadata(place, [{**row, "text": f"a picture {number}"} for number, row in enumerate(rows)])
    return place


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest, root: Path) -> DiffusionModel:
    return load_model(str(FAMILIES[request.param](root / request.param)))


@pytest.fixture(scope="module")
def sd(root: Path) -> Path:
    return FAMILIES["sd"](root / "one")


def options(root: Path, **further: Any) -> AttributionOptions:
    return AttributionOptions(store=root / "store", progress=False, **further)


def losses(model: DiffusionModel, data: EncodedImages) -> torch.Tensor:
    measured = LossPass(model, data, LossGrid(timesteps=2), 3)
    measured.step(range(len(data)))
    return measured.losses


def test_images_of_each_bucket_have_the_losses_that_they_have_alone(
    model: DiffusionModel, folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    framing = RunSize.of(model, 8, BUCKETS).framing
    images = build_image_folder(store, folder, ImageFolderOptions(8, framing=framing))
    assert model.encoder is not None
    encoded = encode_image_set(images, encoder=model.encoder, store=store, batch_size=2)
    assert len(encoded.groups) == len(images.distinct_sizes) >= 3
    encoded.check(model)
    check_latents(encoded, model)
    together = losses(model, encoded)
    for size, alone, where in images.by_size():
        plain = ImageSet(alone.ids, alone.captions, np.asarray(alone.pixels), alone.columns, f"plain {size}")
        made = encode_image_set(plain, encoder=model.encoder, store=Store(tmp_path / "alone"))
        assert torch.equal(made.groups[0].latents[:], encoded.latents_at(torch.from_numpy(where), slice(None)))
        torch.testing.assert_close(together[where], losses(model, made), rtol=1e-4, atol=1e-6)


def test_size_ids_are_those_of_each_images_bucket(root: Path, folder: Path, tmp_path: Path) -> None:
    model = load_model(str(FAMILIES["sdxl"](root / "xl")))
    images = build_image_folder(Store(tmp_path), folder, ImageFolderOptions(8, framing=BUCKETS))
    assert model.encoder is not None
    encoded = encode_image_set(images, encoder=model.encoder, store=Store(tmp_path))
    ids = [encoded.conditioning_at(torch.tensor([n]), 0)["time_ids"][0].tolist() for n in range(len(images))]
    assert ids == [[*size, 0, 0, *size] for size in images.sizes]
    drawn = generate(model, prompts=["x"], seed=0, shape=(4, 2, 6), sampling_steps=1)
    assert drawn[0].pixels.shape == (4, 12, 3)
    assert model.encoder.text.size == (4, 12)


def test_a_querys_size_ids_are_its_own(root: Path, folder: Path, tmp_path: Path) -> None:
    model = load_model(str(FAMILIES["sdxl"](root / "xl_query")))
    images = build_image_folder(Store(tmp_path), folder, ImageFolderOptions(8, framing=BUCKETS))
    assert model.encoder is not None
    encode_image_set(images, encoder=model.encoder, store=Store(tmp_path))
    for size in ((4, 12), (8, 8), (12, 4)):
        seen = encode_query(model, Query("q", "a picture", np.zeros((*size, 3), np.uint8)))
        assert seen.conditioning["time_ids"].tolist() == [*size, 0, 0, *size]
        assert seen.latent.shape == (4, size[0] // 2, size[1] // 2)


def test_a_query_goes_to_its_bucket_and_every_image_is_ranked(
    model: DiffusionModel, folder: Path, tmp_path: Path
) -> None:
    wide = tmp_path / "wide.png"
    paint(wide, 99, (60, 22))
    few = options(tmp_path, framing=BUCKETS, resize=True, settings=FEW)
    (scores,) = attribute_images(model, folder, [(wide, "a picture")], options=few)
    bucket, _ = RunSize.of(model, None, BUCKETS).framing.place((22, 60), 8)
    assert scores.query.pixels.shape[:2] == bucket
    assert bucket[1] > bucket[0]
    np.testing.assert_array_equal(scores.query.pixels, load_image(wide, 8, RunSize.of(model, 8, BUCKETS).framing))
    assert len(scores.ids) == len(SHAPES)
    assert np.isfinite(scores.scores).all()


@pytest.mark.parametrize("method", ["influence", "trak", "d_trak", "efficientnet", "caption"])
def test_methods_rank_images_of_several_sizes(method: str, sd: Path, folder: Path, tmp_path: Path) -> None:
    given = options(tmp_path, framing=BUCKETS, quick=True)
    (scores,) = attribute_images(sd, folder, [(folder / "1.png", "a picture 1")], method, replace(given, resize=True))
    assert len(scores.ids) == len(SHAPES)
    assert np.isfinite(scores.scores).all()


def test_pixels_of_several_sizes_are_compared_only_at_one(sd: Path, folder: Path, tmp_path: Path) -> None:
    few = options(tmp_path, framing=BUCKETS, resize=True)
    queries = [(folder / "0.png", "")]
    with pytest.raises(ValueError, match=r"images of \d sizes cannot be compared .* Set size"):
        attribute_images(sd, folder, queries, PixelSimilarity(), few)[0]
    (scores,) = attribute_images(sd, folder, queries, PixelSimilarity(4), few)
    assert scores.top(1)[0][0] == "0.png"


def test_the_size_is_the_models_unless_another_is_asked_for(sd: Path, folder: Path, tmp_path: Path) -> None:
    query = tmp_path / "q.png"
    paint(query, 5, (12, 12))
    (at_own,) = attribute_images(sd, folder, [(query, "x")], "efficientnet", options(tmp_path, resize=True))
    assert at_own.query.pixels.shape == (8, 8, 3)
    assert at_own.data.images.pixels.shape[1:3] == (8, 8)
    (larger,) = attribute_images(sd, folder, [(query, "x")], "influence", options(tmp_path, size=12, quick=True))
    assert larger.data.images.pixels.shape[1:3] == (12, 12)
    assert larger.data.latents is not None
    assert larger.data.latents.latent_shape == (4, 6, 6)
    drawn = attribute_images(
        sd, folder, ["a picture"], "efficientnet", options(tmp_path, size=(8, 12), sampling_steps=1)
    )
    assert drawn[0].query.pixels.shape == (8, 12, 3)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"size": 9}, r"size: images of 9 × 9 pixels do not suit the model, .* multiples of 2"),
        ({"framing": Framing(buckets=Buckets(step=3))}, r"buckets: step 3 is no multiple of 2"),
        (
            {"size": 12},
            r"query\.png is 8 × 8 pixels, the images of this run are 12 × 12.*AttributionOptions\(resize=True",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(
    further: dict[str, Any], message: str, sd: Path, folder: Path, tmp_path: Path
) -> None:
    paint(tmp_path / "query.png", 5)
    with pytest.raises(ValueError, match=message):
        attribute_images(sd, folder, [(tmp_path / "query.png", "x")], options=options(tmp_path, **further))
    assert not (tmp_path / "store" / "image_folder").exists(), "before anything is decoded"


def test_buckets_beyond_a_transformers_positions_are_refused(root: Path, folder: Path, tmp_path: Path) -> None:
    model = load_model(str(FAMILIES["sd3"](root / "limited")))
    with pytest.raises(ValueError, match=r"buckets: the largest are too large.*no more than 16.*smaller max_side"):
        RunSize.of(model, 8, Framing(buckets=Buckets(16, 4, 64, 4)))


def test_images_of_another_size_are_refused_with_a_remedy(sd: Path, folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    larger = build_image_folder(store, folder, ImageFolderOptions(12))
    query = [(folder / "1.png", "x")]
    with pytest.raises(
        ValueError, match=r"images: they are 12 × 12 pixels, the model's are 8 × 8\..*AttributionOptions\.size"
    ):
        attribute_images(sd, larger, query, options=options(tmp_path, resize=True))
    several = build_image_folder(store, folder, ImageFolderOptions(8, framing=BUCKETS))
    with pytest.raises(ValueError, match=r"images: they have \d sizes \(.*framing=Framing\(buckets=Buckets"):
        attribute_images(sd, several, query, options=options(tmp_path, resize=True))
    (scores,) = attribute_images(sd, larger, query, "efficientnet", options(tmp_path, size=12, resize=True))
    assert scores.query.pixels.shape == (12, 12, 3)


def test_a_query_that_is_in_no_bucket_is_refused_unless_it_may_be_resized(
    sd: Path, folder: Path, tmp_path: Path
) -> None:
    given = options(tmp_path, framing=BUCKETS)
    with pytest.raises(ValueError, match=r"0\.png is 20 × 10 pixels, which is the size of no bucket; the nearest is"):
        attribute_images(sd, folder, [(folder / "0.png", "")], "efficientnet", given)
    exact = Image.fromarray(load_image(folder / "0.png", 8, BUCKETS))
    (scores,) = attribute_images(sd, folder, [(exact, "")], "efficientnet", given)
    np.testing.assert_array_equal(scores.query.pixels, np.asarray(exact))


def test_latents_of_another_size_than_their_images_are_refused(sd: Path, folder: Path, tmp_path: Path) -> None:
    model = load_model(str(sd))
    images = build_image_folder(Store(tmp_path), folder, ImageFolderOptions(8))
    assert model.encoder is not None
    made = encode_image_set(images, encoder=model.encoder, store=Store(tmp_path))
    check_latents(made, model)
    other = build_image_folder(Store(tmp_path), folder, ImageFolderOptions(12))
    with pytest.raises(ValueError, match=r"4×4×4, but images of 12 × 12 pixels have latents of 4×6×6.*option 'size'"):
        check_latents(replace(made, images=other), model)


def test_a_data_module_reads_at_the_models_size_where_none_is_named(sd: Path, folder: Path, tmp_path: Path) -> None:
    model = load_model(str(sd))
    for given, expected in ((None, (8, 8)), (12, (12, 12)), ((8, 12), (8, 12))):
        module = ImageFolder(str(folder), options=ImageFolderOptions(given), store=str(tmp_path / "store"))
        data = training_data(module, model)
        assert data.images.pixels.shape[1:3] == expected
        assert data.latents is not None
        assert data.latents.latent_shape == (4, expected[0] // 2, expected[1] // 2)
        latent_shape, size = shapes(data, module.take_size(model))
        assert (latent_shape, run_size(size).size) == (data.latents.latent_shape, expected)
    for kind in (CocoOptions, ShardOptions):
        module.options = kind()
        module.take_size(model)
        assert module.options.side == 8
    module.options = ImageFolderOptions(9)
    with pytest.raises(ValueError, match="size: images of 9 × 9 pixels do not suit the model"):
        training_data(module, model)


def test_a_data_module_of_buckets(sd: Path, folder: Path, tmp_path: Path) -> None:
    model = load_model(str(sd))
    module = ImageFolder(str(folder), options=ImageFolderOptions(framing=BUCKETS), store=str(tmp_path / "store"))
    data = training_data(module, model)
    assert data.latents is not None
    assert len(data.latents.groups) >= 3
    wide = tmp_path / "wide.png"
    paint(wide, 1, (30, 10))
    latent_shape, size = shapes(data, module.take_size(model))
    source = QuerySource(images=[QueryImage(str(wide), "x")], prompts=["drawn"], sampling_steps=1, resize=True)
    from_file, drawn = make_queries(model, source=source, latent_shape=latent_shape, size=size)
    assert from_file.pixels.shape == (4, 12, 3)
    assert drawn.pixels.shape == (8, 8, 3)
    with pytest.raises(ValueError, match="bring the images to one size"):
        module.visits(data.images, None, training=True)


def test_training_on_several_sizes_is_refused_by_name(folder: Path, sd: Path, tmp_path: Path) -> None:
    model = load_model(str(sd))
    images = build_image_folder(Store(tmp_path), folder, ImageFolderOptions(8, framing=BUCKETS))
    assert model.encoder is not None
    encoded = encode_image_set(images, encoder=model.encoder, store=Store(tmp_path))
    with pytest.raises(ValueError, match=r"The latents have several shapes .*bring the images to one size"):
        LatentVisits(encoded, seed=0)
    assert isinstance(encoded.conditioning_at(torch.arange(3), 0), Conditioning)


def test_the_command_takes_sizes_and_its_page_says_them(
    sd: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "3.png", 5, (30, 15))
    damaged = tmp_path / "images"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(b"" if file.name == "3.png" else file.read_bytes())
    words = ["attribute", "--model", str(sd), "--images", str(damaged), "--query", "3.png", "--prompt", "x", "--resize"]
    words += [
        "--method",
        "efficientnet",
        "--buckets",
        "min_side=4,max_side=16,step=4",
        "--size",
        "8",
        "--output",
        "run",
    ]
    with pytest.raises(ValueError, match=r"1 of 7 images cannot be read, .*: 3\.png .*set --on-error skip"):
        main(words)
    capsys.readouterr()
    main([*words, "--on-error", "skip"])
    said = capsys.readouterr().err
    assert "images are at 8 × 8 pixels: each in the nearest of" in said
    assert "the training image 3.png, called like a query, could not be read" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Images left out, which could not be read" in page
    assert "1: 3.png" in page
    assert "Sizes of the images" in page
    assert json.loads((tmp_path / "run" / "image_sizes.json").read_text())["buckets"]["step"] == 4
    (tmp_path / "run" / "report.html").unlink()
    main(["report", "run"])
    assert (tmp_path / "run" / "report.html").read_text() == page


def test_how_sizes_and_buckets_are_said() -> None:
    assert [size_of(size_text(value, "size")) for value in (512, "768x512", "64 × 32", "")] == [
        512, (512, 768), (32, 64), None,
    ]  # fmt: skip
    for wrong in ("big", "5x", True, "1x2x3"):
        with pytest.raises(ValueError, match=r"--size is a number of pixels, or WIDTHxHEIGHT such as 768x512"):
            size_text(wrong, "--size")
    assert bucket_numbers(True, "b") == bucket_numbers("", "b") == {}
    assert bucket_numbers(False, "b") is None
    assert bucket_numbers("step=32, upscale=false", "b") == {"step": 32, "upscale": False}
    assert bucket_numbers({"resolution": 768}, "b") == {"resolution": 768}
    for wrong in ("step", "size=3", {"upscale": 3}, 7):
        with pytest.raises(ValueError, match=r"b takes resolution, min_side, max_side, step \(pixels\) and upscale"):
            bucket_numbers(wrong, "b")
