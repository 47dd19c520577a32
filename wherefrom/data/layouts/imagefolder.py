"""Hugging Face's `imagefolder`: images beside a metadata file."""

from __future__ import annotations

from wherefrom.data.image_metadata import METADATA, metadata_files, read_metadata, split_folders
from wherefrom.data.layouts.base import FileReader, Found, Place, ReadingOptions
from wherefrom.runtime.artifacts import hash_file


class ImageFolderLayout:
    """`metadata.jsonl`, `.csv` or `.parquet`, in the folder or in its split folders."""

    name = "imagefolder"
    needs = f"images beside {', '.join(METADATA[:-1])} or {METADATA[-1]}, with the columns file_name and text"
    contains: frozenset[str] = frozenset({"images"})
    takes: frozenset[str] = frozenset()

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """The first metadata file."""
        if not place.path.is_dir():
            return None
        for below in ("", *split_folders(place.path)):
            for name in METADATA:
                if (place.path / below / name).is_file():
                    return Found(f"{below}/{name}".removeprefix("/"))
        return None

    def read(self, place: Place, options: ReadingOptions) -> FileReader:
        """See `read_metadata`."""
        folder = place.path
        told = read_metadata(folder, options.caption, options.columns)
        hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in metadata_files(folder)}
        return FileReader(self.name, told.rows, folder, told.caption, told.lines, {**hashes, **told.also})
