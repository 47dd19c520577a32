"""Reading a shard: damage at any byte, damaged headers, names and kinds of members that are tricks."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.worlds import jpeg_of, make_shards, plain, write_shard
from wherefrom.data.decoding import SkippedItem
from wherefrom.data.shards import DAMAGED, REFUSED, ShardSample, read_shard
from wherefrom.data.webdataset import ShardOptions, build_laion
from wherefrom.runtime.artifacts import Store


@pytest.fixture
def keys(folder: Path) -> list[list[str]]:
    return make_shards(folder)


@pytest.mark.parametrize("step", [509])
def test_a_cut_at_any_byte_gives_a_beginning_of_the_samples(folder: Path, keys: list[list[str]], step: int) -> None:
    path = folder / "00000.tar"
    content = path.read_bytes()
    (folder / "cut").mkdir()
    cut = folder / "cut" / "00000.tar"
    whole = [sample for sample in read_shard(path) if isinstance(sample, ShardSample)]
    end = content.rstrip(b"\0")
    for at in range(1, len(end), step):
        cut.write_bytes(content[:at])
        result = list(read_shard(cut))
        assert isinstance(result[-1], SkippedItem)
        assert result[-1].kind == DAMAGED
        samples = [sample for sample in result[:-1] if isinstance(sample, ShardSample)]
        assert samples[:-1] == whole[: max(len(samples) - 1, 0)]
        if samples:  # the last may lack members, but has none that is cut
            expected = whole[len(samples) - 1]
            assert samples[-1].members.items() <= expected.members.items()


def test_damage_in_the_middle_is_not_taken_for_the_end(folder: Path, keys: list[list[str]]) -> None:
    path = folder / "00001.tar"
    with tarfile.open(path) as tar:
        third = next(member for member in tar if member.name.startswith("000010003"))
    content = bytearray(path.read_bytes())
    content[third.offset : third.offset + 512] = b"\xa5" * 512
    path.write_bytes(content)
    result = list(read_shard(path))
    assert [sample.key for sample in result if isinstance(sample, ShardSample)] == keys[1][:3]
    assert isinstance(result[-1], SkippedItem)
    assert result[-1].kind == DAMAGED


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("/etc/cron.d/x.jpg", {}, "leads out"),
        ("../x.jpg", {}, "leads out"),
        ("a/../../x.jpg", {}, "leads out"),
        ("a\\..\\x.jpg", {}, "leads out"),
        ("C:/x.jpg", {}, "leads out"),
        ("x.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}, "plain file"),
        ("x.jpg", {"type": tarfile.LNKTYPE, "linkname": "ok.jpg", "size": 0}, "plain file"),
        ("x.jpg", {"type": tarfile.CHRTYPE, "size": 0}, "plain file"),
        ("x.jpg", {"type": tarfile.FIFOTYPE, "size": 0}, "plain file"),
        ("x\ny.jpg", {}, "is not valid"),
        ("x\udcff.jpg", {}, "is not valid"),
        ("x" * 300 + ".jpg", {}, "is not valid"),
        (".jpg", {}, "no key"),
    ],
)
def test_tricks_are_refused_and_counted(
    tmp_path: Path, folder: Path, name: str, fields: dict[str, Any], reason: str
) -> None:
    good = [("ok.jpg", jpeg_of(0, (16, 12))), ("ok.txt", b"a caption")]
    shard = write_shard(
        folder, [*plain(good), (name, good[0][1], fields), *plain([("y.jpg", b""), ("y.txt", b"x")])], ["ok"]
    )
    before = set(tmp_path.rglob("*"))
    result = list(read_shard(shard))
    (problem,) = (each for each in result if isinstance(each, SkippedItem))
    assert problem.kind == REFUSED
    assert reason in problem.detail
    assert problem.name.isprintable()
    assert [each.key for each in result if isinstance(each, ShardSample)] == ["ok", "y"]
    assert set(tmp_path.rglob("*")) == before
    assert build_laion(Store(tmp_path / "store"), folder=folder, options=ShardOptions(size=8)).ids == ("ok",)


@pytest.mark.parametrize("size", [2**20, 2**40, 2**62, -(2**20)])
def test_a_size_that_a_header_invents_is_not_believed(folder: Path, size: int) -> None:
    shard = write_shard(folder, plain([("ok.jpg", jpeg_of(0, (16, 12))), ("ok.txt", b"x")]), ["ok"])
    with tarfile.open(shard) as tar:
        text = tar.getmember("ok.txt")
    invented = tarfile.TarInfo("ok.txt")
    invented.size = size
    content = bytearray(shard.read_bytes())
    content[text.offset_data - 512 : text.offset_data] = invented.tobuf(tarfile.GNU_FORMAT)
    shard.write_bytes(content)
    result = list(read_shard(shard))
    assert [each.kind for each in result if isinstance(each, SkippedItem)] == [DAMAGED]
    assert [list(each.members) for each in result if isinstance(each, ShardSample)] == [["jpg"]]
