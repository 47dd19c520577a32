"""Do both protocols of counterfactual evaluation order the methods alike: query groups, and one query at a time?

    python -m experiments.protocols runs/judge_groups runs/judge_single

Both are run folders of `evaluate.py counterfactual` (or their `counterfactual.json`): one with query groups, one with
`protocol.query_groups: [1]`, which is the papers' protocol. Prints, for each K that both have, how far they agree on
the order of the methods that both evaluated by matched ΔL (Kendall's and Spearman's correlation): for each query, as a
mean over the queries, and for the means of the methods over all queries; and how far the ΔLs themselves correlate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import kendalltau, pearsonr, spearmanr

from experiments.support.arguments import script_parser
from wherefrom.counterfactual.results_file import COUNTERFACTUAL, SEED_BASELINE, or_nan, read_results
from wherefrom.metrics.standard_error import estimate

Effects = Mapping[int, Mapping[str, Mapping[str, float]]]  # K -> method -> query -> matched ΔL


@dataclass(frozen=True)
class Agreement:
    """Agreement of two evaluations on the same methods and queries at one K.

    Attributes:
        k: Images that each query lost.
        methods: The methods.
        queries: The queries.
        kendall: Kendall's τ-b of the methods' order, by query; NaN where all ΔLs of one evaluation are equal.
        spearman: Spearman's correlation of the same.
        mean_kendall: Kendall's τ-b of the order of the methods' means over the queries.
        mean_spearman: Spearman's correlation of the same.
        pearson: Pearson's correlation of the ΔLs, over all methods and queries.
        rank_correlation: Spearman's correlation of the same.
    """

    k: int
    methods: tuple[str, ...]
    queries: tuple[str, ...]
    kendall: Float[NDArray[np.float64], " q"]
    spearman: Float[NDArray[np.float64], " q"]
    mean_kendall: float
    mean_spearman: float
    pearson: float
    rank_correlation: float


def read_effects(path: Path) -> tuple[Effects, dict[str, str]]:
    """Matched ΔL of an evaluation's methods, removal at random among them, and the queries' prompts.

    Args:
        path: A run folder of `evaluate.py counterfactual`, or its table of results.

    Raises:
        ValueError: There is no table of results, or it cannot be read.
    """
    stored = read_results(path / COUNTERFACTUAL if path.is_dir() else path, ("rows", "prompts"))
    result: dict[int, dict[str, dict[str, float]]] = {}
    for row in stored["rows"]:
        if row["method"] != SEED_BASELINE:
            matched = or_nan(row["loss"]["matched"]).tolist()
            result.setdefault(row["k"], {})[row["method"]] = dict(zip(row["queries"], matched, strict=True))
    return result, stored["prompts"]


def agreements(first: Effects, second: Effects) -> list[Agreement]:
    """Compares two evaluations at each K that both have, on the methods and queries that both evaluated.

    Raises:
        ValueError: They share no K, fewer than two methods, or no query.
    """
    shared = sorted(set(first) & set(second))
    if not shared:
        raise ValueError(f"The two evaluations share no K: {sorted(first)} and {sorted(second)}.")
    return [_agreement(k, first[k], second[k]) for k in shared]


def _agreement(
    k: int, first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]]
) -> Agreement:
    methods = [name for name in first if name in second]
    if len(methods) < 2:
        raise ValueError(f"At K = {k} the evaluations share {methods}: an order needs at least two methods.")
    evaluated = [set(each[name]) for each in (first, second) for name in methods]
    queries = sorted(set.intersection(*evaluated))
    if not queries:
        raise ValueError(
            f"At K = {k} the evaluations share no query: both must draw them from the same model and seed."
        )
    both = [np.array([[each[name][query] for name in methods] for query in queries]) for each in (first, second)]
    pairs = list(zip(*both, strict=True))
    means = [each.mean(axis=0) for each in both]
    flat = [each.ravel() for each in both]
    return Agreement(
        k,
        tuple(methods),
        tuple(queries),
        np.array([_correlation(kendalltau, a, b) for a, b in pairs]),
        np.array([_correlation(spearmanr, a, b) for a, b in pairs]),
        _correlation(kendalltau, *means),
        _correlation(spearmanr, *means),
        _correlation(pearsonr, *flat),
        _correlation(spearmanr, *flat),
    )


def _correlation(measure: Any, a: Float[NDArray[np.float64], " n"], b: Float[NDArray[np.float64], " n"]) -> float:
    """NaN where one side is constant."""
    return float(measure(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else float("nan")


def report(result: Sequence[Agreement], prompts: Mapping[str, str]) -> str:
    """All numbers as text."""
    lines: list[str] = []
    for each in result:
        n, m = len(each.queries), len(each.methods)
        lines += [f"K = {each.k}: {m} methods ({', '.join(each.methods)}), {n} queries", ""]
        lines += ["| query | Kendall | Spearman |", "|---|---|---|"]
        for query, tau, rho in zip(each.queries, each.kendall, each.spearman, strict=True):
            lines.append(f"| {prompts.get(query, query)} | {tau:.2f} | {rho:.2f} |")
        for name, values in (("Kendall", each.kendall), ("Spearman", each.spearman)):
            mean, error = estimate(values)
            known = int(np.isfinite(values).sum())
            lines += ["", f"order of the methods for a query: {name} {mean:.2f} ± {error:.2f} (n = {known} queries)"]
        lines += [
            "",
            f"order of means: Kendall {each.mean_kendall:.2f}, Spearman {each.mean_spearman:.2f} (n = {m} methods)",
            "",
            f"matched ΔL itself: Pearson {each.pearson:.2f}, Spearman {each.rank_correlation:.2f} (n = {n * m} pairs)",
            "",
        ]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Prints the comparison."""
    arguments = script_parser(__doc__)
    arguments.add_argument("pooled", type=Path)
    arguments.add_argument("single", type=Path)
    options = arguments.parse_args(args)
    try:
        (pooled, prompts), (single, _) = read_effects(options.pooled), read_effects(options.single)
        print(report(agreements(pooled, single), prompts))
    except ValueError as error:
        if args is not None:
            raise
        arguments.error(str(error))


if __name__ == "__main__":
    main()
