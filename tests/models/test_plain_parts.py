"""A pipeline that is handed in as people load it: the plain pipeline's numbers, and nothing of theirs is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, ConsistencyDecoderVAE, DiffusionPipeline
from torch import Tensor, nn

from tests.support.pipelines import pixart, stable_diffusion, stable_diffusion_3, stable_diffusion_xl, tiny_vae_of
from wherefrom.models import plain_parts
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model, model_from_pipeline

KINDS: dict[str, Callable[[Path], Path]] = {
    "sd1": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "pixart": pixart,
    "sd3": stable_diffusion_3,
}
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind)) for kind, save in KINDS.items()}


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline as a user loads it, whose prompts and images differ between precisions."""
    return DiffusionPipeline.from_pretrained(folder, dtype=dtype)


def numbers(model: DiffusionModel) -> tuple[Tensor, Tensor]:
    """Losses of two captions' images, with images and captions encoded by the model itself."""
    assert model.encoder is not None
    random = torch.Generator().manual_seed(0)
    latents = model.encoder.encode_pixels(torch.rand(2, 3, 8, 8, generator=random) * 2 - 1)
    noise = torch.randn(latents.shape, generator=random)
    said = model.encoder.text.encode(["a big red square", "stripes"])
    with torch.no_grad():
        return latents, model.losses(latents, said, torch.tensor([100, 700]), noise)


def same(first: DiffusionModel, second: DiffusionModel) -> None:
    """Equal to the bit, fingerprints and encoders' identities included."""
    assert first.fingerprint() == second.fingerprint()
    assert first.encoder is not None
    assert second.encoder is not None
    assert first.encoder.identity() == second.encoder.identity()
    for one, other in zip(numbers(first), numbers(second), strict=True):
        assert torch.equal(one, other)


def state_of(pipeline: Any) -> dict[str, Any]:
    """All that attribution could change of a pipeline's own objects."""
    return {
        f"{name}.{key}": (id(value), value.dtype, value.device, value.requires_grad, value.detach().float().sum())
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
        for key, value in [*part.named_parameters(), *part.named_buffers()]
    } | {
        f"{name}/{key}": (module.training, sorted(vars(module)), type(module))
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
        for key, module in part.named_modules()
    }


@pytest.mark.parametrize("kind", KINDS)
@HALF
def test_half_precision_gives_what_the_same_weights_give_as_float32(
    folders: dict[str, Path], kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipeline = opened(folders[kind], dtype)
    pipeline.save_pretrained(tmp_path)  # the same rounded weights, which a folder brings to float32
    before = state_of(pipeline)
    model = model_from_pipeline(pipeline)
    assert model.dtype == torch.float32
    same(model, load_model(str(tmp_path)))
    assert model.fingerprint() != load_model(str(folders[kind])).fingerprint()
    (note,) = model.notes
    assert "float32" in note
    assert str(dtype).removeprefix("torch.") in note
    assert state_of(pipeline) == before


def test_tables_that_no_file_holds_are_those_of_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = opened(folders["pixart"])
    pipeline.to(torch.bfloat16)
    assert pipeline.transformer.pos_embed.pos_embed.dtype == torch.bfloat16  # rounded, and in no file
    pipeline.save_pretrained(tmp_path)
    same(model_from_pipeline(pipeline), load_model(str(tmp_path)))


def test_each_part_may_have_a_precision_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = opened(folders["sdxl"])
    pipeline.unet.to(torch.float16)
    pipeline.text_encoder_2.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    model = model_from_pipeline(pipeline)
    assert model.notes[0].endswith("(text_encoder_2 is in bfloat16, unet is in float16).")
    same(model, load_model(str(tmp_path)))


def test_float8_weights_that_are_cast_layer_by_layer(folders: dict[str, Path]) -> None:
    pipeline = opened(folders["sd1"])
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = state_of(pipeline)
    stored = [value.dtype for value in pipeline.unet.parameters()]
    assert torch.float8_e4m3fn in stored
    model = model_from_pipeline(pipeline)
    assert {value.dtype for value in model.denoiser.parameters()} == {torch.float32}
    assert "float8_e4m3fn" in model.notes[0]
    latents, embeddings = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 12)
    with torch.no_grad():
        theirs = pipeline.unet(latents, torch.tensor([5, 500]), embeddings).sample
        unet: Any = model.denoiser
        assert torch.equal(unet(latents, torch.tensor([5, 500]), embeddings).sample, theirs)
    assert state_of(pipeline).keys() == before.keys()
    assert [value.dtype for value in pipeline.unet.parameters()] == stored


