"""Does a second-order correction of the influence bank pay? What exact AbU+ ranks first, found by the bank's scores.

    python evaluate.py curate -c configs/experiment/emoji_1k_teacher_test.yaml
    python evaluate.py curate -c configs/experiment/emoji_1k_teacher_test.yaml \
        --teacher configs/attributor/influence_bank_quick.yaml --output runs/emoji_1k_teacher_test_bank
    python -m experiments.second_order

Both sets score all training images of emoji-1k for the same queries. The corrected score is s + c · s² / σ (see
`InfluenceBank`), so every c is evaluated from the bank's first-order scores: mAP(k) against AbU+, how often AbU+'s very
first image is first, and among the last ten, and how many of AbU+'s first 1, 10 and 100 are among K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from experiments.ranker_table import average_precisions, matrix_of
from experiments.support.arguments import script_parser
from experiments.support.markdown import markdown_table, mean_and_error
from experiments.support.recall import recalls
from wherefrom.distillation.teacher_set import TeacherSet, read_teacher_set
from wherefrom.runtime.artifacts import write_json

RESULT = Path("results/emoji/second_order.json")
TOPS = (1, 10, 100)
LAST = 10

Matrix = Float[NDArray[np.float64], "q n"]


def corrected(first_order: Matrix, c: float) -> Matrix:
    """The bank's scores, corrected."""
    spread: Matrix = first_order.std(axis=1, keepdims=True)
    return first_order + c * first_order**2 / spread


def aligned(exact: TeacherSet, bank: TeacherSet) -> tuple[Matrix, Matrix]:
    """Scores of the queries that both sets have, over the same images.

    Raises:
        SystemExit: They are of other images, or share no query.
    """
    if exact.images != bank.images:
        raise SystemExit("The two teacher sets are of other training images.")
    common = [query for query in exact.queries if query in set(bank.queries)]
    if not common:
        raise SystemExit("The two teacher sets have no query in common.")
    result = [matrix_of(each.of_queries([each.queries.index(query) for query in common])) for each in (exact, bank)]
    return result[0], result[1]


def measure(exact: Matrix, scores: Matrix, ids: Sequence[str], candidates: Sequence[int]) -> dict[str, Any]:
    """What the scores find of the exact ones."""
    first = exact.argmax(axis=1)
    place = (scores > np.take_along_axis(scores, first[:, None], axis=1)).sum(axis=1)
    result = {str(top): recalls(exact, ids, {"": scores}, top, candidates)[""] for top in TOPS}
    both = {str(top): recalls(exact, ids, {"both tails": scores}, top, candidates)["both tails"] for top in TOPS}
    return {
        "ap": average_precisions(exact, scores),
        "first_is_first": (place == 0).astype(float).tolist(),
        "first_is_among_the_last": (place >= exact.shape[1] - LAST).astype(float).tolist(),
        "recall": result,
        "recall_both_tails": both,
    }


def main() -> None:
    """Measures and prints."""
    parser = script_parser(__doc__)
    parser.add_argument("--exact", type=Path, default=Path("runs/emoji_1k_teacher_test"))
    parser.add_argument("--bank", type=Path, default=Path("runs/emoji_1k_teacher_test_bank"))
    parser.add_argument("--c", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0])
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 20, 50, 101, 202])
    options = parser.parse_args()
    teacher = read_teacher_set(options.exact, [])
    exact, bank = aligned(teacher, read_teacher_set(options.bank, []))
    rows = {f"{c:g}": measure(exact, corrected(bank, c), teacher.images, options.candidates) for c in options.c}
    facts = {"queries": len(exact), "pictures": exact.shape[1], "candidates": options.candidates}
    write_json(RESULT, {"command": "python -m experiments.second_order", **facts, "rows": rows})
    ks = list(next(iter(rows.values()))["ap"])
    titles = [*(f"mAP({k})" for k in ks), "first is first", f"first is among the last {LAST}"]
    lines = [
        [c, *map(mean_and_error, (*row["ap"].values(), row["first_is_first"], row["first_is_among_the_last"]))]
        for c, row in rows.items()
    ]
    print(markdown_table(["c", *titles], lines))
    lines = []
    for c, row in rows.items():
        kinds = {f"c = {c}": "recall", **({"both tails": "recall_both_tails"} if c == "0" else {})}
        for name, kind in kinds.items():
            lines.append([name, *(", ".join(f"{value:.2f}" for value in row[kind][str(top)]) for top in TOPS)])
    print("\n" + markdown_table(["candidates", *(f"first {top}" for top in TOPS)], lines))
    print(f"\n{facts['queries']} queries, {facts['pictures']:,} images; K = {options.candidates}")


if __name__ == "__main__":
    main()
