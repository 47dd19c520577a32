"""Queries, options and page settings of a request, as the library takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wherefrom.cli.run_file import Request
from wherefrom.cli.run_sizes import framing_of, size_of

if TYPE_CHECKING:
    from wherefrom.commands.prepared_run import AttributionOptions, QueryInput
    from wherefrom.reports.query_section import ReportOptions


def inputs_of(request: Request) -> tuple[list[QueryInput], AttributionOptions]:
    """The queries and options that a request names."""
    from wherefrom.commands.prepared_run import AttributionOptions
    from wherefrom.data.layouts.base import checked_lines
    from wherefrom.data.on_error import checked
    from wherefrom.queries.sources import QueryRegion

    queries: list[QueryInput] = [
        (query["image"], query.get("prompt")) if query.get("image") else query["prompt"] for query in request.queries
    ]
    return queries, AttributionOptions(
        settings=request.settings or {},
        quick=request.quick,
        lora=request.lora,
        store=request.store,
        device=request.device or None,
        resize=request.resize,
        regions=[QueryRegion(**region) for region in request.regions],
        base=request.base or None,
        caption=request.caption or None,
        layout=request.layout or None,
        one_caption=request.one_caption,
        trigger=request.trigger,
        caption_lines=checked_lines(request.caption_lines),
        image_column=request.image_column or None,
        split=request.split,
        null=request.null,
        size=size_of(request.size),
        framing=framing_of(request),
        on_error=checked(request.on_error),
        seed=request.seed,
        sampling_steps=request.sampling_steps,
        guidance=request.guidance,
        eta=request.eta,
        clip_skip=request.clip_skip,
    )


def report_options(request: Request) -> ReportOptions:
    """What the pages show."""
    from wherefrom.commands.packaged_methods import QUICK_NOTE
    from wherefrom.reports.query_section import ReportOptions

    notes = [QUICK_NOTE] if request.quick else []
    return ReportOptions(request.top, list(request.groups) or None, request.title, notes)
