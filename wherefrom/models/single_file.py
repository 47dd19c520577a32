"""Checkpoints of one file in the original names (Civitai, ComfyUI, A1111), as diffusers pipelines.

Every tensor of the file is used or known as not needed, and every weight of the model comes from the file; parts that
a file does not hold come from a base pipeline, or the file is refused. Renaming is diffusers' own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.loaders import single_file_utils as original
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from wherefrom.models.checkpoint_files import CheckpointFile, read_checkpoint_file, says
from wherefrom.models.clip_vocabulary import clip_tokenizer
from wherefrom.models.families.base import PipelineParts
from wherefrom.models.loaded_parts import check_finite
from wherefrom.models.released_models import Blueprint, ReleasedModel, released_models

_BASE = "name a pipeline that has it as the option 'base'"
_VELOCITY = ("v", "v_prediction", "v-prediction")
# Of OpenCLIP's attention the file has queries, keys and values in one tensor, which is cut into three.
_CUT = (".in_proj_weight", ".in_proj_bias", "text_projection")


def load_single_file(
    path: Path,
    dtype: torch.dtype = torch.float32,
    base: DiffusionPipeline | None = None,
    released: Mapping[str, ReleasedModel] | None = None,
) -> tuple[DiffusionPipeline, list[str]]:
    """A pipeline of the weights of one file.

    Args:
        path: A `.safetensors` file in the original names.
        dtype: Type of number.
        base: Where settings, scheduler, tokenizers and missing parts come from; its parts are replaced in place. None
            takes the released model's that the file is a fine-tuning of.
        released: Released models by short name; None takes the packaged ones.

    Returns:
        The pipeline, and what is to be said of it.

    Raises:
        ValueError: The file is no model, lacks tensors or parts, holds others, or does not say what is needed.
    """
    found = read_checkpoint_file(path)
    channels = found.shape("input_blocks.0.0.weight")
    if channels is not None and len(channels) == 4 and channels[1] not in (4, 16):
        raise ValueError(
            f"model: {path} takes {channels[1]} channels: models that edit or fill in images are no text-to-image "
            "models."
        )
    if base is None:
        return _released(found, dtype, released_models() if released is None else released)
    parts = PipelineParts(base)
    parts.components = dict(parts.components)
    network = "unet" if parts.components.get("unet") is not None else "transformer"
    names = {"network": network}
    for part in found.parts:
        name = names.get(part, part)
        there: Any = parts.components.get(name)
        if there is None:
            raise ValueError(f"model: {path} holds a {name}, which the base does not have: it is another model's.")
        parts.components[name] = _filled(found, part, Blueprint.of(there), dtype)
        base.register_modules(**{name: parts.components[name]})
    kept = [name for name in parts.components if name.startswith(("vae", "text_enc")) and name not in found.parts]
    kept = [name for name in kept if parts.components[name] is not None]
    notes = [f"Not in {path.name}, and so the base's: {', '.join(kept)}."] if kept else []
    scheduler: Any = base.scheduler
    said = _prediction(found)
    if said is not None and said != getattr(scheduler.config, "prediction_type", said):
        notes.append(f"{path.name} says that it predicts {said}, and is followed; the base's scheduler says otherwise.")
        base.register_modules(scheduler=_schedule(scheduler.config, said, "ztsnr" in found.shapes))
    elif "ztsnr" in found.shapes:
        base.register_modules(scheduler=_schedule(scheduler.config, None, True))
    side, made_for = _side(found, parts.reduction), parts.components[network].config.sample_size
    if side is not None and side != made_for:
        given, other = side * parts.reduction, made_for * parts.reduction
        notes.append(
            f"{path.name} says that its images have {given} pixels a side, and is followed; the base's {other}."
        )
        parts.components[network].register_to_config(sample_size=side)
    _check_noise_levels(found, base.scheduler)
    return base, [*notes, *_averaged(found)]


def _released(
    found: CheckpointFile, dtype: torch.dtype, released: Mapping[str, ReleasedModel]
) -> tuple[DiffusionPipeline, list[str]]:
    """The file as a fine-tuning of a released model."""
    model = released[_model_name(found)]
    prediction = _prediction(found) or model.prediction
    if prediction is None:
        raise ValueError(
            f"model: {found.path} does not say whether it predicts noise or velocity (models of {model.name} do "
            "either): name the pipeline that it was trained from as the option 'base', whose scheduler says it."
        )
    if "text_encoder_3" in found.parts:
        raise ValueError(
            f"model: {found.path} holds a T5, whose tokenizer is in no file here: name a pipeline of {model.name} as "
            "the option 'base', from which it is taken."
        )
    parts: dict[str, Any] = {}
    for name, blueprint in model.parts.items():
        part = "network" if name in ("unet", "transformer") else name
        if part not in found.parts:
            raise ValueError(f"model: {found.path} lacks the {name} of {model.name}: {_BASE}.")
        parts[name] = _filled(found, part, blueprint, dtype, model.name)
    parts |= {name: clip_tokenizer(pad) for name, pad in model.pads.items()}
    config = model.scheduler.config
    flow = prediction == "flow"
    parts["scheduler"] = model.scheduler.build() if flow else _schedule(config, prediction, "ztsnr" in found.shapes)
    _check_noise_levels(found, parts["scheduler"])
    reduction = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    side = _side(found, reduction)
    network: Any = next(parts[name] for name in ("unet", "transformer") if name in parts)
    if side is not None:
        network.register_to_config(sample_size=side)
    absent: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if flow else {}
    if "safety_checker" in inspect.signature(model.pipeline.__init__).parameters:
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline: DiffusionPipeline = model.pipeline(**parts, **absent)
    what = {"epsilon": "the noise", "v_prediction": "the velocity", "flow": "the flow"}[prediction]
    pixels = int(network.config.sample_size) * reduction
    notes = [
        f"{found.path.name} was read as a {model.name} of {pixels} × {pixels} pixels that predicts {what}; the file "
        f"{'says so' if _prediction(found) else 'says nothing else'}."
    ]
    if flow:
        notes.append(f"{found.path.name} holds no T5: prompts are read by the two CLIPs alone.")
    return pipeline, [*notes, *_averaged(found)]


def _model_name(found: CheckpointFile) -> str:
    """Which released model the file is a fine-tuning of, by its parts.

    Raises:
        ValueError: It holds the network alone.
    """
    names, parts = found.shapes, found.parts
    if found.shape("joint_blocks.0.x_block.attn.qkv.weight"):
        prefix = parts["network"][1]
        if any(".x_block.attn2." in name for name in names):
            return "sd3.5_medium"
        normed = f"{prefix}joint_blocks.0.x_block.attn.ln_q.weight" in names
        return "sd3.5_large" if normed else "sd3_medium"
    if "text_encoder_2" in parts:
        return "sdxl"
    if "text_encoder" not in parts:
        raise ValueError(
            f"model: {found.path} holds a U-Net and no text encoder: name the pipeline that it was trained from as the "
            "option 'base', whose text encoder and autoencoder are taken."
        )
    return "sd2" if parts["text_encoder"][0] == "open_clip" else "sd1"


def _prediction(found: CheckpointFile) -> str | None:
    """What the file says that the network predicts."""
    said = str(says(found, "prediction_type") or "").lower()
    if "v_pred" in found.shapes or said in _VELOCITY:
        return "v_prediction"
    if said in ("epsilon", "eps"):
        return "epsilon"
    architecture = str(says(found, "architecture") or "").lower()
    if architecture.startswith("stable-diffusion-v2-768-v"):
        return "v_prediction"
    return "epsilon" if architecture.startswith("stable-diffusion-v2-512") else None


def _side(found: CheckpointFile, reduction: int) -> int | None:
    """Side of the latents, where the file says how large the model's images are."""
    said = str(says(found, "resolution") or "")
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", said)
    if match and match[1] == match[2] and int(match[1]) % reduction == 0:
        return int(match[1]) // reduction
    architecture = str(says(found, "architecture") or "").lower()
    return 512 // reduction if architecture.startswith("stable-diffusion-v2-512") else None


