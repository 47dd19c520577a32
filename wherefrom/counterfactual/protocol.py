"""Protocol of the counterfactual evaluation: which models are retrained, and what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Protocol:
    """How many images are left out, for how many queries at once, with which seeds, and which analyses are added.

    Attributes:
        ks: Numbers K of top-ranked images of each query that a retraining leaves out.
        query_groups: For each K, how many queries share one retraining, which leaves out the images of all of them; a
            single number serves for all K. 1 is the papers' protocol.
        seeds: Seeds of the trainings; each has its own model of all images.
        random: How many retrainings without as many random images are made for each query group.
        timesteps: Timesteps of the queries' losses (AbU, section 5.1: 200).
        random_removal_curve: Numbers of random images that are left out, to say how many random images have the same
            effect as those that a method names (AbU, section 5.1: up to the whole set). Empty leaves that out.
        random_removal_samples: Models at each point of that curve.
        reattributed_queries: For how many queries of each method and K the retrained model of the first seed is
            attributed again, to see which images take over; whole query groups, until so many queries are covered.
        additivity_groups: Retrain also without the odd and without the even places of each query's top K: do their
            effects add up?
        iterative_removal_rounds: In how many rounds the K images are removed instead of at once, attributing again
            after each; 0 leaves that out. Only for methods that use a model: the others rank what is left as before.
    """

    ks: list[int] = field(default_factory=lambda: [16])
    query_groups: list[int] = field(default_factory=lambda: [5])
    seeds: list[int] = field(default_factory=lambda: [0])
    random: int = 1
    timesteps: int = 200
    random_removal_curve: list[int] = field(default_factory=list)
    random_removal_samples: int = 3
    reattributed_queries: int = 0
    additivity_groups: bool = False
    iterative_removal_rounds: int = 0

    def __post_init__(self) -> None:
        ks, sizes, rounds = self.ks, self.query_groups, self.iterative_removal_rounds
        if min(ks, default=0) < 1 or min(sizes, default=0) < 1 or not self.seeds or self.random < 0:
            raise ValueError(
                "ks, query_groups and seeds need positive numbers and random must not be negative; given ks "
                f"{ks}, query_groups {sizes}, seeds {self.seeds}, random {self.random}."
            )
        if len(sizes) not in (1, len(ks)):
            raise ValueError(f"query_groups must hold one number, or one for each of ks {ks}; given {sizes}.")
        if self.timesteps < 1:
            raise ValueError(f"timesteps must be positive; given {self.timesteps}.")
        if self.random_removal_curve and self.random_removal_samples < 1:
            raise ValueError(f"random_removal_samples must be positive; given {self.random_removal_samples}.")
        if self.reattributed_queries < 0 or rounds < 0:
            raise ValueError(
                "reattributed_queries and iterative_removal_rounds must not be negative; given "
                f"{self.reattributed_queries} and {rounds}."
            )
        if self.additivity_groups and min(ks) < 2:
            raise ValueError(
                f"additivity_groups cuts the top K of each query in two, so every K must be at least 2; given ks {ks}."
            )
        uneven = [k for k in ks if rounds and k % rounds]
        if uneven:
            raise ValueError(
                f"iterative_removal_rounds removes K images in {rounds} equal rounds, which {uneven[0]} cannot be cut "
                f"into: choose ks that are multiples of {rounds}, or another number of rounds."
            )

    def stages(self) -> list[tuple[int, int]]:
        """(K, queries in a group) of each stage."""
        return list(zip(self.ks, self.query_groups * (len(self.ks) // len(self.query_groups)), strict=True))
