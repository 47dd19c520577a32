"""Pickles are decoded, not run: honest ones give their arrays, hostile ones an error, and nothing in them happens."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wherefrom.interchange.__main__ import main
from wherefrom.interchange.safe_pickle import flattened, read_pickle

SHARED = np.arange(4.0)
ARRAYS = {
    "big-endian, transposed": np.arange(6, dtype=">i4").reshape(2, 3).T,
    "axes in another order": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
    "strided": np.ones((3, 4))[:, ::2],
    "empty": np.empty((0, 3), np.float16),
    "no axes": np.array(7, np.uint16),
    "text": np.array([["ab", "ç"], ["", "日本"]]),
    "bytes": np.array([b"a", b"bc"]),
    "truth": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex64),
    "shared": SHARED,
    "again": SHARED,
}


def written(folder: Path, content: bytes) -> Path:
    (folder / "file.pkl").write_bytes(content)
    return folder / "file.pkl"


@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_back(tmp_path: Path, protocol: int, module: str) -> None:
    others = {"list": [1, 2.5, (True, "x", -(2**70))], "scalar": np.float32(2.5), 3: {"deep": np.arange(3)}}
    content = pickle.dumps(ARRAYS | others, protocol=protocol)
    if protocol < 4:
        content = content.replace(b"numpy._core", module.encode())  # else lengths would change
    result = read_pickle(written(tmp_path, content))
    assert list(result) == [*ARRAYS, *others]
    for name, array in ARRAYS.items():
        assert (result[name].dtype, result[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(result[name], array)
        assert not result[name].flags.writeable
    assert result["list"] == others["list"]
    assert type(result["scalar"]) is np.float32
    assert result["scalar"] == 2.5
    np.testing.assert_array_equal(result[3]["deep"], [0, 1, 2])
    assert result["shared"] is result["again"]


def test_arrays_of_python_2_come_back(tmp_path: Path) -> None:
    # As Python 2.7 wrote np.array([1.5, -2.0]) by protocol 2: bytes were str, hence SHORT_BINSTRING.
    data = struct.pack("<2d", 1.5, -2.0)
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85U\x01b\x87Rq\x02"
        b"(K\x01K\x02\x85cnumpy\ndtype\nq\x03U\x02f8K\x00K\x01\x87Rq\x04(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tb\x89U\x10" + data + b"tb."
    )
    np.testing.assert_array_equal(read_pickle(written(tmp_path, content)), [1.5, -2.0])
    np.testing.assert_array_equal(pickle.loads(content, encoding="latin1"), [1.5, -2.0])  # what the test wrote is real


class Reduced:
    """Pickles as a call of whatever it is given."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that the hostile pickles would create; it must never be."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_calls_are_refused(tmp_path: Path, marker: Path, protocol: int) -> None:
    code = f"open({str(marker)!r}, 'w')"
    hostile = {
        r"'(posix|nt)', 'system'": Reduced(os.system, (f"touch {marker}",)),
        "eval": Reduced(eval, (code,)),
        "exec": Reduced(exec, (code,)),
        "'open'": Reduced(open, (str(marker), "w")),
        "getattr": Reduced(getattr, ("x", "upper")),
        "'pathlib', 'P": Reduced(Path, (str(marker),)),
        "OrderedDict": OrderedDict(a=1),
    }
    for asked, value in hostile.items():
        path = written(tmp_path, pickle.dumps({"x": [np.arange(3), value]}, protocol=protocol))
        with pytest.raises(ValueError, match=f"{path} was not read: .*{asked}"):
            read_pickle(path)
    # The same files do what they say where they are unpickled.
    pickle.loads(pickle.dumps(hostile["eval"], protocol=protocol)).close()
    assert marker.exists()
    marker.unlink()


