"""Adapters of every trainer: the model's output is that of weights merged in closed form, whatever the layout."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from torch import Tensor, nn

from tests.support import adapters as made_up
from tests.support.adapters import ALPHA, RANK, Make, Parts, kohya, lora, made, merge_into, save, targets
from tests.support.original_names import checkpoint_tensors, save_checkpoint
from tests.support.pipelines import pixart, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from wherefrom.models.adapter_files import read_adapter
from wherefrom.models.adapter_sources import AdapterSource
from wherefrom.models.adapter_states import adapter_scales, known_adapters
from wherefrom.models.adapters import add_adapter, add_adapters, network_parts, read_adapters
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.layer_names import network_names
from wherefrom.models.pipeline import load_model, load_pipeline, model_from_pipeline

KINDS: dict[str, Callable[[Path], Path]] = {
    "1": stable_diffusion,
    "xl": stable_diffusion_xl,
    "3": stable_diffusion_3,
    "pixart": pixart,
}
WORDS = (
    ".attn1.to_q",
    ".attn2.to_k",
    ".attn.add_k_proj",
    ".attn.to_q",
    ".ff.net.0.proj",
    ".resnets.0.conv1",
    ".proj_in",
)
TEXT = (".q_proj", ".fc1", ".SelfAttention.q")
PREFIX = {"1": "lora_unet_", "xl": "lora_unet_", "3": "lora_transformer_", "pixart": "lora_transformer_"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(f"model-{kind}")) for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, DiffusionModel]:
    return {kind: load_model(str(folder), torch.float64) for kind, folder in folders.items()}


def losses(model: DiffusionModel) -> Tensor:
    random = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 4, 4, generator=random, dtype=torch.float64)
    assert model.encoder is not None
    captions = model.encoder.text.encode(["a big red square", "stripes"])
    with torch.no_grad():
        return model.losses(latents, captions, torch.tensor([100, 700]), noise)


def loaded(model: DiffusionModel, *files: Path, weight: float = 1.0) -> DiffusionModel:
    """A copy of a model with adapters in it."""
    result = copy.deepcopy(model)
    add_adapters(result, read_adapters([AdapterSource(str(file), weight) for file in files]))
    return result


def check_merged(base: DiffusionModel, result: DiffusionModel, expected: DiffusionModel) -> None:
    """The result has the losses of the expected, which are others than the base's."""
    assert (losses(result) / losses(base) - 1).abs().max() > 1e-4
    torch.testing.assert_close(losses(result), losses(expected), rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (made_up.lora, False),
        (made_up.tucker_lora, False),
        (made_up.loha, False),
        (made_up.tucker_loha, True),
        (made_up.whole_lokr, False),
        (made_up.low_lokr, False),
        (made_up.tucker_lokr, False),
        (made_up.dora_of_outputs, True),
        (made_up.dora_of_inputs, True),
        (made_up.dora_of_loha, True),
        (made_up.whole, True),
    ],
)
def test_the_output_is_that_of_merged_weights(
    models: dict[str, DiffusionModel], tmp_path: Path, make: Make, fused: bool
) -> None:
    base = models["1"]
    layers = made(targets(base.denoiser, WORDS), make)
    assert {len(parts["alpha"].shape) if "alpha" in parts else 0 for parts in layers.values()} == {0}
    result = loaded(base, save(tmp_path / "a.safetensors", kohya(layers)))
    expected = copy.deepcopy(base)
    merge_into(expected.denoiser, layers)
    check_merged(base, result, expected)
    (record,) = known_adapters(result.denoiser)
    assert (record.name, record.weight, record.fused) == ("a.safetensors", 1.0, fused)
    assert bool(result.notes) == fused


