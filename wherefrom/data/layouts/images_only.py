"""Images without captions, all of which are given one."""

from __future__ import annotations

from wherefrom.data.layouts.base import (
    FileReader,
    Found,
    Place,
    ReadingOptions,
    check_inside,
    counted,
    finished_rows,
    image_row,
    with_folder_splits,
)
from wherefrom.data.layouts.caption_files import with_trigger
from wherefrom.data.layouts.left_out import images_to_read, left_out


class ImagesOnlyLayout:
    """A folder of nothing but images."""

    name = "images"
    needs = "images, and one caption for all of them in the option 'one_caption' (it may be '')"
    contains: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset({"one_caption", "trigger"})

    def find(self, place: Place, options: ReadingOptions) -> Found | None:
        """Counts the images."""
        images = images_to_read(place) if place.path.is_dir() else []
        return Found(f"{counted(len(images), 'image')} without captions", whole=False) if images else None

    def read(self, place: Place, options: ReadingOptions) -> FileReader:
        """The images, with the one caption.

        Raises:
            ValueError: There is no image, or no caption is given for all.
        """
        images, folder = images_to_read(place) if place.path.is_dir() else [], place.path
        if not images:
            raise ValueError(f"{place.given} holds no image. It should hold {self.needs}.")
        if options.one_caption is None:
            raise ValueError(
                f"{place.given} holds {counted(len(images), 'image')} and no captions. Where the model was trained "
                "with one caption for all of them, give it in the option 'one_caption' ('' where it was trained "
                "without words); else add the captions that it was trained with."
            )
        check_inside(folder, images)
        (caption,) = with_trigger((options.one_caption,), "one_caption", options.trigger, before=True)
        rows = [image_row(name, (caption,)) for name in images]
        made, _ = with_folder_splits(folder, rows)
        return FileReader(
            self.name, finished_rows(made), folder, lines=[f"all captions are {caption!r}", *left_out(place)]
        )
