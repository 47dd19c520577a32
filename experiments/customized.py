"""Can methods find what a model was customized on? Exemplars of twenty customized emoji models among 2,000 others.

    npm pack @iconify-json/{noto,noto-v1,emojione,fxemoji} --pack-destination data/npm
    python -m experiments.customized --methods efficientnet caption pixel random --words with without
    python -m experiments.customized --methods abu_plus abu_plus_100_steps abu abu_100_steps abu_all_weights abu_sgd

The base model is `weights/emoji`, which knows two styles. Ten models learn a third style each (V* is the style: ten
drawings of it, of other things for each model), ten learn one thing each (V* is the thing: its drawings in the held-out
styles). Each then draws two images with V*, and each method is asked which of 2,000 training images and the
exemplars made them. Everything is written in the released layouts below `runs/customized`, and attributed by
`evaluate.py customized`, which goes on where it stopped. Unlearning takes 5 timesteps without mirror images, and 500
draws, or 1,000 in 100 steps of 10. `--full`: twice as many models, 10 timesteps and mirror images, four times as many
draws.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
import yaml
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image

import evaluate
import train
from experiments.support.arguments import script_parser
from wherefrom.commands.customization_benchmark import RESULT, ROWS
from wherefrom.data.emoji import EmojiOptions, build_emoji
from wherefrom.data.image_set import ImageSet
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import generate
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store, replacing, write_json

ROOT, RESULTS, EXPERIMENT = Path("runs/customized"), Path("results/emoji/customized.json"), "configs/experiment"
WORD, SIZE, DRAWN = "<new1>", 32, 128
EXEMPLARS, IMAGES = 10, 2
LARGEST = 64 * 2**20  # of a file in an archive
# A piano in two of the sets.
AMBIGUOUS = {"keyboard", "musical keyboard"}
_ORDER = 1301


@dataclass(frozen=True)
class Style:
    """A set of drawings from an npm package of Iconify's.

    Attributes:
        name: The package's.
        license: Of all its drawings.
        author: Who drew them.
        drawings: Name of the thing -> SVG.
    """

    name: str
    license: str
    author: str
    drawings: Mapping[str, str]


def read_style(archive: Path) -> Style:
    """Drawings of a package as `npm pack` leaves it; nothing is written to disk.

    Raises:
        ValueError: The archive is of another kind, or a file in it too large.
    """
    with tarfile.open(archive) as package:

        def content(name: str) -> Any:
            try:
                member = package.getmember(f"package/{name}")
            except KeyError as error:
                raise ValueError(
                    f"{archive} has no {name}: give Iconify's packages, as `npm pack` leaves them."
                ) from error
            stream = package.extractfile(member)
            if stream is None or member.size > LARGEST:
                raise ValueError(f"{archive}: {name} is no file, or of {member.size:,} bytes, more than {LARGEST:,}.")
            return json.load(stream)

        icons, info = content("icons.json"), content("info.json")
    width, height = icons.get("width", 16), icons.get("height", 16)
    drawings = {
        name.replace("-", " "): (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {icon.get("width", width)} {icon.get("height", height)}">{icon["body"]}</svg>'
        )
        for name, icon in icons["icons"].items()
    }
    return Style(icons["prefix"], info["license"]["spdx"], info["author"]["name"], drawings)


def rasterise(svg: str) -> UInt8[NDArray[np.uint8], "h w 3"]:
    """A drawing on white, as the emoji world's are."""
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN)))).convert(
        "RGBA"
    )
    on_white = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    return np.asarray(on_white.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Plan:
    """One model to make.

    Attributes:
        case: `emoji_styles` or `emoji_objects`.
        number: Which of them.
        caption: Of all its exemplars.
        start: The word that V* begins from.
        exemplars: (style, thing) of each.
        prompts: Of the images it draws.
    """

    case: str
    number: int
    caption: str
    start: str
    exemplars: tuple[tuple[str, str], ...]
    prompts: tuple[str, ...]

    @property
    def name(self) -> str:
        """Folder of the model and of its images."""
        return f"{self.case}/{self.number:02d}"


def ordered(names: Sequence[str], seed: int) -> list[str]:
    """Names in an order that is a hash of (seed, name)."""
    keys = keyed_random.uniform(keyed_random.combine(_ORDER, seed, keyed_random.hash_texts(list(names))))[:, 0]
    return [names[index] for index in keys.argsort(stable=True).tolist()]


def plan(styles: Mapping[str, Style], known: Sequence[str], models: int) -> list[Plan]:
    """Models of styles, and as many of things.

    Args:
        styles: The held-out styles by name.
        known: Things that the base model draws.
        models: How many of each kind.

    Raises:
        ValueError: The styles hold too few things.
    """
    names, things = sorted(styles), [name for name in known if name not in AMBIGUOUS]
    result: list[Plan] = []
    used: set[str] = set()
    for number in range(models):
        style = names[number % len(names)]
        free = [name for name in ordered(things, number) if name in styles[style].drawings and name not in used]
        if len(free) < EXEMPLARS + IMAGES:
            raise ValueError(
                f"{style} has {len(free)} things left for model {number}, {EXEMPLARS + IMAGES} are needed."
            )
        chosen, asked = free[:EXEMPLARS], free[EXEMPLARS : EXEMPLARS + IMAGES]
        used |= set(chosen)
        exemplars = tuple((style, name) for name in chosen)
        prompts = tuple(f"{name}, {WORD} style" for name in asked)
        result.append(Plan("emoji_styles", number, f"{WORD} style", "picture", exemplars, prompts))
    everywhere = [name for name in ordered(things, 10_000) if all(name in styles[each].drawings for each in names)]
    if len(everywhere) < models:
        raise ValueError(f"Only {len(everywhere)} things are in all of {', '.join(names)}; {models} are needed.")
    for number, name in enumerate(everywhere[:models]):
        exemplars = tuple((style, name) for style in names)
        caption = f"{WORD}, drawn style"  # in the words of the base model's captions, but of neither of its styles
        result.append(Plan("emoji_objects", number, caption, "object", exemplars, (caption,) * IMAGES))
    return result


def write_exemplars(each: Plan, styles: Mapping[str, Style], folder: Path) -> list[Path]:
    """The exemplars in the imagefolder layout; gives their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files, lines = [], []
    for number, (style, name) in enumerate(each.exemplars):
        files.append(folder / f"{number:02d}.png")
        with replacing(files[-1]) as temporary:
            Image.fromarray(rasterise(styles[style].drawings[name])).save(temporary, "PNG")
        row = {"file_name": files[-1].name, "text": each.caption, "name": name, "style": style}
        lines.append(json.dumps({**row, "license": styles[style].license, "author": styles[style].author}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return files


def make(plans: Sequence[Plan], styles: Mapping[str, Style], steps: int) -> None:
    """Trains what is not trained, draws what is not drawn, and writes the lists."""
    cases: dict[str, list[dict[str, Any]]] = {}
    tasks = []
    for number, each in enumerate(plans, start=1):
        exemplars, model = ROOT / "dataset" / "exemplar" / each.name, ROOT / "models" / each.name
        files = write_exemplars(each, styles, exemplars)
        if not (model / "customized.json").exists():
            print(f"{each.name}: model {number} of {len(plans)}", flush=True)
            shutil.rmtree(model / "run", ignore_errors=True)  # of a training that was interrupted
            options = {
                "data.init_args.folder": exemplars,
                "model.init_args.start": each.start,
                "model.init_args.save_to": model,
                "trainer.max_steps": steps,
                "trainer.enable_progress_bar": "false",
                "trainer.default_root_dir": model / "run",
                "trainer.logger": "false",
                "trainer.callbacks": "[]",
                "trainer.enable_checkpointing": "false",
            }
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            train.main(["fit", "-c", f"{EXPERIMENT}/emoji_customized.yaml", *words])
        drawn = [ROOT / "synth" / each.name / f"{index}.png" for index in range(len(each.prompts))]
        if not all(path.exists() for path in drawn):
            queries = generate(load_model(str(model)), prompts=each.prompts, seed=0, shape=(4, 8, 8), eta=1.0)
            for path, query in zip(drawn, queries, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    Image.fromarray(query.pixels).save(temporary, "PNG")
        paths = [str(path.relative_to(ROOT)) for path in drawn]
        cases.setdefault(each.case, []).append(
            {"exemplar": [str(path.relative_to(ROOT)) for path in files], "synth": {"own": paths}}
        )
        tasks += [
            {
                "synth_image_path": path,
                "prompt": prompt,
                "test_case": each.case,
                "test_case_ind": each.number,
                "model_path": str(model.relative_to(ROOT)),
                "train_prompt": each.caption,
                "category": each.start,
            }
            for path, prompt in zip(paths, each.prompts, strict=True)
        ]
    for case, content in cases.items():
        write_json(ROOT / "json" / f"{case}.json", content)
    write_json(ROOT / "tasks.json", tasks)


def sheet(plans: Sequence[Plan], path: Path) -> None:
    """An image to look at: each model's first exemplars, and what it draws."""
    rows = []
    for each in plans:
        files = sorted((ROOT / "dataset" / "exemplar" / each.name).glob("*.png"))[:4]
        files += sorted((ROOT / "synth" / each.name).glob("*.png"))
        rows.append(np.concatenate([np.asarray(Image.open(file).convert("RGB").resize((96, 96))) for file in files], 1))
    Image.fromarray(np.concatenate(rows)).save(path)


def settings_of(file: Path, full: bool) -> dict[str, Any]:
    """What is changed of a method's file: fewer draws and timesteps, for a method that unlearns."""
    unlearning = yaml.safe_load(file.read_text()).get("init_args", {}).get("unlearning")
    if unlearning is None:
        return {}
    several = unlearning["steps"] > 1
    noise_samples = {"unlearning.noise_samples": (10 if several else 500) * (4 if full else 1)}
    if several:  # each step's size is measured
        noise_samples["unlearning.measurement_samples"] = 100 if full else 25
    return {"grid.timesteps": 10 if full else 5, "grid.flips": full, **noise_samples}


def main() -> None:
    """Makes the models, asks the methods, prints and keeps the table."""
    parser = script_parser(__doc__)
    parser.add_argument("--npm", type=Path, default=Path("data/npm"), help="folder of the packages")
    parser.add_argument("--methods", nargs="*", default=["efficientnet", "caption", "pixel", "random", "abu_plus"])
    parser.add_argument("--words", nargs="+", default=["with"], choices=["with", "without"])
    parser.add_argument("--steps", type=int, default=300, help="of each model's training")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    archives = sorted(options.npm.glob("*.tgz"))
    if len(archives) < 2:
        raise SystemExit(f"{options.npm} holds {len(archives)} packages; at least two are needed: see --help.")
    styles = {style.name: style for style in map(read_style, archives)}
    images: ImageSet = build_emoji(Store("cache"), EmojiOptions())
    train_names = sorted(set(images.where("split", "train").columns["name"]))
    plans = plan(styles, train_names, 20 if options.full else 10)
    make(plans, styles, options.steps)
    sheet(plans, ROOT / "sheet.png")
    print(f"look: {ROOT / 'sheet.png'}")
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    for name in options.methods:
        output = ROOT / "run" / ("full" if options.full else "quick")
        file = f"configs/attributor/{name}.yaml"
        asked = [f"[{file}]", "--settings", json.dumps(settings_of(Path(file), options.full))]
        evaluate.main(
            [
                *("customized", "-c", f"{EXPERIMENT}/emoji_customized_benchmark.yaml", "--methods", *asked),
                *("--words", json.dumps(options.words), "--output", str(output / name)),
            ]
        )
        result = json.loads((output / name / RESULT).read_text())
        kept["rows"][f"{name}{' (full)' if options.full else ''}"] = result["lines"]
        command = "python -m experiments.customized --methods " + " ".join(kept["rows"])
        write_json(RESULTS, {"command": command, "k": result["k"], "rows": kept["rows"]})
        print(f"rows of single images: {output / name / ROWS}")


if __name__ == "__main__":
    main()