def stack_global(module: str, name: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


RECONSTRUCT = stack_global("numpy._core.multiarray", "_reconstruct")
NDARRAY, DTYPE = stack_global("numpy", "ndarray"), stack_global("numpy", "dtype")
EMPTY = RECONSTRUCT + NDARRAY + b"K\x00\x85C\x01b\x87R"


def dtype(code: str, state: bytes = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t") -> bytes:
    return DTYPE + text(code) + b"\x89\x88\x87R" + state + b"b"


def array(code: bytes, shape: bytes, data: bytes) -> bytes:
    return EMPTY + b"(K\x01" + shape + code + b"\x89C" + bytes([len(data)]) + data + b"tb."


HUGE = struct.pack("<i", 2**31 - 1)
FLEXIBLE = b"(K\x03X\x01\x00\x00\x00|NNNJ\x40\x42\x0f\x00K\x01K\x00t"  # an item size of a million


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "'os', 'system'"),
        (b"\x80\x04" + stack_global("numpy._core.multiarray", "_reconstruct.__globals__") + b".", "__globals__"),
        (b"\x80\x04" + stack_global("numpy", "core.multiarray._reconstruct") + b".", "'core.multiarray._reconstruct'"),
        (b"\x80\x04" + stack_global("numpy.core", "multiarray.os.system") + b".", "'multiarray.os.system'"),
        (b"\x80\x04K\x01K\x02\x93.", "holds or asks for 1, 2"),
        (b"\x80\x02cnumpy\nload\n.", "'numpy', 'load'"),
        (b"(S'true'\nios\nsystem\n.", "the instruction INST 'os system'"),
        (b"(cos\nsystem\nS'true'\no.", "'os', 'system'"),
        (b"Pfile\n.", "the instruction PERSID 'file'"),
        (b"\x80\x02K\x01Q.", "the instruction BINPERSID"),
        (b"\x80\x02\x82\x01.", "the instruction EXT1 1"),
        (b"\x80\x02\x83\x01\x00.", "the instruction EXT2 1"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "the instruction EXT4 1"),
        (b"\x80\x05\x97.", "the instruction NEXT_BUFFER"),
        (b"\x80\x04\x8f.", "the instruction EMPTY_SET"),
        (b"\x80\x02" + NDARRAY + b")\x81.", "the instruction NEWOBJ"),
        (b"\x80\x02" + NDARRAY + b".", "Global"),
        (b"\x80\x02" + NDARRAY + b")R.", "a call of ndarray"),
        (b"\x80\x02" + NDARRAY + b"N}X\x01\x00\x00\x00aK\x01s\x86b.", "setting the state of Global"),
        (b"\x80\x02]N}b.", "setting the state of"),
        (b"\x80\x02K\x01K\x02a.", "appending to 1"),
        (b"\x80\x02K\x01K\x02K\x03s.", "setting items of 1"),
        (b"\x80\x02N.", "None as data"),
        (b"\x80\x02C\x01a.", "b'a' as data"),
        (b"\x80\x02}K\x01\x85K\x01s.", "a dictionary with the key a tuple"),
        (b"\x80\x02]q\x00h\x00a.", "a list that contains itself"),
        (b"\x80\x02" + b"]" * 80 + b"a" * 79 + b".", "more than 64 deep"),
        (b"\x80\x02" + EMPTY + b".", "an array without its state"),
        (b"\x80\x02" + dtype("f8") + b".", "a dtype as data"),
        # What would be allocated before anything is read.
        (
            b"\x80\x02" + RECONSTRUCT + NDARRAY + b"J" + HUGE + b"\x85C\x01b\x87R.",
            "something else than an empty ndarray",
        ),
        (b"\x80\x02" + array(dtype("f8"), b"J" + HUGE + b"J" + HUGE + b"\x86", b"8" * 8), "bytes, where it holds 8"),
        (b"\x80\x02" + array(dtype("f8"), b"J\xff\xff\xff\xff\x85", b""), "shape is no tuple"),
        (b"\x80\x02" + array(dtype("S0"), b"J" + HUGE + b"\x85", b""), "type 'S0'"),
        (b"\x80\x02" + array(dtype("S1", FLEXIBLE), b"K\x01\x85", b"a"), "items of 1000000 bytes"),
        # Objects, and what may hold them.
        (b"\x80\x02" + array(dtype("O8"), b"K\x01\x85", b"8" * 8), "type 'O8'; only numbers and strings"),
        (b"\x80\x02" + array(dtype("O"), b"K\x01\x85", b"8" * 8), "type 'O'; only numbers and strings"),
        (b"\x80\x02" + array(dtype("V8"), b"K\x01\x85", b"8" * 8), "type 'V8'; only numbers and strings"),
        (b"\x80\x02" + array(dtype("f8,O"), b"K\x01\x85", b"8" * 8), "type 'f8,O'; only numbers and strings"),
        (b"\x80\x02" + array(dtype("b1"), b"K\x01\x85", b"\x07"), "neither true nor false"),
        (b"\x80\x02" + array(dtype("U1"), b"K\x01\x85", b"\xff" * 4), "characters that do not exist"),
    ],
)
def test_hostile_instructions_are_refused(tmp_path: Path, content: bytes, asked: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=f"{path} was not read: it .*") as caught:
        read_pickle(path)
    assert asked in str(caught.value)


