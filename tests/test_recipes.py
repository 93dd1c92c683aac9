"""The codec of recipes, read by a second decoder too, and given what is no recipe."""

import hashlib
import json
import lzma
import re
import tracemalloc
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supermix_transforms.offline.recipes import (
    FIELDS,
    FILTERS,
    PREFIX,
    Group,
    Layout,
    RecipeReader,
    _compress,
    _planes,
    _unpack,
    encode,
    picture_digest,
)
from supermix_transforms.quantised import quantise

LAYOUT = Layout(3, 5, 40, 4, 20, 12, "a" * 64)


def group(layout: Layout = LAYOUT, originals: int = 6, seed: int = 0) -> Group:
    """Mixes of all three kinds."""
    random = np.random.default_rng(seed)
    k, w, n = layout.k, layout.mask_size, layout.top
    kind = np.array([0, 2, 0, 1, 0], dtype="u1")
    count = len(kind)

    def labels(rows):
        index = np.stack([random.permutation(layout.num_classes)[:n] for _ in range(rows)])
        log_prob = -np.sort(random.exponential(2, (rows, n)), axis=1)
        rest = random.random(rows)
        wide = "<u2" if layout.num_classes <= 65536 else "<u4"
        return index.astype(wide), log_prob.astype("<f2"), rest.astype("<f2")

    steps = quantise(torch.from_numpy(3 * random.standard_normal((3, k, w, w)))).numpy()
    own, new = labels(originals), labels(count)
    corners = np.sort(
        random.integers(0, min(layout.height, layout.width), (1, k - 1, 2, 2)), axis=2
    ).reshape(1, k - 1, 4)
    return Group(
        sample=random.integers(0, 1 << 31, originals).astype("<u4"),
        crop=np.concatenate(
            [random.integers(-5, 300, (originals, 2)), random.integers(1, 300, (originals, 2))], 1
        ).astype("<i2"),
        flip=random.integers(0, 2, originals).astype("u1"),
        original_index=own[0],
        original_log_prob=own[1],
        original_rest=own[2],
        source=random.integers(0, originals, (count, k)).astype("<u2"),
        weight=random.integers(0, 65535 // (k - 1), (count, k - 1)).astype("<u2"),
        outcome=np.array([0, 1, 2, 3, 0], dtype="u1"),
        steps=np.array([0, 300, 20, 1, 2], dtype="<u2"),
        index=new[0],
        log_prob=new[1],
        rest=new[2],
        kind=kind,
        grid=steps,
        share=random.integers(0, 255 // (k - 1), (1, k - 1)).astype("<u2"),
        box=corners.astype("<u2"),
        digest=picture_digest(np.zeros((3, 20, 12), dtype=np.uint8)),
    )


def reader(content: bytes) -> RecipeReader:
    return RecipeReader("a file", lambda at, size: content[at : at + size], len(content))


def read_all(content: bytes) -> list[Group]:
    found = reader(content)
    return [found.group(number) for number in range(len(found))]


def same(a: Group, b: Group) -> bool:
    return all(
        np.array_equal(x, y) and x.dtype == y.dtype
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


CONTENT = encode(LAYOUT, [group(), group(seed=1)])


def test_what_was_written_is_read():
    assert reader(CONTENT).layout == LAYOUT
    assert reader(CONTENT).counts == [5, 5]
    first, second = read_all(CONTENT)
    assert same(first, group())
    assert same(second, group(seed=1))


def test_the_same_groups_give_the_same_bytes():
    assert encode(LAYOUT, [group(), group(seed=1)]) == CONTENT


def test_bytes_by_field_add_up_to_the_file():
    assert sum(reader(CONTENT).bytes_by_field().values()) == len(CONTENT)


def test_no_mixes_and_no_originals():
    empty = {name: array[:0] for name, array in vars(group()).items()}
    (found,) = read_all(encode(LAYOUT, [Group(**empty)]))
    assert len(found.sample) == len(found.kind) == len(found.digest) == 0
    assert read_all(encode(LAYOUT, [])) == []


# -- what is no recipe -----------------------------------------------------------------------------


@given(at=st.integers(0, len(CONTENT) - 1), by=st.integers(1, 255))
def test_any_byte_changed_is_an_error(at, by):
    changed = bytearray(CONTENT)
    changed[at] ^= by
    with pytest.raises(ValueError, match="expected what `supermix generate` wrote, got"):
        read_all(bytes(changed))


@given(size=st.integers(0, len(CONTENT) - 1))
def test_any_cut_is_an_error(size):
    with pytest.raises(ValueError, match="expected what `supermix generate` wrote, got"):
        read_all(CONTENT[:size])


@given(more=st.binary(min_size=1, max_size=9))
def test_anything_behind_the_end_is_an_error(more):
    with pytest.raises(ValueError, match="and its header says otherwise"):
        read_all(CONTENT + more)


def with_header(change) -> bytes:
    """The file with another header and a checksum that fits it."""
    _, _, size = PREFIX.unpack(CONTENT[: PREFIX.size])
    header = json.loads(CONTENT[PREFIX.size : PREFIX.size + size])
    change(header)
    text = json.dumps(header).encode()
    start = PREFIX.pack(b"supermix", 1, len(text)) + text
    return start + hashlib.sha256(start).digest() + CONTENT[PREFIX.size + size + 32 :]


def change_group(**values):
    return lambda header: header["groups"][0].update(values)


def change_layout(**values):
    return lambda header: header["layout"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_layout(k=0), "k: expected 1..64, got 0"),
        (change_layout(k=10**9), "k: expected 1..64"),
        (change_layout(mask_size=10**6), "mask_size: expected 1..256"),
        (change_layout(height=1 << 20), "height: expected 1..16384"),
        (change_layout(num_classes=1 << 40), "num_classes: expected"),
        (change_layout(top=41), "top: expected at most 40 classes"),
        (change_layout(top=True), "top: expected 1..65536, got True"),
        (change_layout(k="2"), "k: expected 1..64, got '2'"),
        (change_layout(k=65), "k: expected 1..64, got 65"),
        (change_layout(k=2.0), r"k: expected 1..64, got 2\.0"),
        (change_layout(mask_size=0), "mask_size: expected 1..256, got 0"),
        (change_layout(mask_size=257), "mask_size: expected 1..256, got 257"),
        (change_layout(num_classes=0), "num_classes: expected"),
        (change_layout(num_classes=(1 << 24) + 1), "num_classes: expected 1..16777216"),
        (change_layout(top=0), "top: expected 1..65536, got 0"),
        (change_layout(top=65537, num_classes=70000), "top: expected 1..65536, got 65537"),
        (change_layout(height=0), "height: expected 1..16384, got 0"),
        (change_layout(width=-1), "width: expected 1..16384, got -1"),
        (change_layout(width=16385), "width: expected 1..16384, got 16385"),
        (change_layout(settings=5), "settings: expected a sha256"),
        (change_layout(settings="a" * 63), "settings: expected a sha256"),
        (change_layout(settings="a" * 65), "settings: expected a sha256"),
        (change_layout(settings="A" * 64), "settings: expected a sha256"),
        (change_layout(settings="a" * 63 + "\n"), "settings: expected a sha256"),
        (lambda header: header["layout"].pop("width"), "missing 1 required"),
        (lambda header: header.pop("layout"), "layout"),
        (change_group(originals=65537), "counts that do not fit"),
        (change_group(mixes=65537, kinds=[65535, 1, 1]), "counts that do not fit"),
        (change_group(mixes=5.0), "counts that are negative or no"),
        (change_group(kinds=[3, 2]), "counts that do not fit"),
        (change_group(kinds=[6, -1, 0]), "counts that are negative or no"),
        (change_group(kinds=None), "NoneType"),
        (change_group(bytes=[1] * 17), "counts that do not fit"),
        (change_layout(more=1), "unexpected keyword argument"),
        (change_group(originals=1 << 40), "counts that do not fit"),
        (change_group(mixes=-5), "counts that are negative or no"),
        (change_group(mixes=4), "counts that do not fit"),
        (change_group(kinds=[5, 0, 0]), "is|does not"),
        (change_group(originals=7), "does not have"),
        (change_group(bytes=[10**9] * len(FIELDS)), "its header says otherwise"),
        (change_group(bytes=[1]), "counts that do not fit"),
        (change_group(sha256="0" * 64), "checksum does not fit"),
        (lambda header: header.pop("groups"), "groups"),
        (lambda header: header.update(groups=7), "int"),
        (lambda header: header.update(layout=None), "NoneType"),
    ],
)
def test_a_header_made_up_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        read_all(with_header(change))


@pytest.mark.parametrize("version", [0, 2])
def test_another_version_says_so(version):
    start = PREFIX.pack(b"supermix", version, 2) + b"{}"
    with pytest.raises(ValueError, match=f"it is of version {version}, and this reads version 1"):
        reader(start + hashlib.sha256(start).digest())


@pytest.mark.parametrize("text", [b"", b"nonsense", b"[]", b"\xff", b"[" * 9999, b'{"groups": []}'])
def test_a_header_that_is_none_is_an_error(text):
    start = PREFIX.pack(b"supermix", 1, len(text)) + text
    with pytest.raises(ValueError, match="recipes: expected what `supermix generate` wrote"):
        reader(start + hashlib.sha256(start).digest())


@pytest.mark.parametrize("length", [len(CONTENT) + 1, (1 << 24) + 1, (1 << 32) - 1])
def test_a_header_of_too_many_bytes_is_not_read(length):
    def read(at: int, size: int) -> bytes:
        assert size <= PREFIX.size
        return PREFIX.pack(b"supermix", 1, length)

    size = len(CONTENT) if length < 1 << 24 else 1 << 33
    with pytest.raises(ValueError, match=f"its header says {length} bytes"):
        RecipeReader("a file", read, size)


def test_a_field_that_swells_is_not_unpacked_beyond_its_size():
    """A bomb: the header says few bytes, the compressed stream holds many."""
    bomb = lzma.compress(bytes(1 << 24), format=lzma.FORMAT_RAW, filters=FILTERS)
    counts = {"G": 6, "M": 5, "D": 8, "LOGITS": 3, "CONSTANT": 1, "BOXES": 1}
    tracemalloc.start()
    with pytest.raises(ValueError, match="flip does not have 6 bytes"):
        _unpack("flip", bomb, LAYOUT, counts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20  # of them 1 MiB of dictionary; the bomb holds 16
    with pytest.raises(ValueError, match="grid says"):
        _unpack("grid", b"", replace(LAYOUT, mask_size=256), counts | {"LOGITS": 1 << 16})


def pack(name: str, array) -> bytes:
    return _compress(_planes(name, array))


def forged(fields=None, raw=None) -> bytes:
    """A file of one group with right checksums: other values, or fields of other bytes."""
    arrays = {**vars(group()), **(fields or {})}
    packed = {name: pack(name, arrays[name]) for name in FIELDS} | (raw or {})
    block = b"".join(packed.values())
    entry = {"originals": 6, "mixes": 5, "kinds": [3, 1, 1], "bytes": [*map(len, packed.values())]}
    entry["sha256"] = hashlib.sha256(block).hexdigest()
    header = json.dumps({"layout": asdict(LAYOUT), "groups": [entry]}).encode()
    start = PREFIX.pack(b"supermix", 1, len(header)) + header
    return start + hashlib.sha256(start).digest() + block


def test_what_is_forged_is_read_where_nothing_is_wrong():
    (found,) = read_all(forged())
    assert same(found, group())


SIX = pack("flip", np.zeros(6, "u1"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        SIX[:-1],  # without its end marker
        SIX + b"\0",
        SIX + SIX,
        pack("flip", np.zeros(5, "u1")),
        pack("flip", np.zeros(7, "u1")),
        zlib.compress(bytes(6)),
        lzma.compress(bytes(6)),  # with its container
        bytes([255] * 9),
    ],
)
def test_a_field_that_is_not_of_its_size_is_an_error(content):
    with pytest.raises(ValueError, match="group 0 of a file"):
        read_all(forged(raw={"flip": content}))


def put(name, place, value):
    array = vars(group())[name].copy()
    array[place] = value
    return {name: array}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (put("outcome", 0, 4), "an outcome is unknown"),
        (put("flip", 0, 2), "flip is not 0 or 1"),
        (put("kind", 0, 3), "does not fit|instead of"),
        (put("kind", 0, 1), "does not fit|instead of"),
        (put("crop", (0, 2), 0), "a crop has no pixels"),
        (put("crop", (5, 3), 0), "a crop has no pixels"),
        (put("crop", (0, 2), -4), "a crop has no pixels"),
        (put("source", (1, 1), 6), "a source is not among the originals"),
        (put("weight", (0, slice(None)), 60000), "weights are more than 1"),
        (put("weight", (4, slice(None)), [65535, 1]), "weights are more than 1"),
        (put("index", (0, 0), 40), "index is no class"),
        (put("index", (0, slice(None)), 3), "index has a class twice"),
        (put("original_index", (0, 0), 40), "original_index is no class"),
        (put("original_index", (5, slice(None)), [1, 2, 3, 1]), "original_index has a class twice"),
        (put("log_prob", (0, 0), 1.0), "log_prob is no logarithm"),
        (put("log_prob", (0, 0), 0.0011), "log_prob is no logarithm"),
        (put("log_prob", (0, 0), np.inf), "log_prob is no logarithm"),
        (put("log_prob", (0, 0), np.nan), "log_prob is no logarithm"),
        (put("original_log_prob", (5, 3), np.nan), "original_log_prob is no logarithm"),
        (put("log_prob", (0, 0), -60000), "classes are unordered"),
        (put("original_log_prob", (0, 3), 0), "classes are unordered"),
        (put("rest", 0, -0.5), "rest is no probability"),
        (put("rest", 0, 1.001), "rest is no probability"),
        (put("rest", 0, np.nan), "rest is no probability"),
        (put("original_rest", 0, np.inf), "original_rest is no probability"),
        (put("grid", (0, 0, 0, 0), 13), "a grid is beyond 12 steps"),
        (put("grid", (2, 1, 4, 4), -13), "a grid is beyond 12 steps"),
        (put("grid", (0, slice(None), 0, 0), [12, -1]), "more than 12 steps apart"),
        (put("share", (0, slice(None)), 200), "shares are more than a picture"),
        (put("share", (0, slice(None)), [256, 0]), "shares are more than a picture"),
        (put("box", (0, 0, 2), 21), "a box is not in the picture"),
        (put("box", (0, 1, 3), 13), "a box is not in the picture"),
        (put("box", (0, 0, slice(None)), [5, 0, 4, 0]), "a box is not in the picture"),
        (put("box", (0, 1, slice(None)), [0, 5, 0, 4]), "a box is not in the picture"),
        ({"sample": group().sample.astype("<i8")}, "sample is int64|sample does not have"),
        ({"flip": group().flip[:5]}, "flip is uint8|flip does not have"),
        ({"digest": group().digest[:7]}, "digest is uint8|digest does not have"),
    ],
)
def test_values_out_of_range_are_neither_written_nor_read(fields, message):
    with pytest.raises(ValueError, match=message):
        encode(LAYOUT, [replace(group(), **fields)])
    with pytest.raises(ValueError, match="recipes: expected what `supermix generate` wrote") as got:
        read_all(forged(fields))
    assert re.search(message, str(got.value))


@pytest.mark.parametrize(
    "fields",
    [
        put("log_prob", (0, 0), 0.0009),
        put("log_prob", (0, 3), -np.inf),
        put("rest", 0, 1),
        put("weight", (0, slice(None)), [65535, 0]),
        put("grid", (0, slice(None), 0, 0), [12, 0]),
        put("grid", (0, slice(None), 0, 0), [-6, 6]),
        put("share", (0, slice(None)), [255, 0]),
        put("box", (0, 0, slice(None)), [0, 0, 20, 12]),
        put("box", (0, 0, slice(None)), [20, 12, 20, 12]),
        put("crop", (0, slice(None)), [-5, -32768, 1, 32767]),
        put("sample", 0, (1 << 32) - 1),
        put("steps", 0, 65535),
    ],
)
def test_values_at_the_end_of_their_range_are_written_and_read(fields):
    other = replace(group(), **fields)
    (found,) = read_all(encode(LAYOUT, [other]))
    assert same(found, other)
