"""Every kind of pipeline that loads: its loss, its sampler, and attribution from fit to ranking."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import evaluate
from tests.support.pipelines import (
    TOKENS,
    images,
    pixart,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from tests.support.tiny import attribution_config, one_process
from wherefrom.attributors import AttributionByUnlearning, TrainingData
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings, unlearn
from wherefrom.curvature import EKFAC, DiagonalFisher, FisherSettings
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.data.image_set import ImageSet
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.models.conditioning import PROMPT
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.noise_schedule import sampling_scheduler
from wherefrom.models.parameter_subsets import moved_weights
from wherefrom.models.pipeline import load_model, load_pipeline, model_from_pipeline
from wherefrom.models.sampling import sample
from wherefrom.queries.sources import generate
from wherefrom.rankings.ranking_file import order_of, read_ranking
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store

KINDS: dict[str, Callable[[Path], Path]] = {
    "sd1": lambda folder: stable_diffusion(folder, 1),
    "sd2": lambda folder: stable_diffusion(folder, 2),
    "sdxl": stable_diffusion_xl,
    "pixart": pixart,
    "sd3": stable_diffusion_3,
    "sd3 without t5": lambda folder: stable_diffusion_3(folder, t5=False),
}
KEYS = keyed_random.hash_texts(["a", "b"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind)) for kind, save in KINDS.items()}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channels(model: DiffusionModel) -> int:
    config: Any = model.denoiser.config
    return int(config.in_channels)


def key_and_value(name: str, kind: str) -> bool:
    """Written out anew: what the papers move."""
    parts = name.split(".")
    wanted = (["attn", "add_k_proj"], ["attn", "add_v_proj"])
    return parts[-3:-1] in (wanted if kind.startswith("sd3") else (["attn2", "to_k"], ["attn2", "to_v"]))


@pytest.mark.parametrize("curvature", [DiagonalFisher, EKFAC])
@pytest.mark.parametrize("kind", KINDS)
def test_fit_unlearn_score_and_rank(folders: dict[str, Path], kind: str, curvature: Any, tmp_path: Path) -> None:
    model, store = load_model(str(folders[kind]), torch.float64), Store(tmp_path)
    assert model.encoder is not None
    train = images()
    data = TrainingData(train, encode_image_set(train, encoder=model.encoder, store=store))
    assert data.latents is not None
    shape = data.latents.latent_shape
    (query,) = generate(model, prompts=["a big red square"], seed=0, shape=shape, sampling_steps=2)
    settings = UnlearningSettings(noise_samples=8, measurement_samples=8, relative_loss_increase=1e-3)
    method = AttributionByUnlearning(
        "cross_attention_kv",
        unlearning=settings,
        grid=LossGrid(timesteps=2),
        curvature=curvature(FisherSettings(1)),
        timestep_weights="equal",
    )
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    method.fit(data, model, store, one_process())
    (scores,) = method.score([query])
    assert np.isfinite(scores.scores).all()
    assert len(np.unique(scores.scores)) == len(train)
    order = order_of(scores.ids, scores.scores)
    assert sorted(order) == list(range(len(train)))
    moved = unlearn(
        model,
        query=method.query_latent(query),
        weights="cross_attention_kv",
        curvature=method.curvature_matrix,
        dataset_size=len(train),
        settings=settings,
        runner=one_process(),
    ).moved
    expected = {name for name, _ in model.denoiser.named_parameters() if key_and_value(name, kind)}
    assert moved.keys() == expected
    assert expected
    with moved_weights(model.denoiser, moved):
        changed = {name for name, value in model.denoiser.named_parameters() if not torch.equal(value, before[name])}
    assert changed == expected
    assert all(torch.equal(value, before[name]) for name, value in model.denoiser.state_dict().items())


def test_the_captions_that_are_cut_are_counted(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load_model(str(folders["sd1"])).encoder
    assert encoder is not None
    assert encoder.text.length == TOKENS
    fits, long = "a" * (TOKENS - 2), "a" * (TOKENS - 1)
    assert encoder.text.cut([fits, long, "", long]) == [1, 3]
    first, second = encoder.text.encode([long, long + " and more"])[PROMPT]
    assert torch.equal(first, second)
    assert not torch.equal(*encoder.text.encode(["a", "b"])[PROMPT])
    train = images(3)
    captions = ((long,), ("short",), (long,))
    latents = ImageSet(train.ids, captions, train.pixels, train.columns, "long")
    encode_image_set(latents, encoder=encoder, store=Store(tmp_path))
    assert "2 of 3 captions are longer than the text encoder reads (77 tokens)" in caplog.text
    (manifest,) = tmp_path.glob("encoded_images/*/manifest.json")
    assert '"captions_cut": 2' in manifest.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_own_pipeline_draws_the_same_image(folders: dict[str, Path], kind: str) -> None:
    pipeline: Any = load_pipeline(str(folders[kind]))
    pipeline.set_progress_bar_config(disable=True)
    model = model_from_pipeline(pipeline)
    assert model.encoder is not None
    flow = model.noise_schedule.prediction == "flow"
    if not flow:
        pipeline.scheduler = sampling_scheduler(model.noise_schedule)
    prompt, text, shape = "a big red square", model.encoder.text, (channels(model), 4, 4)
    null = text.encode([""]).at(0)
    ours = sample(
        model, conditioning=text.encode([prompt]), empty=null, keys=KEYS[:1], shape=shape, steps=4, guidance=3.0
    )
    options = {"clean_caption": False} if kind == "pixart" else {}
    start = keyed_random.normal(keyed_random.combine(101, KEYS[:1]), shape)
    theirs = pipeline(
        prompt,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=start,
        output_type="latent",
        height=8,
        width=8,
        **({"use_resolution_binning": False} if kind == "pixart" else {}),
        **options,
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    other = sample(
        model, conditioning=text.encode(["stripes"]), empty=null, keys=KEYS[:1], shape=shape, steps=4, guidance=3.0
    )
    assert (ours - other).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_the_command_line_attributes(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    config = attribution_config(tmp_path, count=4, model=str(folders[kind]))
    settings = json.loads(config.read_text())
    settings["attributor"]["init_args"] |= {
        "weights": "cross_attention_kv",
        "unlearning": {"noise_samples": 8, "measurement_samples": 8, "relative_loss_increase": 1e-3},
    }
    config.write_text(json.dumps(settings))
    evaluate.main(["attribute", "-c", str(config)])
    ((ids, scores),) = read_ranking(tmp_path / "run").values()
    assert len(ids) == 4
    assert len(np.unique(scores)) == 4
    assert (tmp_path / "run" / "report.html").exists()
