"""CLIP skip against `encode_prompt` of diffusers' own pipelines, from Python and from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pipelines import pixart, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tests.support.tiny import tiny_folder, tiny_model, tiny_pipeline
from wherefrom.api import AttributionOptions, attribute_images
from wherefrom.cli.run_flags import request_from
from wherefrom.cli.run_inputs import inputs_of
from wherefrom.models.clip_skip import with_clip_skip
from wherefrom.models.conditioning import POOLED, PROMPT
from wherefrom.models.pipeline import load_model, load_pipeline, model_from_pipeline

PROMPTS = ["a big red square", "", "stripes"]


@torch.no_grad()
def theirs(pipeline: Any, skip: int | None) -> Any:
    named: dict[str, Any] = {"prompt_2": None, "prompt_3": None} if hasattr(pipeline, "text_encoder_3") else {}
    return pipeline.encode_prompt(
        PROMPTS,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=skip,
        **named,
    )


@pytest.mark.parametrize("save", [stable_diffusion, stable_diffusion_xl, stable_diffusion_3])
def test_embeddings_are_the_pipelines(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    pipeline: Any = load_pipeline(str(save(tmp_path)))
    if save is stable_diffusion:
        # diffusers asks for the place that CLIP's last normalization had before version 5 of transformers.
        pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder
    expected = [theirs(pipeline, skip) for skip in (None, 0, 1)]
    pipeline.text_encoder.__dict__.pop("text_model", None)
    if save is stable_diffusion_xl:
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)  # of the prompt itself it makes no zeros
    model = model_from_pipeline(pipeline)
    for skip, result in zip((0, 0, 1), expected, strict=True):
        encoder = with_clip_skip(model, skip).encoder
        assert encoder is not None
        made = encoder.text.encode(PROMPTS)
        assert torch.equal(made[PROMPT], result[0])
        if POOLED in made:
            assert torch.equal(made[POOLED], result[2])
    assert not torch.equal(expected[1][0], expected[2][0])


def test_only_a_skip_enters_the_identity_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = load_model(str(stable_diffusion(tmp_path)))
    skipped = with_clip_skip(model, 1)
    assert with_clip_skip(model, 0) is model
    assert model.encoder is not None
    assert skipped.encoder is not None
    identity = model.encoder.identity()
    assert skipped.encoder.identity() == {**identity, "clip_skip": 1}
    assert "clip_skip" not in identity
    assert skipped.fingerprint() == model.fingerprint()
    again = with_clip_skip(skipped, 0).encoder
    assert again is not None
    assert again.identity() == identity
    assert skipped.denoiser is model.denoiser
    assert skipped.encoder.text.model is model.encoder.text.model


@pytest.mark.parametrize(
    ("save", "skip", "message"),
    [
        (stable_diffusion, 2, r"clip_skip must lie between 0 and 1.*2 layers; given 2.*'Clip skip: 2' is 1 here"),
        (stable_diffusion_xl, 2, "clip_skip must lie between 0 and 1"),
        (stable_diffusion_3, -1, "clip_skip must lie between 0 and 1"),
        (pixart, 1, "clip_skip = 1 needs a CLIP as text encoder, but the model's is a T5EncoderModel"),
        (tiny_pipeline, 1, "clip_skip = 1 needs a CLIP as text encoder, but the model's is a BertModel"),
    ],
)
def test_more_than_there_is_is_refused(tmp_path: Path, save: Callable[[Path], Path], skip: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_clip_skip(load_model(str(save(tmp_path / "p"))), skip)


def test_a_model_without_a_text_encoder_has_no_layers_to_skip() -> None:
    with pytest.raises(ValueError, match="no text encoder"):
        with_clip_skip(tiny_model(), 1)


def test_the_option_reaches_captions_and_prompts(tmp_path: Path) -> None:
    model, folder = load_model(str(stable_diffusion(tmp_path / "p"))), tiny_folder(tmp_path / "f", count=4)
    runs = {
        skip: attribute_images(
            model,
            folder,
            ["stripes"],
            options=AttributionOptions(
                store=tmp_path / "store", clip_skip=skip, sampling_steps=1, progress=False, device="cpu"
            ),
        )
        for skip in (1, 0)
    }
    for skip, run in runs.items():
        encoder = with_clip_skip(model, skip).encoder
        assert encoder is not None
        latents = run.data.latents
        assert latents is not None
        (caption,) = run.data.images.captions[0]
        kept = latents.conditioning_at(torch.tensor([0]), 0)[PROMPT]
        assert torch.equal(kept, encoder.text.encode([caption])[PROMPT])
        assert run._run.model.encoder.text.clip_skip == skip  # what the query's prompt is read by, whichever ran last


def test_the_command_line_has_it(tmp_path: Path) -> None:
    words = ["--model", "m", "--images", "i", "--prompt", "p"]
    assert inputs_of(request_from("attribute", "a", "b", [*words, "--clip-skip", "2"]))[1].clip_skip == 2
    assert inputs_of(request_from("attribute", "a", "b", words))[1].clip_skip == 0
    (tmp_path / "run.yaml").write_text("model: m\nclip_skip: 1\n")
    assert inputs_of(request_from("attribute", "a", "b", ["-c", str(tmp_path / "run.yaml"), *words]))[1].clip_skip == 1
    with pytest.raises(ValueError, match="clip_skip must be a number from 0 on"):
        AttributionOptions(clip_skip=-1)
