"""Adapters that a pipeline has set: only those that take part count, in subsets, fingerprints and identities."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.support import adapters as made_up
from tests.support.adapters import Parts, made, save, targets
from tests.support.pipelines import images, stable_diffusion, stable_diffusion_xl
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.models.adapter_states import known_adapters, with_adapters
from wherefrom.models.conditioning import PROMPT, prompt_embeddings
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import Subset, select_weights, trainable
from wherefrom.models.pipeline import load_pipeline, model_from_pipeline
from wherefrom.runtime.artifacts import Store

KEYS = (".attn2.to_k", ".attn1.to_q")
TEXT = (".q_proj",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("model"))


def for_diffusers(layers: Mapping[str, Parts]) -> Parts:
    """In the names of diffusers and peft, at scale 1."""
    return {
        f"{name}.lora_{side}.weight": parts[f"lora_{part}.weight"]
        for name, parts in layers.items()
        for side, part in (("A", "down"), ("B", "up"))
    }


def of_text(encoder: nn.Module, seed: int = 0) -> dict[str, Parts]:
    layers = made(targets(encoder, TEXT), made_up.lora, seed)
    return {f"text_encoder.text_model.{key.removeprefix('text_model.')}": parts for key, parts in layers.items()}


@pytest.fixture(scope="module")
def files(folder: Path) -> Mapping[str, Path]:
    pipeline: Any = load_pipeline(str(folder))
    result = {}
    for seed, name in enumerate(["cat", "dog"]):
        layers = {f"unet.{key}": parts for key, parts in made(targets(pipeline.unet, KEYS), made_up.lora, seed).items()}
        layers |= of_text(pipeline.text_encoder, seed)
        result[name] = save(folder.parent / f"{folder.name}-{name}.safetensors", for_diffusers(layers))
    return result


@pytest.fixture
def pipeline(folder: Path, files: Mapping[str, Path]) -> Any:
    result: Any = load_pipeline(str(folder), torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        for name, file in files.items():
            result.load_lora_weights(str(file), adapter_name=name)
    result.set_adapters(["cat", "dog"], [1.0, 0.5])
    return result


def losses(model: DiffusionModel) -> Tensor:
    random = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 4, 4, generator=random, dtype=torch.float64)
    captions = torch.randn(2, 5, 12, generator=random, dtype=torch.float64)
    return model.losses(latents, prompt_embeddings(captions), torch.tensor([100, 700]), noise)


def adapters_of(names: Mapping[str, Any]) -> set[str]:
    return {part for name in names for part in name.split(".") if part in ("cat", "dog", "default_0")}


def moving(model: DiffusionModel) -> set[str]:
    """Weights with a gradient, by autograd: what takes part."""
    every = dict(model.denoiser.named_parameters())
    with trainable(model.denoiser, every):
        grads = torch.autograd.grad(losses(model).sum(), list(every.values()), allow_unused=True)
    return {name for name, grad in zip(every, grads, strict=True) if grad is not None and grad.abs().sum() > 0}


@pytest.mark.parametrize(
    ("case", "expected", "said"),
    [
        ("both", {"cat", "dog"}, "with LoRA cat at 1 ("),
        ("one", {"dog"}, "with LoRA dog at 0.7 ("),
        ("zero", {"dog"}, "dog at 0.7 ("),
        ("disabled", set(), "fingerprint"),
        ("blocks", {"cat"}, "with LoRA cat at several weights ("),
    ],
)
def test_only_adapters_that_take_part_belong_to_subsets(
    pipeline: Any, case: str, expected: set[str], said: str
) -> None:
    if case == "one":
        pipeline.set_adapters(["dog"], [0.7])
    elif case == "zero":
        pipeline.set_adapters(["cat", "dog"], [0.0, 0.7])
    elif case == "disabled":
        pipeline.disable_lora()
    elif case == "blocks":
        pipeline.set_adapters(["cat"], [{"unet": {"down": 0.0, "mid": 0.4, "up": 1.0}, "text_encoder": 1.0}])
    model = model_from_pipeline(pipeline)
    active = moving(model)
    assert adapters_of(dict.fromkeys(active)) == expected
    for subset in ("all", "cross_attention_kv", "attention"):
        chosen = select_weights(model.denoiser, subset)
        assert adapters_of(chosen) == expected
        assert {name for name in chosen if "lora" in name} <= active
    if expected:
        assert set(select_weights(model.denoiser, "adapter")) == {name for name in active if "lora_" in name}
    else:
        with pytest.raises(ValueError, match=r"disabled, inactive or at weight zero.*Choose other weights"):
            select_weights(model.denoiser, "adapter")
    assert said in with_adapters("fingerprint", model.denoiser)


def test_models_of_other_losses_have_other_fingerprints(pipeline: Any) -> None:
    prints: dict[str, Tensor] = {}

    def seen() -> None:
        model = model_from_pipeline(pipeline)
        with torch.no_grad():
            result = losses(model)
        for before, others in prints.items():
            if before == model.fingerprint():
                torch.testing.assert_close(result, others, rtol=1e-12, atol=0)
        prints[model.fingerprint()] = result

    seen()
    pipeline.set_adapters(["cat"], [1.0])
    seen()
    pipeline.set_adapters(["cat"], [0.5])
    seen()
    pipeline.set_adapters(["cat"], [1.0])
    pipeline.fuse_lora(components=["unet"])
    seen()
    for module in pipeline.unet.modules():  # the same weights, no longer taken for fused
        if getattr(module, "merged_adapters", None):
            module.merged_adapters = []
    seen()
    pipeline.disable_lora()
    seen()
    assert len(prints) == 5  # disabled on top of what was fused is the fused model


def test_a_fused_adapter_is_said_and_its_subset_refused(pipeline: Any) -> None:
    before = losses(model_from_pipeline(pipeline))
    pipeline.fuse_lora(adapter_names=["cat", "dog"])
    model = model_from_pipeline(pipeline)
    torch.testing.assert_close(losses(model), before, rtol=1e-9, atol=0)
    assert any("cat at 1 (fused" in note and "cannot be told apart" in note for note in model.notes)
    assert not adapters_of(select_weights(model.denoiser, "all"))
    with pytest.raises(ValueError, match=r"The adapter cat is fused.*such as cross_attention_kv"):
        select_weights(model.denoiser, "adapter")
    pipeline.unload_lora_weights()
    model = model_from_pipeline(pipeline)
    torch.testing.assert_close(losses(model), before, rtol=1e-9, atol=0)
    assert [each.name for each in known_adapters(model.denoiser)] == ["cat", "dog"]
    assert len(model_from_pipeline(pipeline).notes) == 2
    with pytest.raises(ValueError, match="is fused"):
        select_weights(model.denoiser, "adapter")


def test_adapters_fused_and_disabled_at_once_are_refused(pipeline: Any) -> None:
    pipeline.fuse_lora()
    pipeline.disable_lora()
    with pytest.raises(ValueError, match=r"fused and disabled at once: call unfuse_lora\(\) or enable_lora\(\)"):
        model_from_pipeline(pipeline)


@pytest.mark.parametrize("kind", ["1", "xl"])
def test_a_text_encoders_adapter_is_in_the_identity_of_what_it_encodes(tmp_path: Path, kind: str) -> None:
    make = stable_diffusion if kind == "1" else stable_diffusion_xl
    pipeline: Any = load_pipeline(str(make(tmp_path / "model")))
    plain = model_from_pipeline(pipeline).encoder
    layers = for_diffusers(of_text(pipeline.text_encoder))
    pipeline.load_lora_weights(str(save(tmp_path / "a.safetensors", layers)), adapter_name="cat")
    train, store = images(2), Store(tmp_path / "store")
    assert plain is not None
    assert "adapters" not in plain.identity()
    found: dict[str, Tensor] = {}
    for state in (1.0, 0.5, 0.25, None):
        if state is None:
            pipeline.disable_lora()
        else:
            pipeline.set_adapters(["cat"], [state])
        encoder = model_from_pipeline(pipeline).encoder
        assert encoder is not None
        assert ("adapters" in encoder.identity()) is (state != 1.0)  # as before there were weights
        stored = encode_image_set(train, encoder=encoder, store=store)
        direct = encoder.text.encode([caption for (caption,) in train.captions])[PROMPT]
        torch.testing.assert_close(stored.conditioning_at(torch.arange(2), 0)[PROMPT], direct, rtol=1e-5, atol=1e-6)
        found[str(encoder.identity())] = direct
    assert len(found) == 4
    values = list(found.values())
    assert all(not torch.allclose(values[0], other, atol=1e-4) for other in values[1:])
    torch.testing.assert_close(values[-1], plain.text.encode([caption for (caption,) in train.captions])[PROMPT])


@pytest.mark.parametrize("subset", ["adapter", "cross_attention_kv", "all"])
def test_a_norm_that_peft_holds_fixed_is_refused(folder: Path, subset: Subset) -> None:
    pipeline: Any = load_pipeline(str(folder), torch.float64)
    settings = peft.LoraConfig(r=2, target_modules=["to_k"], use_dora=True, init_lora_weights=False)
    pipeline.unet.add_adapter(settings, "norm")
    model = model_from_pipeline(pipeline)
    before = losses(model)
    with pytest.raises(ValueError, match=r"to_k has the adapter norm .*DoRA.* fuse_lora\(\) of the pipeline"):
        select_weights(model.denoiser, subset)
    pipeline.fuse_lora(components=["unet"])
    fused = model_from_pipeline(pipeline)
    torch.testing.assert_close(losses(fused), before, rtol=1e-9, atol=0)
    assert len(select_weights(fused.denoiser, "all")) < len(dict(fused.denoiser.named_parameters()))


def test_a_kind_that_peft_differentiates_wrongly_is_refused(folder: Path) -> None:
    pipeline: Any = load_pipeline(str(folder), torch.float64)
    settings = peft.LoHaConfig(r=2, target_modules=["conv1"], use_effective_conv2d=True, init_weights=False)
    pipeline.unet.add_adapter(settings, "tucker")
    model = model_from_pipeline(pipeline)
    with pytest.raises(ValueError, match=r"conv1 has the adapter tucker \(LoHa in Tucker form"):
        select_weights(model.denoiser, "adapter")
    assert select_weights(model.denoiser, "cross_attention_kv")


def test_other_kinds_of_peft_are_known_by_their_weights(folder: Path) -> None:
    pipeline: Any = load_pipeline(str(folder), torch.float64)
    pipeline.unet.add_adapter(peft.OFTConfig(r=2, oft_block_size=0, target_modules=["to_q"]), "turn")
    model = model_from_pipeline(pipeline)
    chosen = select_weights(model.denoiser, "adapter")
    assert chosen
    assert all(".oft_R." in name for name in chosen)
    assert "turn" in with_adapters("", model.denoiser)
    pipeline.disable_lora()
    off = model_from_pipeline(pipeline)
    assert off.fingerprint() != model.fingerprint()


def test_a_layer_that_an_adapter_replaced_is_refused(folder: Path) -> None:
    pipeline: Any = load_pipeline(str(folder))
    settings = peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_in"])
    pipeline.unet = peft.get_peft_model(pipeline.unet, settings).base_model.model
    with pytest.raises(ValueError, match="conv_in was replaced as a whole"):
        model_from_pipeline(pipeline)