@pytest.mark.parametrize("kind", ["xl", "3", "pixart"])
@pytest.mark.parametrize("make", [made_up.lora, made_up.loha, made_up.low_lokr])
def test_every_family_takes_every_kind(
    models: dict[str, DiffusionModel], tmp_path: Path, kind: str, make: Make
) -> None:
    base = models[kind]
    layers = made(targets(base.denoiser, WORDS), make)
    assert len(layers) >= 4
    result = loaded(base, save(tmp_path / "a.safetensors", kohya(layers, PREFIX[kind])), weight=-0.4)
    expected = copy.deepcopy(base)
    merge_into(expected.denoiser, layers, -0.4)
    check_merged(base, result, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_text_encoders_are_changed_too(models: dict[str, DiffusionModel], tmp_path: Path, kind: str) -> None:
    base = models[kind]
    names = {"1": ["lora_te_"], "xl": ["lora_te1_", "lora_te2_"], "3": ["lora_te1_", "lora_te2_", "lora_te3_"]}
    prefixes = names.get(kind, ["lora_te_"])
    expected, tensors = copy.deepcopy(base), {}
    encoders = [part for name, part in network_parts(expected).items() if name != "network"]
    assert len(encoders) == len(prefixes)
    for seed, (prefix, encoder) in enumerate(zip(prefixes, encoders, strict=True)):
        layers = made(targets(encoder, TEXT), lora, seed)
        assert layers
        # CLIP's layers are called with `text_model` before them, whatever transformers calls them today.
        clip = "SelfAttention" not in next(iter(layers))
        named = {f"text_model.{name.removeprefix('text_model.')}" if clip else name: x for name, x in layers.items()}
        tensors |= kohya(named, prefix)
        merge_into(encoder, layers)
    result = loaded(base, save(tmp_path / "a.safetensors", tensors))
    check_merged(base, result, expected)


def _as(layers: dict[str, Parts], name: Callable[[str], str], down: str, up: str, alpha: str | None) -> Parts:
    result = {}
    for layer, parts in layers.items():
        result[f"{name(layer)}{down}"] = parts["lora_down.weight"]
        result[f"{name(layer)}{up}"] = parts["lora_up.weight"]
        if alpha is not None:
            result[f"{name(layer)}{alpha}"] = parts["alpha"]
    return result


def _processor(layer: str) -> str:
    owner, _, last = layer.removesuffix(".0").rpartition(".")
    return f"unet.{owner}.processor.{last}"


@pytest.mark.parametrize("layout", ["kohya", "diffusers", "header", "older", "oldest", "peft", "first names"])
def test_one_adapter_in_every_layout_is_one_model(
    models: dict[str, DiffusionModel], tmp_path: Path, layout: str
) -> None:
    base = models["1"]
    layers = made(targets(base.denoiser, (".to_q", ".to_k", ".to_out.0")), lora)
    plain, header, file = {}, None, tmp_path / "a.safetensors"
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["to_q", "to_k", "to_out.0"]}
    if layout == "kohya":
        plain = kohya(layers)
    elif layout == "diffusers":
        plain = _as(layers, lambda name: f"unet.{name}", ".lora_A.weight", ".lora_B.weight", ".alpha")
    elif layout == "header":
        plain = _as(layers, lambda name: f"unet.{name}", ".lora_A.weight", ".lora_B.weight", None)
        header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    elif layout == "older":
        plain = _as(layers, lambda name: f"unet.{name}", ".lora.down.weight", ".lora.up.weight", ".alpha")
    elif layout == "oldest":
        plain = _as(layers, _processor, "_lora.down.weight", "_lora.up.weight", "_lora.alpha")
        plain = {key.replace("_lora.alpha", ".alpha"): value for key, value in plain.items()}
    elif layout == "peft":
        plain = _as(layers, lambda name: f"base_model.model.{name}", ".lora_A.weight", ".lora_B.weight", None)
        file = tmp_path / "adapter_model.safetensors"
        beside = {"peft_type": "LORA", **settings, "lora_alpha": 1, "alpha_pattern": {"to_q": ALPHA}, "bias": "none"}
        beside["alpha_pattern"] |= {f"^{name}": ALPHA for name in layers if not name.endswith("to_q")}
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    else:
        first = {
            places[0].module: name
            for name, places in network_names(_layers(base.denoiser)).items()
            if name.startswith(("input_", "middle_", "output_"))
        }
        assert len(layers) == sum(name in first for name in layers)
        plain = _as(layers, lambda name: f"diffusion_model.{first[name]}", ".lora_A.weight", ".lora_B.weight", ".alpha")
    result = loaded(base, save(file, plain, header))
    reference = loaded(base, save(tmp_path / "k.safetensors", kohya(layers)))
    assert result.fingerprint() == reference.fingerprint() != base.fingerprint()


