"""Random projections: keyed, unbiased, and the same however the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wherefrom.gradients import projection as module
from wherefrom.gradients.projection import Projection

KINDS = ["rademacher", "gaussian", "sparse"]
CPU = torch.device("cpu")


def gradients(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 3), "b.weight": (4, 2, 3, 3), "b.bias": (4,)}
    return {
        name: torch.randn(count, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_product_with_the_whole_matrix(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, given = Projection(70, 3, kind), gradients(6)  # type: ignore[arg-type]
    whole = torch.cat(
        [p.rows(name, start=0, stop=value[0].numel(), device=CPU, dtype=torch.float64) for name, value in given.items()]
    )
    flat = torch.cat([value.flatten(1) for value in given.values()], dim=1)
    torch.testing.assert_close(p.project(given), flat @ whole / 70**0.5)
    expected = p.project(given)
    monkeypatch.setattr(module, "_NUMBERS_AT_A_TIME", 7 * 70)
    torch.testing.assert_close(p.project(given), expected)
    torch.testing.assert_close(p.project({name: value[2:3] for name, value in given.items()}), expected[2:3])
    parts = [p.project({name: value}) for name, value in given.items()]
    torch.testing.assert_close(sum(parts), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_kept_on_average(kind: str) -> None:
    """Over 400 seeds the mean error is within four standard errors of zero, and the spread is that of the theory."""
    given, dimension, trials = gradients(2), 8, 400
    x, y = torch.cat([value.flatten(1) for value in given.values()], dim=1)
    result = np.array(
        [
            float(u @ v)
            for u, v in (Projection(dimension, seed, kind).project(given) for seed in range(trials))  # type: ignore[arg-type]
        ]
    )
    # Var = (|x|²|y|² + (x·y)² - [signs] 2 Σ x²y²) / dimension
    excess = 2 * float((x * x * y * y).sum()) if kind != "gaussian" else 0.0
    spread = ((float(x @ x) * float(y @ y) + float(x @ y) ** 2 - excess) / dimension) ** 0.5
    assert abs(result.mean() - float(x @ y)) < 4 * spread / trials**0.5
    assert result.std() == pytest.approx(spread, rel=0.2)


def test_entries_have_variance_one_and_do_not_repeat() -> None:
    for kind in KINDS:
        rows = Projection(128, 0, kind).rows("w", start=0, stop=500, device=CPU, dtype=torch.float64)  # type: ignore[arg-type]
        assert abs(float(rows.mean())) < 4 / rows.numel() ** 0.5
        assert float(rows.square().mean()) == pytest.approx(1.0, abs=4 * (2 / rows.numel()) ** 0.5)
        correlation = rows @ rows.T / 128
        correlation.fill_diagonal_(0)
        if kind == "sparse":
            assert rows.count_nonzero(dim=1).tolist() == [1] * 500
            meetings = int(correlation.count_nonzero()) / 2
            assert abs(meetings - 500 * 499 / 2 / 128) < 4 * (500 * 499 / 2 / 128) ** 0.5
        else:
            assert float(correlation.abs().max()) < 0.6
    signs = Projection(128).rows("w", start=0, stop=50, device=CPU, dtype=torch.float64)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(signs, Projection(128, 1).rows("w", start=0, stop=50, device=CPU, dtype=torch.float64))
    assert not torch.equal(signs, Projection(128).rows("v", start=0, stop=50, device=CPU, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_keyed_by_its_place(kind: str) -> None:
    p = Projection(70, 3, kind)  # type: ignore[arg-type]
    whole = p.rows("w", start=0, stop=20, device=CPU, dtype=torch.float64)
    assert torch.equal(p.rows("w", start=5, stop=9, device=CPU, dtype=torch.float64), whole[5:9])
    assert torch.equal(p.rows("w", start=5, stop=9, device=CPU, dtype=torch.float32), whole[5:9].float())
    assert not torch.equal(p.rows("v", start=0, stop=20, device=CPU, dtype=torch.float64), whole)
    assert len({tuple(row) for row in whole.tolist()}) > 15


@pytest.mark.parametrize("kind", KINDS)
def test_small_numbers_are_summed_in_float32(kind: str) -> None:
    """In bfloat16, a sum of 4,000 numbers near one would stop growing at 256."""
    p, given = Projection(100, 0, kind), {"w": torch.rand(2, 4000).bfloat16() + 1}  # type: ignore[arg-type]
    result = p.project(given)
    assert result.dtype == torch.float32
    expected = p.project({name: value.double() for name, value in given.items()})
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-2)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="dimension must be at least 1; given 0"):
        Projection(0)
    with pytest.raises(ValueError, match="Unknown projection 'dense'"):
        Projection(8, 0, "dense")  # type: ignore[arg-type]
