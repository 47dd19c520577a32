"""`wherefrom attribute`, `compare` and `budget`: a request, run by the same code as `attribute_images`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wherefrom.cli.entry import COMMANDS
from wherefrom.cli.run_file import Request, claim, completed
from wherefrom.cli.run_flags import request_from
from wherefrom.cli.run_inputs import inputs_of, report_options
from wherefrom.cli.run_sizes import keep_size

if TYPE_CHECKING:
    from wherefrom.attributors.base import Attributor
    from wherefrom.commands.prepared_run import PreparedRun
    from wherefrom.runtime.distributed import Runner

EXAMPLES = {
    "attribute": 'wherefrom attribute --model MODEL --images FOLDER --query generated.png --prompt "a red bus"',
    "compare": 'wherefrom compare --model MODEL --images FOLDER --prompt "a red bus" --method abu_plus --method trak',
}
_PRINTED = 10  # images of each query that are printed


def run(command: str, words: Sequence[str]) -> None:
    """Runs one of the commands.

    Raises:
        ValueError: What was asked for cannot be done; the message says why.
        OSError: There is no such model, or a folder could not be written.
    """
    if command == "budget":
        run_budget(words)
        return
    request = request_from(command, COMMANDS[command][1], EXAMPLES[command], words)
    if command == "attribute" and len(request.method) > 1:
        raise ValueError("--method stands once with attribute; wherefrom compare takes several.")
    request = completed(request)
    claim(request, write=False)  # before PyTorch is loaded
    _quiet()
    from wherefrom.runtime.distributed import launched

    with launched(request.device or None) as runner:
        (run_attribute if command == "attribute" else run_compare)(request, runner)


def _quiet() -> None:
    """No advice of libraries about themselves, and no bars but ours."""
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="(diffusers|transformers|torch)")
    print("loading PyTorch", file=sys.stderr)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _prepared(request: Request, runner: Runner) -> tuple[dict[str, Attributor], PreparedRun]:
    """The methods, and what they work with; says what they will take."""
    from wherefrom.commands.estimate import announce
    from wherefrom.commands.packaged_methods import QUICK_NOTE, load_packaged
    from wherefrom.commands.prepared_run import prepare_run

    queries, options = inputs_of(request)
    methods = load_packaged(request.method, options.settings, options.quick)
    made = prepare_run(
        request.model,
        images=request.images,
        queries=queries,
        methods=methods.values(),
        options=options,
        runner=runner,
    )
    for method in methods.values():
        method.check(made.queries)
    if runner.is_main:
        claim(request, write=True)  # only a request whose inputs are right takes the folder
        keep_size(Path(request.output), made.size)
    if request.quick:
        made.console.log(QUICK_NOTE)
    for name, method in methods.items():
        method.progress = made.console.progress
        if runner.is_main:
            if len(methods) > 1:
                made.console.log(name)
            output = Path(request.output)
            count = len(made.queries)
            announce(made.console, attributor=method, data=made.data, model=made.model, queries=count, output=output)
    return methods, made


def run_attribute(request: Request, runner: Runner) -> None:
    """`wherefrom attribute`."""
    from wherefrom.commands.attribute import attribute
    from wherefrom.reports.scores_view import ScoresView

    methods, made = _prepared(request, runner)
    ((_, method),) = methods.items()
    output = Path(request.output)
    results = attribute(
        output,
        attributor=method,
        data=made.data,
        model=made.model,
        queries=made.queries,
        store=made.store,
        runner=runner,
        options=report_options(request),
        log=made.console.log,
    )
    if not runner.is_main:
        return
    for scores in results:
        print("\n".join(ScoresView.of(scores, made.data).lines(_PRINTED)), end="\n\n")
    print(f"report:  {output / 'report.html'}\nranking: {output / 'ranking.parquet'}")


def run_compare(request: Request, runner: Runner) -> None:
    """`wherefrom compare`."""
    from wherefrom.commands.compare import compare

    methods, made = _prepared(request, runner)
    output = Path(request.output)
    results = compare(
        output,
        methods=methods,
        data=made.data,
        model=made.model,
        queries=made.queries,
        store=made.store,
        runner=runner,
        options=report_options(request),
        log=made.console.log,
    )
    if not runner.is_main:
        return
    for number, query in enumerate(made.queries):
        print(f"{query.name}  {query.prompt!r}")
        for name, scores in results.items():
            first = ", ".join(image for image, _ in scores[number].top(3))
            print(f"  {name}: {'all scores are equal' if scores[number].all_equal else first}")
    print(f"\nreport:  {output / 'report.html'}\ntable:   {output / 'methods.parquet'}")


def run_budget(words: Sequence[str]) -> None:
    """`wherefrom budget COMMAND …`: what the command would take, at rates measured here; nothing long is run.

    Raises:
        ValueError: The command has no budget, or what it is asked for cannot be used.
    """
    command = words[0] if words else ""
    if command in ("-h", "--help"):
        print(
            "usage: wherefrom budget attribute|compare [the words of that command]\n\n"
            "What the command would take, from a few passes through the model that are timed here.\n\n"
            f"example:\n\n  wherefrom budget {EXAMPLES['attribute'].removeprefix('wherefrom ')}"
        )
        return
    if command not in EXAMPLES:
        raise ValueError(
            f"budget stands before attribute or compare with all its words; given {command or 'nothing'!r}."
        )
    request = completed(request_from(command, COMMANDS[command][1], EXAMPLES[command], words[1:]))
    _quiet()
    from wherefrom.cli.budget_table import budget_of

    print(budget_of(request))
