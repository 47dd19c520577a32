"""What the judge is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Protocol:
    """How many images go, for how many queries at once, how often, and what is asked of the models.

    Attributes:
        ks: Images of each query that a retraining leaves out.
        pools: For each K, queries whose images one retraining leaves out; a single number serves for all K. 1 is the
            papers' protocol.
        seeds: Seeds of the trainings; each has its own model with all images.
        random: How many times as many images are left out at random for each pool.
        timesteps: Timesteps of the queries' losses (AbU, section 5.1: 200).
        ladder: Numbers of images that are left out at random, to say how many random images do as much as those
            that a method names (AbU, section 5.1: up to the whole set). Empty leaves that out.
        ladder_draws: Models on each rung.
        after: For how many queries of each method and K the retrained model of the first seed is attributed again, to
            see which images take over; whole pools, until so many queries are covered.
        groups: Retrain also without the odd and without the even places of each query's top K: do their effects add up?
        greedy: In how many rounds the K images are taken away instead of at once, attributing again after each; 0
            leaves that out. Methods that ask a model only: the others rank what is left as they did before.
    """

    ks: list[int] = field(default_factory=lambda: [16])
    pools: list[int] = field(default_factory=lambda: [5])
    seeds: list[int] = field(default_factory=lambda: [0])
    random: int = 1
    timesteps: int = 200
    ladder: list[int] = field(default_factory=list)
    ladder_draws: int = 3
    after: int = 0
    groups: bool = False
    greedy: int = 0

    def __post_init__(self) -> None:
        if min(self.ks, default=0) < 1 or min(self.pools, default=0) < 1 or not self.seeds or self.random < 0:
            raise ValueError(
                "ks, pools and seeds need positive numbers and random must not be negative; given ks "
                f"{self.ks}, pools {self.pools}, seeds {self.seeds}, random {self.random}."
            )
        if len(self.pools) not in (1, len(self.ks)):
            raise ValueError(f"pools must hold one number, or one for each of ks {self.ks}; given {self.pools}.")
        if self.after < 0 or self.greedy < 0:
            raise ValueError(f"after and greedy must not be negative; given {self.after} and {self.greedy}.")
        if self.groups and min(self.ks) < 2:
            raise ValueError(
                f"groups cuts the top K of each query in two, so every K must be at least 2; given ks {self.ks}."
            )
        uneven = [k for k in self.ks if self.greedy and k % self.greedy]
        if uneven:
            raise ValueError(
                f"greedy takes K images away in {self.greedy} equal rounds, which {uneven[0]} cannot be cut into: "
                f"choose ks that are multiples of {self.greedy}, or another number of rounds."
            )

    def stages(self) -> list[tuple[int, int]]:
        """(K, queries in a pool) of each stage."""
        return list(zip(self.ks, self.pools * (len(self.ks) // len(self.pools)), strict=True))