def _layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(getattr(module, "weight", None), Tensor)]


@pytest.mark.parametrize(("kind", "text"), [("1", False), ("1", True), ("xl", True)])
def test_what_diffusers_loads_as_well_is_the_same_model(
    folders: dict[str, Path], tmp_path: Path, kind: str, text: bool
) -> None:
    def both(path: Path) -> tuple[Any, DiffusionModel]:
        pipeline: Any = load_pipeline(str(folders[kind]))
        pipeline.load_lora_weights(str(path))
        return pipeline, loaded(load_model(str(folders[kind])), path)

    base = load_model(str(folders[kind]))
    tensors = _as(
        made(targets(base.denoiser, WORDS[:4]), lora),
        lambda name: f"unet.{name}",
        ".lora_A.weight",
        ".lora_B.weight",
        None,
    )
    names = [name for name in network_parts(base) if name != "network"]
    for name in names if text else []:
        layers = made(targets(network_parts(base)[name], TEXT), lora)
        long = {f"text_model.{layer.removeprefix('text_model.')}": parts for layer, parts in layers.items()}
        prefix = name
        tensors |= _as(long, lambda each, prefix=prefix: f"{prefix}.{each}", ".lora_A.weight", ".lora_B.weight", None)
    pipeline, result = both(save(tmp_path / "a.safetensors", tensors))
    theirs = model_from_pipeline(pipeline)
    assert list(result.denoiser.state_dict()) == list(theirs.denoiser.state_dict())
    assert result.fingerprint() == theirs.fingerprint()
    assert result.encoder is not None
    assert theirs.encoder is not None
    assert result.encoder.identity() == theirs.encoder.identity()
    assert (result.encoder.identity() != base.encoder.identity()) is text  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["1", "xl"])
def test_first_names_of_a_unet_are_those_of_single_files(models: dict[str, DiffusionModel], kind: str) -> None:
    network: Any = models[kind].denoiser
    names = network_names(_layers(network))
    first = {name: places[0].module for name, places in names.items() if places[0].module != name}
    assert sorted(first.values()) == sorted(
        name for name in _layers(network) if name != "conv_norm_out" or "out.0" in first
    )
    checkpoint = {
        f"model.diffusion_model.{name}.{kind}": value
        for name, module in first.items()
        for kind, value in network.get_submodule(module).named_parameters()
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, network.config)
    for module in first.values():
        assert converted[f"{module}.weight"] is network.get_submodule(module).weight, module


@pytest.mark.parametrize("make", [made_up.lora, made_up.loha, made_up.low_lokr, made_up.dora_of_outputs])
def test_first_names_of_stable_diffusion_3_split_what_was_one_layer(
    models: dict[str, DiffusionModel], tmp_path: Path, make: Make
) -> None:
    base = models["3"]
    network = base.denoiser
    places = {name: found for name, found in network_names(_layers(network)).items() if found[0].module != name}
    places["context_embedder"] = network_names(_layers(network))["context_embedder"]

    def original(of: nn.Module) -> Parts:
        """The network as Stability's code writes it: the conversion's inverse, up to the order of halves."""
        result: Parts = {"pos_embed": torch.zeros(1)}
        for name, found in places.items():
            for kind in ("weight", "bias"):
                rows = [getattr(of.get_submodule(place.module), kind) for place in found]
                value = torch.cat(list(rows))
                if found[0].rows is not None and found[0].of == 1:
                    value = torch.cat(value.chunk(2)[::-1])
                result[f"{name}.{kind}"] = value
        return result

    whole = original(network)
    shapes = {
        key.removesuffix(".weight"): tuple(value.shape)
        for key, value in whole.items()
        if key.startswith("joint_blocks") and key.endswith(".weight") and value.dim() == 2
    }
    assert any("context_block.adaLN" in name for name in shapes)
    layers = made(shapes, make)
    for name, parts in layers.items():
        whole[f"{name}.weight"] = made_up.summed(whole[f"{name}.weight"], parts)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(whole)
    converted.pop("pos_embed.pos_embed")
    expected = copy.deepcopy(base)
    missing = expected.denoiser.load_state_dict(converted, strict=False)
    assert not missing.unexpected_keys
    check_merged(base, loaded(base, save(tmp_path / "a.safetensors", kohya(layers))), expected)


