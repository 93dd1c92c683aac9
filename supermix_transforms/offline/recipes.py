"""Recipes: what it takes to make mixed pictures again from the pictures they were made of.

This is the codec, from records to bytes and back; docs/format.md is its specification. A file holds
groups, each compressed for itself, so that any of them can be read alone. Every byte is covered by
a checksum, and every value is checked before it is used: a file from anywhere may be opened.
"""

import hashlib
import json
import lzma
import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from supermix_transforms.quantised import LEVELS, LIMIT
from supermix_transforms.results import Outcome

__all__ = ["FIELDS", "Group", "Kind", "Layout", "RecipeReader", "encode", "picture_digest"]

MAGIC, VERSION = b"supermix", 1
PREFIX = struct.Struct("<8sII")  # magic, version, bytes of the header
DIGEST_BYTES = 32
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0}]
MOST = {  # what a reader takes, so that no file makes it allocate without bound
    "k": 64,
    "mask_size": 256,
    "num_classes": 1 << 24,
    "top": 1 << 16,
    "height": 1 << 14,
    "width": 1 << 14,
    "originals": 1 << 16,
    "mixes": 1 << 16,
    "header": 1 << 24,
    "field": 1 << 30,
}

Array: TypeAlias = npt.NDArray[Any]


class Kind(IntEnum):
    """How a mix's masks are stored."""

    LOGITS = 0  # on a grid, in steps
    CONSTANT = 1  # a share of each picture (MixUp; a picture that was not mixed)
    BOXES = 2  # pasted one over the other (CutMix)


@dataclass(frozen=True)
class Layout:
    """What all groups of a file have in common."""

    k: int
    mask_size: int  # w
    num_classes: int  # N
    top: int  # n, classes that are kept of a teacher's answer
    height: int  # of the pictures
    width: int
    settings: str  # sha256 of the settings that the file was made with

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "settings":
                if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
                    raise ValueError(f"settings: expected a sha256, got {str(value)[:80]!r}.")
            elif type(value) is not int or not 1 <= value <= MOST[name]:  # True is none
                raise ValueError(f"{name}: expected 1..{MOST[name]}, got {value!r}.")
        if self.top > self.num_classes:
            raise ValueError(f"top: expected at most {self.num_classes} classes, got {self.top}.")


@dataclass(frozen=True, eq=False)
class Group:
    """G originals and the M mixes of them; all arrays are little-endian."""

    # originals
    sample: Array  # (G,) uint32, index in the data set
    crop: Array  # (G, 4) int16: top, left, height, width, in pixels; see `views`
    flip: Array  # (G,) uint8
    original_index: Array  # (G, n) uint16, or uint32 where N > 65536: the teacher's top classes
    original_log_prob: Array  # (G, n) float16, largest first
    original_rest: Array  # (G,) float16, the probability of all others
    # mixes
    source: Array  # (M, k) uint16 rows of the originals
    weight: Array  # (M, k - 1) uint16: the mixing weights r in parts of 65535, but for the last
    outcome: Array  # (M,) uint8
    steps: Array  # (M,) uint16
    index: Array  # (M, n), as of the originals
    log_prob: Array
    rest: Array
    kind: Array  # (M,) uint8
    grid: Array  # (mixes of LOGITS, k - 1, w, w) int8, see `quantised`
    share: Array  # (mixes of CONSTANT, k - 1) uint16, parts of 255 of all pictures but the last
    box: Array  # (mixes of BOXES, k - 1, 4) uint16: top, left, bottom, right of pictures 1..k - 1
    digest: Array  # (8,) uint8, of the first mix's pixels; none where there are no mixes


