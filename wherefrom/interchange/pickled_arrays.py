"""NumPy's pickle calls as inert data, and the arrays that they encode."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Refused(ValueError):  # noqa: N818  raised about the file, not about this code
    """Raised when a pickle uses a feature that plain data does not need."""


@dataclass(frozen=True)
class Global:
    """Function or class named by a pickle; it is never called.

    Attributes:
        name: Canonical name, the same for its modules in all versions.
    """

    name: str


@dataclass
class Call:
    """Call in a pickle, recorded as data.

    Attributes:
        name: Name of the function.
        arguments: Arguments of the call.
        state: State that the pickle sets on the result.
    """

    name: str
    arguments: tuple[Any, ...]
    state: tuple[Any, ...] | None = None

    def __repr__(self) -> str:
        return f"a {self.name}"  # the arguments may be hundreds of megabytes

    def array(self) -> Any:
        """Decodes the array or scalar that the call encodes.

        Raises:
            Refused: It encodes neither, or not one of numbers or strings.
        """
        if self.name == "_reconstruct":
            return _stated_array(self.state)
        if self.name == "_frombuffer":
            return _buffered_array(self.arguments)
        if self.name == "scalar":
            return _scalar(self.arguments)
        raise Refused(f"a {self.name} as data")


_MULTIARRAY, _NUMERIC = (
    ("numpy.core.multiarray", "numpy._core.multiarray"),
    ("numpy.core.numeric", "numpy._core.numeric"),
)
NUMPY = {
    ("numpy", "ndarray"): Global("ndarray"),
    ("numpy", "dtype"): Global("dtype"),
    ("_codecs", "encode"): Global("encode"),
    **{(module, name): Global("bytes") for module in ("builtins", "__builtin__") for name in ("bytes",)},
    **{(module, name): Global(name) for module in _MULTIARRAY for name in ("_reconstruct", "scalar")},
    **{(module, "_frombuffer"): Global("_frombuffer") for module in _NUMERIC},
}
# Sizes in bytes of the numbers that mean the same on every machine; `f16` and `c32` do not.
_SIZES = {"b": {1}, "i": {1, 2, 4, 8}, "u": {1, 2, 4, 8}, "f": {2, 4, 8}, "c": {8, 16}}
_CODE = re.compile(r"([a-zA-Z])(\d{1,9})")
_LAST_CHARACTER = 0x10FFFF


def record_call(function: Global, arguments: tuple[Any, ...]) -> Any:
    """Records a call as data; text that encodes bytes (protocols 0 to 2) is converted to bytes at once.

    Raises:
        Refused: Plain arrays do not use the function in this way.
    """
    if function.name == "bytes" and arguments == ():
        return b""
    if function.name == "encode":
        if len(arguments) == 2 and type(arguments[0]) is str and arguments[1] in ("latin1", "latin-1"):
            return arguments[0].encode("latin-1")
        raise Refused("_codecs.encode of something else than text, or to something else than latin1")
    if function.name == "_reconstruct":
        # An empty array of bytes, whose state follows; NumPy would allocate any other shape first.
        if len(arguments) != 3 or arguments[0] != NUMPY["numpy", "ndarray"] or arguments[1] != (0,):
            raise Refused("numpy's _reconstruct of something else than an empty ndarray")
        return Call("_reconstruct", ())
    if function.name in ("dtype", "scalar", "_frombuffer"):
        return Call(function.name, arguments)
    raise Refused(f"a call of {function.name}")


def record_state(call: Call, state: Any) -> None:
    """Records the state of an array or dtype.

    Raises:
        Refused: Its state is already set, or the call takes none.
    """
    if call.name not in ("_reconstruct", "dtype") or type(state) is not tuple or call.state is not None:
        raise Refused(f"setting the state of {call!r}")
    call.state = state


def _stated_array(state: tuple[Any, ...] | None) -> NDArray[Any]:
    if state is None or len(state) != 5:
        raise Refused("an array without its state")
    _, shape, dtype, fortran, data = state
    return _array(data, dtype, shape, "F" if fortran else "C")


def _buffered_array(arguments: tuple[Any, ...]) -> NDArray[Any]:
    if len(arguments) not in (4, 5):
        raise Refused("numpy's _frombuffer with other arguments")
    data, dtype, shape, order = arguments[:4]
    axes = arguments[4] if len(arguments) == 5 else None
    if order == "K" and axes is not None:  # numpy 2.3 and later
        if type(axes) is not tuple or not all(type(axis) is int for axis in axes):
            raise Refused("numpy's _frombuffer with other axes")
        return _array(data, dtype, shape, "C").transpose(axes)
    if order not in ("C", "F"):
        raise Refused(f"an array in the order {str(order)[:9]!r}")
    return _array(data, dtype, shape, order)


def _scalar(arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 2:
        raise Refused("a NumPy scalar with other arguments")
    return _array(arguments[1], arguments[0], (), "C")[()]


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    kind = _dtype(dtype)
    if type(shape) is not tuple or not all(type(side) is int and side >= 0 for side in shape):
        raise Refused("an array whose shape is no tuple of numbers")
    if type(data) is str:  # Python 2 had no bytes
        data = data.encode("latin-1")
    if type(data) not in (bytes, bytearray):
        raise Refused(f"an array whose content is a {type(data).__name__}")
    claimed = kind.itemsize
    for side in shape:
        claimed *= side
    if claimed != len(data):
        raise Refused(f"an array of shape {shape} and type {kind}, {claimed:,} bytes, where it holds {len(data):,}")
    flat: NDArray[Any] = np.frombuffer(data, kind) if data else np.empty(0, kind)
    flat.flags.writeable = False
    if kind.kind == "b" and flat.size and flat.view(np.uint8).max() > 1:
        raise Refused("truth values that are neither true nor false")
    if kind.kind == "U" and flat.size and flat.view(kind.str[0] + "u4").max() > _LAST_CHARACTER:
        raise Refused("text of characters that do not exist")
    return flat.reshape(shape, order=order)


def _dtype(call: Any) -> np.dtype[Any]:
    """Decodes a dtype of numbers or strings from its letter, size and byte order."""
    if type(call) is not Call or call.name != "dtype" or not call.arguments or type(call.arguments[0]) is not str:
        raise Refused("an array of an unknown type")
    code, state = call.arguments[0], call.state
    order = "="
    if state is not None:
        if len(state) < 5 or any(part is not None for part in state[2:5]):
            raise Refused(f"an array of the structured type {code[:20]!r}")
        order = state[1]
    match = _CODE.fullmatch(code)
    letter, size = (match[1], int(match[2])) if match else ("", 0)
    if size == 0 or not (letter in "SU" or size in _SIZES.get(letter, ())) or letter == "":
        raise Refused(f"an array of type {code[:20]!r}; only numbers and strings are read")
    if order not in ("<", ">", "|", "="):
        raise Refused(f"an array of the byte order {str(order)[:9]!r}")
    dtype = np.dtype(f"{order}{letter}{size}")
    if state is not None and len(state) > 5 and state[5] not in (-1, dtype.itemsize):
        raise Refused(f"an array of type {code!r} with items of {str(state[5])[:20]} bytes")
    return dtype
