"""`wherefrom convert`: turns files of other projects into what is used here, and back.

`python -m wherefrom.interchange` is its name of earlier releases.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wherefrom.distillation.ranker import load_ranker, save_ranker
from wherefrom.distillation.teacher_set import write_teacher_set
from wherefrom.interchange.fastgda import (
    features_of_width,
    read_fastgda_ranker,
    read_fastgda_teacher,
    write_fastgda_ranker,
)
from wherefrom.interchange.safe_pickle import flattened, read_pickle
from wherefrom.runtime.artifacts import MANIFEST, check_identity, hash_file, replacing
from wherefrom.runtime.cli_errors import mistakes_in_one_line

EXAMPLES = """\
examples:

  {prog} fastgda-teacher data/coco teachers/coco

  {prog} fastgda-ranker weights/dino.pth rankers/dino

  {prog} to-fastgda-ranker rankers/dino dino.pth

  {prog} pickle influence_0.pkl influence_0.npz
"""


def parser(prog: str = "wherefrom convert") -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog=prog,
        description="Turn files of other projects into what is used here, and back.",
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    teacher = commands.add_parser("fastgda-teacher", help="FastGDA's rankings and features into a teacher set")
    teacher.add_argument("folder", type=Path, help="FastGDA's data/coco")
    teacher.add_argument("output", type=Path, help="folder of the teacher set")
    teacher.add_argument("--part", choices=("train", "test"), default="train", help="which queries")
    teacher.add_argument("--features", nargs="+", help="types of features; without it all that are there")
    teacher.add_argument(
        "--images",
        "--pictures",
        dest="images",
        type=Path,
        help="Parquet table: image, caption, in the training set's order",
    )
    teacher.add_argument("--queries", type=Path, help="Parquet table: query, prompt, in the queries' order")
    ranker = commands.add_parser("fastgda-ranker", help="a checkpoint of FastGDA's into a ranker")
    ranker.add_argument("file", type=Path, help="the .pth file")
    ranker.add_argument("output", type=Path, help="folder of the ranker")
    ranker.add_argument("--features", nargs="+", help="features that it takes, in their order; by default by its width")
    back = commands.add_parser("to-fastgda-ranker", help="a ranker into a checkpoint of FastGDA's")
    back.add_argument("folder", type=Path, help="folder of the ranker")
    back.add_argument("output", type=Path, help="the .pth file")
    arrays = commands.add_parser("pickle", help="the arrays of a pickle file, which is never run, into NumPy files")
    arrays.add_argument("file", type=Path, help="the pickle file")
    arrays.add_argument("output", type=Path, help="a .npy file for one array, a .npz file for several")
    return root


def convert_teacher(options: argparse.Namespace) -> None:
    """`fastgda-teacher`."""
    teacher = read_fastgda_teacher(options.folder, options.part, options.features, options.images, options.queries)
    if (options.output / MANIFEST).exists():
        check_identity(options.output, teacher.identity)
    write_teacher_set(options.output, teacher)
    print(
        f"{options.output}: {len(teacher.queries):,} queries, {teacher.rows.shape[1]:,} of {len(teacher.images):,} "
        f"images each; features {', '.join(sorted(teacher.features))}"
    )


def convert_ranker(options: argparse.Namespace) -> None:
    """`fastgda-ranker`."""
    ranker = read_fastgda_ranker(options.file)
    features = options.features or features_of_width(ranker.inputs)
    save_ranker(options.output, ranker, features, source={"file": options.file.name, "hash": hash_file(options.file)})
    print(f"{options.output}: {ranker.inputs} inputs ({', '.join(features)}), scale {ranker.scale.item():.3f}")


def convert_back(options: argparse.Namespace) -> None:
    """`to-fastgda-ranker`."""
    ranker, features = load_ranker(options.folder)
    write_fastgda_ranker(options.output, ranker)
    print(f"{options.output}: takes {', '.join(features)}")


def convert_pickle(options: argparse.Namespace) -> None:
    """`pickle`.

    Raises:
        ValueError: The file cannot be read, or its arrays do not fit into the output.
    """
    arrays = flattened(read_pickle(options.file))
    if options.output.suffix == ".npy":
        if len(arrays) != 1:
            raise ValueError(
                f"{options.file} holds {len(arrays)} arrays; name a .npz file in place of {options.output}."
            )
        with replacing(options.output) as temporary, temporary.open("wb") as stream:
            np.lib.format.write_array(stream, next(iter(arrays.values())), allow_pickle=False)
    elif options.output.suffix == ".npz":
        _write_npz(options.output, arrays)
    else:
        raise ValueError(f"{options.output} must end with .npy or .npz.")
    for name, array in arrays.items():
        print(f"{name or '(the array)'}: {array.dtype} {array.shape}")


def _write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """As `numpy.savez`, which cannot take every name."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name or 'array'}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def run(words: Sequence[str] | None, prog: str = "wherefrom convert") -> None:
    """Runs the command line.

    Raises:
        ValueError: See the conversions.
        OSError: A file could not be read or written.
    """
    options = parser(prog).parse_args(words)
    convert = {
        "fastgda-teacher": convert_teacher,
        "fastgda-ranker": convert_ranker,
        "to-fastgda-ranker": convert_back,
        "pickle": convert_pickle,
    }[options.command]
    convert(options)


def main(args: Sequence[str] | None = None) -> None:
    """`python -m wherefrom.interchange`: a user's mistake is one line, not a traceback."""
    print("python -m wherefrom.interchange is now: wherefrom convert", file=sys.stderr)
    with mistakes_in_one_line(called_from_python=args is not None):
        run(args)


if __name__ == "__main__":
    main()
