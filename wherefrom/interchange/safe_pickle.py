"""Safe reader of arrays in pickle files: decodes them without unpickling.

A pickle is a program. Here it is decoded, never executed: opcodes are read one by one with the standard library's
disassembler, those that plain data does not need are rejected, and the few functions with which NumPy encodes arrays
are recorded as names, from which the arrays are built afterwards with `numpy.frombuffer`.

Why not a `pickle.Unpickler` whose `find_class` allows these functions: cached extension codes bypass
it, a memo index of four billion allocates 64 GB before it is called, nested tuples as keys hash for ever, and
NumPy's own `dtype.__setstate__` changes a live array's item size, after which it reads memory that is not its own.
"""

from __future__ import annotations

import mmap
import pickletools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wherefrom.interchange.pickled_arrays import NUMPY, Call, Global, Refused, record_call, record_state

_DEEPEST = 64
_REPEATED = 2**30
_KEYS = (str, int, float)
# Opcodes that push their own argument; none that imports, calls classes or refers to external objects.
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_VALUES |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


def read_pickle(path: str | Path) -> Any:
    """Reads a pickle file of arrays of numbers or strings, dictionaries, lists, tuples, numbers and strings.

    Arrays are read-only. Pickles of protocol 0 to 5 are read, those of Python 2 as well (but for protocol 0, whose
    bytes the disassembler cannot read).

    Raises:
        ValueError: The file contains anything else, such as arrays of objects, claims more bytes than it has, or is
            damaged.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    with path.open("rb") as stream, warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # the disassembler's, of text with a wrong escape
        try:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                size = len(content)
                program = pickletools.genops(content)  # type: ignore[arg-type]  # a file to it: read, readline, tell
                decoded = _Machine(size).run(program)
                rest = size - content.tell()
            if rest:
                raise Refused(f"{rest} more bytes after its end; only files with one object are read")
            return _plain(decoded, size)
        except (ValueError, LookupError, TypeError, OverflowError, MemoryError, DeprecationWarning) as error:
            why = "it holds or asks for" if isinstance(error, Refused) else "it is damaged:"
            raise ValueError(
                f"{path} was not read: {why} {error}. Only plain NumPy arrays, dictionaries, "
                "lists, tuples, numbers and strings are read; nothing in the file was run."
            ) from error


@dataclass
class _Machine:
    """Stack machine that decodes a pickle.

    Attributes:
        room: Remaining bytes that may be decoded from text: in total no more than the file size.
    """

    room: int
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, program: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> Any:
        """Decodes all opcodes and returns the result.

        Raises:
            Refused: An opcode is not needed for plain data.
        """
        for instruction, argument, _ in program:
            name = instruction.name
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _PUTS:
                self.memo[argument] = self._top()
            elif name == "MEMOIZE":
                self.memo[len(self.memo)] = self._top()
            elif name in _GETS:
                self.stack.append(self.memo[argument])
            elif name in _TUPLES:
                self.stack.append(tuple(self._pop(_TUPLES[name])))
            elif name == "STOP":
                (value,) = self.stack
                return value
            elif name not in ("PROTO", "FRAME"):
                self._structure(name, argument)
        raise AssertionError("the disassembler ends at STOP or raises")

    def _structure(self, name: str, argument: Any) -> None:
        match name:
            case "MARK":
                self.stack.append(_MARK)
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "LIST":
                self.stack.append(self._marked())
            case "TUPLE":
                self.stack.append(tuple(self._marked()))
            case "DICT":
                self.stack.append(_filled({}, self._marked()))
            case "APPEND":
                self._append(self._pop(1))
            case "APPENDS":
                self._append(self._marked())
            case "SETITEM":
                self._set(self._pop(2))
            case "SETITEMS":
                self._set(self._marked())
            case "GLOBAL":
                self.stack.append(_admitted(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self.stack.append(_admitted(*self._pop(2)))
            case "REDUCE":
                self._call()
            case "BUILD":
                self._restore()
            case _:
                raise Refused(f"the instruction {name}{'' if argument is None else ' ' + _short(argument)}")

    def _top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("its stack is empty where a value is needed")
        return self.stack[-1]

    def _pop(self, count: int) -> list[Any]:
        values = self.stack[len(self.stack) - count :] if count else []
        if len(values) < count or any(value is _MARK for value in values):
            raise ValueError("its stack is empty where a value is needed")
        del self.stack[len(self.stack) - count :]
        return values

    def _marked(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise ValueError("a mark is missing on its stack")

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise Refused(f"appending to {_short(target)}")
        target.extend(values)

    def _set(self, values: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict:
            raise Refused(f"setting items of {_short(target)}")
        _filled(target, values)

    def _call(self) -> None:
        function, arguments = self._pop(2)
        if type(function) is not Global or type(arguments) is not tuple:
            raise Refused(f"a call of {_short(function)}")
        value = record_call(function, arguments)
        if type(value) is bytes:
            self.room = _spent(self.room, len(value))
        self.stack.append(value)

    def _restore(self) -> None:
        (state,) = self._pop(1)
        target = self._top()
        if type(target) is not Call:
            raise Refused(f"setting the state of {_short(target)}")
        record_state(target, state)


def _admitted(module: Any, name: Any) -> Global:
    """Looks up the stand-in of a function by its exact name: nothing is imported and no attribute accessed.

    Raises:
        Refused: Plain arrays do not need the function.
    """
    stand_in = NUMPY.get((module, name)) if type(module) is str and type(name) is str else None
    if stand_in is None:
        raise Refused(f"{_short(module)}, {_short(name)}")
    return stand_in


def _filled(target: dict[Any, Any], values: Sequence[Any]) -> dict[Any, Any]:
    if len(values) % 2:
        raise ValueError("a dictionary in it has a key without a value")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) not in _KEYS:
            raise Refused(f"a dictionary with the key {_short(key)}; keys are strings or numbers")
        target[key] = value
    return target


def _short(value: Any) -> str:
    """Formats a value in few characters: it may be huge, or contain itself."""
    if isinstance(value, str | bytes | bytearray):
        return repr(value[:80])
    return (
        repr(value) if isinstance(value, int | float | Global | Call) or value is None else f"a {type(value).__name__}"
    )


def _spent(room: int, size: int) -> int:
    """Subtracts from the remaining bytes.

    Raises:
        Refused: Too few bytes remain.
    """
    if size > room:
        raise Refused("more bytes of arrays than it has")
    return room - size


def _plain(value: Any, room: int) -> Any:
    """Replaces stand-ins by arrays; shared objects stay shared, so the time is linear in the file size."""
    finished: dict[int, Any] = {}
    open_: set[int] = set()

    def visit(each: Any, depth: int) -> Any:
        nonlocal room
        if type(each) in (bool, int, float, str):
            return each
        key = id(each)
        if key in finished:
            return finished[key]
        if type(each) is Call:
            finished[key] = each.array()
            room = _spent(room, finished[key].nbytes)
            return finished[key]
        if type(each) not in (dict, list, tuple):
            raise Refused(f"{_short(each)} as data")
        if key in open_:
            raise Refused(f"a {type(each).__name__} that contains itself")
        if depth > _DEEPEST:
            raise Refused(f"containers in containers, more than {_DEEPEST} deep")
        open_.add(key)
        plain: Any
        if type(each) is dict:
            plain = {name: visit(inner, depth + 1) for name, inner in each.items()}
        else:
            plain = type(each)(visit(inner, depth + 1) for inner in each)
        open_.discard(key)
        finished[key] = plain
        return plain

    return visit(value, 0)


def flattened(value: Any, most: int = 10_000) -> dict[str, NDArray[Any]]:
    """Flattens the content of a pickle to arrays by path, such as `random/rank`; scalars become 0-d arrays.

    A list or tuple of numbers or of strings is one array. A small file may refer to the same object very often, so both
    the number of paths and the repeated bytes are bounded.

    Raises:
        ValueError: There are too many paths, two are the same, or a key would lead out of a folder.
    """
    by_path: dict[str, NDArray[Any]] = {}
    converted: dict[int, NDArray[Any]] = {}
    visited = 0

    def visit(each: Any, path: str) -> None:
        nonlocal visited
        visited += 1
        if visited > most:
            raise ValueError(f"It holds more than {most:,} arrays, dictionaries and lists; the next is {path!r}.")
        if isinstance(each, list | tuple) and each and not _is_flat(each):
            each = dict(enumerate(each))
        if isinstance(each, dict):
            for name, inner in each.items():
                if str(name) in ("", ".", "..") or set(str(name)) & set("/\\\0"):
                    raise ValueError(f"The key {str(name)[:80]!r} cannot be part of a path.")
                visit(inner, f"{path}/{name}" if path else str(name))
            return
        if path in by_path:
            raise ValueError(f"Two arrays have the path {path!r}: they cannot be told apart.")
        by_path[path] = converted.setdefault(id(each), np.asarray(each))
        if by_path[path].dtype == object:
            raise ValueError(f"The numbers of {path!r} are too large for an array.")

    visit(value, "")
    repeated = sum(array.nbytes for array in by_path.values()) - sum(array.nbytes for array in converted.values())
    if repeated > _REPEATED:
        raise ValueError(f"It names the same arrays again and again: {repeated:,} bytes more than it has.")
    return by_path


def _is_flat(values: Sequence[Any]) -> bool:
    kinds = {type(value) for value in values}
    return kinds <= {str} or kinds <= {bool, int, float} or all(issubclass(kind, np.generic) for kind in kinds)
