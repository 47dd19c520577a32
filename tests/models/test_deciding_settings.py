"""Two parts of the same weights that compute different things have different identities; usual ones keep theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from tests.models.test_families import LATENTS, NOISE, PROMPTS, TIMES
from tests.support.pipelines import (
    clip_text,
    clip_tokenizer,
    pixart,
    pixart_transformer,
    sd3_transformer,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    t5_text,
    unet_with,
)
from tests.support.tiny import tiny_vae
from wherefrom.models.deciding_settings import deciding_settings, settings_hash
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model

ROOT = Path(__file__).parents[2]


def released(kind: Any, **settings: Any) -> nn.Module:
    """A network of a released configuration, without numbers."""
    with torch.device("meta"):
        network: nn.Module = kind(**settings)
    return network


def text(kind: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = kind(config)
    return network


XL_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
}
VAE_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
CLIP_L = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_H = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "hidden_act": "gelu"}
CLIP_G = {"hidden_size": 1280, "num_attention_heads": 20, "intermediate_size": 5120, "hidden_act": "gelu"}
T5_XXL = {"d_model": 4096, "num_heads": 64, "d_ff": 10240, "num_layers": 2, "feed_forward_proj": "gated-gelu"}
RELEASED: dict[str, Callable[[], nn.Module]] = {
    "Stable Diffusion 1": lambda: released(UNet2DConditionModel, cross_attention_dim=768),
    "Stable Diffusion 2": lambda: released(
        UNet2DConditionModel,
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
        upcast_attention=True,
    ),
    "SDXL": lambda: released(
        UNet2DConditionModel,
        **XL_BLOCKS,
        cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20],
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "PixArt 256": lambda: released(PixArtTransformer2DModel, sample_size=32, num_layers=2, caption_channels=4096),
    "PixArt 512": lambda: released(PixArtTransformer2DModel, sample_size=64, num_layers=2, interpolation_scale=1),
    "PixArt 1024": lambda: released(
        PixArtTransformer2DModel, sample_size=128, num_layers=2, interpolation_scale=2, use_additional_conditions=True
    ),
    "PixArt Sigma 2K": lambda: released(PixArtTransformer2DModel, sample_size=256, num_layers=2, interpolation_scale=4),
    "SD 3 medium": lambda: released(
        SD3Transformer2DModel, num_layers=2, num_attention_heads=24, caption_projection_dim=1536
    ),
    "SD 3.5 large": lambda: released(
        SD3Transformer2DModel, num_layers=2, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
    ),
    "autoencoder": lambda: released(AutoencoderKL, **VAE_BLOCKS),
    "CLIP-L": lambda: text(CLIPTextModel, CLIPTextConfig(**CLIP_L, eos_token_id=2)),
    "OpenCLIP H": lambda: text(CLIPTextModel, CLIPTextConfig(**CLIP_H, num_hidden_layers=2)),
    "OpenCLIP bigG": lambda: text(CLIPTextModelWithProjection, CLIPTextConfig(**CLIP_G, num_hidden_layers=2)),
    "T5-XXL": lambda: text(T5EncoderModel, T5Config(**T5_XXL)),
    "MiniLM": lambda: text(
        BertModel, BertConfig(hidden_size=384, num_hidden_layers=2, intermediate_size=1536, num_attention_heads=12)
    ),
    "BERT": lambda: text(BertModel, BertConfig(num_hidden_layers=2)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_nothing_unusual(name: str) -> None:
    part = RELEASED[name]()
    assert deciding_settings(part) == {}
    assert settings_hash(part) == ""


@pytest.mark.parametrize("name", ["emoji", "emoji_1k", "emoji_transformer"])
def test_committed_models_have_nothing_unusual(name: str) -> None:
    model = load_model(str(ROOT / "weights" / name))
    assert model.encoder is not None
    for part in (model.denoiser, model.encoder.vae, *model.encoder.text.model.children()):
        assert deciding_settings(part) == {}
    assert "settings" not in model.fingerprint()


PAIRS: dict[str, tuple[Callable[..., Path], Callable[[], dict[str, Any]]]] = {
    "heads": (stable_diffusion, lambda: {"unet": unet_with(attention_head_dim=4)}),
    "groups": (stable_diffusion, lambda: {"unet": unet_with(norm_num_groups=8)}),
    "activation": (stable_diffusion, lambda: {"unet": unet_with(act_fn="gelu")}),
    "epsilon": (stable_diffusion, lambda: {"unet": unet_with(norm_eps=1e-2)}),
    "time embedding": (stable_diffusion, lambda: {"unet": unet_with(flip_sin_to_cos=False)}),
    "heads of XL": (stable_diffusion_xl, lambda: {"unet": xl_unet(attention_head_dim=1)}),
    "heads of PixArt": (pixart, lambda: {"transformer": heads_of_pixart(4)}),
    "positions of PixArt": (pixart, lambda: {"transformer": pixart_transformer(interpolation_scale=2)}),
    "heads of SD 3": (stable_diffusion_3, lambda: {"transformer": sd3_with_heads(4)}),
}


def xl_unet(**changes: Any) -> nn.Module:
    return unet_with(
        cross_attention_dim=20,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
        **changes,
    )


def heads_of_pixart(heads: int) -> nn.Module:
    return pixart_transformer(num_attention_heads=heads, attention_head_dim=16 // heads)


def sd3_with_heads(heads: int) -> nn.Module:
    config = dict(sd3_transformer().config) | {"num_attention_heads": heads, "attention_head_dim": 16 // heads}
    network = SD3Transformer2DModel.from_config(config)
    return network


@pytest.mark.parametrize("name", PAIRS)
def test_networks_of_the_same_weights_that_differ_have_other_fingerprints(tmp_path: Path, name: str) -> None:
    save, changed = PAIRS[name]
    plain = load_model(str(save(tmp_path / "plain")), torch.float64)
    other = load_model(str(save(tmp_path / "other", **changed())), torch.float64)
    other.denoiser.load_state_dict(plain.denoiser.state_dict())
    assert plain.encoder is not None
    states = plain.encoder.text.encode(PROMPTS)
    losses = [model.losses(LATENTS, states, TIMES, NOISE) for model in (plain, other)]
    assert (losses[0] / losses[1] - 1).abs().max() > 1e-6  # they do compute different things
    assert plain.fingerprint().count("settings") == 0
    assert other.fingerprint().split("/settings ")[0] == plain.fingerprint()
    assert "/settings " in other.fingerprint()


def encoder_of(model: DiffusionModel) -> Any:
    assert model.encoder is not None
    return model.encoder


def test_text_encoders_and_autoencoders_too(tmp_path: Path) -> None:
    plain = encoder_of(load_model(str(stable_diffusion(tmp_path / "plain"))))
    clip = CLIPTextModel(CLIPTextConfig(**(clip_text().config.to_dict() | {"hidden_act": "gelu"})))
    clip.load_state_dict(clip_text().state_dict())
    vae = AutoencoderKL.from_config({**tiny_vae().config, "norm_num_groups": 2})
    vae.load_state_dict(tiny_vae().state_dict())
    other = encoder_of(load_model(str(stable_diffusion(tmp_path / "other", text_encoder=clip, vae=vae))))
    more = {"settings", "vae_settings"}
    mine, theirs = plain.identity(), other.identity()
    assert mine == {name: value for name, value in theirs.items() if name not in more}
    assert more <= set(theirs)
    assert other.decoder_identity().startswith(f"{plain.decoder_identity()}/")
    assert not torch.equal(plain.text.encode(["a"])["prompt_embeds"], other.text.encode(["a"])["prompt_embeds"])
    pixels = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    assert not torch.equal(plain.encode_pixels(pixels), other.encode_pixels(pixels))


def test_a_second_text_encoder_and_t5_too(tmp_path: Path) -> None:
    plain = encoder_of(load_model(str(stable_diffusion_3(tmp_path / "plain"))))
    t5 = T5EncoderModel(T5Config(**(t5_text().config.to_dict() | {"num_heads": 3, "d_kv": 4})))
    t5.load_state_dict({**t5.state_dict(), **{k: v for k, v in t5_text().state_dict().items() if "relative" not in k}})
    other = encoder_of(load_model(str(stable_diffusion_3(tmp_path / "other", text_encoder_3=t5))))
    assert "settings" not in plain.identity()
    assert "settings" in other.identity()


@pytest.mark.parametrize(("side", "value"), [("padding_side", "left"), ("truncation_side", "left")])
def test_how_the_tokenizer_fills_up_and_cuts(tmp_path: Path, side: str, value: str) -> None:
    text = encoder_of(load_model(str(stable_diffusion(tmp_path)))).text
    before, long = text.identity(), ["abcdefghij" * 9, "ab"]
    embeddings = text.encode(long)["prompt_embeds"]
    setattr(text.tokenizer, side, value)
    assert text.identity() == {**before, "sides": [[text.tokenizer.padding_side, text.tokenizer.truncation_side]]}
    assert not torch.equal(text.encode(long)["prompt_embeds"], embeddings)


def test_what_captions_are_filled_up_with(tmp_path: Path) -> None:
    for version, usual in ((1, True), (2, True)):
        text = encoder_of(load_model(str(stable_diffusion(tmp_path / str(version), version)))).text
        assert ("padding" not in text.identity()) is usual
    other = stable_diffusion(tmp_path / "other", tokenizer=clip_tokenizer("b"))
    assert encoder_of(load_model(str(other))).text.identity()["padding"] == 1


def test_in_half_precision_it_matters_where_attention_is_added_up() -> None:
    network = unet_with(upcast_attention=True)
    assert deciding_settings(network) == {}
    assert deciding_settings(network.half()) == {"upcast_attention": True}
