"""What is checked and said of the images that are ranked and of the null, before and after they are read."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from wherefrom.data.identical_images import identical_images
from wherefrom.data.image_set import ImageSet
from wherefrom.data.layouts.base import ReadingOptions, shown
from wherefrom.data.layouts.detection import OpenedImages, open_images
from wherefrom.data.ranked_images import RankedImages
from wherefrom.queries.types import Query
from wherefrom.runtime.cli_errors import as_spoken

_logger = logging.getLogger(__name__)


def check_choice(images: OpenedImages | ImageSet, choice: RankedImages, reading: ReadingOptions) -> None:
    """Refuses a choice of splits that the images do not have, before a model is loaded.

    Args:
        images: A place whose rows are read, or images.
        choice: Which of them are ranked, and the null.
        reading: How a null folder is read.

    Raises:
        ValueError: See `RankedImages`; or the folder cannot be used.
    """
    if not choice.chosen:
        return
    if isinstance(images, ImageSet):
        splits: Sequence[str] = images.columns.get("split", ("",) * len(images))
    else:
        splits = [row.split for row in images.reader.rows]
    choice.parts(splits)
    folder = choice.null_folder({name for name in splits if name})
    if folder is not None:
        open_images(folder, reading)


def warn_of_null(null: ImageSet | None, ranked: ImageSet, queries: Sequence[Query]) -> None:
    """Warns where images of the null are also ranked, or asked about: the model may well have seen them.

    Args:
        null: Images that the model was never trained on, as the user says.
        ranked: The training images.
        queries: The queries.
    """
    if null is None:
        return
    asked = identical_images(null, [query.pixels for query in queries])
    if asked:
        names = [queries[place].name for place in dict.fromkeys(place for _, place in asked)]
        _logger.warning(
            as_spoken(
                f"{len(names)} of {len(queries)} queries are among the null themselves, the images that the model was "
                f"never trained on: {shown(names)}. If it was trained on them, they belong to the ranked images; "
                "null: none measures without a null."
            )
        )
    both = (
        identical_images(ranked, (null.pixels[place] for place in range(len(null))))
        if null.fingerprint != ranked.fingerprint
        else []
    )  # not a split of these
    if both:
        names = [null.ids[place] for place in dict.fromkeys(place for _, place in both)]
        _logger.warning(
            as_spoken(
                f"{len(names)} of the {len(null):,} images of the null are also ranked: {shown(names)}. p-values count "
                "them as never trained on; take them out of one of the two."
            )
        )
