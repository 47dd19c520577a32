"""Training batches of a ranker as blocks of pairs: some queries times some images, each embedded once.

One pair per row, as in the paper's recipe, embeds two rows for one label. A block of Q queries and C images embeds
Q + C rows for all its labelled pairs, up to Q · C. Everything is sampled on the device with keyed random numbers: a
block is a function of (seed, step), so a resumed run sees the same blocks as an uninterrupted one.

Shape letters: Q = queries of the block, C = its images, N = training images, K = images that the teacher scored
per query, M ≤ K = those used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from wherefrom.distillation.teacher_set import Features, TeacherSet
from wherefrom.runtime import keyed_random
from wherefrom.runtime.salts import Salt


@dataclass(frozen=True)
class TeacherPairs:
    """Teacher labels and features of queries and images, as tensors on one device.

    Attributes:
        query_keys: Hash of each query's id.
        image_keys: Hash of each training image's id.
        queries: Features of the queries.
        images: Features of the training images.
        rows: Images that the teacher scored: first the M used ones, the most influential first, then the others.
        scores: Standardised scores of the M used ones (0 where all scores of a query are equal), in that order.
    """

    query_keys: Int64[Tensor, " q"]
    image_keys: Int64[Tensor, " n"]
    queries: Float[Tensor, "q d"]
    images: Float[Tensor, "n d"]
    rows: Int32[Tensor, "q k"]
    scores: Float[Tensor, "q m"]

    @classmethod
    def of(cls, teacher: TeacherSet, features: Features, candidates: int | None = None, seed: int = 0) -> TeacherPairs:
        """Builds the labels of a teacher set.

        Args:
            teacher: The teacher set.
            features: Input features of the ranker for images and queries.
            candidates: Use this many of the scored images of each query, sampled uniformly by (seed, query, image);
                None uses all. The others are neither labelled nor outside.
            seed: Seed of that sample.

        Raises:
            ValueError: The teacher scored fewer images.
        """
        query_keys, image_keys = keyed_random.hash_texts(teacher.queries), keyed_random.hash_texts(teacher.images)
        rows, scores = torch.tensor(teacher.rows), torch.tensor(teacher.scores).double()
        used = rows.shape[1] if candidates is None else candidates
        if not 1 <= used <= rows.shape[1]:
            raise ValueError(
                f"candidates is {candidates}, but the teacher scored {rows.shape[1]} images a query: take at most as "
                "many, at least 1, or leave it out to use all."
            )
        if used < rows.shape[1]:
            keys = keyed_random.combine(Salt.RANKER_SUBSAMPLE, seed, query_keys[:, None], image_keys[rows.long()])
            order = keyed_random.uniform(keys)[..., 0].argsort(dim=1)
            order = torch.cat([order[:, :used].sort(dim=1).values, order[:, used:]], dim=1)
            rows, scores = rows.gather(1, order), scores.gather(1, order)[:, :used]
        spread = scores.std(dim=1, correction=0, keepdim=True)
        standard = (scores - scores.mean(dim=1, keepdim=True)) / torch.where(spread > 0, spread, 1.0)
        sides = torch.tensor(features.queries), torch.tensor(features.training)
        return cls(query_keys, image_keys, *sides, rows.int(), standard.float())

    def to(self, device: torch.device | str) -> TeacherPairs:
        """Moves all tensors to a device."""
        return TeacherPairs(*(value.to(device) for value in vars(self).values()))

    @property
    def used(self) -> int:
        """M: labelled images per query."""
        return self.scores.shape[1]

    @property
    def outside(self) -> int:
        """Number of images per query that the teacher did not score."""
        return len(self.images) - self.rows.shape[1]


class PairBlock(NamedTuple):
    """All pairs of some queries and some images.

    Attributes:
        key: Key of all other randomness of the step, such as dropout.
        query_rows: Positions of the queries.
        image_rows: Positions of the images.
        queries: Features of the queries.
        images: Features of the images.
        ranks: Normalised ranks of the teacher; (M - 1) / M for images that it did not score.
        scores: Standardised scores of the teacher; the query's lowest for images that it did not score.
        weights: Weights of the pairs in the loss; 0 for unused pairs.
        labelled: Pairs that the teacher scored.
    """

    key: int
    query_rows: Int64[Tensor, " q"]
    image_rows: Int64[Tensor, " c"]
    queries: Float[Tensor, "q d"]
    images: Float[Tensor, "c d"]
    ranks: Float[Tensor, "q c"]
    scores: Float[Tensor, "q c"]
    weights: Float[Tensor, "q c"]
    labelled: Bool[Tensor, "q c"]

    def share(self, rank: int, world_size: int) -> PairBlock:
        """Selects one process's images; gradients averaged over processes equal those of the whole block."""
        if world_size == 1:
            return self
        mine = slice(rank, None, world_size)
        return self._replace(
            key=int(keyed_random.combine(self.key, rank)),
            image_rows=self.image_rows[mine],
            images=self.images[mine],
            ranks=self.ranks[:, mine],
            scores=self.scores[:, mine],
            weights=self.weights[:, mine] * world_size,
            labelled=self.labelled[:, mine],
        )