def test_a_single_file_takes_adapters_like_its_pipeline(
    folders: dict[str, Path], models: dict[str, DiffusionModel], tmp_path: Path
) -> None:
    folder = folders["1"]
    single = save_checkpoint(tmp_path / "civitai.safetensors", checkpoint_tensors(load_pipeline(str(folder)), "sd1"))
    layers = made(targets(models["1"].denoiser, WORDS), lora)
    file = save(tmp_path / "style.safetensors", kohya(layers))
    given = load_model(str(single), torch.float64, lora=[f"{file}:0.7"], base=str(folder))
    assert given.fingerprint() == loaded(models["1"], file, weight=0.7).fingerprint()


def test_two_adapters_add_up_and_keep_their_weights(models: dict[str, DiffusionModel], tmp_path: Path) -> None:
    base, result = models["1"], copy.deepcopy(models["1"])
    expected = copy.deepcopy(base)
    for number, (make, weight) in enumerate([(made_up.lora, 0.8), (made_up.loha, -0.5), (made_up.lora, 0.3)]):
        layers = made(targets(base.denoiser, WORDS), make, number)
        file = save(tmp_path / f"{number}.safetensors", kohya(layers))
        add_adapter(network_parts(result), read_adapter(file), weight)
        merge_into(expected.denoiser, layers, weight)
    check_merged(base, result, expected)
    assert [(each.name, each.weight) for each in known_adapters(result.denoiser)] == [
        ("0.safetensors", 0.8),
        ("1.safetensors", -0.5),
        ("2.safetensors", 0.3),
    ]
    assert len(adapter_scales(result.denoiser)) == 3 * len(targets(base.denoiser, WORDS))
    assert not any(parameter.requires_grad for parameter in result.denoiser.parameters())


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"peft_type": "LORA", "r": RANK, "lora_alpha": 6}, 6 / RANK),
        ({"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
        ({"peft_type": "LORA", "r": 99}, 8 / RANK),
        ({"peft_type": "LOHA", "r": RANK, "alpha": 6}, 6 / RANK),
        ({"peft_type": "LOKR", "r": 4, "alpha": 6, "rank_pattern": {"to_k": 3}}, 2.0),
    ],
)
def test_settings_beside_an_adapter_say_how_strongly_it_counts(
    models: dict[str, DiffusionModel], tmp_path: Path, settings: dict[str, Any], scale: float
) -> None:
    make = {"LORA": made_up.lora, "LOHA": made_up.loha, "LOKR": made_up.whole_lokr}[settings["peft_type"]]
    layers = made(targets(models["1"].denoiser, (".attn2.to_k",)), make)
    tensors = {
        f"base_model.model.{name}.{part.replace('down', 'A').replace('up', 'B')}": value
        for name, parts in layers.items()
        for part, value in parts.items()
        if part != "alpha"
    }
    save(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    result = loaded(models["1"], tmp_path)
    assert set(adapter_scales(result.denoiser).values()) == {scale}


def test_an_adapter_of_the_text_encoders_alone_leaves_the_network(
    models: dict[str, DiffusionModel], tmp_path: Path
) -> None:
    base = models["1"]
    layers = made(targets(network_parts(base)["text_encoder"], TEXT), lora)
    result = loaded(base, save(tmp_path / "a.safetensors", kohya(layers, "lora_te_text_model_")))
    assert result.fingerprint() == base.fingerprint()
    assert result.encoder is not None
    assert base.encoder is not None
    assert result.encoder.identity() != base.encoder.identity()
    assert "a.safetensors at 1" in result.description()
