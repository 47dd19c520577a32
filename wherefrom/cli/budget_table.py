"""What a request would take: images counted, a few of them read and encoded, a few passes timed."""

from __future__ import annotations

import os
from pathlib import Path

from wherefrom.cli.run_file import Request
from wherefrom.cli.run_inputs import inputs_of
from wherefrom.commands.budget import Sizes, as_table, drawing, encoding, method
from wherefrom.commands.estimate import forward_rate, timed
from wherefrom.commands.packaged_methods import load_packaged
from wherefrom.commands.prepared_run import check_query_files, open_model
from wherefrom.data.image_folder import load_image
from wherefrom.data.layouts.detection import open_images
from wherefrom.queries.run_size import RunSize
from wherefrom.runtime.console import room
from wherefrom.runtime.distributed import parse_device

_SAMPLE = 16  # images that are read to see how long that takes


def budget_of(request: Request) -> str:
    """A table of stages in Markdown, and what it was measured on.

    Raises:
        ValueError: The model, the images, a query, a method or a setting cannot be used.
        OSError: There is no pipeline at that path.
    """
    queries, options = inputs_of(request)
    check_query_files(queries)
    methods = load_packaged(request.method, options.settings, options.quick)
    reader = open_images(request.images, options.reading).reader
    rows = reader.rows
    splits = [row.split for row in rows]
    parts, null = options.choice.parts(splits), options.choice.null_folder(set(splits))
    training, held_out = len(parts.ranked), len(parts.null)
    if null is not None:
        held_out = len(open_images(null, options.reading).reader.rows)
    model = open_model(request.model, options.lora, options.base).to(parse_device(options.device))
    size = RunSize.of(model, options.size, options.framing)

    def decode() -> int:
        for row in rows[:_SAMPLE]:
            load_image(reader.open_image(row), size.option, size.framing)
        return len(rows[:_SAMPLE])

    sizes = Sizes(training, held_out, size.size, len(rows[0].captions), False)
    stages, data = encoding(model, sizes, timed(decode))
    assert data.latents is not None
    rate = forward_rate(model, data.latents)
    drawn = sum(isinstance(query, str) for query in queries)
    if drawn:
        stages.append(drawing(drawn, options.sampling_steps, options.guidance, rate))
    count = len(queries) + len(options.regions)
    for name, each in methods.items():
        stages += method(name, attributor=each, data=data, queries=count, rate=rate)
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    free = room(Path(request.output))
    return f"{as_table(stages, devices)}\n\nmeasured on one device; what the store holds is not made again; {free}"
