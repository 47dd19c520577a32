"""Block sampling against one pair a row, in training a ranker: labelled pairs a second, and time to the same mAP.

    OMP_NUM_THREADS=1 python -m benchmarks.ranker

The labels are planted: a random MLP ranks random features (clustered, as real ones are), all images or the nearest
ones. Both sides train the same ranker of the papers' shape with the same optimizer and loss on the same labels:

- rows: 4,096 labelled pairs a step, drawn as in the papers' recipe, each embedded in two rows;
- blocks: `BlockSampler`.

First the throughput of whole training steps, in alternating runs. Then both train for the same time, and the seconds
are counted in which each reached a mAP on held-out queries that both reach. Measuring it is not counted. Seconds are
the processor's, so that other work on the machine does not count; with one thread they are a quiet machine's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.support.arguments import script_parser
from wherefrom.distillation.losses import BinaryCrossEntropy
from wherefrom.distillation.pair_blocks import BlockSampler, TeacherPairs
from wherefrom.distillation.ranker import Ranker
from wherefrom.distillation.teacher_set import Features, TeacherSet
from wherefrom.metrics.retrieval import MeanAveragePrecision
from wherefrom.runtime.artifacts import write_json


def planted(options: argparse.Namespace) -> TeacherSet:
    """Rankings by the cosine in a random MLP's embedding of some of the dimensions that the features come from."""
    random = torch.Generator().manual_seed(options.seed)
    count, width, latent = options.queries + options.held_out, options.features, options.latent
    centres = torch.randn(options.clusters, latent, generator=random)
    spread = torch.randn(latent, width, generator=random) / latent**0.5

    def drawn(size: int) -> tuple[Tensor, Tensor]:
        of = torch.randint(options.clusters, (size,), generator=random)
        inner = centres[of] + 0.7 * torch.randn(size, latent, generator=random)
        return inner[:, : options.seen], inner @ spread + 0.3 * torch.randn(size, width, generator=random)

    (seen_queries, queries), (seen_images, images) = drawn(count), drawn(options.images)
    torch.manual_seed(options.seed)
    teacher = Ranker(options.seen, width=256, hidden=1, outputs=options.outputs, dropout=0.0).eval()
    with torch.no_grad():
        scores = teacher.embed(seen_queries) @ teacher.embed(seen_images).T
        near = F.normalize(queries, dim=1) @ F.normalize(images, dim=1).T
    rows = near.topk(round(options.scored * options.images), dim=1).indices
    rows = rows.gather(1, scores.gather(1, rows).argsort(dim=1, descending=True))
    return TeacherSet(
        tuple(f"picture/{index}" for index in range(options.images)),
        ("",) * options.images,
        tuple(f"query/{index}" for index in range(count)),
        ("",) * count,
        rows.numpy().astype(np.int32),
        scores.gather(1, rows).numpy(),
        {"random": Features(images.numpy(), queries.numpy())},
        {"teacher": "planted"},
    )


class Row(NamedTuple):
    """Some labelled pairs, one a row."""

    queries: Tensor
    images: Tensor
    ranks: Tensor


class RowSampler:
    """The papers' recipe: a query and a labelled image of its, or with a probability one that was not scored."""

    def __init__(self, pairs: TeacherPairs, seed: int, size: int, outside: float) -> None:
        self.pairs, self.size, self.random = pairs, size, torch.Generator().manual_seed(seed)
        self.outside = outside if pairs.outside else 0.0
        self.scored = torch.zeros(len(pairs.queries), len(pairs.images), dtype=torch.bool)
        self.scored.scatter_(1, pairs.rows.long(), True)

    def draw(self) -> Row:
        """A batch."""
        pairs, random = self.pairs, self.random
        query = torch.randint(len(pairs.queries), (self.size,), generator=random)
        place = torch.randint(pairs.used, (self.size,), generator=random)
        image = pairs.rows[query, place].long()
        for index in (torch.rand(self.size, generator=random) < self.outside).nonzero()[:, 0].split(256):
            free = (~self.scored[query[index]]).float()
            image[index] = torch.multinomial(free, 1, generator=random)[:, 0]
            place[index] = pairs.used - 1
        return Row(pairs.queries[query], pairs.images[image], place / pairs.used)


