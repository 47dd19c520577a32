"""The two-object check: does attribution of a part of an image find the object that is in that part?

    python -m experiments.two_objects

Scenes are two training images A | B of the emoji world side by side, in one style, with the caption "NAME_A and
NAME_B, STYLE style"; both concepts are in training in both styles. A scene is admitted if the model still shows both
objects after its latent was noised to t = 300 and denoised with its caption: each half's own caption is among the top 5
of 100, judged as in `experiments.recognisability`. Each admitted scene is attributed three times: box A (its left
half), box B (its right half) and the whole image. Box A wins if the best-ranked training image of concept A (in
either style) comes before that of concept B, box B the other way round; the whole image tells which side a method
prefers without a box. By EK-FAC influence functions, one pass over the training set for all queries, and by AbU+ for
the first scenes.

At most 600 scenes are tried. `--from-timestep 0` asks for less: that the autoencoder keeps both objects.
Everything is rebuilt below `runs/two_objects`; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datamodules import Emoji
from experiments.alignment import AlignmentJudge, Rate, rate
from experiments.scenes import AMONG, Admission, Scene, admit, judge_scenes
from experiments.support.arguments import (
    add_images,
    add_noise_samples,
    add_relative_loss_increase,
    add_samples_per_image,
    script_parser,
)
from lightning_modules.launch.runs import training_data
from wherefrom.attributors import (
    AttributionByUnlearning,
    Attributor,
    InfluenceFunction,
    Query,
    Scores,
    TrainingData,
)
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings
from wherefrom.commands.attribute import attribute
from wherefrom.curvature import EKFAC, FisherSettings
from wherefrom.data.emoji import EmojiOptions, build_emoji
from wherefrom.data.image_set import ImageSet
from wherefrom.features.base import EfficientNetLite0Encoder, MiniLMEncoder
from wherefrom.gradients.loss_grid import LossGrid
from wherefrom.models.pipeline import load_model
from wherefrom.queries.regions import Region
from wherefrom.rankings.ranking_file import order_of
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store, replacing
from wherefrom.runtime.console import Console, peak_memory
from wherefrom.runtime.distributed import Runner

BOXES = ("left", "right", "whole")


@dataclass(frozen=True)
class Ranks:
    """Under one query of each scene: rank, from 1, of the best training image of A and of B."""

    a: list[int]
    b: list[int]

    def a_first(self) -> Bool[NDArray[np.bool_], " n"]:
        """Whether A's best image comes before B's."""
        return np.array(self.a) < np.array(self.b)


def queries_of(scene: Scene, latent: Float[Tensor, "c h w"]) -> list[Query]:
    """Its three queries, in the order of `BOXES`: one id, so that they share their noise."""
    size = scene.pixels.shape[0], scene.pixels.shape[1]
    return [
        Query(
            scene.id,
            scene.prompt,
            scene.pixels,
            latent,
            region=None if name == "whole" else Region.from_box(scene.box(name), size),
        )
        for name in BOXES
    ]


def best_rank(scores: Scores, concepts: Mapping[str, str], concept: str) -> int:
    """Rank, from 1, of a concept's best training image.

    Args:
        scores: One query's scores.
        concepts: Image id -> concept.
        concept: The concept.
    """
    order = order_of(scores.ids, scores.scores)
    return next(rank for rank, row in enumerate(order, start=1) if concepts[scores.ids[row]] == concept)


def ranks_of(results: Sequence[Scores], scenes: Sequence[Scene], concepts: Mapping[str, str]) -> dict[str, Ranks]:
    """The ranks under each kind of query; `results` holds the scenes' queries in the order of `BOXES`."""
    result = {}
    for offset, name in enumerate(BOXES):
        pairs = list(zip(results[offset :: len(BOXES)], scenes, strict=True))
        a, b = ([best_rank(scores, concepts, scene.concepts[side]) for scores, scene in pairs] for side in (0, 1))
        result[name] = Ranks(a, b)
    return result


def shares(ranks: Mapping[str, Ranks]) -> dict[str, Rate]:
    """How often box A wins, box B wins, and the whole image prefers A."""
    return {
        "box A": rate(ranks["left"].a_first()),
        "box B": rate(~ranks["right"].a_first()),
        "whole": rate(ranks["whole"].a_first()),
    }