class BlockSampler:
    """Samples blocks whose expected weighted loss is that of the paper's recipe.

    That recipe samples a query and one of its M labelled images uniformly and, with probability `outside`, replaces the
    image by one that the teacher did not score for the query, with the last rank. Here:

    - Queries come in a keyed random order, each at most once per epoch; an incomplete last block is dropped.
    - Images come from two strata without replacement: most uniformly from the union of the images labelled for the
      block's queries (so that as many pairs as possible are labelled), the share `outside` of them uniformly from the
      rest of the training set (so that images which are no query's candidates are seen too). A stratum that is too
      small leaves its slots to the other.
    - Every labelled pair of the block is used, and every pair that the teacher did not score is an outside pair, at no
      extra cost. A pair's weight is its probability in the recipe over the inclusion probability of its image, which
      its stratum determines (Horvitz and Thompson 1952), so frequently labelled images are not overweighted: the
      expectation of the weighted sum is exactly the recipe's mean loss. Outside pairs have `outside` of the weight.

    A block holds about Q · C · M / N labelled pairs for its Q + C rows, so use more queries if M is much smaller than
    N. Grouping similar queries does not help: on clustered features with M = N / 10 it raised the labelled share of
    blocks of 64 queries from 10 to 11 % only.

    Args:
        pairs: The labels.
        seed: Seed of all samples.
        queries: Q; all queries if there are fewer.
        images: C; all images if there are fewer.
        outside: Probability of an image that was not scored; no effect if the teacher scored all.

    Raises:
        ValueError: A size is not positive, or `outside` not a probability below 1.
    """

    def __init__(
        self,
        pairs: TeacherPairs,
        seed: int,
        queries: int = 256,
        images: int = 512,
        outside: float = 0.1,
    ) -> None:
        if queries < 1 or images < 2 or not 0 <= outside < 1:
            raise ValueError(
                "A block needs at least one query and two images, and a share of outside images from 0 to below 1; "
                f"given {queries}, {images} and {outside}."
            )
        self.pairs, self.seed = pairs, seed
        self.queries, self.images = min(queries, len(pairs.queries)), min(images, len(pairs.images))
        self.outside = outside if pairs.outside else 0.0
        # Images from the rest of the training set: at least one if `outside` is positive.
        self._reserved = min(max(round(self.outside * self.images), 1), self.images - 1) if self.outside else 0
        self._blocks = len(pairs.queries) // self.queries  # per epoch
        self._order: tuple[int, Tensor] | None = None  # cached order of one epoch

    def steps(self) -> int:
        """Steps per epoch: blocks that hold, on average, as many labelled pairs as there are."""
        labelled = 0.0
        for step in range(self._blocks):
            union = self._union(self.block_queries(step)).sum()
            labelled += float(self._inside(union) / union) * self.queries * self.pairs.used
        return max(1, round(len(self.pairs.queries) * self.pairs.used * self._blocks / labelled))

    def block(self, step: int) -> PairBlock:
        """Builds the block of a step."""
        pairs, queries = self.pairs, self.block_queries(step)
        images, drawn = self._block_images(step, self._union(queries))
        positions = self._positions(queries, images)
        labelled = (positions >= 0) & (positions < pairs.used)
        place = torch.where(labelled, positions, pairs.used - 1)
        share = labelled * ((1 - self.outside) / (self.queries * pairs.used))
        if self.outside:
            share = share + (positions < 0) * (self.outside / (self.queries * pairs.outside))
        dtype = pairs.queries.dtype
        return PairBlock(
            int(keyed_random.combine(Salt.RANKER_BLOCK, self.seed, step)),
            queries,
            images,
            pairs.queries[queries],
            pairs.images[images],
            place.to(dtype) / pairs.used,
            pairs.scores[queries].gather(1, place).to(dtype),
            (share / drawn).to(dtype),
            labelled,
        )

    def block_queries(self, step: int) -> Int64[Tensor, " q"]:
        """Selects the queries of a step's block: the next Q of the epoch's keyed random order."""
        turn, place = divmod(step, self._blocks)
        if self._order is None or self._order[0] != turn:
            keys = keyed_random.combine(Salt.RANKER_QUERY_ORDER, self.seed, turn, self.pairs.query_keys)
            self._order = turn, keyed_random.uniform(keys)[:, 0].argsort()
        return self._order[1][place * self.queries : (place + 1) * self.queries]

    def _union(self, queries: Int64[Tensor, " q"]) -> Bool[Tensor, " n"]:
        """Marks images that are labelled for any of these queries."""
        union = torch.zeros(len(self.pairs.images), dtype=torch.bool, device=queries.device)
        union[self.pairs.rows[queries, : self.pairs.used].flatten().long()] = True
        return union

    def _inside(self, union: Tensor) -> Tensor:
        """Number of a block's images sampled from a union of this size; the others come from the rest."""
        rest = len(self.pairs.images) - union
        return torch.minimum((self.images - rest).clamp(min=self.images - self._reserved), union)

    def _block_images(self, step: int, union: Bool[Tensor, " n"]) -> tuple[Int64[Tensor, " c"], Float[Tensor, " c"]]:
        """Samples the images of a step's block, with the inclusion probability of each."""
        size = union.sum()
        inside = self._inside(size)
        keys = keyed_random.combine(Salt.RANKER_OUTSIDE_IMAGE, self.seed, step, self.pairs.image_keys)
        luck = keyed_random.uniform(keys)[:, 0]
        # No device synchronisation: both strata are sampled in full, and slots filled from one or the other.
        from_union = torch.topk(luck + ~union, self.images, largest=False).indices
        from_rest = torch.topk(luck + union, self.images, largest=False).indices
        place = torch.arange(self.images, device=luck.device)
        images = torch.where(place < inside, from_union, from_rest[(place - inside).clamp(min=0)])
        rest = len(union) - size
        return images, torch.where(place < inside, inside / size, (self.images - inside) / rest.clamp(min=1))

    def _positions(self, queries: Int64[Tensor, " q"], images: Int64[Tensor, " c"]) -> Int64[Tensor, "q c"]:
        """Rank of each image among those that the teacher scored for each query, from 0; -1 if not scored."""
        pairs, count = self.pairs, len(images)
        column = torch.full((len(pairs.images),), count, device=images.device)  # one too far: not in the block
        column[images] = torch.arange(count, device=images.device)
        columns = column[pairs.rows[queries].long()]
        positions = torch.full((len(queries), count + 1), -1, device=images.device)
        places = torch.arange(pairs.rows.shape[1], device=images.device).expand_as(columns)
        return positions.scatter_(1, columns, places)[:, :count]