def _schedule(config: Mapping[str, Any], prediction: str | None, zero_snr: bool) -> Any:
    """A scheduler of these settings, with what the file itself says."""
    said: dict[str, Any] = {} if prediction is None else {"prediction_type": prediction}
    if zero_snr:
        said["rescale_betas_zero_snr"] = True
    known = inspect.signature(DDIMScheduler.__init__).parameters
    return DDIMScheduler(**{key: value for key, value in {**config, **said}.items() if key in known})


def _check_noise_levels(found: CheckpointFile, scheduler: Any) -> None:
    """Compares the noise levels that older files hold with the scheduler's.

    Raises:
        ValueError: They differ: the model was trained with others.
    """
    expected = getattr(scheduler, "alphas_cumprod", None)
    if "alphas_cumprod" not in found.shapes or expected is None:
        return
    kept = found.tensors(["alphas_cumprod"])["alphas_cumprod"].float()
    if kept.shape != expected.shape or not torch.allclose(kept, expected.float(), rtol=0.02, atol=1e-4):
        raise ValueError(
            f"model: {found.path} was trained with other noise levels (alphas_cumprod) than its scheduler's: name "
            "the pipeline that it was trained from as the option 'base'."
        )


def _averaged(found: CheckpointFile) -> list[str]:
    """Says that a file's second set of weights is left alone."""
    if not any(name.startswith("model_ema.") for name in found.ignored):
        return []
    return [
        f"{found.path.name} also holds averaged weights (model_ema), which A1111 and ComfyUI do not draw with, and "
        "which were left out."
    ]


