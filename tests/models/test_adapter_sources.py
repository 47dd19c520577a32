"""Names of adapters: paths, weights and hub ids are told apart, and what is not there is refused before long work."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from tests.support.adapters import save
from wherefrom.models.adapter_sources import AdapterSource, check_place, file_of, is_hub_id, parse_adapter

TENSORS = {"x.lora_A.weight": torch.ones(1, 1)}


@pytest.mark.parametrize(
    ("given", "place", "weight"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-.5", "style.safetensors", -0.5),
        ("style.safetensors:1e-1", "style.safetensors", 0.1),
        ("a:b:2.safetensors:2", "a:b:2.safetensors", 2.0),
        ("a:b:2.safetensors", "a:b:2.safetensors", 1.0),
        ("C:\\loras\\style.safetensors", "C:\\loras\\style.safetensors", 1.0),
        ("C:\\loras\\style.safetensors:0.8", "C:\\loras\\style.safetensors", 0.8),
        ("C:/loras/0.8", "C:/loras/0.8", 1.0),
        ("/a folder/стиль.safetensors:0.8", "/a folder/стиль.safetensors", 0.8),
        ("owner/name:0.5", "owner/name", 0.5),
        ("name:nan", "name:nan", 1.0),
        (Path("style:0.8"), "style:0.8", 1.0),
        (("style:0.8", 0.3), "style:0.8", 0.3),
    ],
)
def test_a_weight_is_what_follows_the_last_colon(given: Any, place: str, weight: float) -> None:
    assert parse_adapter(given) == AdapterSource(place, weight)
    if not isinstance(given, Path | tuple):
        assert parse_adapter(str(AdapterSource(place, weight))) == AdapterSource(place, weight)


def test_a_file_with_a_colon_in_its_name_is_itself(tmp_path: Path) -> None:
    odd = save(tmp_path / "a.safetensors:0.5", TENSORS)
    assert parse_adapter(str(odd)) == AdapterSource(str(odd))
    save(tmp_path / "a.safetensors", TENSORS)
    with pytest.raises(ValueError, match=r"is a file, and .*a.safetensors' with a weight is another: rename"):
        parse_adapter(str(odd))


@pytest.mark.parametrize("given", ["a:0", ("a", math.inf), ("a", True), ("a",), "", ":2", " "])
def test_what_means_nothing_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^lora: "):
        check_place(parse_adapter(given))


def test_what_looks_like_a_place_on_disk_is_no_hub_id() -> None:
    assert [place for place in ("o/n", "o/n/f.safetensors", "o/n/sub/f x.safetensors") if not is_hub_id(place)] == []
    local = ["./o/n", "/o/n", "~/n", "C:/n", "o\\n", "n", "o/../n", "o/n/../f", "стиль/n", ""]
    assert [place for place in local if is_hub_id(place)] == []


def test_a_place_where_nothing_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora: there is no file 'style.safetensors'; give a .safetensors file"):
        check_place(AdapterSource("style.safetensors"))
    pickled = tmp_path / "style.pt"
    torch.save(TENSORS, pickled)
    with pytest.raises(ValueError, match=r"style.pt is a pickle.*save_file"):
        check_place(AdapterSource(str(pickled)))
    (tmp_path / "style.zip").touch()
    with pytest.raises(ValueError, match=r"style.zip is no .safetensors file"):
        check_place(AdapterSource(str(tmp_path / "style.zip")))


def test_a_folder_stands_for_its_one_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no .safetensors file"):
        file_of(AdapterSource(str(tmp_path)))
    torch.save(TENSORS, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle"):
        file_of(AdapterSource(str(tmp_path)))
    one = save(tmp_path / "one.safetensors", TENSORS)
    assert file_of(AdapterSource(str(tmp_path))) == one
    save(tmp_path / "two.safetensors", TENSORS)
    with pytest.raises(ValueError, match=r"holds 2 .safetensors files \(one.safetensors, two.safetensors\); name"):
        file_of(AdapterSource(str(tmp_path)))
    usual = save(tmp_path / "pytorch_lora_weights.safetensors", TENSORS)
    assert file_of(AdapterSource(str(tmp_path))) == usual


def test_adapters_of_the_hub_are_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--style"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    kept = repository / "snapshots" / "abc"
    (kept / "sub").mkdir(parents=True)
    save(kept / "style.safetensors", TENSORS)
    save(kept / "sub" / "other.safetensors", TENSORS)
    assert file_of(AdapterSource("owner/style")).name == "style.safetensors"
    assert file_of(AdapterSource("owner/style/sub/other.safetensors")).name == "other.safetensors"
    save(kept / "second.safetensors", TENSORS)
    with pytest.raises(ValueError, match=r"owner/style holds 2 .safetensors files"):
        file_of(AdapterSource("owner/style"))
    for place in ("owner/none", "owner/style/none.safetensors"):
        with pytest.raises(ValueError, match=rf"lora: '{place}' is neither a file here nor one of the hub"):
            file_of(AdapterSource(place))


def test_names_are_checked_without_pytorch() -> None:
    code = "import sys, wherefrom.models.adapter_sources as a; a.parse_adapter('x:2'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
