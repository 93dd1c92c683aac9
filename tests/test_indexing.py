"""`supermix index`: what shards hold, and whether the indices beside them are right."""

import json
import os
from dataclasses import replace

import pytest
from tars import picture, samples, write_shards, write_tar

from supermix_transforms.cli import main
from supermix_transforms.data.indexing import index_shards
from supermix_transforms.data.tarindex import index_path, load_index, write_index


@pytest.fixture
def shards(tmp_path):
    """Five shards with their indices."""
    found = write_shards(tmp_path, [2, 3, 1, 2, 2])
    index_shards(found)
    return found


def stale(shard):
    """Another tar of the same size and time, which the index beside it does not tell from it."""
    before = shard.stat()
    write_tar(shard, samples(30, 2))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_index(shard).keys == ("0000", "0001")


def test_verify_finds_nothing_wrong_where_nothing_is(shards):
    found = index_shards(shards, verify=True)
    assert found.problems == ()
    assert found.verified
    assert found.shards == index_shards(shards).shards
    assert not index_shards(shards).verified


def test_verify_lists_each_index_that_is_not_what_its_tar_holds(shards, capsys):
    stale(shards[0])
    index_path(shards[1]).unlink()
    index_path(shards[2]).write_bytes(index_path(shards[2]).read_bytes()[:-1])
    os.truncate(shards[3], 2000)
    folder = shards[0].parent
    beside = {path: path.read_bytes() for path in folder.iterdir()}

    found = index_shards([*shards, folder / "nowhere.tar"], verify=True)
    assert [row.shard for row in found.shards] == [str(shards[4])]
    reasons = ["another", "got none that", "got none that", "a whole uncompressed", "No such file"]
    assert len(found.problems) == len(reasons)
    for problem, reason, shard in zip(
        found.problems, reasons, [*shards[:4], "nowhere.tar"], strict=True
    ):
        assert reason in problem
        assert str(shard) in problem

    assert main(["index", "--shards", str(folder), "--verify"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("WRONG: shards: expected") == 4
    assert "1 shards" in shown
    assert main(["index", "--shards", str(folder), "--verify", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 4
    assert {path: path.read_bytes() for path in folder.iterdir()} == beside  # it only looks

    shards[3].unlink()
    for path in folder.glob("*.index"):
        path.unlink()
    assert main(["index", "--shards", str(folder)]) == 0
    assert main(["index", "--shards", str(folder), "--verify"]) == 0
    assert "4 indices are what their tars hold" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["keys", "doubles", "suffixes", "places", "sha256"])
def test_verify_finds_an_index_that_makes_sense_and_is_wrong(shards, what):
    index = load_index(shards[0])
    labels, pictures = index.places["cls"], index.places["png"]
    wrong = {
        "keys": {"keys": ("0000", "0009")},
        "doubles": {"doubles": (1,)},
        "suffixes": {"places": {"txt": labels, "png": pictures}},
        "places": {"places": {"cls": labels[::-1], "png": pictures}},
        "sha256": {"sha256": "0" * 64},
    }
    write_index(shards[0], replace(index, **wrong[what]))
    (problem,) = index_shards(shards, verify=True).problems
    assert f"the index beside {str(shards[0])!r} to say what the tar holds" in problem


def test_names_in_a_tar_do_not_style_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    names = ["a.[bold]", "a.\x1b[31mred", "a.\udcff"]
    write_tar(tmp_path / "a.tar", [(name, picture(1)) for name in names])
    assert main(["index", "--shards", str(tmp_path)]) == 0
    assert r"[bold] 1, '\x1b[31mred' 1, '\udcff' 1" in capsys.readouterr().out
