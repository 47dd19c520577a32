"""Attention processors: which of diffusers' compute the same, so that any of them may stand in a part."""

from __future__ import annotations

from typing import Any

from diffusers.models import attention_processor as known
from torch import nn

# Each row computes the same, in other orders of summation.
_ALIKE = (
    ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor", "AttnProcessorNPU"),
    ("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0", "SlicedAttnAddedKVProcessor", "XFormersAttnAddedKVProcessor"),
    ("JointAttnProcessor2_0", "XFormersJointAttnProcessor"),
)
_DEFAULT = "`set_default_attn_processor()` puts the class's own back, and so does loading the pipeline anew"
# What a processor's name holds -> what brings the plain one back.
_REMEDIES = {
    "IPAdapter": "`pipeline.unload_ip_adapter()` takes the adapter for image prompts away, of which no caption speaks",
    "CustomDiffusion": "give the base pipeline's folder with its `pytorch_custom_diffusion_weights` and new words as "
    "a customized model's folder",
    "Fused": "`pipeline.unfuse_qkv_projections()` takes the fused projections apart again",
    "PAG": "perturbed attention guides sampling only: load the plain pipeline class",
}


def check_processor(module: nn.Module, usual: object, where: str) -> None:
    """Refuses an attention layer's processor that does not compute what its configuration's own computes.

    Args:
        module: The layer; layers without a processor pass.
        usual: The processor that a fresh layer has.
        where: Names the layer in messages.

    Raises:
        ValueError: The processor, or the backend that it was given, is not known to compute the same.
    """
    processor: Any = getattr(module, "processor", None)
    if processor is None and usual is None:
        return
    kind = type(processor)
    alike = next((row for row in _ALIKE if type(usual).__name__ in row), ())
    same = kind is type(usual) or any(kind is getattr(known, name, None) for name in alike)
    if not same:
        remedy = next((text for name, text in _REMEDIES.items() if name in kind.__name__), _DEFAULT)
        raise ValueError(
            f"{where} has the attention processor {kind.__name__} of {kind.__module__}, which is not known to compute "
            f"what the weights say: {remedy}."
        )
    backend = str(getattr(processor, "_attention_backend", None) or "native")
    if "sage" in backend.lower():
        raise ValueError(
            f"{where} attends by the backend {backend!r}, which rounds keys and values to few bits: "
            "`set_attention_backend('native')` brings torch's own back."
        )
