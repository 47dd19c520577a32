"""What a pipeline may consist of: anything that would change what is measured without a word is refused by name.

Losses are computed by the network, latents by the autoencoder and conditioning by the text encoders. `check_part` looks
at one of them and is cheap enough to be asked whenever a fingerprint is computed, so that what somebody switches on
later in a notebook is seen too. `check_pipeline` looks at the rest of a pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import diffusers
from torch import nn

from wherefrom.models.fresh_parts import check_against_fresh, made_fresh
from wherefrom.models.module_code import check_code, check_hooks

if TYPE_CHECKING:
    from wherefrom.models.families.base import ModelFamily, PipelineParts

NETWORK, AUTOENCODER, TEXT_ENCODER = "The network", "The autoencoder", "The text encoder"
_NAMES = {
    "unet": NETWORK,
    "transformer": NETWORK,
    "vae": AUTOENCODER,
    "text_encoder": TEXT_ENCODER,
    "text_encoder_2": f"{TEXT_ENCODER} (text_encoder_2)",
    "text_encoder_3": f"{TEXT_ENCODER} (text_encoder_3)",
}
# Settings that classes of before have left in configurations, all of which say that something is off.
_OFF: tuple[Any, ...] = (None, False, 0, "", [], (), {})
_LEFT_OUT = "this kind of pipeline leaves it out when it draws, so it is not known what was trained"
_STATISTICS = {"latents_mean": _LEFT_OUT, "latents_std": _LEFT_OUT}


def check_part(part: nn.Module, what: str) -> None:
    """Refuses a network, an autoencoder or a text encoder that does not compute what its weights say.

    Args:
        part: The part.
        what: Names it in messages.

    Raises:
        ValueError: A hook, a replaced `forward`, an unknown class, layer or attention processor, or FreeU is in it.
    """
    check_against_fresh(part, what)
    check_code(part, what)


def check_settings(part: Any, what: str, refused: Mapping[str, str]) -> None:
    """Refuses settings of a part's configuration that need something which losses do not hand to it.

    Args:
        part: The part, of diffusers.
        what: Names it in messages.
        refused: Setting -> why it is refused where it has another value than the class's own.

    Raises:
        ValueError: Such a setting, or one that the class does not know, is set; the message names it.
    """
    known = inspect.signature(type(part).__init__).parameters
    for name, value in dict(part.config).items():
        if name.startswith("_") or value in _OFF:
            continue
        if name not in known and name not in _registered(part):
            raise ValueError(
                f"{what} has {name} = {value!r} in its configuration, which {type(part).__name__} of diffusers "
                f"{diffusers.__version__} does not know and leaves out: it may have been trained otherwise. Take the "
                "diffusers version that it was made with, or remove the setting if it says nothing."
            )
        if name in refused and name in known and value != known[name].default:
            raise ValueError(
                f"{what} has {name} = {value!r} in its configuration, which is not supported: {refused[name]}."
            )


def _registered(part: Any) -> Mapping[str, Any]:
    """The configuration of a fresh part, to which some classes add settings of their own."""
    made: Any = made_fresh(part)
    return {} if made is None else dict(made.config)


def check_components(components: Mapping[str, Any]) -> None:
    """Refuses hooks of unknown origin on a pipeline's parts, before anything is made of them.

    Raises:
        ValueError: There is one; the message names it.
    """
    for name, part in components.items():
        if isinstance(part, nn.Module):
            check_hooks(part, _NAMES.get(name, f"The pipeline's {name}"))


def check_pipeline(parts: PipelineParts, family: ModelFamily) -> None:
    """Refuses a pipeline that does not draw from text alone, or whose parts do not compute what their weights say.

    Args:
        parts: Of the pipeline.
        family: Of its network.

    Raises:
        ValueError: Its class, a part, a part's setting or something switched on is not known; the message names it.
    """
    kind, network, vae = type(parts.pipeline), parts.network, parts.components["vae"]
    if family.pipelines:
        _check_class(kind, family.pipelines)
        channels = network.config.in_channels, network.config.out_channels
        if len(set(channels)) > 1 and not (family.learned_variance and channels[1] == 2 * channels[0]):
            raise ValueError(
                f"{NETWORK} takes {channels[0]} channels and says {channels[1]} (out_channels), which is not "
                "supported: it is not known what the others are."
            )
        check_settings(vae, AUTOENCODER, {} if family.latent_statistics else _STATISTICS)
    check_settings(network, NETWORK, family.refused_settings)
    check_part(network, NETWORK)
    check_part(vae, AUTOENCODER)
    for name, part in parts.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            check_part(part, _NAMES.get(name, f"{TEXT_ENCODER} ({name})"))


def _check_class(kind: type, allowed: Sequence[str]) -> None:
    if not any(kind is getattr(diffusers, name, None) for name in allowed):
        raise ValueError(
            f"A {kind.__name__} is not supported: it draws from more than a text, or in a way of its own, which losses "
            "do not follow. If its network was trained as a text-to-image model, hand it over as one: "
            f"`diffusers.{allowed[0]}.from_pipe(pipeline)`, which `save_pretrained` saves."
        )
