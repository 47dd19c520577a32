"""Keyed random numbers: pinned values, their distribution, and independence of keys."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from wherefrom.runtime import keyed_random

SEEDS = 20_000


@pytest.fixture(scope="module")
def keys() -> torch.Tensor:
    return keyed_random.combine(7, torch.arange(SEEDS))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        # Known answers of SplitMix64 with these states, as published with the reference implementation.
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_bits_are_those_of_splitmix64(state: int, words: list[int]) -> None:
    drawn = keyed_random.bits(torch.tensor([state]), 3)[0]
    assert [word % 2**64 for word in drawn.tolist()] == words


def test_values_are_pinned() -> None:
    """Any change of these numbers changes every training run and every score."""
    assert keyed_random.hash_texts(["twemoji/1f98a", ""]).tolist() == [2862348059389435479, -5426141060434712860]
    assert keyed_random.combine(1, 2, 3).item() == 7934959330630343949
    noise = keyed_random.normal(torch.tensor([0]), (3,), torch.float64)[0]
    torch.testing.assert_close(
        noise,
        torch.tensor([2.044272163028782, 1.045091417389922, 0.34268650712041837], dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )


def test_normal_is_box_muller_of_the_uniforms() -> None:
    key = keyed_random.combine(3)[None]
    u = keyed_random.uniform(key, 6)[0].tolist()
    radii = [math.sqrt(-2 * math.log(1 - x)) for x in u[:3]]
    expected = [r * math.cos(2 * math.pi * x) for r, x in zip(radii, u[3:], strict=True)]
    expected += [r * math.sin(2 * math.pi * x) for r, x in zip(radii, u[3:], strict=True)]
    torch.testing.assert_close(
        keyed_random.normal(key, (5,), torch.float64)[0],
        torch.tensor(expected[:5], dtype=torch.float64),
        rtol=1e-13,
        atol=1e-15,
    )


def test_uniform_is_uniform(keys: torch.Tensor) -> None:
    drawn = keyed_random.uniform(keys, 5)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in drawn.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(keyed_random.uniform(keys[:1], SEEDS)[0].numpy(), "uniform").pvalue > 1e-4


def test_normal_has_the_moments_and_the_law_of_a_standard_normal(keys: torch.Tensor) -> None:
    drawn = keyed_random.normal(keys, (6,), torch.float64)
    count = drawn.numel()
    # Standard errors of the first four moments of a standard normal: var(x^k) = E x^2k - (E x^k)^2.
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((drawn**power).mean().item() - mean) < 4 * math.sqrt(variance / count), power
    for column in drawn.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-4


def test_draws_of_a_key_and_of_neighbouring_keys_are_uncorrelated(keys: torch.Tensor) -> None:
    drawn = keyed_random.normal(keys, (6,), torch.float64)
    limit = 4.5 / math.sqrt(SEEDS)
    within = torch.corrcoef(drawn.T) - torch.eye(6)
    assert within.abs().max() < limit
    # Keys of consecutive integers, of one bit's difference, and of the same parts under another salt.
    others = {
        "next": torch.roll(keys, 1),
        "bit": keyed_random.combine(7, torch.arange(SEEDS) ^ (1 << 40)),
        "salt": keyed_random.combine(8, torch.arange(SEEDS)),
        "raw": keys + 1,
    }
    for name, other in others.items():
        noise = keyed_random.normal(other, (6,), torch.float64)
        between = torch.corrcoef(torch.cat([drawn, noise], dim=1).T)[:6, 6:]
        assert between.abs().max() < limit, name


def test_float32_is_float64_rounded_once(keys: torch.Tensor) -> None:
    exact = keyed_random.normal(keys[:500], (2, 3), torch.float64)
    assert torch.equal(keyed_random.normal(keys[:500], (2, 3)), exact.float())
    assert keyed_random.normal(keys[:500], (2, 3)).dtype == torch.float32


def test_default_dtype_does_not_matter(keys: torch.Tensor) -> None:
    expected = keyed_random.normal(keys[:50], (3,), torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(keyed_random.normal(keys[:50], (3,), torch.float64), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_draw_does_not_depend_on_its_neighbours(keys: torch.Tensor) -> None:
    together = keyed_random.normal(keys[:9], (4,))
    assert torch.equal(torch.cat([keyed_random.normal(keys[i : i + 1], (4,)) for i in range(9)]), together)
    assert torch.equal(keyed_random.uniform(keys[:9], 3), keyed_random.uniform(keys[:9], 8)[:, :3])


def test_combine_depends_on_order_and_number_of_parts() -> None:
    parts = [(), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (3,), (-3,)]
    assert len({keyed_random.combine(*several).item() for several in parts}) == len(parts)


def test_combine_broadcasts_like_a_loop() -> None:
    a, b = torch.tensor([[1], [-2]]), torch.tensor([3, 4, 5])
    expected = [[keyed_random.combine(9, x, y).item() for y in (3, 4, 5)] for x in (1, -2)]
    assert keyed_random.combine(9, a, b).tolist() == expected


def test_combine_has_no_collisions_and_changes_half_of_the_bits() -> None:
    grid = keyed_random.combine(torch.arange(100)[:, None], torch.arange(100)[None, :])
    assert grid.unique().numel() == 10_000
    flipped = grid ^ keyed_random.combine(torch.arange(100)[:, None], torch.arange(100)[None, :] ^ 1)
    share = sum(((flipped >> bit) & 1).sum().item() for bit in range(64)) / (64 * flipped.numel())
    # Pairs (b, b ^ 1) are counted twice, so only half of the words are independent.
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(64 * flipped.numel() / 2)


def test_hash_text_tells_texts_apart() -> None:
    texts = [f"{style}/{point:x}" for style in ("a", "b") for point in range(5000)]
    assert keyed_random.hash_texts(texts).unique().numel() == len(texts)
    assert keyed_random.hash_texts([]).shape == (0,)
