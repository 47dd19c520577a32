"""Damaged JSON, safetensors and `.npy` files are one line that names the file and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wherefrom.runtime.artifacts import read_manifest
from wherefrom.runtime.checked_files import read_array, read_list, read_object, read_tensors
from wherefrom.runtime.mapped_arrays import map_array


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'"text"', b"null", b"1" * 5000, b"[" * 100_000])
@pytest.mark.parametrize("read", [read_object, read_manifest])
def test_json_of_another_kind_is_refused(tmp_path: Path, content: bytes, read: Callable[[Path], Any]) -> None:
    file = tmp_path / "manifest.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is .*Delete"):
        read(file if read is read_object else tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged.* Copy it\."):
        read_list(file, "Copy it")


@pytest.mark.parametrize("content", [{}, [], {"identity": None}, {"identity": []}])
def test_a_manifest_without_an_identity_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names no identity"):
        read_manifest(tmp_path)


def test_what_is_whole_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_object(tmp_path / "a.json", ["a"]) == {"a": 1}
    with pytest.raises(ValueError, match="has no 'b'"):
        read_object(tmp_path / "a.json", ["a", "b"])
    (tmp_path / "l.json").write_text("[1, 2]")
    assert read_list(tmp_path / "l.json") == [1, 2]
    save_file({"x": torch.arange(3)}, tmp_path / "t.safetensors")
    assert read_tensors(tmp_path / "t.safetensors", ["x"])["x"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="has no tensor 'y'"):
        read_tensors(tmp_path / "t.safetensors", ["y"])
    for read in (read_object, read_list, read_tensors, read_array):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_cut_tensors_and_arrays_are_refused(tmp_path: Path, share: float) -> None:
    save_file({"x": torch.arange(1000)}, tmp_path / "t.safetensors")
    np.save(tmp_path / "a.npy", np.arange(1000))
    for name in ("t.safetensors", "a.npy"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"t\.safetensors is damaged: its tensors cannot be read"):
        read_tensors(tmp_path / "t.safetensors")
    for read in (read_array, map_array, lambda path: read_array(path, "r")):
        with pytest.raises(ValueError, match=r"a\.npy is damaged: its array cannot be read"):
            read(tmp_path / "a.npy")


def test_pickles_in_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"cannot be read .*allow_pickle"):
        read_array(tmp_path / "a.npy")