def compiled(pipeline: Any) -> None:
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")


def compiled_in_place(pipeline: Any) -> None:
    pipeline.unet.compile(backend="eager")


def compiled_by_blocks(pipeline: Any) -> None:
    for index, block in enumerate(pipeline.unet.down_blocks):
        pipeline.unet.down_blocks[index] = torch.compile(block, backend="eager")


def channels_last(pipeline: Any) -> None:
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)


def fused(pipeline: Any) -> None:
    pipeline.fuse_qkv_projections()


def offloaded(pipeline: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(pipeline.unet, torch.device("cpu"))
    accelerate.cpu_offload(pipeline.text_encoder, torch.device("cpu"))
    assert all(value.is_meta for value in pipeline.unet.parameters())


def offloaded_by_models(pipeline: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    _, hook = accelerate.cpu_offload_with_hook(pipeline.text_encoder, torch.device("cpu"))
    accelerate.cpu_offload_with_hook(pipeline.unet, torch.device("cpu"), prev_module_hook=hook)


def spread(pipeline: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.dispatch_model(pipeline.unet, {"": "cpu"}, force_hooks=True)


def frozen(pipeline: Any) -> None:
    pipeline.unet.train()
    pipeline.unet.requires_grad_(True)


WAYS = [
    compiled,
    compiled_in_place,
    compiled_by_blocks,
    channels_last,
    fused,
    offloaded,
    offloaded_by_models,
    spread,
    frozen,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_moves_or_speeds_up_a_pipeline_changes_nothing(
    folders: dict[str, Path], way: Callable[[Any], None]
) -> None:
    pipeline = opened(folders["sd1"])
    way(pipeline)
    before = state_of(pipeline) if way is not offloaded else {}
    model = model_from_pipeline(pipeline)
    same(model, load_model(str(folders["sd1"])))
    assert model.notes == ()
    assert not any(value.requires_grad for value in model.denoiser.parameters())
    assert not any(module.training for module in model.denoiser.modules())
    if before:
        assert state_of(pipeline) == before


@pytest.mark.parametrize("kind", ["pixart", "sd3"])
def test_fused_projections_of_transformers_are_taken_apart(folders: dict[str, Path], kind: str) -> None:
    pipeline = opened(folders[kind])
    pipeline.transformer.fuse_qkv_projections()
    same(model_from_pipeline(pipeline), load_model(str(folders[kind])))


def test_fused_projections_that_were_trained_further_are_what_is_measured(folders: dict[str, Path]) -> None:
    pipeline = opened(folders["sd1"])
    pipeline.fuse_qkv_projections(vae=False)
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    with torch.no_grad():
        attention.to_kv.weight[: len(attention.to_k.weight)] *= 2
    model = model_from_pipeline(pipeline)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    kept = load_model(str(folders["sd1"])).denoiser.state_dict()
    moved = model.denoiser.state_dict()
    assert kept.keys() == moved.keys()
    assert {key for key in kept if not torch.equal(kept[key], moved[key])} == {name}
    assert torch.equal(moved[name], 2 * kept[name])


def test_moving_and_changing_the_model_leaves_the_pipeline_as_it_is(folders: dict[str, Path]) -> None:
    pipeline = opened(folders["sd1"], torch.float16)
    kept = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    model = model_from_pipeline(pipeline)
    with torch.no_grad():
        for value in model.denoiser.parameters():
            value += 1
    model.denoiser.requires_grad_(True)
    assert all(torch.equal(value, kept[name]) for name, value in pipeline.unet.state_dict().items())


def quantized(pipeline: Any) -> None:
    layer = pipeline.unet.time_embedding.linear_1
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.uint8), requires_grad=False)


def by_a_quantizer(pipeline: Any) -> None:
    pipeline.unet.register_to_config(quantization_config={"quant_method": "bitsandbytes_4bit"})


def dynamically_quantized(pipeline: Any) -> None:
    class Packed(Tensor):
        """Stands for a quantizer's kind of tensor: torchao's and GGUF's are subclasses too."""

    layer = pipeline.text_encoder.encoder.layers[0].mlp.fc1
    layer._parameters["weight"] = nn.Parameter(layer.weight.detach().as_subclass(Packed))


def emptied(pipeline: Any) -> None:
    pipeline.unet.conv_in.to("meta")


def grouped(pipeline: Any) -> None:
    pipeline.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")


REFUSED = [
    (quantized, "unet is quantized.*time_embedding.linear_1.weight is a .*uint8.*without quantization"),
    (by_a_quantizer, r"unet is quantized.*\(bitsandbytes_4bit\).*without quantization"),
    (dynamically_quantized, "text_encoder is quantized.*mlp.fc1.weight is a Packed"),
    (emptied, r"unet.conv_in.weight holds no values.*pipeline.remove_all_hooks\(\)"),
    (grouped, "diffusers' hook '.*group.*load the pipeline without it"),
]


@pytest.mark.parametrize(("way", "message"), REFUSED, ids=lambda each: getattr(each, "__name__", ""))
def test_what_has_no_plain_weights_is_refused_by_name(
    folders: dict[str, Path], way: Callable[[Any], None], message: str
) -> None:
    pipeline = opened(folders["sd1"])
    way(pipeline)
    with pytest.raises(ValueError, match=message):
        model_from_pipeline(pipeline)


def test_a_copy_that_does_not_fit_is_refused_before_it_is_made(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_parts, "_free", lambda device: 1000)
    same(model_from_pipeline(opened(folders["sd1"])), load_model(str(folders["sd1"])))  # float32 takes no copy
    with pytest.raises(ValueError, match=r"is in bfloat16.* needs a float32 copy.*0.0 GiB are free on cpu"):
        model_from_pipeline(opened(folders["sd1"], torch.bfloat16))


def test_taesd_encodes_as_the_pipeline_decodes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    stable_diffusion(tmp_path, vae=vae)
    for model in (load_model(str(tmp_path)), model_from_pipeline(opened(tmp_path))):
        assert model.encoder is not None
        pixels = torch.rand(2, 3, 8, 8) * 2 - 1
        latents = model.encoder.encode_pixels(pixels)
        with torch.no_grad():
            assert torch.equal(latents, vae.eval().encoder(pixels))
            expected = vae.decode(latents).sample.clamp(-1, 1)
        assert torch.equal(model.encoder.decode(latents), expected)
        assert model.encoder.scale == (0.0, 1.0)


def test_other_autoencoders_are_taken_or_refused_by_name(folders: dict[str, Path]) -> None:
    class Noisy(type(tiny_vae_of(4))):  # type: ignore[misc]
        """Encodes in another way than its base."""

        def encode(self, x: Tensor, return_dict: bool = True) -> Any:
            return super().encode(x + 1, return_dict)

    pipeline = opened(folders["sd1"])
    pipeline.vae = AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        down_block_out_channels=(4, 8),
        up_block_out_channels=(4, 8),
        norm_num_groups=2,
    )
    encoder = model_from_pipeline(pipeline).encoder
    assert encoder is not None
    assert encoder.encode_pixels(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 4, 4)
    sides = {"encoder_block_out_channels": (4, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    norms = {"encoder_norm_num_groups": 2, "decoder_norm_num_groups": 2}
    for vae in (ConsistencyDecoderVAE(**sides, **norms), Noisy.from_config(tiny_vae_of(4).config)):
        pipeline.vae = vae
        with pytest.raises(ValueError, match=f"autoencoder is a {type(vae).__name__}.*AutoencoderKL"):
            model_from_pipeline(pipeline)
