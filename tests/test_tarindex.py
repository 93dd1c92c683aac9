"""The index of a tar: what webdataset sees, and no damage that it would not see."""

import hashlib
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tars import picture, samples, write_tar

from supermix_transforms.data.tarindex import (
    index_path,
    load_index,
    make_index,
    parse_index,
    read_members,
)


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "a.tar", samples(0, 4))


def contents(shard, index):
    """Everything the index leads to: [{key, suffix: content}]."""
    rows = []
    for row, key in enumerate(index.keys):
        found = {
            suffix: read_members(shard, index, row, [suffix]).get(suffix) for suffix in index.places
        }
        rows.append({"__key__": key} | {s: c for s, c in found.items() if c is not None})
    return rows


def as_webdataset_reads(shard):
    dataset = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
    keep = ("__url__", "__local_path__")
    return [{key: value for key, value in row.items() if key not in keep} for row in dataset]


def test_samples_are_those_of_webdataset(tmp_path):
    names = ["n01.a.v2_1.JPEG", "d.d/x.jpg", "d.d/x.CLS", "./y.cls", "y.cls", "images/x.jpg"]
    names += ["labels/x.cls", "nodot", ".hidden.jpg", "d/.hid.jpg", "__meta__", "__info__/a.jpg"]
    names += ["__index__.json", "long" * 60 + ".jpg", "ü.cls"]
    shard = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    with tarfile.open(shard, "a") as tar:
        folder, link = tarfile.TarInfo("dir.jpg"), tarfile.TarInfo("link.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "d.d/x.jpg"
        tar.addfile(folder)
        tar.addfile(link)
    index = make_index(shard)
    assert contents(shard, index) == as_webdataset_reads(shard)
    assert len(index) == 10


def test_keys_that_occur_twice_are_told(tmp_path):
    twins = [("a.jpg", b"1"), ("a.JPG", b"2"), ("b.jpg", b"3"), ("a.cls", b"4"), ("c.jpg", b"5")]
    index = make_index(write_tar(tmp_path / "a.tar", twins))
    assert index.keys == ("a", "b", "a", "c")
    assert index.doubles == (0, 2)


def test_a_tar_that_is_cut_at_any_byte_is_an_error(tmp_path):
    shard = write_tar(tmp_path / "torn.tar", samples(0, 2))
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    os.truncate(shard, end + 1024)  # the padding after the end-of-archive blocks may go
    assert len(make_index(shard)) == 2
    for cut in reversed(range(end + 1024)):
        os.truncate(shard, cut)
        with pytest.raises(ValueError, match=r"shards: expected a whole .*tar file, got '.*torn"):
            make_index(shard)


@pytest.mark.parametrize("how", ["zeroed", "checksum"])
def test_a_header_that_is_damaged_is_an_error(shard, how):
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[3].offset
    content[header : header + 512] = (
        bytes(512) if how == "zeroed" else b"x" + content[header + 1 : header + 512]
    )
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"no header follows at byte {header}"):
        make_index(shard)


def test_what_is_no_tar_is_an_error(tmp_path):
    packed = tmp_path / "a.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match="expected a whole uncompressed tar"):
        make_index(packed)
    with pytest.raises(ValueError, match=r"got '.*missing.tar': No such file"):
        make_index(tmp_path / "missing.tar")


def test_a_suffix_of_its_own_for_each_sample_is_an_error(tmp_path):
    shard = tmp_path / "a.tar"
    few = [(f"{n}.{n}", b"") for n in range(1000)]
    assert len(make_index(write_tar(shard, few)).places) == 1000
    many = few + [(f"{n}.{n}", b"") for n in range(1000, 1001)]
    with pytest.raises(ValueError, match=r"1001 suffixes of 1001 samples .* such as '0'.*KEY.SUFF"):
        make_index(write_tar(shard, many))


# -- the file beside it ----------------------------------------------------------------------------


def test_an_index_is_read_again_and_equal(shard, monkeypatch):
    first = load_index(shard)
    monkeypatch.setattr("supermix_transforms.data.tarindex.make_index", None)
    again = load_index(shard)
    for name, value in vars(first).items():
        if name == "places":
            assert all(np.array_equal(again.places[each], value[each]) for each in value)
        else:
            assert getattr(again, name) == value


def test_an_index_of_another_shard_is_made_anew(shard, tmp_path):
    load_index(shard)
    other = write_tar(tmp_path / "b.tar", samples(10, 4))
    shutil.copyfile(other, shard)  # of the same size
    assert load_index(shard).keys[0] == "0010"
    write_tar(shard, samples(0, 3))
    assert len(load_index(shard)) == 3


