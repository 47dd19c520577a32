"""What would change the result of a pass is put into a tiny pipeline of every kind, and refused by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    IPAdapterAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.models.test_pipeline import KINDS
from tests.support.pipelines import stable_diffusion, unet_with
from tests.support.tiny import one_process, tiny_model
from wherefrom.attributors.unlearning.attributor import AttributionByUnlearning
from wherefrom.gradients.per_sample import PerSampleGradients
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.families.base import PipelineParts
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.models.pipeline import load_model, load_pipeline, model_from_pipeline

Change = Callable[[nn.Module], Any]
# The others have parts of the same classes.
OWN = ("sd1", "sdxl", "pixart", "sd3")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        kind: load_pipeline(str(save(tmp_path_factory.mktemp("pipeline"))))
        for kind, save in KINDS.items()
        if kind in OWN
    }


class Copies(Mapping[str, Any]):
    """A copy of each pipeline, made when it is first asked for; tokenizers, which no test here changes, are shared."""

    def __init__(self, loaded: dict[str, Any]) -> None:
        self.loaded, self.made = loaded, dict[str, Any]()

    def __getitem__(self, kind: str) -> Any:
        if kind not in self.made:
            pipeline = self.loaded[kind]
            shared = [part for name, part in pipeline.components.items() if name.startswith("tokenizer")]
            self.made[kind] = copy.deepcopy(pipeline, {id(part): part for part in shared})
        return self.made[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaded)

    def __len__(self) -> int:
        return len(self.loaded)


@pytest.fixture
def pipelines(loaded: dict[str, Any]) -> Copies:
    return Copies(loaded)


def network(pipeline: Any) -> Any:
    return PipelineParts(pipeline).network


def a_layer(part: nn.Module) -> nn.Module:
    """Somewhere in the middle of a part."""
    layers = [module for module in part.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return layers[len(layers) // 2]


def watch(module: nn.Module, *arguments: Any) -> None:
    """A hook of somebody's."""


class Doubled:
    """A hook that is an object."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return output


class OtherProcessor:
    """An attention processor of somebody's."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


def replace_forward(part: nn.Module) -> None:
    layer = a_layer(part)
    before = layer.forward

    @functools.wraps(before)  # as patches do, which then claim to be what they replace
    def forward(*arguments: Any, **named: Any) -> Any:
        return 2 * before(*arguments, **named)

    layer.forward = forward  # type: ignore[method-assign]


def exchange_class(part: nn.Module) -> None:
    """As packages do that merge tokens."""
    module = a_layer(part)
    module.__class__ = type("Merging", (type(module),), {"__module__": __name__})


def set_by_hand(part: nn.Module) -> None:
    name, module = next((n, m) for m in part.modules() for n in ("eps", "variance_epsilon") if hasattr(m, n))
    setattr(module, name, 0.1)


def exchange_layer(part: nn.Module) -> None:
    parent = next(each for each in part.modules() if isinstance(each._modules.get("0"), nn.Module))
    setattr(parent, "0", nn.Identity())


CHANGES: dict[str, tuple[Change, str]] = {
    "forward hook": (
        lambda part: a_layer(part).register_forward_hook(watch),
        "forward hook of unknown origin, 'watch'",
    ),
    "forward pre-hook": (lambda part: part.register_forward_pre_hook(watch), "forward pre hook of unknown origin"),
    "hook that is an object": (lambda part: part.register_forward_hook(Doubled()), "unknown origin, 'Doubled'"),
    "backward hook": (lambda part: a_layer(part).register_full_backward_hook(watch), "backward hook of unknown origin"),
    "forward": (replace_forward, "'forward' was replaced by .*replace_forward.*of tests.models"),
    "class": (exchange_class, "is a Merging of tests.* where its configuration makes a (Linear|Conv2d)"),
    "layer": (exchange_layer, "is a Identity of torch.* where its configuration makes a|is a layer, .*does not make"),
    "number": (set_by_hand, "(eps|variance_epsilon) = 0.1 where its configuration makes"),
    "parametrized": (lambda part: parametrizations.spectral_norm(a_layer(part)), "is a Parametrized"),
    "pruned": (lambda part: prune.random_unstructured(a_layer(part), "weight", 0.5), "forward pre hook of unknown"),
    "cast": (lambda part: part.add_module("extra", nn.Linear(1, 1)), r"\(extra\) is a layer, Linear"),
}