# In the order in which they stand in a group: dtype ("class": uint16, or uint32 where N > 65536),
# shape. G, M and the mixes of each kind are counted by group; D is 8, or 0 where nothing is mixed.
FIELDS: dict[str, tuple[str, tuple[int | str, ...]]] = {
    "sample": ("<u4", ("G",)),
    "crop": ("<i2", ("G", 4)),
    "flip": ("u1", ("G",)),
    "original_index": ("class", ("G", "n")),
    "original_log_prob": ("<f2", ("G", "n")),
    "original_rest": ("<f2", ("G",)),
    "source": ("<u2", ("M", "k")),
    "weight": ("<u2", ("M", "k - 1")),
    "outcome": ("u1", ("M",)),
    "steps": ("<u2", ("M",)),
    "index": ("class", ("M", "n")),
    "log_prob": ("<f2", ("M", "n")),
    "rest": ("<f2", ("M",)),
    "kind": ("u1", ("M",)),
    "grid": ("i1", ("LOGITS", "k - 1", "w", "w")),
    "share": ("<u2", ("CONSTANT", "k - 1")),
    "box": ("<u2", ("BOXES", "k - 1", 4)),
    "digest": ("u1", ("D",)),
}


def picture_digest(picture: Array) -> Array:
    """8 bytes that depend on every pixel of a picture (C, H, W) uint8."""
    digest = hashlib.blake2b(np.ascontiguousarray(picture).tobytes(), digest_size=8).digest()
    return np.frombuffer(digest, dtype=np.uint8)


def encode(layout: Layout, groups: Sequence[Group]) -> bytes:
    """The content of a file.

    Raises:
        ValueError: for a group that a reader would reject.
    """
    blocks, entries = [], []
    for group in groups:
        arrays = vars(group)
        counts = _counts(group.kind, len(group.sample))
        _check(layout, counts, arrays)
        fields = [_compress(_planes(name, arrays[name])) for name in FIELDS]
        blocks.append(b"".join(fields))
        entries.append(
            {
                "originals": counts["G"],
                "mixes": counts["M"],
                "kinds": [counts[kind.name] for kind in Kind],
                "bytes": [len(field) for field in fields],
                "sha256": hashlib.sha256(blocks[-1]).hexdigest(),
            }
        )
    header = json.dumps(
        {"layout": asdict(layout), "groups": entries}, separators=(",", ":")
    ).encode()
    start = PREFIX.pack(MAGIC, VERSION, len(header)) + header
    return b"".join([start, hashlib.sha256(start).digest(), *blocks])