def table(result: Mapping[str, Mapping[str, Ranks]], images: int) -> str:
    """The table in Markdown: shares, and the median ranks of A's and B's best images under each query."""
    lines = [
        f"| method | scenes | box A wins | box B wins | whole image: A first | median rank of A, B of {images:,}: "
        "box A | box B | whole |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, ranks in result.items():
        rates = shares(ranks)
        cells = [f"{each.value:.0%} ± {each.error:.0%}" for each in rates.values()]
        medians = [f"{np.median(each.a):.0f}, {np.median(each.b):.0f}" for each in (ranks[name] for name in BOXES)]
        lines.append(f"| {method} | {rates['whole'].count} | {' | '.join([*cells, *medians])} |")
    return "\n".join(lines)


def contact_sheet(
    scenes: Sequence[Scene],
    *,
    shown: UInt8[NDArray[np.uint8], "n h w 3"],
    results: Sequence[Scores],
    images: ImageSet,
    top: int = 5,
    cell: int = 64,
) -> Image.Image:
    """A row a scene: it, it denoised, the first training images under box A, under box B.

    A green bar is under images of the box's own concept, a red one under those of the other one.
    """
    pad, bar, text_height = 6, 4, 14
    pitch_x, pitch_y = cell + pad, cell + bar + text_height + pad
    sheet = Image.new("RGB", (pad + 4 * pitch_x + 2 * (top * pitch_x + 2 * pad), pad + len(scenes) * pitch_y), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    where = {name: row for row, name in enumerate(images.ids)}

    def paste(pixels: NDArray[np.uint8], left: int, upper: int, width: int) -> None:
        shown = Image.fromarray(np.asarray(pixels)).resize((width, cell), Image.Resampling.NEAREST)
        sheet.paste(shown, (left, upper))

    for number, scene in enumerate(scenes):
        upper = pad + number * pitch_y
        paste(scene.pixels, pad, upper, 2 * cell)
        paste(shown[number], pad + 2 * pitch_x, upper, 2 * cell)
        canvas.text((pad, upper + cell + bar), scene.prompt, fill="black", font=font)
        for side in range(2):
            left = 2 * pad + 4 * pitch_x + side * (top * pitch_x + pad)
            for image, _ in results[number * len(BOXES) + side].top(top):
                paste(images.pixels[where[image]], left, upper, cell)
                concept = images.columns["concept"][where[image]]
                colour = {scene.concepts[side]: "limegreen", scene.concepts[1 - side]: "red"}.get(concept, "lightgrey")
                canvas.rectangle((left, upper + cell, left + cell - 1, upper + cell + bar - 1), fill=colour)
                left += pitch_x
    return sheet


def part_of(data: TrainingData, scenes: Sequence[Scene], count: int) -> TrainingData:
    """So many training images, among them all of the scenes' concepts; the others by hash."""
    assert data.latents is not None
    shown = {concept for scene in scenes for concept in scene.concepts}
    concepts, ids = data.images.columns["concept"], data.images.ids
    order = sorted(range(len(ids)), key=lambda row: (concepts[row] not in shown, keyed_random.hash_text(ids[row])))
    kept = sorted(order[:count])
    missing = shown - {concepts[row] for row in kept}
    if missing:
        raise ValueError(f"{count} images cannot hold all {len(shown)} concepts of the scenes; give --images more.")
    return TrainingData(data.images.subset(kept), data.latents.subset(kept))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the check."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="weights/emoji")
    parser.add_argument("--output", type=Path, default=Path("runs/two_objects"))
    parser.add_argument("--sheet", type=Path, default=Path("runs/two_objects.png"))
    parser.add_argument("--scenes", type=int, default=40, help="admitted scenes to attribute")
    parser.add_argument("--unlearning-scenes", type=int, default=10, help="how many of them by AbU+ also")
    add_images(parser, help="only so many training images: a quick look, whose record stays in --output")
    parser.add_argument("--from-timestep", type=int, default=300, help="where a scene is denoised from")
    parser.add_argument("--sampling-steps", type=int, default=50, help="DDIM steps of the whole way from T")
    parser.add_argument("--timesteps", type=int, default=5)
    add_noise_samples(parser, 1000)
    add_samples_per_image(parser, 2)
    add_relative_loss_increase(parser, 0.2)
    parser.add_argument("--weights", default="cross_attention_kv", help="which weights' gradients count")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    console, runner = Console(), Runner.current()
    store = Store(options.output / "cache")
    model = load_model(options.model).to(runner.device)
    console.log("images, latents and captions")
    data = training_data(Emoji(store=str(store.root)), model)
    assert data.latents is not None
    console.log("judge: features of all images")
    judge = AlignmentJudge(
        EfficientNetLite0Encoder.from_pretrained(), texts=MiniLMEncoder.from_pretrained(), store=store
    )
    judge.fit(build_emoji(store, EmojiOptions()), console.progress)
    console.log("scenes")

    def judged(scenes: Sequence[Scene]) -> Admission:
        return judge_scenes(
            model,
            judge=judge,
            scenes=scenes,
            seed=options.seed,
            timestep=options.from_timestep,
            steps=options.sampling_steps,
        )

    blocks = admit(data.images, options.scenes, options.seed, judged, most=12)
    tried = sum(len(block.scenes) for block in blocks)
    every = [(block, row) for block in blocks for row in block.admitted()]
    chosen = every[: options.scenes]
    scenes = [block.scenes[row] for block, row in chosen]
    queries = [query for block, row in chosen for query in queries_of(block.scenes[row], block.latents[row])]
    too_long = len(blocks) * AMONG // 2 - tried
    admitted = (
        f"{len(every)} of {tried} scenes are admitted ({too_long} more have captions of more tokens than are read); "
        f"the first {len(scenes)} are attributed"
    )
    if len(scenes) < options.scenes:
        admitted += f", fewer than the {options.scenes} asked for: the model shows no more"
    console.log(admitted)
    # Without the null: nothing here is read from p-values.
    train = TrainingData(data.images, data.latents)
    if options.images is not None:
        train = part_of(train, scenes, options.images)
    grid, fisher = LossGrid(timesteps=options.timesteps), FisherSettings(samples_per_image=options.samples_per_image)
    few = len(BOXES) * min(options.unlearning_scenes, len(scenes))
    methods: dict[str, tuple[Attributor, list[Query]]] = {
        "influence function (EK-FAC)": (
            InfluenceFunction(
                weights=options.weights,
                noise_samples=options.noise_samples,
                grid=grid,
                curvature=EKFAC(fisher),
                queries_per_pass=len(queries),
            ),
            queries,
        ),
        "AbU+": (
            AttributionByUnlearning(
                weights=options.weights,
                # Half the usual noise samples: the search for the step is most of a query's time.
                unlearning=UnlearningSettings(
                    noise_samples=options.noise_samples,
                    relative_loss_increase=options.relative_loss_increase,
                    measurement_samples=200,
                ),
                grid=grid,
                curvature=EKFAC(fisher),
            ),
            queries[:few],
        ),
    }
    concepts = dict(zip(train.images.ids, train.images.columns["concept"], strict=True))
    result: dict[str, dict[str, Ranks]] = {}
    results: dict[str, list[Scores]] = {}
    for name, (method, mine) in methods.items():
        if not mine:
            continue
        console.log(f"{name}: {len(mine)} queries")
        method.progress = console.progress
        folder = options.output / name.replace(" ", "_")
        results[name] = attribute(
            folder,
            attributor=method,
            data=train,
            model=model,
            queries=mine,
            store=store,
            runner=runner,
            log=console.log,
        )
        result[name] = ranks_of(results[name], scenes[: len(mine) // len(BOXES)], concepts)
    print(table(result, len(train.images)))
    print(
        f"\n{admitted}; {len(train.images):,} training images, {options.timesteps} timesteps, {options.noise_samples} "
        f"noise samples; peak resident memory {peak_memory() / 2**30:.1f} GiB"
    )
    with replacing(options.sheet) as temporary:
        shown = np.stack([block.shown[row] for block, row in chosen])
        contact_sheet(scenes, shown=shown, results=next(iter(results.values())), images=train.images).save(
            temporary, format="PNG"
        )
    record = {
        "command": "python -m experiments.two_objects",
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "model": model.fingerprint(),
        "training_pictures": len(train.images),
        "tried": tried,
        "admitted": len(every),
        "captions_too_long": too_long,
        "scenes": [
            {
                "id": block.scenes[row].id,
                "prompt": block.scenes[row].prompt,
                "concepts": block.scenes[row].concepts,
                "judged_ranks": block.ranks[row].tolist(),
            }
            for block, row in chosen
        ],
        "shares": {
            name: {kind: asdict(each) for kind, each in shares(ranks).items()} for name, ranks in result.items()
        },
        "ranks": {name: {kind: asdict(each) for kind, each in ranks.items()} for name, ranks in result.items()},
    }
    folder = Path("results/emoji") if options.images is None else options.output
    with replacing(folder / "two_objects.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    console.log(f"look: {options.sheet}   record: {folder / 'two_objects.json'}")


if __name__ == "__main__":
    main()