def _filled(
    found: CheckpointFile, part: str, blueprint: Blueprint, dtype: torch.dtype, of: str = "the base"
) -> nn.Module:
    """A part with its weights from the file.

    Raises:
        ValueError: A tensor is missing, misshaped, left over, or holds no numbers.
    """
    naming, prefix, names = found.parts[part]
    with torch.random.fork_rng(devices=[]), no_init_weights():  # every weight comes from the file
        model: Any = blueprint.build()
    tensors = found.tensors(names)
    try:
        converted, unused = _CONVERTERS[naming](tensors, prefix, model)
    except (KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"model: the {type(model).__name__} of {found.path} is not that of {of}: {' '.join(str(error).split())} is "
            "missing or of another shape."
        ) from error
    kind = f"{type(model).__name__} of {of}"
    expected = model.state_dict()
    for name in sorted(expected.keys() - converted.keys()):
        raise ValueError(f"model: {found.path} lacks the tensor {name} (diffusers' name) of the {kind}.")
    unused += sorted(converted.keys() - expected.keys())
    if unused:
        raise ValueError(f"model: {found.path} holds the tensor {unused[0]}, which the {kind} does not have.")
    for name, value in converted.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"model: the tensor {name} of {found.path} has shape {tuple(value.shape)}, that of the {kind} "
                f"{tuple(expected[name].shape)}."
            )
        converted[name] = value.to(dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
    model.load_state_dict(converted, assign=True)
    check_finite(model, str(found.path))
    filled: nn.Module = model.to(dtype).eval()
    return filled


Converted = tuple[dict[str, Tensor], list[str]]


def _without(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _unused(tensors: Mapping[str, Tensor], converted: Mapping[str, Tensor]) -> list[str]:
    """Tensors that renaming dropped: the renamed ones lie where the file's do."""
    used = {value.data_ptr() for value in converted.values()}
    return [name for name, value in tensors.items() if value.data_ptr() not in used and not name.endswith(_CUT)]


def _network(tensors: dict[str, Tensor], prefix: str, model: Any) -> Converted:
    """A U-Net, or Stable Diffusion 3's transformer, by what the network is."""
    own = _without(tensors, prefix)
    if own.keys() == model.state_dict().keys():
        return own, []
    named = {f"{original.LDM_UNET_KEY}{name}": value for name, value in own.items()}
    if "joint_blocks.0.x_block.attn.qkv.weight" in own:
        converted = original.convert_sd3_transformer_checkpoint_to_diffusers(own)
        return converted, sorted(own)  # diffusers takes out what it uses
    converted = original.convert_ldm_unet_checkpoint(named, model.config)
    return converted, _unused(named, converted)


def _autoencoder(tensors: dict[str, Tensor], prefix: str, model: Any) -> Converted:
    converted = original.convert_ldm_vae_checkpoint(
        {f"first_stage_model.{name}": value for name, value in _without(tensors, prefix).items()}, model.config
    )
    return converted, _unused(tensors, converted)


def _clip(tensors: dict[str, Tensor], prefix: str, model: Any) -> Converted:
    """A CLIP in transformers' names, of which one kind of model says `text_model.` and the other does not."""
    own = {name.removeprefix("text_model."): value for name, value in _without(tensors, prefix).items()}
    if not hasattr(model, "text_model"):
        own.pop("text_projection.weight", None)
        return own, []
    top = ("text_projection.",)
    converted = {name if name.startswith(top) else f"text_model.{name}": value for name, value in own.items()}
    if "text_projection.weight" not in converted and ".clip_l." in prefix:  # left out, as it changes nothing
        converted["text_projection.weight"] = torch.eye(model.config.projection_dim, model.config.hidden_size)
    return converted, []


def _open_clip(tensors: dict[str, Tensor], prefix: str, model: Any) -> Converted:
    """A CLIP in OpenCLIP's names; Stable Diffusion 2 reads it before its last layer, which is left out."""
    converted = original.convert_open_clip_checkpoint(model, tensors, prefix)
    left_out = set(original.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE)
    unused = [name for name in _unused(tensors, converted) if name not in left_out]
    if not hasattr(model, "text_model"):
        converted = {name.removeprefix("text_model."): value for name, value in converted.items()}
        converted.pop("text_projection.weight", None)
    return converted, unused


def _t5(tensors: dict[str, Tensor], prefix: str, model: Any) -> Converted:
    own = _without(tensors, prefix)
    tied = "encoder.embed_tokens.weight"
    if "shared.weight" in own and tied in model.state_dict():
        own.setdefault(tied, own["shared.weight"])
    return own, []


_CONVERTERS: Mapping[str, Callable[[dict[str, Tensor], str, Any], Converted]] = {
    "network": _network,
    "vae": _autoencoder,
    "clip": _clip,
    "open_clip": _open_clip,
    "t5": _t5,
}