class RecipeReader:
    """The groups of a file, each read and checked when it is asked for.

    Args:
        name: of the file, for messages.
        read: (offset, bytes) -> that part of the file.
        size: of the file, bytes.

    Attributes:
        layout: what the groups have in common.
        counts: mixes of each group.

    Raises:
        ValueError: for what is no file of recipes, is cut, or has changed.
    """

    def __init__(self, name: str, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self.name = name
        self.layout: Layout
        with _complaint(name):
            self.layout, self._entries = self._header(size)
        self.counts: list[int] = [int(entry["mixes"]) for entry in self._entries]
        lengths = [sum(entry["bytes"]) for entry in self._entries]
        self._offsets = [size - sum(lengths[i:]) for i in range(len(lengths))]

    def __len__(self) -> int:
        return len(self._entries)

    def group(self, number: int) -> Group:
        """A group.

        Raises:
            ValueError: if it is not what was written.
        """
        entry = self._entries[number]
        with _complaint(f"group {number} of {self.name}"):
            content = self._read(self._offsets[number], sum(entry["bytes"]))
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise ValueError("its checksum does not fit")
            counts = _named(entry["originals"], entry["mixes"], entry["kinds"])
            arrays, at = {}, 0
            for name, length in zip(FIELDS, entry["bytes"], strict=True):
                arrays[name] = _unpack(name, content[at : at + length], self.layout, counts)
                at += length
            _check(self.layout, counts, arrays)
            return Group(**arrays)

    def bytes_by_field(self) -> dict[str, int]:
        """What each field takes in the file; "frame" is all that is not a group's."""
        columns = zip(*(entry["bytes"] for entry in self._entries), strict=True)
        sums = dict(zip(FIELDS, map(sum, columns), strict=False))
        return {**sums, "frame": self._offsets[0] if self._offsets else 0}

    def _header(self, size: int) -> tuple[Layout, list[dict[str, Any]]]:
        prefix = self._read(0, PREFIX.size)
        if len(prefix) < PREFIX.size:
            raise ValueError(f"it has {size} bytes")
        magic, version, length = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise ValueError(f"it begins with {magic!r} instead of {MAGIC!r}")
        if version != VERSION:
            raise ValueError(f"it is of version {version}, and this reads version {VERSION}")
        if length > min(size, MOST["header"]):
            raise ValueError(f"its header says {length} bytes")
        header = self._read(PREFIX.size, length)
        digest = self._read(PREFIX.size + length, DIGEST_BYTES)
        if hashlib.sha256(prefix + header).digest() != digest:
            raise ValueError("its header's checksum does not fit")
        content = json.loads(header)
        layout = Layout(**content["layout"])
        for entry in content["groups"]:
            numbers = [entry["originals"], entry["mixes"], *entry["kinds"], *entry["bytes"]]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError("its header holds counts that are negative or no integers")
            if (
                entry["originals"] > MOST["originals"]
                or entry["mixes"] > MOST["mixes"]
                or sum(entry["kinds"]) != entry["mixes"]
                or len(entry["kinds"]) != len(Kind)
                or len(entry["bytes"]) != len(FIELDS)
            ):
                raise ValueError("its header holds counts that do not fit each other")
        held = sum(sum(entry["bytes"]) for entry in content["groups"])
        if PREFIX.size + length + DIGEST_BYTES + held != size:
            raise ValueError(f"it has {size} bytes, and its header says otherwise")
        return layout, content["groups"]


# -- a field and its bytes -------------------------------------------------------------------------


def _dtype_and_shape(
    name: str, layout: Layout, counts: dict[str, int]
) -> tuple[np.dtype[Any], tuple[int, ...]]:
    dtype, shape = FIELDS[name]
    if dtype == "class":
        dtype = "<u2" if layout.num_classes <= 1 << 16 else "<u4"
    sizes = {"n": layout.top, "k": layout.k, "k - 1": layout.k - 1, "w": layout.mask_size, **counts}
    return np.dtype(dtype), tuple(sizes[size] if isinstance(size, str) else size for size in shape)


def _planes(name: str, array: Array) -> bytes:
    """Columns, then bytes of one significance: neighbours are alike then."""
    flat = _residuals(array) if name == "grid" else np.moveaxis(array, 0, -1)
    return np.ascontiguousarray(flat).reshape(-1, 1).view(np.uint8).T.tobytes()


def _compress(content: bytes) -> bytes:
    """A field's bytes, as they stand in the file."""
    return lzma.compress(content, format=lzma.FORMAT_RAW, filters=FILTERS)


def _unpack(name: str, content: bytes, layout: Layout, counts: dict[str, int]) -> Array:
    dtype, shape = _dtype_and_shape(name, layout, counts)
    size = math.prod(shape) * dtype.itemsize
    if size > MOST["field"]:
        raise ValueError(f"{name} says {size} bytes")
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=FILTERS)
    data = decompressor.decompress(content, max_length=size + 1)
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"{name} does not have {size} bytes")
    planes = np.frombuffer(data, dtype=np.uint8).reshape(dtype.itemsize, -1)
    flat = np.ascontiguousarray(planes.T).view(dtype).reshape(-1)
    if name == "grid":
        return _from_residuals(flat.reshape(shape))
    return np.ascontiguousarray(np.moveaxis(flat.reshape(*shape[1:], shape[0]), -1, 0))


def _residuals(grid: Array) -> Array:
    """What each cell (..., w, w) int8 differs by from the median of its neighbours' guesses."""
    wide = np.pad(grid.astype(np.int16), [(0, 0)] * (grid.ndim - 2) + [(1, 0), (1, 0)])
    left, up, corner = wide[..., 1:, :-1], wide[..., :-1, 1:], wide[..., :-1, :-1]
    return (grid - _median_guess(left, up, corner)).astype(np.int8)


def _from_residuals(residuals: Array) -> Array:
    """The inverse of `_residuals`, for all masks at once along the diagonals."""
    side = residuals.shape[-1]
    wide = np.zeros((*residuals.shape[:-2], side + 1, side + 1), dtype=np.int16)
    for diagonal in range(2 * side - 1):
        row = np.arange(max(0, diagonal - side + 1), min(diagonal, side - 1) + 1)
        column = diagonal - row
        guess = _median_guess(
            wide[..., row + 1, column], wide[..., row, column + 1], wide[..., row, column]
        )
        wide[..., row + 1, column + 1] = guess + residuals[..., row, column]
    return wide[..., 1:, 1:].astype(np.int8)


