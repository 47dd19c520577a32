"""The customized-model benchmark's lists: which model, what it was customized on, and which images it drew.

Two layouts, both as released: AbC's (`json/NAME.json`, Wang et al. 2023) says which exemplars each model has and which
images were drawn; AbU's task list names the model's folder and each image's prompt, and points into AbC's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherefrom.queries.sources import QueryImage

# Fields of AbU's task list, and their types.
_FIELDS: dict[str, type] = {
    "synth_image_path": str,
    "prompt": str,
    "test_case": str,
    "test_case_ind": int,
    "model_path": str,
    "train_prompt": str,
}


@dataclass(frozen=True)
class Task:
    """A customized model and what is asked of it.

    Attributes:
        name: Test case and number.
        case: The test case, such as `test_artchive`: styles and objects are told apart by it.
        model: The customized model's folder; None where only features are asked.
        exemplars: What it was customized on.
        caption: The exemplars' caption; "" where it is not known.
        queries: Images that it drew, with their prompts ("" where they are not known).
    """

    name: str
    case: str
    model: Path | None
    exemplars: tuple[Path, ...]
    caption: str
    queries: tuple[QueryImage, ...]


def read_all(files: Sequence[Path], root: Path, limit: int | None = None) -> list[Task]:
    """Tasks of several files of either layout, told apart by their fields.

    Args:
        files: The files.
        root: What their paths are relative to.
        limit: Only the first so many models of each test case.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is of neither layout, the limit is not positive, or a model is in two files.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be positive; given {limit}.")
    result: list[Task] = []
    for file in files:
        made = read_abc(file, root) if "exemplar" in _list(file)[0] else read_tasks(file, root)
        twice = {task.name for task in made} & {task.name for task in result}
        if twice:
            raise ValueError(f"{file}: the model {min(twice)} is in another file of tasks too.")
        result += made
    seen: dict[str, int] = {}
    kept = []
    for task in result:
        seen[task.case] = seen.get(task.case, 0) + 1
        if limit is None or seen[task.case] <= limit:
            kept.append(task)
    return kept


def read_tasks(tasks: Path, root: Path) -> list[Task]:
    """Tasks of AbU's list, with the exemplars that AbC's files in `root/json` name.

    Args:
        tasks: The list.
        root: What its paths, and AbC's, are relative to.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is of another shape, a path leads out of the root, or two entries of a model contradict.
    """
    result: dict[str, list[dict[str, Any]]] = {}
    for number, entry in enumerate(_list(tasks)):
        for name, kind in _FIELDS.items():
            if not isinstance(entry.get(name), kind) or isinstance(entry.get(name), bool):
                raise ValueError(f"{tasks}: entry {number} should have {name!r} of type {kind.__name__}.")
        result.setdefault(f"{entry['test_case']}/{entry['test_case_ind']}", []).append(entry)
    made: list[Task] = []
    for name, entries in result.items():
        first = entries[0]
        for other in entries[1:]:
            for field in ("model_path", "train_prompt"):
                if other[field] != first[field]:
                    raise ValueError(
                        f"{tasks}: {name} has two values of {field!r}: {first[field]!r}, {other[field]!r}."
                    )
        file = _inside(root / "json", f"{first['test_case']}.json", tasks)
        cases = _list(file)
        if not 0 <= first["test_case_ind"] < len(cases):
            raise ValueError(f"{tasks}: {name} is not in {file}, which has {len(cases)} entries.")
        exemplars = _exemplars(cases[first["test_case_ind"]], first["test_case_ind"], file, root)
        model = _inside(root, first["model_path"], tasks)
        queries = [QueryImage(str(_file(root, each["synth_image_path"], tasks)), each["prompt"]) for each in entries]
        made.append(Task(name, first["test_case"], model, exemplars, first["train_prompt"], tuple(queries)))
    return made


def read_abc(file: Path, root: Path) -> list[Task]:
    """Tasks of one of AbC's own files: images without prompts or models, for methods that look at images alone.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The file is of another shape, or a path leads out of the root.
    """
    made = []
    for number, entry in enumerate(_list(file)):
        drawn = entry.get("synth")
        if not isinstance(drawn, dict) or not all(_is_paths(paths) for paths in drawn.values()):
            raise ValueError(f"{file}: entry {number} should have 'synth', lists of paths by the prompts' source.")
        images = [QueryImage(str(_file(root, path, file)), "") for paths in drawn.values() for path in paths]
        exemplars = _exemplars(entry, number, file, root)
        made.append(Task(f"{file.stem}/{number}", file.stem, None, exemplars, "", tuple(images)))
    return made


def _list(file: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"{file} should hold a list of entries with named fields, one at least.")
    return content


def _is_paths(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(path, str) for path in value)


def _exemplars(entry: dict[str, Any], number: int, file: Path, root: Path) -> tuple[Path, ...]:
    listed = entry.get("exemplar")
    if not isinstance(listed, list) or not _is_paths(listed):
        raise ValueError(f"{file}: entry {number} should have 'exemplar', a list of paths.")
    return tuple(_file(root, path, file) for path in listed)


def _inside(root: Path, path: str, file: Path) -> Path:
    """A path below the root: lists come from elsewhere, and are not to be trusted with the rest of the disk."""
    result = (root / path).resolve()
    if not result.is_relative_to(root.resolve()):
        raise ValueError(f"{file}: the path {path!r} leads out of {root}.")
    return result


def _file(root: Path, path: str, file: Path) -> Path:
    result = _inside(root, path, file)
    if not result.is_file():
        raise FileNotFoundError(f"{file} names {path!r}, which is no file in {root}.")
    return result


def cases_of(tasks: Sequence[Task], styles: Sequence[str]) -> dict[str, list[Task]]:
    """Tasks by what was customized: `styles` are the test cases of these names, `objects` all others.

    Raises:
        ValueError: A name is no task's test case.
    """
    unknown = sorted(set(styles) - {task.case for task in tasks})
    if unknown:
        there = ", ".join(sorted({task.case for task in tasks}))
        raise ValueError(f"styles: there is no test case {unknown[0]!r}; there are {there}.")
    split = {
        "objects": [task for task in tasks if task.case not in styles],
        "styles": [task for task in tasks if task.case in styles],
    }
    return {kind: result for kind, result in split.items() if result}
