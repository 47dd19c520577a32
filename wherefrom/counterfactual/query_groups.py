"""Query groups: queries whose images one retraining leaves out together."""

from __future__ import annotations

from collections.abc import Mapping

from wherefrom.runtime.keyed_random import hash_text


def group_queries(tops: Mapping[str, frozenset[str]], size: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Groups the queries so that the top images of a group overlap little.

    A group is opened by the first query that is left, in an order by hash, and filled with those that add the fewest
    images which the group already has.

    Args:
        tops: Query -> its top images, by one method or by several.
        size: Queries in a group; the last may have fewer.
        seed: Seed of the order.

    Raises:
        ValueError: `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"A query group needs at least one query; given {size}.")
    # The salt decides which queries share a model, so it never changes.
    left = sorted(tops, key=lambda query: hash_text(f"pools/{seed}/{query}"))
    groups = []
    while left:
        group = [left.pop(0)]
        union = set(tops[group[0]])
        while left and len(group) < size:
            best = min(left, key=lambda query: (len(tops[query] & union), left.index(query)))
            left.remove(best)
            group.append(best)
            union |= tops[best]
        groups.append(tuple(group))
    return groups