def _median_guess(left: Array, up: Array, corner: Array) -> Array:
    """The median of left, up and left + up - corner, as in LOCO-I."""
    low, high = np.minimum(left, up), np.maximum(left, up)
    guess: Array = np.clip(left + up - corner, low, high)
    return guess


# -- what a reader must reject ---------------------------------------------------------------------


def _counts(kind: Array, originals: int) -> dict[str, int]:
    return _named(originals, len(kind), [int((kind == each).sum()) for each in Kind])


def _named(originals: int, mixes: int, kinds: Sequence[int]) -> dict[str, int]:
    by_kind = {kind.name: kinds[kind] for kind in Kind}
    return {"G": originals, "M": mixes, "D": 8 * min(1, mixes), **by_kind}


def _check(layout: Layout, counts: dict[str, int], arrays: dict[str, Array]) -> None:
    """Raise a ValueError unless the arrays of a group are what `docs/format.md` says."""

    def expect(right: Any, what: str) -> None:
        if not np.all(right):
            raise ValueError(what)

    for name, array in arrays.items():
        dtype, shape = _dtype_and_shape(name, layout, counts)
        expect(
            array.shape == shape and array.dtype == dtype,
            f"{name} is {array.dtype} {array.shape} instead of {dtype} {shape}",
        )
    a = arrays
    expect(_counts(a["kind"], counts["G"]) == counts, "kind does not fit the counts")
    expect(a["outcome"] <= max(Outcome), "an outcome is unknown")
    expect(a["flip"] <= 1, "flip is not 0 or 1")
    expect(a["crop"][:, 2:] >= 1, "a crop has no pixels")
    expect(a["source"] < counts["G"], "a source is not among the originals")
    total = a["weight"].sum(axis=1, dtype=np.int64)
    expect(total <= 65535, "weights are more than 1")
    for prefix in ("original_", ""):
        index, log_prob = a[f"{prefix}index"], a[f"{prefix}log_prob"].astype(np.float32)
        rest = a[f"{prefix}rest"]
        expect(index < layout.num_classes, f"{prefix}index is no class")
        expect(
            np.isfinite(log_prob) & (log_prob <= 1e-3) | np.isneginf(log_prob),
            f"{prefix}log_prob is no logarithm of a probability",
        )
        expect(log_prob[:, 1:] <= log_prob[:, :-1], "classes are unordered")
        expect((rest >= 0) & (rest <= 1), f"{prefix}rest is no probability")
        ordered = np.sort(index, axis=1)
        expect(ordered[:, 1:] != ordered[:, :-1], f"{prefix}index has a class twice")
    grid = a["grid"].astype(np.int16)
    expect(np.abs(grid) <= LIMIT, f"a grid is beyond {LIMIT} steps")
    last = np.zeros_like(grid[:, :1])
    spread = np.concatenate([grid, last], axis=1)
    expect(
        spread.max(axis=1) - spread.min(axis=1) <= LIMIT if len(grid) else True,
        f"a grid's images are more than {LIMIT} steps apart",
    )
    expect(a["share"].sum(axis=1, dtype=np.int64) <= LEVELS, "shares are more than a picture")
    top, left, bottom, right = np.moveaxis(a["box"].astype(np.int64), -1, 0)
    expect((top <= bottom) & (bottom <= layout.height), "a box is not in the picture")
    expect((left <= right) & (right <= layout.width), "a box is not in the picture")


class _complaint:
    """Turns whatever goes wrong inside into one error that names the file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        expected = (ValueError, TypeError, KeyError, IndexError, RecursionError, OSError)
        if isinstance(error, (*expected, lzma.LZMAError, AttributeError)):
            raise ValueError(
                f"recipes: expected what `supermix generate` wrote, got {self.name}: {error}. Copy "
                "the file again, or generate it anew."
            ) from error
