"""A fitted curvature matrix, and how it preconditions a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor


class CurvatureMatrix(ABC):
    """A positive curvature matrix F of some weights, of which only the inverse's action is needed."""

    @abstractmethod
    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F⁻¹ g, parameter by parameter.

        Raises:
            ValueError: The curvature does not hold a parameter, or the result is not finite.
        """

    @abstractmethod
    def whiten(self, gradients: Mapping[str, Float[Tensor, "b n"]]) -> dict[str, Float[Tensor, "b m"]]:
        """F^(-1/2) g up to a rotation: inner products of what comes out are gᵀ F⁻¹ h.

        Args:
            gradients: By parameter name, one flattened gradient a row.

        Raises:
            ValueError: The curvature does not hold a parameter, or the result is not finite.
        """

    @abstractmethod
    def lacks(self, names: Sequence[str]) -> list[str]:
        """Parameters without which these gradients cannot be preconditioned: not in the curvature, or not among them.

        It is checked before any gradient is computed.
        """

    def check(self, names: Sequence[str], where: str) -> None:
        """Refuses a curvature of other weights.

        Args:
            names: Parameters whose gradients will be preconditioned.
            where: The folder or object that holds the curvature, for the message.

        Raises:
            ValueError: It was made for other weights; the missing layers are named.
        """
        missing = self.lacks(names)
        if missing:
            layers = list(dict.fromkeys(name.rpartition(".")[0] for name in missing))
            shown = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
            raise ValueError(
                f"{where} was made for other weights: of the {len(names)} that are asked for it lacks {len(missing)}, "
                f"in {shown}. Choose the `weights` that it was fitted for, or fit it for these."
            )


class IdentityMatrix(CurvatureMatrix):
    """F = I: the plain gradient."""

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients themselves."""
        return dict(gradients)

    def whiten(self, gradients: Mapping[str, Float[Tensor, "b n"]]) -> dict[str, Float[Tensor, "b m"]]:
        """The gradients themselves."""
        return dict(gradients)

    def lacks(self, names: Sequence[str]) -> list[str]:
        """Nothing."""
        return []


def finite_rows(name: str, rows: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """The rows themselves.

    Raises:
        ValueError: One is not finite.
    """
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"A whitened gradient of {name!r} is not finite: some eigenvalues are 0 (set damping above 0), or the "
            "gradient itself is not finite (check the model's weights)."
        )
    return rows
