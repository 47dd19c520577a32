"""How good are a fast method's estimates of influence, on queries never used before?

    python -m experiments.calibration --ranker weights/emoji_1k_ranker

Of the queries in `runs/emoji_1k_teacher_test`, which the ranker was not trained on, some fit the calibration (cosine to
the teacher's score, with intervals) and the others measure it: error, rank correlation, and how often the teacher's
score lies inside its interval, in all and by bin of similarity. Beside it, how concentrated influence is: what the
teacher's scores say, and what the estimates say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from experiments.support.arguments import script_parser
from wherefrom.distillation.calibration import CalibrationSettings, calibrate, evaluate_calibration
from wherefrom.distillation.embedding_similarity import similarities
from wherefrom.distillation.ranker import load_ranker
from wherefrom.distillation.teacher_set import read_teacher_set
from wherefrom.metrics.concentration import concentration
from wherefrom.metrics.standard_error import estimate
from wherefrom.runtime.artifacts import write_json
from wherefrom.runtime.keyed_random import hash_text

RESULT = Path("results/emoji/calibration.json")
TOPS = (1, 10, 100)


def concentrations(scores: Float[NDArray[np.floating], "q m"]) -> dict[str, list[float]]:
    """Mean over queries and its standard error: shares of the first images, effective number of images."""
    each = [concentration(row, TOPS) for row in scores]
    numbers = {f"share of the first {k}": [one.shares[k] for one in each] for k in TOPS}
    numbers["effective images"] = [one.effective for one in each]
    return {name: list(estimate(np.array(values))) for name, values in numbers.items()}


def split(queries: Sequence[str], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Positions of so many queries by hash, and of the others."""
    order = sorted(range(len(queries)), key=lambda row: hash_text(f"calibration/{seed}/{queries[row]}"))
    return sorted(order[:count]), sorted(order[count:])


def main() -> None:
    """Fits, measures and prints."""
    parser = script_parser(__doc__)
    parser.add_argument("--ranker", type=Path, default=Path("weights/emoji_1k_ranker"))
    parser.add_argument("--teacher", type=Path, default=Path("runs/emoji_1k_teacher_test"))
    parser.add_argument("--fit", type=int, default=40, help="queries that fit the calibration")
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    teacher = read_teacher_set(options.teacher)
    ranker, features = load_ranker(options.ranker)
    fitting, measuring = split(teacher.queries, options.fit, options.seed)
    calibration = calibrate(
        teacher.of_queries(fitting), ranker, features, CalibrationSettings(confidence=options.confidence)
    )
    others = teacher.of_queries(measuring)
    cosines = similarities(ranker, others.concatenated(features), others.rows)
    result = evaluate_calibration(calibration, cosines, others.scores, others.queries)
    print(
        f"{len(fitting)} queries fit the calibration, {result.count} measure it; {others.rows.shape[1]:,} images each"
    )
    print(f"error {result.rmse:.3g} (always saying the mean: {result.spread:.3g}), unit: the teacher's score")
    print(f"rank correlation {result.spearman:.3f} ± {result.spearman_error:.3f}")
    print(f"coverage {result.coverage:.3f} ± {result.coverage_error:.3f}, asked for {options.confidence:g}")
    print("by bin of similarity, the least similar first:", ", ".join(f"{each:.3f}" for each in result.coverage_by_bin))
    spread = {
        "teacher": concentrations(others.scores),
        "estimates": concentrations(calibration.estimate(cosines).values),
    }
    for name, numbers in spread.items():
        print(f"{name}:", ", ".join(f"{what} {mean:.3g} ± {error:.2g}" for what, (mean, error) in numbers.items()))
    write_json(
        RESULT,
        {
            "command": "python -m experiments.calibration",
            "ranker": ranker.identity(),
            "fitted_on": len(fitting),
            "confidence": options.confidence,
            "assessment": asdict(result),
            "concentration": spread,
        },
    )


if __name__ == "__main__":
    main()
