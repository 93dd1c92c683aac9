"""Tars that lie: an error, and no reading without end, no memory that a header asks for."""

import io
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supermix_transforms.data.tarindex import make_index

BLOCK = 512
END = bytes(2 * BLOCK)


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a checksum that fits, whatever it says."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[156:157] = kind
    return summed(block)


def summed(block: bytes) -> bytes:
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def pax(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    content = b"".join(records)
    return header("pax", len(content), kind) + padded(content)


@pytest.fixture
def at_most_once(monkeypatch):
    """Each block is a header once at most; a reader that goes in circles is stopped."""
    read = tarfile.TarInfo._proc_member
    places = set()

    def once(self, tar):
        assert self.offset not in places, f"the header at byte {self.offset} is read again"
        places.add(self.offset)
        return read(self, tar)

    monkeypatch.setattr(tarfile.TarInfo, "_proc_member", once)
    return places


ORDINARY = header("a.jpg") + header("a.cls")
GLOBALS = b"".join(b"%d %d=\n" % (len(f" {n}=\n") + 1, n) for n in range(1001))
LIES = {
    "a size below zero": (ORDINARY + header("b.jpg", -1024), "next would be at byte 512 of"),
    "one that leads to itself": (ORDINARY + header("b.jpg", -512), "would be at byte 1024 of"),
    "a little below zero": (ORDINARY + header("b.jpg", -1), "a header at byte 1024 after which"),
    "a size beyond the file": (ORDINARY + header("b.jpg", 1 << 40), "next would be at byte 1099"),
    "one beyond 64 bits": (ORDINARY + header("b.jpg", 1 << 80), "a header at byte 1024 after"),
    "a pax size below zero": (ORDINARY + pax(b"14 size=-2048\n") + header("b.jpg"), "512 of"),
    "a pax size beyond the file": (
        pax(b"18 size=999999999\n") + header("b.jpg"),
        "byte 1000001536",
    ),
    "a name of a terabyte": (header("L", 1 << 40, b"L"), "header of 1099511627776 bytes at byte 0"),
    "a link of a terabyte": (header("K", 1 << 40, b"K"), "header of 1099511627776 bytes"),
    "pax of a terabyte": (header("x", 1 << 40, b"x"), "header of 1099511627776 bytes"),
    "pax of Solaris": (header("X", 1 << 40, b"X"), "header of 1099511627776 bytes"),
    "global pax": (header("g", 1 << 40, b"g"), "header of 1099511627776 bytes"),
    "a name of no bytes at all": (header("L", -1, b"L"), "header of -1 bytes"),
    "names of names": (header("L", 0, b"L") * 2000 + header("a.jpg"), "recursion"),
    "a length of many digits": (pax(b"1" * 5000 + b" path=a\n") + header("a.jpg"), ""),
    "a long name": (header("L", 2000, b"L") + padded(b"n" * 2000) + header("a"), "2000 characters"),
    "many globals": (pax(GLOBALS, kind=b"g") + header("a.jpg"), "1001 global entries"),
    "a sparse file": (header("a.jpg", 0, b"S"), "a sparse file at byte 0"),
    "a sparse file in pax": (pax(b"22 GNU.sparse.major=1\n") + header("a.jpg"), "a sparse file"),
    "no member after its name": (header("L", 5, b"L") + padded(b"a.jpg"), ""),
}


@pytest.mark.parametrize("what", LIES)
def test_a_header_that_lies_is_an_error(tmp_path, at_most_once, what):
    content, message = LIES[what]
    shard = tmp_path / "a.tar"
    shard.write_bytes(content + 20 * END)
    with pytest.raises(ValueError, match=rf"shards: expected a whole .*tar.*{message}"):
        make_index(shard)


def a_tar_of_all_kinds() -> bytes:
    """Headers of two formats: long names and links, a folder, pax, global pax."""
    content = b""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form, pax_headers={"a": "b"}) as tar:
            for name, kind in [
                ("a.jpg", tarfile.REGTYPE),
                ("long" * 40 + ".png", tarfile.REGTYPE),
                ("ü/" + "n" * 120 + "/a.cls", tarfile.REGTYPE),
                ("folder", tarfile.DIRTYPE),
                ("link.jpg", tarfile.SYMTYPE),
            ]:
                member = tarfile.TarInfo(f"{form}/{name}")
                member.type, member.linkname = kind, "l" * 200 if kind == tarfile.SYMTYPE else ""
                member.size = 700 if kind == tarfile.REGTYPE else 0
                tar.addfile(member, io.BytesIO(b"c" * 700))
            end = tar.offset
        content += stream.getvalue()[:end]
    return content + END


WHOLE = a_tar_of_all_kinds()
STARTS = [start for start in range(0, len(WHOLE), BLOCK) if WHOLE[start : start + 3] != b"ccc"]
SIZES = st.integers(-2 * len(WHOLE), 2 * len(WHOLE)) | st.integers(-(1 << 86), 1 << 86)
CHANGES = st.one_of(
    st.tuples(st.integers(0, BLOCK - 1), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just(124), SIZES.map(lambda size: tarfile.itn(size, 12, tarfile.GNU_FORMAT))),
    st.tuples(st.just(156), st.sampled_from([b"0", b"1", b"5", b"L", b"K", b"x", b"g", b"S"])),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    changes=st.lists(st.tuples(st.sampled_from(STARTS), CHANGES, st.booleans()), max_size=3),
    cut=st.none() | st.integers(0, len(WHOLE)),
)
def test_a_tar_with_any_bytes_changed_or_cut_is_an_error_or_leads_inside(
    tmp_path, at_most_once, changes, cut
):
    content = bytearray(WHOLE)
    for start, (place, replaced), is_summed in changes:
        content[start + place : start + BLOCK] = (
            replaced + content[start + place + len(replaced) : start + BLOCK]
        )[: BLOCK - place]
        if is_summed:
            content[start : start + BLOCK] = summed(content[start : start + BLOCK])
    shard = tmp_path / "a.tar"
    shard.write_bytes(content[:cut])
    at_most_once.clear()
    try:
        index = make_index(shard)
    except ValueError as error:
        if not str(error).startswith("shards: expected"):
            raise
        return
    places = sorted(
        (offset, size)
        for table in index.places.values()
        for offset, size in table.tolist()
        if offset >= 0
    )
    ends = [0, *(offset + size for offset, size in places)]
    assert all(
        end + BLOCK <= offset and size >= 0
        for end, (offset, size) in zip(ends, places, strict=False)
    )
    assert ends[-1] <= shard.stat().st_size


def test_the_tar_that_is_changed_is_read_whole(tmp_path, at_most_once):
    shard = tmp_path / "a.tar"
    shard.write_bytes(WHOLE)
    assert len(make_index(shard)) == 6
    assert len(at_most_once) == 17
