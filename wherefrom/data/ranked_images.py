"""Which images of a data set are ranked, and which were never trained on: the null."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wherefrom.data.image_set import ImageSet
from wherefrom.data.split_names import split_named
from wherefrom.runtime.artifacts import identity_hash

ALL, NONE = "all", "none"
_OF_A_FOLDER = "null/"  # before the ids of a null folder, which may be those of ranked images


@dataclass(frozen=True)
class Parts:
    """Positions of the ranked images and of the null, and what is to be said about them."""

    ranked: list[int]
    null: list[int]
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankedImages:
    """Which images are ranked, and which were never trained on.

    Attributes:
        split: Splits whose images are ranked, or `all`; without any, `train` where the images have splits and all of
            them where they have none.
        null: Images never trained on: the name of a split, a folder, images, or `none`; "" is the split `validation`
            where the images have one that is not ranked.
    """

    split: tuple[str, ...] = ()
    null: str | Path | ImageSet = ""

    @classmethod
    def of_options(cls, split: Sequence[str] | str | None, null: str | Path | ImageSet | None) -> RankedImages:
        """The choice as options give it: one split or several, and None for what is not said."""
        several = (split,) if isinstance(split, str) else tuple(split or ())
        return cls(tuple(name for name in several if name), "" if null is None else null)

    @property
    def chosen(self) -> bool:
        """Whether anything but the default is asked for."""
        return bool(self.split) or self.null != ""

    def null_folder(self, known: Collection[str]) -> Path | None:
        """The folder that `null` names, if it is one.

        Args:
            known: The splits that there are.

        Raises:
            ValueError: It is neither a split of the images, nor a folder, nor `none`.
        """
        if isinstance(self.null, ImageSet) or self.null in ("", NONE):
            return None
        name = str(self.null)
        if split_named(name, known) in known:
            return None
        if Path(name).is_dir():
            return Path(name)
        there = f"the images' splits are {', '.join(sorted(known))}" if known else "the images have no splits"
        raise ValueError(
            f"null: {name!r} is neither a split of the images ({there}), nor a folder of images that were never "
            "trained on. Give one of these, or null: none."
        )

    def parts(self, splits: Sequence[str]) -> Parts:
        """The positions of the ranked images and of the null among these images.

        Args:
            splits: The split of each image; "" where the images have none.

        Raises:
            ValueError: A split is named that there is not, none is ranked, or an image would be ranked and null.
        """
        known = Counter(name for name in splits if name)
        ranked = self._ranked(known)
        null = self._null(known, ranked)
        both = sorted(null & ranked)
        if both:
            raise ValueError(
                f"null: images of the split {both[0]!r} cannot be ranked and be the null, of images that were never "
                "trained on. Name other splits in split:, or give null: none."
            )
        places = [place for place, name in enumerate(splits) if name in ranked or not known]
        held = [place for place, name in enumerate(splits) if name in null]
        if not places:
            raise ValueError(
                f"images: none is for training: the images' splits are {_counted(known)}. Name those that the model "
                "was trained on in split:, or give split: all."
            )
        return Parts(places, held, self._lines(known, ranked, null, len(places)))

    def _ranked(self, known: Counter[str]) -> set[str]:
        if ALL in self.split:
            return set(known)
        if not self.split:
            return {"train"} if known else set()
        if not known:
            raise ValueError(
                f"split: the images have no splits, so {self.split[0]!r} names none of them. Leave it out, or add a "
                "column 'split' to the metadata."
            )
        named = {name: split_named(name, known) for name in self.split}
        missing = [name for name, split in named.items() if split not in known]
        if missing:
            raise ValueError(f"split: no image has the split {missing[0]!r}; the images' splits are {_counted(known)}.")
        return {split for split in named.values() if split is not None}

    def _null(self, known: Counter[str], ranked: set[str]) -> set[str]:
        if self.null == "":
            return {"validation"} & set(known) - ranked
        if self.null == NONE or isinstance(self.null, ImageSet) or self.null_folder(known) is not None:
            return set()
        return {split for split in (split_named(str(self.null), known),) if split is not None}

    def _lines(self, known: Counter[str], ranked: set[str], null: set[str], count: int) -> tuple[str, ...]:
        """What a person must know of the choice, where the images have splits."""
        if not known:
            return ()
        lines = [f"{count:,} images are ranked: split {_counted(Counter({name: known[name] for name in ranked}))}"]
        if null:
            held = _counted(Counter({name: known[name] for name in null}))
            remedy = "" if self.null else "; null: none, split: all ranks them too"
            lines.append(f"the null, of images never trained on: split {held}{remedy}")
        left = Counter({name: number for name, number in known.items() if name not in ranked | null})
        if left:
            lines.append(
                f"left out: split {_counted(left)}, neither ranked nor the null; name it in split: to rank it too"
            )
        return tuple(lines)

    def of(self, images: ImageSet, read: Callable[[Path], ImageSet]) -> tuple[ImageSet, ImageSet | None, Sequence[str]]:
        """The ranked images, the null if there is one, and what is to be said about them.

        Args:
            images: All images.
            read: Reads a folder of images as these were read.

        Raises:
            ValueError: See `parts`; or a null folder cannot be used.
        """
        splits = images.columns.get("split", ("",) * len(images))
        found = self.parts(splits)
        lines = list(found.lines)
        ranked = images if len(found.ranked) == len(images) else images.subset(found.ranked)
        null = images.subset(found.null) if found.null else None
        folder = self.null_folder({name for name in splits if name})
        if isinstance(self.null, ImageSet):
            null = of_a_folder(self.null)
            lines.append(f"the null, of images never trained on: {len(null):,} images")
        elif folder is not None:
            null = of_a_folder(read(folder))
            lines.append(f"the null, of images never trained on: the {len(null):,} images of {folder}")
        elif null is None:
            lines.append(
                f"{len(ranked):,} images are ranked, and there is no null, so there are no p-values"
                if not lines
                else "there is no null, so there are no p-values"
            )
        if null is not None and not len(null):
            raise ValueError("null: it holds no image. Give another, or null: none.")
        return ranked, null, lines


def of_a_folder(images: ImageSet) -> ImageSet:
    """Images from elsewhere than the ranked ones, under ids that cannot be theirs."""
    ids = tuple(_OF_A_FOLDER + name for name in images.ids)
    return replace(
        images, ids=ids, fingerprint=identity_hash({"of": images.fingerprint, "ids": list(ids)}), joined_from=()
    )


def _counted(splits: Counter[str]) -> str:
    return ", ".join(f"{name!r} ({splits[name]:,})" for name in sorted(splits)) or "none"