def hook_a_gradient(part: nn.Module) -> None:
    next(part.parameters()).requires_grad_(True).register_hook(lambda _: None)


# Copies, of which a model consists, have no such hooks; it is refused where somebody adds one to the model.
GRADIENT_HOOK: tuple[Change, str] = (hook_a_gradient, "backward hook of unknown origin")


@pytest.mark.parametrize("what", ["network", "vae", "text_encoder"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_part_is_refused_by_name(loaded: dict[str, Any], what: str, change: str) -> None:
    apply, message = CHANGES[change]
    named = {"network": "The network", "vae": "The autoencoder", "text_encoder": "The text encoder"}[what]
    for pipeline in loaded.values():
        name = ("unet" if hasattr(pipeline, "unet") else "transformer") if what == "network" else what
        whole = getattr(pipeline, name)
        part = copy.deepcopy(whole).requires_grad_(True)  # as after training; hooks on gradients need it
        apply(part)
        setattr(pipeline, name, part)
        try:
            with pytest.raises(ValueError, match=f"{named}.*({message})"):
                model_from_pipeline(pipeline)
        finally:
            setattr(pipeline, name, whole)


@pytest.mark.parametrize("change", ["forward hook", "forward", "class", "number", "gradient hook"])
def test_what_is_changed_later_is_seen_where_identities_are_computed(pipelines: Copies, change: str) -> None:
    apply, message = {**CHANGES, "gradient hook": GRADIENT_HOOK}[change]
    for pipeline in pipelines.values():
        model = model_from_pipeline(pipeline)
        assert model.encoder is not None
        before = model.encoder.identity()
        apply(model.denoiser)
        with pytest.raises(ValueError, match=f"The network.*({message})"):
            model.fingerprint()
        assert model.encoder.identity() == before
        text: Any = model.encoder.text
        apply(text.models[-1] if hasattr(text, "models") else text.model)
        with pytest.raises(ValueError, match=f"The text encoder.*({message})"):
            model.encoder.identity()
        apply(model.encoder.vae)
        with pytest.raises(ValueError, match=f"The autoencoder.*({message})"):
            model.encoder.identity()


def test_the_second_text_encoder_is_looked_at_too(pipelines: Copies) -> None:
    for kind, suffix in (("sdxl", "_2"), ("sd3", "_3")):
        getattr(pipelines[kind], f"text_encoder{suffix}").register_forward_hook(watch)
        with pytest.raises(ValueError, match=rf"The text encoder \(text_encoder{suffix}\) has a forward hook"):
            model_from_pipeline(pipelines[kind])


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (OtherProcessor(), "processor OtherProcessor of tests.*set_default_attn_processor"),
        (PAGIdentitySelfAttnProcessor2_0(), "PAGIdentitySelfAttnProcessor2_0.*perturbed attention"),
        (CustomDiffusionAttnProcessor(hidden_size=8, cross_attention_dim=12), "CustomDiffusion.*customized model"),
        (IPAdapterAttnProcessor2_0(8, 12), "IPAdapterAttnProcessor2_0.*unload_ip_adapter"),
        (functools.partial(AttnProcessor2_0()), "processor partial of functools"),
    ],
)
def test_attention_processors_that_nobody_knows_are_refused(pipelines: Copies, processor: Any, message: str) -> None:
    for pipeline in pipelines.values():
        layers = [module for module in network(pipeline).modules() if hasattr(module, "set_processor")]
        layers[-1].set_processor(processor)
        with pytest.raises(ValueError, match=f"The network.*{message}"):
            model_from_pipeline(pipeline)


def test_processors_that_compute_the_same_change_no_fingerprint(pipelines: Copies) -> None:
    for kind in ("sd1", "sdxl", "pixart"):
        before = model_from_pipeline(pipelines[kind]).fingerprint()
        for processor in (AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(2)):
            network(pipelines[kind]).set_attn_processor(processor)
            assert model_from_pipeline(pipelines[kind]).fingerprint() == before
        network(pipelines[kind]).enable_gradient_checkpointing()
        pipelines[kind].vae.enable_slicing()
        assert model_from_pipeline(pipelines[kind]).fingerprint() == before


