"""Rankings whose tops are disjoint but for two queries' own."""

from __future__ import annotations

TRAINING = [f"picture/{index:03d}" for index in range(200)]
RANKINGS = {f"query {index}": TRAINING[10 * max(1, index) :] + TRAINING[: 10 * max(1, index)] for index in range(6)}