class Trained:
    """One side: a ranker, its optimizer, and what it has taken.

    Args:
        side: `rows` or `blocks`.
        pairs: The labels.
        options: Sizes.
    """

    def __init__(self, side: str, pairs: TeacherPairs, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.ranker = Ranker(options.features, width=options.width, hidden=options.hidden, outputs=options.width)
        torch.nn.init.constant_(self.ranker.scale, options.scale)
        self.optimizer = torch.optim.AdamW(self.ranker.parameters(), lr=options.lr)
        self.loss, self.steps, self.pairs_seen, self.seconds = BinaryCrossEntropy(), 0, 0, 0.0
        self.blocks = BlockSampler(pairs, options.seed, options.block_queries, options.block_images, options.outside)
        self.rows = RowSampler(pairs, options.seed, options.batch, options.outside)
        self.step = self.step_of_rows if side == "rows" else self.step_of_blocks

    def step_of_rows(self) -> tuple[Tensor, int]:
        """The loss of a batch of rows, and its labelled pairs."""
        batch = self.rows.draw()
        cosines = (self.ranker.embed(batch.queries) * self.ranker.embed(batch.images)).sum(dim=1)
        losses = self.loss(self.ranker.logits(cosines), batch.ranks, batch.ranks)
        return losses.mean(), round(len(losses) * (1 - self.rows.outside))

    def step_of_blocks(self) -> tuple[Tensor, int]:
        """The loss of a block, and its labelled pairs."""
        block = self.blocks.block(self.steps)
        losses = self.loss(self.ranker(block.queries, block.images), block.ranks, block.scores)
        return (losses * block.weights).sum(), int(block.labelled.sum())

    def train(self, seconds: float) -> None:
        """Trains for some seconds, at least a step."""
        self.ranker.train()
        started, spent = time.process_time(), 0.0
        while spent == 0.0 or spent < seconds:
            self.optimizer.zero_grad()
            loss, pairs = self.step()
            loss.backward()
            self.optimizer.step()
            self.steps, self.pairs_seen = self.steps + 1, self.pairs_seen + pairs
            spent = time.process_time() - started
        self.seconds += spent

    @torch.no_grad()
    def precision(self, held_out: TeacherPairs, k: int) -> float:
        """MAP(k) of the ranking of all images."""
        self.ranker.eval()
        cosines = self.ranker.embed(held_out.queries) @ self.ranker.embed(held_out.images).T
        return precision(cosines, held_out, k)


def precision(scores: Tensor, held_out: TeacherPairs, k: int) -> float:
    """MAP(k) of these scores of all images."""
    metric, right = MeanAveragePrecision(), torch.zeros_like(scores, dtype=torch.bool)
    metric.update(scores, right.scatter_(1, held_out.rows[:, :k].long(), True))
    return float(metric.compute()["mean"])


def throughput(pairs: TeacherPairs, options: argparse.Namespace) -> dict[str, float]:
    """Labelled pairs a second of whole training steps: medians of alternating runs."""
    result: dict[str, list[float]] = {"rows": [], "blocks": []}
    sides = {side: Trained(side, pairs, options) for side in result}
    for each in sides.values():
        each.train(0.0)  # not counted
    for run in range(options.runs):
        for side in list(sides)[:: 1 if run % 2 == 0 else -1]:
            seen, seconds = sides[side].pairs_seen, sides[side].seconds
            sides[side].train(options.run_seconds)
            result[side].append((sides[side].pairs_seen - seen) / (sides[side].seconds - seconds))
        print("  " + ", ".join(f"{side} {values[-1]:,.0f} pairs/s" for side, values in result.items()), flush=True)
    return {side: statistics.median(values) for side, values in result.items()}


def curve(trained: Trained, held_out: TeacherPairs, options: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """(Seconds of training, mAP) again and again: after 1/100 of the time, then at intervals that grow by a tenth."""
    until = options.seconds / 100
    while trained.seconds < options.seconds:
        trained.train(until - trained.seconds)
        yield trained.seconds, trained.precision(held_out, options.k)
        until = min(max(until * 1.1, trained.seconds), options.seconds)


def reached(points: list[tuple[float, float]], level: float) -> float:
    """Seconds until the mAP was first at least this."""
    return next(seconds for seconds, result in points if result >= level)


def main() -> None:
    """Prints the ratios."""
    parser = script_parser(__doc__)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=50)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--scored", type=float, default=0.1, help="share of the images that the teacher scored")
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--latent", type=int, default=24, help="dimensions of the features beside noise")
    parser.add_argument("--seen", type=int, default=8, help="how many of them the teacher sees")
    parser.add_argument("--clusters", type=int, default=40)
    parser.add_argument("--outputs", type=int, default=16, help="width of the teacher's embedding")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scale", type=float, default=-1.0)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--block-queries", type=int, default=256)
    parser.add_argument("--block-images", type=int, default=512)
    parser.add_argument("--outside", type=float, default=0.1)
    parser.add_argument("--k", type=int, default=34)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--run-seconds", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, each side; 0 leaves the curves out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/ranker.json"))
    options = parser.parse_args()
    teacher = planted(options)
    parts = [
        TeacherPairs.of(part, part.concatenated(["random"]))
        for part in (
            teacher.of_queries(range(options.queries)),
            teacher.of_queries(range(options.queries, len(teacher.queries))),
        )
    ]
    pairs, held_out = parts
    block = BlockSampler(pairs, options.seed, options.block_queries, options.block_images, options.outside).block(0)
    print(
        f"{options.queries} queries, {pairs.used:,} of {options.images:,} scored, {options.features} features; rows of "
        f"{options.batch:,} pairs, blocks of {len(block.query_rows)} x {len(block.image_rows)} with "
        f"{float(block.labelled.float().mean()):.0%} labelled; {torch.get_num_threads()} threads"
    )
    rates = throughput(pairs, options)
    print(
        f"blocks see {rates['blocks'] / rates['rows']:.1f} times as many labelled pairs a second (medians of "
        f"{options.runs}: {rates['blocks']:,.0f} and {rates['rows']:,.0f})",
        flush=True,
    )
    if options.seconds == 0:
        return
    raw = F.normalize(held_out.queries, dim=1) @ F.normalize(held_out.images, dim=1).T
    print(f"mAP({options.k}) of the raw features: {precision(raw, held_out, options.k):.3f}")
    curves = {}
    for side in ("rows", "blocks"):
        trained = Trained(side, pairs, options)
        curves[side] = list(curve(trained, held_out, options))
        best = max(result for _, result in curves[side])
        print(
            f"  {side}: {trained.steps} steps, {trained.pairs_seen:,} labelled pairs, mAP({options.k}) "
            f"{best:.3f} at best, {curves[side][-1][1]:.3f} after {trained.seconds:.0f} s",
            flush=True,
        )
    level = min(max(result for _, result in points) for points in curves.values())
    print(f"seconds to shares of mAP({options.k}) {level:.3f}, which both reached:")
    for share in (0.8, 0.9, 0.95, 1.0):
        rows, blocks = (reached(curves[side], share * level) for side in ("rows", "blocks"))
        print(f"  {share:.0%}: rows {rows:.1f}, blocks {blocks:.1f}: {rows / blocks:.1f} times sooner")
    sizes = {name: value for name, value in vars(options).items() if name != "output"}
    write_json(options.output, {"command": "python -m benchmarks.ranker", **sizes, "rates": rates, "curves": curves})


if __name__ == "__main__":
    main()