def test_arrays_of_objects_are_refused(tmp_path: Path, marker: Path) -> None:
    hostile = Reduced(eval, (f"open({str(marker)!r}, 'w')",))
    structured = np.zeros(2, dtype=[("a", "f8"), ("b", "O")])
    for value in (np.array([hostile], dtype=object), structured, np.array([None]), np.zeros(2, "datetime64[s]")):
        for protocol in range(6):
            path = written(tmp_path, pickle.dumps(value, protocol=protocol))
            with pytest.raises(ValueError, match="was not read"):
                read_pickle(path)


def test_a_cached_extension_code_is_refused(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 240)
    try:
        content = b"\x80\x02\x82\xf0."
        assert pickle.loads(content) is os.system  # and from now on no find_class is asked
        with pytest.raises(ValueError, match="the instruction EXT1 240"):
            read_pickle(written(tmp_path, content))
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg.clear_extension_cache()


def test_small_files_stay_small(tmp_path: Path) -> None:
    # Tuples of tuples double at each step; as the key of a dictionary they would be hashed for ever.
    doubling = b"".join(b"\x86r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) for i in range(60))
    nested = b"\x80\x02K\x01K\x01" + doubling + b"\x86"
    assert type(read_pickle(written(tmp_path, nested + b"."))) is tuple
    with pytest.raises(ValueError, match="the key a tuple"):
        read_pickle(written(tmp_path, nested.replace(b"\x80\x02", b"\x80\x02}") + b"K\x01s."))
    # A memo index of four billion is only a name.
    assert read_pickle(written(tmp_path, b"\x80\x02K\x05r\xff\xff\xff\xffj\xff\xff\xff\xff\x86.")) == (5, 5)
    # One text made into bytes again and again, and one buffer made into many arrays.
    encode = b"\x80\x02c_codecs\nencode\nq\x00X\x00\x10\x00\x00" + b"a" * 4096 + b"X\x06\x00\x00\x00latin1\x86q\x01]"
    with pytest.raises(ValueError, match="more bytes of arrays than it has"):
        read_pickle(written(tmp_path, encode + b"h\x00h\x01Ra" * 9 + b"."))
    many = b"\x80\x05]" + stack_global("numpy._core.numeric", "_frombuffer") + b"q\x00("
    many += b"B\x00\x10\x00\x00" + b"a" * 4096 + dtype("u1") + b"M\x00\x10\x85X\x01\x00\x00\x00Ctq\x01"
    many = many.replace(b"]", b"", 1) + b"R]" + b"h\x00h\x01Ra" * 9 + b"\x86."
    with pytest.raises(ValueError, match="more bytes of arrays than it has"):
        read_pickle(written(tmp_path, many))
    with pytest.raises(ValueError, match="it is damaged: expected 4611686018427387904 bytes"):
        read_pickle(written(tmp_path, b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a."))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cut_and_changed_files_are_errors_not_crashes(tmp_path: Path, protocol: int) -> None:
    whole = pickle.dumps({"a": np.arange(4), "b": ["x", 1.5]}, protocol=protocol)
    for end in range(0, len(whole), 3):
        with pytest.raises(ValueError, match="was not read"):
            read_pickle(written(tmp_path, whole[:end]))
    random = np.random.default_rng(protocol)
    for _ in range(150):
        changed = bytearray(whole)
        changed[random.integers(len(whole))] = random.integers(256)
        try:
            read_pickle(written(tmp_path, bytes(changed)))
        except ValueError as error:
            assert str(tmp_path / "file.pkl") in str(error)  # noqa: PT017  many of the changes are harmless
    with pytest.raises(ValueError, match="3 more bytes after its end"):
        read_pickle(written(tmp_path, whole + b"abc"))


def test_flattened_by_path() -> None:
    result = flattened({"random": {"rank": np.eye(2), "n": [np.zeros(1), np.ones(2)]}, "k": [1, 2], "s": "x"})
    assert list(result) == ["random/rank", "random/n/0", "random/n/1", "k", "s"]
    assert result["k"].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"The key '\.\.' cannot be part of a path"):
        flattened({"a": {"..": 1}})
    with pytest.raises(ValueError, match="The key '/etc/x' cannot be part of a path"):
        flattened({"/etc/x": 1})
    with pytest.raises(ValueError, match="Two arrays have the path '1'"):
        flattened({1: 2, "1": 3})
    with pytest.raises(ValueError, match="more than 3 arrays"):
        flattened({"a": 1, "b": 2, "c": 3}, most=3)
    doubling: Any = {}
    for _ in range(60):
        doubling = {"a": doubling, "b": doubling}
    with pytest.raises(ValueError, match="more than 10,000 arrays"):
        flattened(doubling)
    large = np.zeros(2**20)
    assert len(flattened(dict.fromkeys(range(100), large))) == 100
    with pytest.raises(ValueError, match="names the same arrays again and again: 1,669,332,992 bytes more"):
        flattened(dict.fromkeys(range(200), large))
    with pytest.raises(ValueError, match="The numbers of 'a' are too large"):
        flattened({"a": 2**90})


def test_a_pickle_becomes_numpy_files_through_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, pickle.dumps({"influence": np.arange(3.0), "file": np.arange(3)}))
    main(["pickle", str(path), str(tmp_path / "out.npz")])
    assert capsys.readouterr().out == "influence: float64 (3,)\nfile: int64 (3,)\n"
    with np.load(tmp_path / "out.npz", allow_pickle=False) as result:
        assert {name: result[name].tolist() for name in result} == {"influence": [0.0, 1.0, 2.0], "file": [0, 1, 2]}
    with pytest.raises(ValueError, match=r"holds 2 arrays; name a \.npz file"):
        main(["pickle", str(path), str(tmp_path / "out.npy")])
    with pytest.raises(ValueError, match=r"must end with \.npy or \.npz"):
        main(["pickle", str(path), str(tmp_path / "out")])
    single = written(tmp_path, pickle.dumps(np.arange(6).reshape(2, 3).T))
    main(["pickle", str(single), str(tmp_path / "one.npy")])
    np.testing.assert_array_equal(np.load(tmp_path / "one.npy", allow_pickle=False), [[0, 3], [1, 4], [2, 5]])
    main(["pickle", str(single), str(tmp_path / "one.npz")])
    assert zipfile.ZipFile(tmp_path / "one.npz").namelist() == ["array.npy"]
    assert np.load(io.BytesIO((tmp_path / "one.npy").read_bytes())).shape == (3, 2)
