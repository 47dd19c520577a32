"""Which family a network belongs to; families from outside the package are added by `register_family`."""

from __future__ import annotations

from torch import nn

from wherefrom.models.families.base import ModelFamily
from wherefrom.models.families.pixart import PixArt
from wherefrom.models.families.stable_diffusion import StableDiffusion
from wherefrom.models.families.stable_diffusion_3 import StableDiffusion3
from wherefrom.models.families.stable_diffusion_xl import StableDiffusionXL

_FAMILIES: list[type[ModelFamily]] = [StableDiffusionXL, StableDiffusion, PixArt, StableDiffusion3]


def register_family(family: type[ModelFamily]) -> type[ModelFamily]:
    """Adds a family, which is then asked before the others; may decorate its class.

    Families are added by this call alone: no name that is found in data leads to one.

    Args:
        family: The family.

    Raises:
        ValueError: It is no family, or does not say which networks are its own.
    """
    given: object = family
    if not (isinstance(given, type) and issubclass(given, ModelFamily)):
        raise ValueError(f"{given!r} is not a model family: give a subclass of ModelFamily.")
    if not family.networks or not family.description:
        raise ValueError(
            f"{family.__name__} does not say what it is: set its `networks`, the classes of network that belong to it, "
            "and its `description`."
        )
    if family not in _FAMILIES:
        _FAMILIES.insert(0, family)
    return family


def unregister_family(family: type[ModelFamily]) -> None:
    """Takes an added family away again."""
    if family in _FAMILIES:
        _FAMILIES.remove(family)


def families() -> tuple[type[ModelFamily], ...]:
    """All families, in the order in which they are asked."""
    return tuple(_FAMILIES)


def family_class_of(network: object) -> type[ModelFamily] | None:
    """The family that a network belongs to; None where there is none."""
    if not isinstance(network, nn.Module):
        return None
    return next((family for family in _FAMILIES if family.accepts(network)), None)


def family_of(network: nn.Module) -> ModelFamily:
    """How a network is called; any module of no family is called like Stable Diffusion's U-Net.

    Raises:
        ValueError: The network takes conditioning that is not supported.
    """
    return (family_class_of(network) or StableDiffusion)(network)
