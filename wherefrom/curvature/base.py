"""What every curvature can do: precondition a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor


class Curvature(ABC):
    """A positive curvature matrix F of some weights, of which only the inverse's action is needed."""

    @abstractmethod
    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F⁻¹ g, parameter by parameter.

        Raises:
            ValueError: The curvature does not hold a parameter, or the result is not finite.
        """


class Identity(Curvature):
    """F = I: the plain gradient."""

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients themselves."""
        return dict(gradients)
