"""One interface: what every form of curvature does with gradients, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wherefrom.curvature import CurvatureMatrix, DiagonalMatrix, EKFACMatrix, IdentityMatrix
from wherefrom.curvature.ekfac import KroneckerFactors

DAMPING = 0.5


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients() -> dict[str, Tensor]:
    return {"norm.weight": tensor(3, seed=1), "layer.weight": tensor(3, 4, seed=2), "layer.bias": tensor(3, seed=3)}


def with_factors() -> EKFACMatrix:
    left, right = (torch.linalg.qr(tensor(side, side, seed=side)).Q for side in (3, 5))
    factors = KroneckerFactors(right, left, tensor(3, 5, seed=4).square(), bias=True)
    return EKFACMatrix({"layer": factors}, {"norm.weight": tensor(3, seed=5).square()}, DAMPING)


FORMS = {
    "identity": IdentityMatrix(),
    "diagonal": DiagonalMatrix({name: value.square() + 0.1 for name, value in gradients().items()}, DAMPING),
    "ekfac": with_factors(),
}
forms = pytest.mark.parametrize("curvature", FORMS.values(), ids=list(FORMS))


@forms
def test_every_form_is_a_symmetric_positive_matrix(curvature: CurvatureMatrix) -> None:
    names = list(gradients())
    shapes = [value.shape for value in gradients().values()]
    size = sum(shape.numel() for shape in shapes)

    def flat_step(column: Tensor) -> Tensor:
        parts = column.split([shape.numel() for shape in shapes])
        given = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        step = curvature.precondition(given)
        assert list(step) == names
        assert [value.shape for value in step.values()] == shapes
        return torch.cat([value.flatten() for value in step.values()])

    matrix = torch.stack([flat_step(column) for column in torch.eye(size, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix).min()) > 0
    column = tensor(size, seed=9)
    torch.testing.assert_close(flat_step(column), matrix @ column)
    torch.testing.assert_close(flat_step(-3 * column), -3 * flat_step(column))


@forms
def test_the_gradients_stay_as_they_are(curvature: CurvatureMatrix) -> None:
    given = gradients()
    curvature.precondition(given)
    assert all(torch.equal(value, gradients()[name]) for name, value in given.items())


@forms
def test_what_it_has_it_does_not_lack(curvature: CurvatureMatrix) -> None:
    assert curvature.lacks(list(gradients())) == []
    curvature.check(list(gradients()), "It")


@pytest.mark.parametrize("form", ["diagonal", "ekfac"])
def test_what_is_missing_is_named_before_there_is_a_gradient(form: str) -> None:
    others = [f"block.{index}.{kind}" for index in range(7) for kind in ("weight", "bias")]
    assert FORMS[form].lacks(["norm.weight", *others]) == others
    message = (
        r"The file was made for other weights: of the 15 that are asked for it lacks 14, in block\.0, block\.1, "
        r"block\.2, block\.3, block\.4 and 2 more\. Choose the `weights`"
    )
    with pytest.raises(ValueError, match=message):
        FORMS[form].check(["norm.weight", *others], "The file")
    with pytest.raises(ValueError, match=r"lacks 1, in other\. Choose"):
        FORMS[form].check(["other.weight"], "The file")


def test_weight_and_bias_of_one_matrix_are_asked_for_together() -> None:
    assert FORMS["ekfac"].lacks(["layer.weight"]) == ["layer.bias"]
    assert FORMS["ekfac"].lacks(["layer.bias"]) == ["layer.weight"]
    assert FORMS["diagonal"].lacks(["layer.weight"]) == []
    without = KroneckerFactors(*(torch.eye(2, dtype=torch.float64) for _ in range(3)), bias=False)
    assert EKFACMatrix({"layer": without}).lacks(["layer.weight", "layer.bias"]) == ["layer.bias"]
    assert EKFACMatrix({"layer": without}, {"layer.bias": torch.ones(2)}).lacks(["layer.weight", "layer.bias"]) == []