def test_an_attention_of_few_bits_is_refused(pipelines: Copies) -> None:
    unet = network(pipelines["sd1"])
    layer = next(module for module in unet.modules() if hasattr(module, "processor"))
    layer.processor._attention_backend = "native"
    before = model_from_pipeline(pipelines["sd1"]).fingerprint()
    assert before
    layer.processor._attention_backend = "sage"
    with pytest.raises(ValueError, match=r"attends by the backend 'sage'.*set_attention_backend"):
        model_from_pipeline(pipelines["sd1"])


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_freeu_is_refused_until_it_is_switched_off(pipelines: Copies, kind: str) -> None:
    pipeline = pipelines[kind]
    model = model_from_pipeline(pipeline)
    before, unet = model.fingerprint(), model.denoiser
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    with pytest.raises(ValueError, match=r"up_blocks.0\) has FreeU switched on \(b1 = 1.5.*disable_freeu\(\)"):
        model_from_pipeline(pipeline)
    assert model.fingerprint() == before  # it has a copy of the network
    pipeline.disable_freeu()
    assert model_from_pipeline(pipeline).fingerprint() == before
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"up_blocks.0\) has FreeU switched on"):
        model.fingerprint()
    unet.disable_freeu()  # type: ignore[operator]
    assert model.fingerprint() == before


@pytest.mark.parametrize("owner", [UNet2DConditionModel, Attention, AttnProcessor2_0, nn.Conv2d])
def test_a_patched_class_is_refused(pipelines: Copies, owner: type, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "__call__" if owner is AttnProcessor2_0 else "forward"
    before = getattr(owner, name)

    @functools.wraps(before)
    def patched(*arguments: Any, **named: Any) -> Any:
        return before(*arguments, **named)

    model = model_from_pipeline(pipelines["sd1"])
    monkeypatch.setattr(owner, name, patched)
    with pytest.raises(ValueError, match=rf"{owner.__name__}.{name} was replaced by .*patched' of tests.models"):
        model.fingerprint()


def test_patched_functions_and_hooks_on_all_modules_are_refused(
    pipelines: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_from_pipeline(pipelines["sd3"])
    handle = nn.modules.module.register_module_forward_hook(watch)
    try:
        with pytest.raises(ValueError, match=r"torch.nn.Module has a forward hook of unknown origin, 'watch'"):
            model.fingerprint()
    finally:
        handle.remove()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: None)
    with pytest.raises(ValueError, match=r"torch.nn.functional.scaled_dot_product_attention was replaced by"):
        model.fingerprint()


def test_caches_of_diffusers_are_refused(pipelines: Copies) -> None:
    model = model_from_pipeline(pipelines["sd3"])
    HookRegistry.check_if_exists_or_initialize(pipelines["sd3"].transformer).register_hook(ModelHook(), "cache")
    with pytest.raises(ValueError, match=r"The pipeline's transformer has diffusers' hook 'cache'"):
        model_from_pipeline(pipelines["sd3"])
    HookRegistry.check_if_exists_or_initialize(model.denoiser).register_hook(ModelHook(), "cache")
    with pytest.raises(ValueError, match=r"The network: its 'forward' was replaced by .* of diffusers.hooks"):
        model.fingerprint()


def test_dropout_is_off() -> None:
    model = tiny_model()
    model.denoiser.train()  # without dropout, training mode says nothing
    before = model.fingerprint()
    (layer,) = [
        module for name, module in model.denoiser.named_modules() if name.endswith("mid_block.resnets.0.dropout")
    ]
    layer.p = 0.5  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"dropout\) has p = 0.5 where its configuration makes 0.0"):
        model.fingerprint()
    dropping = DiffusionModel(unet_with(dropout=0.5), model.noise_schedule)
    with pytest.raises(ValueError, match=r"drops values at random \(dropout 0.5 in training mode\).*eval\(\)"):
        dropping.fingerprint()
    dropping.denoiser.eval()
    assert dropping.fingerprint() != before


def test_our_own_hooks_are_known() -> None:
    model = tiny_model()
    before = model.fingerprint()
    with PerSampleGradients(model.denoiser, list(select_weights(model.denoiser, "cross_attention_kv"))):
        assert model.fingerprint() == before


