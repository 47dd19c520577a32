"""Checkpoints of one file: the losses, latents and embeddings of the pipeline that they were made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from tests.support.original_names import checkpoint_tensors, save_checkpoint
from tests.support.pipelines import (
    TRAINED,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from tests.support.tiny import tiny_vae
from wherefrom.models.clip_vocabulary import clip_tokenizer
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model, model_from_pipeline
from wherefrom.models.released_models import Blueprint, ReleasedModel, released_models
from wherefrom.models.single_file import load_single_file


def vae() -> AutoencoderKL:
    """With attention in its middle, as the released autoencoders have it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoencoderKL.from_config({**tiny_vae().config, "mid_block_add_attention": True})


KINDS: dict[str, Callable[[Path], Path]] = {
    "sd1": lambda folder: stable_diffusion(folder, 1, vae=vae()),
    "sd2": lambda folder: stable_diffusion(folder, 2, vae=vae()),
    "sdxl": lambda folder: stable_diffusion_xl(folder, vae=vae()),
    "sd3": lambda folder: stable_diffusion_3(folder, vae=vae()),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind)) for kind, save in KINDS.items()}


def opened(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder)


def shaken(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other weights than the base's, so that it is seen whose are used."""
    random = torch.Generator().manual_seed(5)
    return {
        name: value + 0.01 * torch.randn(value.shape, generator=random) if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def shaken_pipeline(folder: Path) -> Any:
    pipeline = opened(folder)
    for name in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        part = pipeline.components.get(name)
        if part is not None:
            part.load_state_dict(shaken(part.state_dict()))
    return pipeline


def same(first: DiffusionModel, second: DiffusionModel) -> None:
    assert first.fingerprint() == second.fingerprint()
    assert first.encoder is not None
    assert second.encoder is not None
    assert first.encoder.identity() == second.encoder.identity()
    assert first.encoder.decoder_identity() == second.encoder.decoder_identity()
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 8, 8, generator=random) * 2 - 1
    noise = torch.randn(2, 4, 4, 4, generator=random)
    results = []
    for model in (first, second):
        assert model.encoder is not None
        latents, said = model.encoder.encode_pixels(pixels), model.encoder.text.encode(["a red bus", ""])
        with torch.no_grad():
            results.append(model.losses(latents, said, torch.tensor([10, 600]), noise))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_the_settings_of_a_base_is_the_pipeline_it_was_made_from(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    pipeline = shaken_pipeline(folders[kind])
    file = save_checkpoint(tmp_path / "model.safetensors", checkpoint_tensors(pipeline, kind))
    model = load_model(str(file), base=str(folders[kind]))
    same(model, model_from_pipeline(pipeline))
    assert model.fingerprint() != load_model(str(folders[kind])).fingerprint()
    assert model.notes == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_narrow_files_are_brought_to_float32(folders: dict[str, Path], dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: value.to(dtype) for name, value in checkpoint_tensors(opened(folders["sd1"]), "sd1").items()}
    narrow = save_checkpoint(tmp_path / "narrow.safetensors", tensors)
    wide = save_checkpoint(tmp_path / "wide.safetensors", {name: value.float() for name, value in tensors.items()})
    first, second = (load_model(str(file), base=str(folders["sd1"])) for file in (narrow, wide))
    assert first.dtype == torch.float32
    same(first, second)


def tiny_release(folder: Path, kind: str = "sd1") -> tuple[Any, ReleasedModel]:
    """A pipeline with CLIP's own tokenizer, and a release of which its file is a fine-tuning."""
    pads = {"sd1": "<|endoftext|>", "sd2": "!"}
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=49408
        )
    )
    tokenizer = clip_tokenizer(pads[kind])
    pipeline: Any = opened(stable_diffusion(folder, 1, text_encoder=text, tokenizer=tokenizer))
    parts = {name: Blueprint.of(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")}
    return pipeline, ReleasedModel(
        "Tiny Diffusion",
        StableDiffusionPipeline,
        parts,
        Blueprint(DDIMScheduler, {**TRAINED, "steps_offset": 1, "clip_sample": False}),
        {"tokenizer": pads[kind]},
        "epsilon" if kind == "sd1" else None,
    )


def test_a_file_alone_is_read_as_its_release(tmp_path: Path) -> None:
    pipeline, release = tiny_release(tmp_path / "pipeline")
    file = save_checkpoint(tmp_path / "model.safetensors", checkpoint_tensors(pipeline, "sd1"))
    loaded, notes = load_single_file(file, released={"sd1": release})
    same(model_from_pipeline(loaded), model_from_pipeline(pipeline))
    assert loaded.safety_checker is None
    assert notes == [
        "model.safetensors was read as a Tiny Diffusion of 8 × 8 pixels that predicts the noise; the file says nothing "
        "else."
    ]


def test_what_is_known_and_not_needed_changes_nothing(tmp_path: Path) -> None:
    pipeline, release = tiny_release(tmp_path / "pipeline")
    tensors = checkpoint_tensors(pipeline, "sd1")
    scheduler = DDIMScheduler(**TRAINED)
    more = {
        "betas": scheduler.betas,
        "alphas_cumprod": scheduler.alphas_cumprod,
        "sqrt_one_minus_alphas_cumprod": scheduler.alphas_cumprod,
        "posterior_mean_coef1": scheduler.betas,
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelout2bias": torch.ones(4),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logit_scale": torch.tensor(1.0),
        "first_stage_model.loss.logvar": torch.tensor(0.0),
    }
    loaded, notes = load_single_file(
        save_checkpoint(tmp_path / "model.safetensors", tensors | more), released={"sd1": release}
    )
    same(model_from_pipeline(loaded), model_from_pipeline(pipeline))
    assert "model_ema" in notes[-1]
    # Old merges call the text encoder's tensors so.
    old = {name.replace(".transformer.text_model.", ".transformer."): value for name, value in tensors.items()}
    loaded, _ = load_single_file(save_checkpoint(tmp_path / "old.safetensors", old), released={"sd1": release})
    same(model_from_pipeline(loaded), model_from_pipeline(pipeline))


def test_the_file_says_what_it_predicts_and_how_large_its_images_are(tmp_path: Path) -> None:
    pipeline, release = tiny_release(tmp_path / "pipeline")
    tensors = checkpoint_tensors(pipeline, "sd1")
    plain = model_from_pipeline(pipeline)

    def read(more: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Any:
        file = save_checkpoint(tmp_path / "model.safetensors", tensors | more, metadata)
        return load_single_file(file, released={"sd1": release})[0]

    flag = {"v_pred": torch.tensor([])}
    for loaded in (read(flag), read({}, {"modelspec.prediction_type": "v"})):
        model = model_from_pipeline(loaded)
        assert model.noise_schedule.prediction == "v_prediction"
        assert torch.equal(model.noise_schedule.signal, plain.noise_schedule.signal)
    ztsnr = model_from_pipeline(read({**flag, "ztsnr": torch.tensor([])}))
    expected = DDIMScheduler(**TRAINED, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(ztsnr.noise_schedule.signal, expected.double().sqrt())
    large = read({}, {"modelspec.resolution": "16x16", "modelspec.prediction_type": "epsilon"})
    assert large.unet.config.sample_size == 8
    with pytest.raises(ValueError, match=r"trained with other noise levels.*the option 'base'"):
        read({"alphas_cumprod": DDIMScheduler().alphas_cumprod})


def test_a_file_that_says_its_own_prediction_wins_over_the_base(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = checkpoint_tensors(opened(folders["sd1"]), "sd1") | {"v_pred": torch.tensor([])}
    model = load_model(str(save_checkpoint(tmp_path / "model.safetensors", tensors)), base=str(folders["sd1"]))
    assert model.noise_schedule.prediction == "v_prediction"
    assert model.noise_schedule.identity()["beta_schedule"] == "scaled_linear"
    (note,) = model.notes
    assert "predicts v_prediction" in note


def test_stable_diffusion_2_does_not_say_and_is_not_guessed(tmp_path: Path) -> None:
    pipeline, release = tiny_release(tmp_path / "pipeline", "sd2")
    tensors = checkpoint_tensors(pipeline, "sd2")
    left_out = {"cond_stage_model.model.transformer.resblocks.23.ln_1.bias": torch.ones(12)}
    file = save_checkpoint(tmp_path / "model.safetensors", tensors | left_out)
    with pytest.raises(ValueError, match=r"does not say whether it predicts noise or velocity.*the option 'base'"):
        load_single_file(file, released={"sd2": release})
    metadata = {"modelspec.architecture": "stable-diffusion-v2-768-v"}
    loaded, _ = load_single_file(save_checkpoint(file, tensors | left_out, metadata), released={"sd2": release})
    model = model_from_pipeline(loaded)
    assert model.noise_schedule.prediction == "v_prediction"
    assert model.encoder is not None
    plain = model_from_pipeline(pipeline).encoder
    assert plain is not None
    assert model.encoder.text.identity()["text_encoder"] == plain.text.identity()["text_encoder"]


def test_parts_that_the_file_lacks_are_the_bases_or_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = shaken_pipeline(folders["sd1"])
    tensors = checkpoint_tensors(pipeline, "sd1")
    unet = {name: value for name, value in tensors.items() if name.startswith("model.")}
    bare = {name.removeprefix("model.diffusion_model."): value for name, value in unet.items()}
    for number, some in enumerate((unet, bare)):
        file = save_checkpoint(tmp_path / f"unet{number}.safetensors", some)
        with pytest.raises(ValueError, match=r"holds a U-Net and no text encoder.*the option 'base'"):
            load_model(str(file))
        model = load_model(str(file), base=str(folders["sd1"]))
        expected = opened(folders["sd1"])
        expected.unet = pipeline.unet
        same(model, model_from_pipeline(expected))
        assert model.notes == (f"Not in {file.name}, and so the base's: vae, text_encoder.",)
    _, release = tiny_release(tmp_path / "pipeline")
    without = {name: value for name, value in tensors.items() if not name.startswith("first_stage")}
    file = save_checkpoint(tmp_path / "novae.safetensors", without)
    release_of_file = ReleasedModel(
        **{
            **vars(release),
            "parts": {name: Blueprint.of(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")},
        }
    )
    with pytest.raises(ValueError, match=r"lacks the vae of Tiny Diffusion: .*the option 'base'"):
        load_single_file(file, released={"sd1": release_of_file})


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3"])
def test_every_tensor_is_used_and_none_is_made_up(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    tensors = checkpoint_tensors(opened(folders[kind]), kind)
    file, base = tmp_path / "model.safetensors", str(folders[kind])
    network = [name for name in tensors if name.startswith("model.") and name.endswith(".weight")]
    parts = [network[len(network) // 2]] + [
        next(name for name in tensors if name.startswith(start) and "mlp" in name)
        for start in ("cond_stage", "conditioner", "text_encoders.clip_g")
        if any(name.startswith(start) for name in tensors)
    ]
    parts += ["first_stage_model.encoder.mid.attn_1.q.weight", "first_stage_model.decoder.up.0.block.0.conv1.bias"]
    for name in parts:
        save_checkpoint(file, {key: value for key, value in tensors.items() if key != name})
        with pytest.raises(ValueError, match=r"model: .*model.safetensors.*(lacks the tensor|is missing)"):
            load_model(str(file), base=base)
        save_checkpoint(file, tensors | {name: torch.cat([tensors[name]] * 2)})
        with pytest.raises(ValueError, match=r"model: .*model.safetensors.*shape"):
            load_model(str(file), base=base)
        save_checkpoint(file, tensors | {name: tensors[name] * float("inf")})
        with pytest.raises(ValueError, match="no finite numbers"):
            load_model(str(file), base=base)
    for more in (
        "model.diffusion_model.something.weight",
        "first_stage_model.else.bias",
        "control_model.x.weight",
    ):
        save_checkpoint(file, tensors | {more: torch.ones(3)})
        with pytest.raises(ValueError, match=rf"model: .*holds .*{more.removeprefix('model.diffusion_model.')}"):
            load_model(str(file), base=base)


def test_files_that_are_no_text_to_image_model_are_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = checkpoint_tensors(opened(folders["sd1"]), "sd1")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"lora_unet_down_blocks_0.lora_down.weight": torch.ones(2)}, r"is an adapter \(LoRA\).*the option 'lora'"),
        (tensors | {name: torch.ones(8, 9, 3, 3)}, "takes 9 channels.*no text-to-image"),
        (tensors | {"edm_mean": torch.ones(4)}, "EDM loss"),
        ({"conditioner.embedders.0.model.ln_final.bias": torch.ones(4)}, "XL's refiner"),
        (tensors | {f"{name}.scale_weight": torch.ones(1)}, "is quantized"),
        ({"double_blocks.0.img_attn.norm.weight": torch.ones(3)}, "looks like FLUX"),
        ({"encoder.down.0.block.0.conv1.weight": torch.ones(3)}, "looks like an autoencoder alone"),
        ({"emb_params": torch.ones(3, 12)}, "looks like a textual inversion"),
        ({"down_blocks.0.x": torch.ones(3)}, "U-Net of diffusers, which is read from its folder"),
        ({"foo": torch.ones(3)}, "looks like something else"),
    ]
    for content, message in cases:
        file = save_checkpoint(tmp_path / "model.safetensors", content)
        with pytest.raises(ValueError, match=message):
            load_model(str(file))
    for file_name, message in (
        ("model.ckpt", "pickled checkpoint, and nothing is unpickled"),
        ("model.gguf", "no checkpoint that can be read"),
        ("broken.safetensors", "damaged"),
    ):
        (tmp_path / file_name).write_bytes(b"what")
        with pytest.raises(ValueError, match=f"model: .*{message}"):
            load_model(str(tmp_path / file_name))


def test_another_models_base_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "model.safetensors", checkpoint_tensors(opened(folders["sdxl"]), "sdxl"))
    with pytest.raises(ValueError, match=r"holds .*(another model's|does not have)"):
        load_model(str(file), base=str(folders["sd1"]))
    with pytest.raises(ValueError, match=r"is a whole pipeline.*leave out the option 'base'"):
        load_model(str(folders["sd1"]), base=str(folders["sd1"]))


def test_t5_needs_a_base_for_its_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = opened(folders["sd3"])
    tensors = checkpoint_tensors(pipeline, "sd3")
    file = save_checkpoint(tmp_path / "model.safetensors", tensors)
    parts = {
        name: Blueprint.of(getattr(pipeline, name)) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    release = ReleasedModel("Tiny 3", type(pipeline), parts, Blueprint.of(pipeline.scheduler), {}, "flow")
    released = {"sd3_medium": ReleasedModel(**{**vars(release), "pads": {"tokenizer": "!", "tokenizer_2": "!"}})}
    with pytest.raises(ValueError, match=r"holds a T5, whose tokenizer.*the option 'base'"):
        load_single_file(file, released=released)
    some = {name: value for name, value in tensors.items() if ".t5xxl." not in name}
    loaded, notes = load_single_file(save_checkpoint(file, some), released=released)
    assert notes[-1].endswith("holds no T5: prompts are read by the two CLIPs alone.")
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    assert model_from_pipeline(loaded).fingerprint() == model_from_pipeline(pipeline).fingerprint()


def test_the_released_models_settings_make_models_of_their_sizes() -> None:
    """Numbers of weights as the models' authors and diffusers give them."""
    sizes = {
        "sd1": (859_520_964, 83_653_863, 123_060_480),
        "sd2": (865_910_724, 83_653_863, 340_387_840),
        "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
        "sd3_medium": (2_028_328_000, 83_819_683, 123_650_304, 694_659_840),
        "sd3.5_medium": (2_243_171_520, 83_819_683, 123_650_304, 694_659_840),
        "sd3.5_large": (8_056_627_520, 83_819_683, 123_650_304, 694_659_840),
    }
    assert released_models().keys() == sizes.keys()
    for name, model in released_models().items():
        counts = []
        for blueprint in model.parts.values():
            with torch.device("meta"):
                counts.append(sum(each.numel() for each in blueprint.build().parameters()))
        assert tuple(counts) == sizes[name], name
        model.scheduler.build()


def test_the_tokenizer_is_clips() -> None:
    theirs, ours = open_clip.get_tokenizer("ViT-L-14"), clip_tokenizer("<|endoftext|>")
    texts = [
        "a big red bus",
        "",
        "çafé, 1234 don't!",
        "日本語 🦊",
        "A  lot\n of",
        "x" * 400,
        "(masterpiece:1.2), 8k, <lora:a:1>",
    ]
    rows = ours(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    for row, expected in zip(rows, theirs(texts), strict=True):
        end = int((expected == 49407).nonzero()[0]) + 1
        assert torch.equal(row[:end], expected[:end])
        assert set(row[end:].tolist()) <= {49407}  # where OpenCLIP has 0, the pipeline pads with this
    assert set(clip_tokenizer("!")(["a"], padding="max_length", max_length=77).input_ids[0][3:]) == {0}