def test_a_shard_that_changes_under_its_index_is_an_error(shard, tmp_path):
    index = load_index(shard)
    write_tar(shard, [("x.png", picture(9)), *samples(0, 4)])
    with pytest.raises(ValueError, match=r"expected '0001.png' at byte .* has changed"):
        read_members(shard, index, 1, ["png"])
    write_tar(shard, samples(0, 4))
    content = bytearray(shard.read_bytes())
    content[index.places["png"][1][0] - 512] = ord("9")  # its name, and so its checksum
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="got no header before it"):
        read_members(shard, index, 1, ["png"])
    shard.write_bytes(shard.read_bytes()[:1024])
    with pytest.raises(ValueError, match="has changed"):
        read_members(shard, index, 1, ["png"])
    shard.unlink()
    with pytest.raises(ValueError, match="No such file"):
        read_members(shard, index, 1, ["png"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_an_index_with_any_byte_changed_or_cut_is_made_anew(shard, data):
    load_index(shard)
    path = index_path(shard)
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:place])
    else:
        changed = whole[place] ^ data.draw(st.integers(1, 255))
        path.write_bytes(whole[:place] + bytes([changed]) + whole[place + 1 :])
    assert load_index(shard).keys == ("0000", "0001", "0002", "0003")
    assert path.read_bytes() == whole


def written(fields, version="1", digest=None) -> bytes:
    """An index's content with a checksum that fits."""
    body = json.dumps(fields).encode() if isinstance(fields, dict) else fields
    return (
        f"supermix-index {version} {digest or hashlib.sha256(body).hexdigest()}\n".encode() + body
    )


def sense(shard):
    return json.loads(index_path(shard).read_bytes().partition(b"\n")[2])


NONSENSE = {
    "an offset below zero": lambda f: f["places"]["cls"].__setitem__(1, [-1024, 1]),
    "an offset inside of a header": lambda f: f["places"]["cls"].__setitem__(0, [100, 1]),
    "an offset between blocks": lambda f: f["places"]["cls"][0].__setitem__(0, 513),
    "a size below zero": lambda f: f["places"]["cls"][1].__setitem__(1, -1),
    "a size without an offset": lambda f: f["places"]["cls"][1].__setitem__(0, -1),
    "a size beyond the tar": lambda f: f["places"]["png"][3].__setitem__(1, f["size"]),
    "an end beyond 64 bits": lambda f: f["places"]["png"][3].__setitem__(1, (1 << 63) - 1),
    "a size beyond 64 bits": lambda f: f["places"]["png"][3].__setitem__(1, 1 << 64),
    "members on each other": lambda f: f["places"].update(png=f["places"]["cls"]),
    "members in each other": lambda f: f["places"]["cls"][0].__setitem__(1, 1025),
    "a size that is no integer": lambda f: f["places"]["cls"][0].__setitem__(1, 1.5),
    "a size in words": lambda f: f["places"]["cls"][0].__setitem__(1, "1"),
    "a column too many": lambda f: f["places"].update(
        cls=[[*row, 0] for row in f["places"]["cls"]]
    ),
    "a column too few": lambda f: f["places"].update(cls=[row[:1] for row in f["places"]["cls"]]),
    "a table in one row": lambda f: f["places"].update(cls=[8, 8, 8, 8]),
    "a row too few": lambda f: f["places"]["cls"].pop(),
    "a sample too many": lambda f: f["keys"].append("0004"),
    "rows of three and one": lambda f: f["places"]["cls"].__setitem__(
        slice(2), [[512, 1, 2560], [1]]
    ),
    "no table": lambda f: f["places"].update(cls=None),
    "no tables": lambda f: f.update(places=[]),
    "a sample of nothing": lambda f: [t.__setitem__(2, [-1, -1]) for t in f["places"].values()],
    "a key twice": lambda f: f["keys"].__setitem__(3, "0001"),
    "a key that is no text": lambda f: f["keys"].__setitem__(3, 3),
    "keys in one text": lambda f: f.update(keys="0123"),
    "a double that is none of them": lambda f: f["doubles"].append(4),
    "a double below zero": lambda f: f["doubles"].append(-1),
    "doubles that are no integers": lambda f: f["doubles"].append("1"),
    "doubles in disorder": lambda f: f["doubles"].extend([2, 1]),
    "a size in doubt": lambda f: f.update(size=str(f["size"])),
    "a size of none": lambda f: f.update(size=1 << 64),
    "a time in doubt": lambda f: f.update(time=None),
    "no sha256": lambda f: f.update(sha256="0" * 63),
    "a field too many": lambda f: f.update(more=1),
    "a field too few": lambda f: f.pop("doubles"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_an_index_without_sense_is_not_believed_whatever_its_checksum(shard, what):
    load_index(shard)
    fields = sense(shard)
    assert parse_index(written(fields)) is not None
    NONSENSE[what](fields)
    assert parse_index(written(fields)) is None


def test_an_index_of_no_samples_is_believed(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("README", b"no suffix, no sample")])
    load_index(shard)
    assert parse_index(index_path(shard).read_bytes()).keys == ()


def test_an_index_of_another_form_is_not_believed(shard):
    load_index(shard)
    fields = sense(shard)
    assert parse_index(written(fields, version="2")) is None
    assert parse_index(written(fields, digest="0" * 64)) is None
    for body in (b"[" * 100_000, b"[]", b"1", b"", b"\xff", b"{", b"9" * 5000):
        assert parse_index(written(body)) is None


def test_an_index_larger_than_its_shard_could_have_is_not_read(shard):
    load_index(shard)
    os.truncate(index_path(shard), 1 << 42)
    assert len(load_index(shard)) == 4
    assert index_path(shard).stat().st_size < 10_000


def test_a_full_disk_is_no_error(shard, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("supermix_transforms.data.tarindex.write_atomically", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert len(load_index(shard)) == 4