@pytest.mark.parametrize(
    ("save", "changes", "message"),
    [
        (stable_diffusion, {"time_cond_proj_dim": 8}, "time_cond_proj_dim = 8.*strength of guidance"),
        (stable_diffusion, {"num_class_embeds": 3}, "num_class_embeds = 3.*classes of images"),
        (stable_diffusion, {"attention_type": "gated"}, "attention_type = 'gated'.*boxes"),
        (stable_diffusion, {"dual_cross_attention": True}, "dual_cross_attention = True.*prompt image"),
        (stable_diffusion, {"out_channels": 8}, r"takes 4 channels and says 8 \(out_channels\)"),
        (stable_diffusion, {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        (stable_diffusion, {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 12}, "encoder_hid_dim_type"),
    ],
)
def test_settings_that_need_more_than_a_caption_are_refused(
    tmp_path: Path, save: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(str(save(tmp_path, unet=unet_with(**changes))))


def test_a_setting_that_its_class_does_not_know_is_refused(pipelines: Copies) -> None:
    for pipeline in pipelines.values():
        network(pipeline).register_to_config(rotary_positions=True, num_vector_embeds=None, old_layout=False)
        with pytest.raises(ValueError, match="The network has rotary_positions = True in its configuration, which"):
            model_from_pipeline(pipeline)


def test_settings_that_the_network_itself_heeds_are_no_reason(tmp_path: Path) -> None:
    changes = {"only_cross_attention": True, "center_input_sample": True, "act_fn": "gelu", "upcast_attention": True}
    model = load_model(str(stable_diffusion(tmp_path, unet=unet_with(**changes))))
    assert "/settings " in model.fingerprint()


def test_other_pipelines_are_refused(pipelines: Copies) -> None:
    plain = pipelines["sd1"]
    before = model_from_pipeline(plain).fingerprint()
    for kind in (StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline):
        other = kind(**plain.components, requires_safety_checker=False)
        with pytest.raises(ValueError, match=rf"A {kind.__name__} is not supported.*StableDiffusionPipeline.from_pipe"):
            model_from_pipeline(other)
        again = diffusers.StableDiffusionPipeline.from_pipe(other)  # what the message says
        assert model_from_pipeline(again).fingerprint() == before

    class Mine(StableDiffusionPipeline):
        """A pipeline that may do anything with its parts."""

    with pytest.raises(ValueError, match="A Mine is not supported"):
        model_from_pipeline(Mine(**plain.components, requires_safety_checker=False))


def test_a_store_is_not_poisoned_by_freeu(pipelines: Copies, tmp_path: Path) -> None:
    """Losses with FreeU would be kept under the plain model's name: the run ends before it keeps anything."""
    from tests.support.pipelines import images
    from wherefrom.attributors import TrainingData
    from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
    from wherefrom.curvature import DiagonalFisher, FisherSettings
    from wherefrom.data.encoded_images import encode_image_set
    from wherefrom.gradients.loss_grid import LossGrid
    from wherefrom.queries.sources import generate
    from wherefrom.runtime.artifacts import Store

    store, train = Store(tmp_path / "store"), images(3)
    model = model_from_pipeline(pipelines["sd1"])
    unet: Any = model.denoiser
    assert model.encoder is not None
    data = TrainingData(train, encode_image_set(train, encoder=model.encoder, store=store))
    queries = generate(model, prompts=["stripes"], seed=0, shape=(4, 4, 4), sampling_steps=2)

    def scores() -> Any:
        method = AttributionByUnlearning(
            "cross_attention_kv",
            unlearning=UnlearningSettings(noise_samples=4, measurement_samples=4, relative_loss_increase=1e-3),
            grid=LossGrid(timesteps=2),
            curvature=DiagonalFisher(FisherSettings(1)),
            timestep_weights="equal",
        )
        method.fit(data, model, store, one_process())
        return next(iter(method.score(queries))).scores

    made = {path.name for path in (tmp_path / "store").rglob("*")}
    unet.enable_freeu(s1=0.5, s2=0.2, b1=1.5, b2=1.6)
    with pytest.raises(ValueError, match="has FreeU switched on"):
        scores()
    assert {path.name for path in (tmp_path / "store").rglob("*")} == made
    unet.disable_freeu()
    first = scores()
    unet.enable_freeu(s1=0.5, s2=0.2, b1=1.5, b2=1.6)
    with pytest.raises(ValueError, match="has FreeU switched on"):
        scores()
    unet.disable_freeu()
    assert (scores() == first).all()
