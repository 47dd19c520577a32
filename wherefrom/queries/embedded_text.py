"""Texts that an image file carries beside its pixels: PNG text chunks, Exif, XMP, JPEG comments.

Files are read by their structure alone, no pixel is decoded, and every size is bounded: whoever sends an image chooses
these bytes. Nothing here imports PyTorch.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

LONGEST = 4 << 20  # bytes of one text, unpacked: ComfyUI's graphs may be long
_MOST_TEXTS = 64
_MOST_PARTS = 1 << 16  # chunks or segments looked at
_PNG, _WEBP = b"\x89PNG\r\n\x1a\n", b"RIFF"
_EXIF, _XMP = b"Exif\x00\x00", b"http://ns.adobe.com/xap/1.0/\x00"
_XMP_KEY = "XML:com.adobe.xmp"
_USER_COMMENT, _EXIF_IFD, _MAKER_NOTE = 0x9286, 0x8769, 0x927C


@dataclass(frozen=True)
class EmbeddedText:
    """One text of an image file.

    Attributes:
        place: Where it stood, such as `PNG text` or `Exif`.
        key: Its keyword, such as `parameters`; of Exif the tag, such as `UserComment`.
        text: The text.
    """

    place: str
    key: str
    text: str


def read_embedded_texts(path: Path) -> tuple[list[EmbeddedText], list[str]]:
    """Reads the texts of a PNG, JPEG or WebP file.

    Args:
        path: The file. Files of other formats have none.

    Returns:
        The texts, and what could not be read: a text that is too long, packed too tightly, or damaged.

    Raises:
        OSError: The file cannot be opened.
    """
    notes: list[str] = []
    texts: list[EmbeddedText] = []
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(0)
        if head.startswith(_PNG):
            found = _of_png(file, notes)
        elif head.startswith(b"\xff\xd8"):
            found = _of_jpeg(file, notes)
        elif head[:4] == _WEBP and head[8:12] == b"WEBP":
            found = _of_webp(file, notes)
        else:
            return [], []
        try:
            for text in found:
                if len(texts) == _MOST_TEXTS:
                    notes.append(f"more than {_MOST_TEXTS} texts; the others are not read")
                    break
                texts.append(text)
        except (struct.error, zlib.error, ValueError, SyntaxError) as error:
            notes.append(f"its texts are damaged ({error})")
    return texts, notes


def texts_of_image(image: Image.Image) -> tuple[list[EmbeddedText], list[str]]:
    """The texts that Pillow keeps of an image that it has opened; see `read_embedded_texts`."""
    notes: list[str] = []
    texts = [
        EmbeddedText("PNG text", str(key), str(value))
        for key, value in list(image.info.items())[:_MOST_TEXTS]
        if isinstance(value, str) and len(value) <= LONGEST
    ]
    exif = image.info.get("exif")
    if isinstance(exif, bytes) and len(exif) <= LONGEST:
        texts += _of_exif(exif.removeprefix(_EXIF), notes)
    return texts, notes


def _of_png(file: BinaryIO, notes: list[str]) -> Iterator[EmbeddedText]:
    file.seek(len(_PNG))
    for _ in range(_MOST_PARTS):
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"eXIf"):
            file.seek(length + 4, 1)
            continue
        if length > LONGEST + 1024:
            notes.append(_too_long(f"a {kind.decode()} chunk"))
            file.seek(length + 4, 1)
            continue
        data = file.read(length)
        file.seek(4, 1)
        if kind == b"eXIf":
            yield from _of_exif(data, notes)
            continue
        text = _png_text(kind, data, notes)
        if text is not None:
            yield text


def _too_long(what: str) -> str:
    return f"{what} is longer than {LONGEST >> 20} MiB and is not read"


def _unpacked(data: bytes) -> bytes | None:
    """Unpacks at most `LONGEST` bytes; None if there are more."""
    made = zlib.decompressobj()
    result = made.decompress(data, LONGEST + 1)
    return None if len(result) > LONGEST or made.unconsumed_tail else result


def _png_text(kind: bytes, data: bytes, notes: list[str]) -> EmbeddedText | None:
    keyword, _, rest = data.partition(b"\x00")
    key, packed, charset = keyword.decode("latin-1")[:80], False, "latin-1"
    if kind == b"zTXt":
        packed, rest = True, rest[1:]
    elif kind == b"iTXt":
        packed, charset = rest[:1] == b"\x01", "utf-8"
        _, _, rest = rest[2:].partition(b"\x00")  # language
        _, _, rest = rest.partition(b"\x00")  # keyword in that language
    value = _unpacked(rest) if packed else rest
    if value is None or len(value) > LONGEST:
        notes.append(_too_long(f"the text {key!r}"))
        return None
    if charset == "latin-1":
        try:  # several programs write UTF-8 where the standard has Latin-1
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            text = value.decode("latin-1")
    else:
        text = value.decode(charset, errors="replace")
    return EmbeddedText("XMP" if key == _XMP_KEY else "PNG text", key, text)


def _of_jpeg(file: BinaryIO, notes: list[str]) -> Iterator[EmbeddedText]:
    file.seek(2)
    exif = b""
    for _ in range(_MOST_PARTS):
        marker = file.read(2)
        if len(marker) < 2 or marker[0] != 0xFF or marker[1] in (0xD9, 0xDA):
            break  # the pixels begin
        if marker[1] == 0xFF:  # filling
            file.seek(-1, 1)
            continue
        length = struct.unpack(">H", file.read(2))[0] - 2
        if marker[1] not in (0xE1, 0xFE):
            file.seek(length, 1)
            continue
        data = file.read(length)
        if marker[1] == 0xFE:
            yield EmbeddedText("JPEG comment", "Comment", data.decode("utf-8", errors="replace"))
        elif data.startswith(_EXIF):
            exif += data.removeprefix(_EXIF)  # longer ones go on in the next segment
            if len(exif) > LONGEST:
                notes.append(_too_long("its Exif"))
                exif = b""
        elif data.startswith(_XMP):
            yield EmbeddedText("XMP", _XMP_KEY, data.removeprefix(_XMP).decode("utf-8", errors="replace"))
    if exif:
        yield from _of_exif(exif, notes)


def _of_webp(file: BinaryIO, notes: list[str]) -> Iterator[EmbeddedText]:
    file.seek(12)
    for _ in range(_MOST_PARTS):
        head = file.read(8)
        if len(head) < 8:
            return
        kind, length = struct.unpack("<4sI", head)
        if kind not in (b"EXIF", b"XMP "):
            file.seek(length + length % 2, 1)
            continue
        if length > LONGEST:
            notes.append(_too_long(f"its {kind.decode().strip()}"))
            file.seek(length + length % 2, 1)
            continue
        data = file.read(length)
        file.seek(length % 2, 1)
        if kind == b"EXIF":
            yield from _of_exif(data.removeprefix(_EXIF), notes)
        else:
            yield EmbeddedText("XMP", _XMP_KEY, data.decode("utf-8", errors="replace"))


def _of_exif(data: bytes, notes: list[str]) -> Iterator[EmbeddedText]:
    """The texts of an Exif block, of its own directory and of the one below."""
    exif = Image.Exif()
    try:
        exif.load(data)
        directories: list[Any] = [dict(exif), dict(exif.get_ifd(_EXIF_IFD))]
    except Exception as error:  # Pillow's parser answers damaged bytes with whatever came of them
        notes.append(f"its Exif is damaged ({type(error).__name__})")
        return
    order = "be" if data[:2] == b"MM" else "le"
    for directory in directories:
        for tag, value in list(directory.items())[:_MOST_TEXTS]:
            key = {_USER_COMMENT: "UserComment", _MAKER_NOTE: "MakerNote"}.get(tag, f"tag {tag:#06x}")
            if isinstance(value, bytes) and tag == _USER_COMMENT:
                value = user_comment(value, order)
            elif isinstance(value, bytes):
                value = value.decode("utf-8", errors="replace")
            if isinstance(value, str) and value.strip("\x00 "):
                yield EmbeddedText("Exif", key, value.strip("\x00"))


def user_comment(data: bytes, order: str = "be") -> str:
    """The text of Exif's UserComment: eight bytes name its character set.

    Args:
        data: The value.
        order: The block's own byte order, which UTF-16 has by the standard; programs follow it or not.
    """
    charset, text = data[:8], data[8:]
    if charset == b"UNICODE\x00":
        return _utf16(text, order)
    if charset in (b"ASCII\x00\x00\x00", bytes(8)):
        return text.decode("utf-8", errors="replace")
    if charset == b"JIS\x00\x00\x00\x00\x00":
        return text.decode("iso2022_jp", errors="replace")
    return data.decode("utf-8", errors="replace")


def _utf16(data: bytes, order: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    # The high byte of most characters that settings are written in is 0, and it tells the order.
    high, low = data[0::2].count(0), data[1::2].count(0)
    if high != low:
        order = "be" if high > low else "le"
    return data.decode(f"utf-16-{order}", errors="replace")
