"""Reader of WebDataset shards: tar files whose members `KEY.jpg`, `KEY.txt`, `KEY.json` form one sample.

A key is a member's name up to the first dot of its last part; what follows is the member's kind, such as `jpg` or
`input.jpg`.

Everything in a shard is untrusted. Nothing is unpacked to disk: names are keys and never paths. Damaged or rejected
members are reported and skipped; a damaged shard yields all samples before the damage.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

from wherefrom.data.decoding import SkippedItem

IMAGES = frozenset(("jpg", "jpeg", "png", "webp"))
# Read too where a sample has none of the above, or by name.
_FURTHER_IMAGES = frozenset(("gif", "bmp", "tif", "tiff", "jp2", "avif", "ppm", "pgm"))
CAPTIONS = ("txt", "caption", "json")
_MOST_IMAGES = 8  # of a sample: what a shard may hold in memory is bounded
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_KEY = 256
# tarfile raises many unrelated types on damaged headers.
_DAMAGED = (tarfile.TarError, ValueError, EOFError, OverflowError, IndexError, TypeError)
REFUSED, DAMAGED, LARGE = "refused members", "damaged shards", "members above the size limit"


@dataclass
class ShardSample:
    """Members of a shard with the same key.

    Attributes:
        key: Name of the members up to the first dot.
        members: Lower-case kind, such as `jpg` or `input.jpg` -> bytes.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)


def is_image(kind: str) -> bool:
    """Whether a member of this kind is an image, by the last part of its name."""
    return kind.rpartition(".")[2] in IMAGES | _FURTHER_IMAGES


def image_kinds(kinds: Collection[str]) -> list[str]:
    """The kinds of a sample that may be its image, sorted: `jpg` and the like, and only without one `input.jpg`."""
    return sorted(IMAGES & {*kinds}) or sorted(kind for kind in kinds if is_image(kind))


def _refusal(member: tarfile.TarInfo) -> str | None:
    """Returns the reason for rejecting a member, or None."""
    name = member.name
    if not member.isreg() or member.issparse():
        return "is not a plain file"
    if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts or ":" in name.partition("/")[0]:
        return "its name leads out of the shard"
    if not name.isprintable() or len(name) > _LONGEST_KEY:  # also what is not UTF-8
        return "its name is not valid"
    return None


def _split(name: str) -> tuple[str, str]:
    """Splits a name into key and extension, at the first dot of the last path component, as WebDataset does."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return (str(path.parent / stem) if stem else "", extension.lower())


def check_shard(path: Path) -> None:
    """Raises if a shard is empty.

    Raises:
        ValueError: The file is empty, or an archive without members.
    """
    with path.open("rb") as stream:
        block = stream.read(_BLOCK)
    if not block.strip(b"\0"):
        raise ValueError(f"{path} is an empty shard: it holds no image. Download it again, or move it away.")


def list_samples(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields key and kinds of each sample of a shard, by the members' headers alone, up to where it is damaged."""
    key, kinds, length = "", list[str](), path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else all headers of a large shard stay in memory
                if member.size < 0 or tar.offset > length + _BLOCK:
                    break
                if member.isdir() or _refusal(member) is not None:
                    continue
                name, kind = _split(member.name)
                if name != key:
                    if key:
                        yield key, kinds
                    key, kinds = name, []
                kinds.append(kind)
    except _DAMAGED:
        pass  # what is lost is named when the shard is read
    if key:
        yield key, kinds


def first_kinds(path: Path) -> list[str]:
    """The kinds of a shard's first sample."""
    return next((kinds for _, kinds in islice(list_samples(path), 1)), [])


def read_shard(
    path: Path,
    largest: int = 2**26,
    wanted: Callable[[str], bool] = lambda key: True,
    further: Collection[str] = (),
) -> Iterator[ShardSample | SkippedItem]:
    """Yields the samples of a shard in order, and skipped items.

    Args:
        path: The tar file.
        largest: Members of more bytes than this, by their header, are not read.
        wanted: Whether to read a key; others are ignored.
        further: Kinds to read beside images and captions.

    Raises:
        OSError: The file cannot be read at all.
    """
    sample: ShardSample | None = None
    finished: set[str] = set()
    offset, length = 0, path.stat().st_size
    try:
        # A stream reads forwards only, from disk or a slow mount, and cannot be sent back by a header.
        with tarfile.open(path, "r|", bufsize=1 << 20) as tar:
            for member in tar:
                offset = tar.offset
                if member.size < 0 or offset > length + _BLOCK:  # tarfile would walk to wherever the header points
                    raise tarfile.ReadError(f"{member.name[:_LONGEST_KEY]!a} cannot have {member.size:,} bytes")
                if member.isdir():
                    continue
                reason = _refusal(member)
                key, extension = _split(member.name)
                if reason is None and not key:
                    reason = "it has no key"
                if reason is not None:
                    yield SkippedItem(f"{path.name}: {member.name[:_LONGEST_KEY]!a}", REFUSED, reason)
                    continue
                if sample is None or key != sample.key:
                    if sample is not None:
                        finished.add(sample.key)
                        yield sample
                    sample = ShardSample(key)
                if not (is_image(extension) or extension in CAPTIONS or extension in further) or not wanted(key):
                    continue
                if extension not in further and "." in extension and len(sample.members) >= _MOST_IMAGES:
                    continue
                if key in finished or extension in sample.members:
                    yield SkippedItem(f"{path.name}: {member.name}", REFUSED, "its key or name occurs twice")
                elif member.size > largest and extension not in IMAGES.union(CAPTIONS, further):
                    continue  # beside the image that is used, or else the sample has none, which is said
                elif member.size > largest:
                    yield SkippedItem(f"{path.name}: {member.name}", LARGE, f"{member.size:,} bytes")
                else:
                    content = tar.extractfile(member)
                    assert content is not None, "plain files have content"
                    sample.members[extension] = content.read()
            offset = tar.offset
        damage = "" if _ends_well(path, offset) else "cut off or damaged"
    except _DAMAGED as error:
        damage = f"cut off or damaged: {error}"
    if sample is not None:
        yield sample
    if damage:
        yield SkippedItem(path.name, DAMAGED, f"{damage}, at or after byte {offset:,} of {length:,}")


def _ends_well(path: Path, offset: int) -> bool:
    """Whether the end marker follows the members: tarfile treats a damaged header as the end."""
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(_BLOCK) == bytes(_BLOCK)
