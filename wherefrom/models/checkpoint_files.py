"""What a single file of weights is and holds, by its header alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Prefix -> the part it belongs to, and how the tensors behind it are called.
_PREFIXES: Mapping[str, tuple[str, str]] = {
    "model.diffusion_model.": ("network", "network"),
    "first_stage_model.": ("vae", "vae"),
    "vae.": ("vae", "vae"),
    "cond_stage_model.transformer.": ("text_encoder", "clip"),
    "cond_stage_model.model.": ("text_encoder", "open_clip"),
    "conditioner.embedders.0.transformer.": ("text_encoder", "clip"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "open_clip"),
    "text_encoders.clip_l.transformer.": ("text_encoder", "clip"),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", "clip"),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "t5"),
}
# What follows from the settings, was averaged, or is said in no weight; no image depends on it.
_NOT_NEEDED = re.compile(
    r"model_ema\..*|(?:sqrt_)?(?:one_minus_)?(?:recip(?:m1)?_)?alphas_cumprod(?:_prev)?|sqrt_reci(?:p|pm1)_alphas_cumprod"
    r"|sqrt_recipm1_alphas_cumprod|log_one_minus_alphas_cumprod|posterior_\w+|betas|lvlb_weights|logvar|scale_factor"
    r"|denoiser\.sigmas|model_sampling\.\w+|global_step|v_pred|ztsnr|first_stage_model\.loss\..*"
    r"|(?:.*\.)?(?:logit_scale|position_ids|attn_mask)"
)
_LORA = re.compile(r".*(?:\.lora_|\.lora\.|lora_unet_|lora_te|\.hada_|\.lokr_|\.oft_|\.dora_scale).*")
_NETWORKS = {"input_blocks.0.0.weight", "joint_blocks.0.x_block.attn.qkv.weight"}
_OTHERS = {
    "double_blocks.": "FLUX's or another transformer's",
    "transformer_blocks.": "a transformer of diffusers",
    "down_blocks.": "a U-Net of diffusers, which is read from its folder, with config.json",
    "encoder.down.": "an autoencoder alone",
    "encoder.down_blocks.": "an autoencoder alone",
    "text_model.": "a text encoder alone",
    "emb_params": "a textual inversion",
    "string_to_param": "a textual inversion",
}


@dataclass
class CheckpointFile:
    """A file's tensors by part.

    Attributes:
        path: The file.
        shapes: Every tensor's shape.
        metadata: What the header says besides.
        parts: Part -> (how its tensors are called, prefix, names).
        ignored: Names of tensors that are not needed.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    parts: dict[str, tuple[str, str, list[str]]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Values of some tensors."""
        with safe_open(self.path, "pt") as stream:
            return {name: stream.get_tensor(name) for name in names}

    def shape(self, end: str) -> tuple[int, ...] | None:
        """Shape of the network's tensor of this name."""
        _, prefix, _ = self.parts.get("network", ("", "", []))
        return self.shapes.get(f"{prefix}{end}")


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """What a single file holds, sorted by the pipeline's parts.

    Raises:
        ValueError: It is of another format, damaged, an adapter, or holds tensors that nobody would use.
    """
    if path.suffix in _PICKLES:
        raise ValueError(
            f"model: {path} is a pickled checkpoint, and nothing is unpickled, as that runs what is in it. Convert it "
            "to .safetensors where you trust it, or give its diffusers folder."
        )
    if path.suffix != ".safetensors":
        raise ValueError(
            f"model: {path} is no checkpoint that can be read: a single file ends in .safetensors; quantized formats "
            "such as .gguf have no weights to move."
        )
    try:
        with safe_open(path, "pt") as stream:
            metadata: dict[str, str] = stream.metadata() or {}
            shapes = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"model: {path} is damaged or no .safetensors file: {error}") from error
    found = CheckpointFile(path, shapes, metadata)
    _refuse_other_models(found)
    _sort(found)
    return found


def _refuse_other_models(found: CheckpointFile) -> None:
    """Refuses adapters and parts alone by what they are.

    Raises:
        ValueError: It is one.
    """
    names, path = found.shapes, found.path
    if names and all(_LORA.fullmatch(name) or name.endswith(".alpha") for name in names):
        raise ValueError(
            f"model: {path} is an adapter (LoRA) and no model: give its base as the model, and this file as the option "
            "'lora'."
        )
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        raise ValueError(f"model: {path} is Stable Diffusion XL's refiner, which completes other models' images.")
    if any(name.endswith((".scale_weight", "scaled_fp8")) or ".quant_state." in name for name in names):
        raise ValueError(
            f"model: {path} is quantized (its tensors come with scales): take the file in float32, bfloat16 or float16."
        )
    other = next((name for name in ("edm_mean", "edm_vpred.sigma_max") if name in names), None)
    if other:
        raise ValueError(
            f"model: {path} was trained by the EDM loss ({other} is in it), which is not supported: noise and velocity "
            "prediction and flow matching are."
        )


def _sort(found: CheckpointFile) -> None:
    """Says of every tensor which part it belongs to.

    Raises:
        ValueError: One belongs to none.
    """
    bare = bool(_NETWORKS & found.shapes.keys())
    unknown = []
    for name in found.shapes:
        prefix = next((each for each in _PREFIXES if name.startswith(each)), None)
        if _NOT_NEEDED.fullmatch(name):
            found.ignored.append(name)
        elif prefix is not None:
            part, naming = _PREFIXES[prefix]
            before = found.parts.setdefault(part, (naming, prefix, []))
            if before[1] != prefix:
                raise ValueError(f"model: {found.path} holds two {part}s: {before[1]}… and {prefix}….")
            before[2].append(name)
        elif bare:
            found.parts.setdefault("network", ("network", "", []))[2].append(name)
        else:
            unknown.append(name)
    if "network" not in found.parts:
        what = next((kind for start, kind in _OTHERS.items() if any(each.startswith(start) for each in unknown)), "")
        raise ValueError(
            f"model: {found.path} holds no U-Net or transformer of Stable Diffusion 1, 2, XL or 3 in the original "
            f"names (model.diffusion_model.…); it looks like {what or 'something else'}. Give a checkpoint of the "
            "whole model, or a diffusers folder."
        )
    if unknown:
        raise ValueError(
            f"model: {found.path} holds {len(unknown)} tensors that no part of Stable Diffusion uses, such as "
            f"{sorted(unknown)[0]}: what they do to an image is not known."
        )


def says(found: CheckpointFile, key: str) -> Any:
    """A value of the header by the model specification's name; None where it says nothing."""
    return found.metadata.get(f"modelspec.{key}") or None
