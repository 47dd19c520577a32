"""The α that gives a relative loss increase, whatever the shape of the loss and wherever the search begins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from wherefrom.attributors.unlearning.step_size import alpha_for_increase

SHAPES: dict[str, tuple[Callable[[float], float], float]] = {
    "line": (lambda alpha: 3.0 * alpha, 0.2 / 3.0),
    "parabola": (lambda alpha: alpha + 50.0 * alpha**2, (-1 + np.sqrt(1 + 40)) / 100),
    "fall first": (lambda alpha: alpha * (alpha - 2.0), 1 + np.sqrt(1.2)),
    "saturating": (lambda alpha: 0.3 * (1 - np.exp(-alpha)), np.log(3.0)),
}


@pytest.mark.parametrize("guess", [0.0, -1.0, float("nan"), float("inf"), 1e-9, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_increase_is_reached_from_any_guess(shape: str, guess: float) -> None:
    relative_loss_increase, expected = SHAPES[shape]
    result = alpha_for_increase(relative_loss_increase, 0.2, guess)
    assert relative_loss_increase(result) == pytest.approx(0.2, rel=0.011)
    assert result == pytest.approx(expected, rel=0.05)


def test_a_good_guess_needs_few_trials() -> None:
    trials: list[float] = []

    def relative_loss_increase(alpha: float) -> float:
        trials.append(alpha)
        return alpha + alpha**2

    alpha_for_increase(relative_loss_increase, 0.2, 0.2)
    assert len(trials) <= 4


def test_a_step_that_breaks_the_model_is_too_long() -> None:
    result = alpha_for_increase(lambda alpha: alpha if alpha < 5 else float("nan"), 0.2, 100.0)
    assert result == pytest.approx(0.2, rel=0.011)


def test_an_increase_that_no_step_reaches_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"No step size raises the query's loss by 20\.0%"):
        alpha_for_increase(lambda alpha: 0.1, 0.2, 1.0)
