"""Where each sample of a WebDataset tar lies: one strict reading of it, kept in a file beside it.

Names are read as webdataset reads them: the key ends at the first dot of the base name, the suffix
is lower-cased, neighbours of one key are a sample. Nothing but headers is looked at.

The file beside a shard, ``NAME.tar.index``, is believed only if its checksum holds and the shard
has the size and the time of change that it states; else it is made anew.
"""

import hashlib
import json
import os
import re
import tarfile
import warnings
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from supermix_transforms.data.tarheaders import BLOCK, tar_members
from supermix_transforms.files import write_atomically

__all__ = [
    "PICTURES",
    "ShardIndex",
    "index_path",
    "load_index",
    "make_index",
    "parse_index",
    "read_members",
    "verify_index",
    "write_index",
]

PICTURES = ("jpg", "jpeg", "png", "webp")
FORMAT, VERSION = "supermix-index", 1
MOST_CELLS = 100  # of the table, for each member; most of it would say that there is none

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a shard of `size` bytes, changed last at `time` (ns)."""

    size: int
    time: int
    sha256: str
    keys: tuple[str, ...]
    doubles: tuple[int, ...]  # samples whose key was there before, or that have a suffix twice
    places: dict[str, Places]  # of each suffix: (n, 2) offset and bytes; -1 where a sample has none

    def __len__(self) -> int:
        return len(self.keys)

    def agrees(self, other: "ShardIndex") -> bool:
        """Whether both say the same of a tar, whenever that was changed."""
        return (
            (self.size, self.sha256, self.keys, self.doubles)
            == (other.size, other.sha256, other.keys, other.doubles)
            and self.places.keys() == other.places.keys()
            and all(np.array_equal(self.places[each], other.places[each]) for each in self.places)
        )


def index_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.index")


def load_index(shard: Path) -> ShardIndex:
    """The index of a shard, from the file beside it, or made anew and written there.

    A folder that cannot be written to is no error: there is a warning, and the index is kept in
    memory.

    Raises:
        ValueError: if the shard is not there, is no whole tar, or changes while it is read.
    """
    index = _read(shard)
    if index is None:
        index = make_index(shard)
        write_index(shard, index)
    return index


def verify_index(shard: Path) -> ShardIndex:
    """The index beside a shard, compared with what the shard holds; nothing is written.

    Raises:
        ValueError: as `load_index`, and if the index is not there, is damaged, or says otherwise.
    """
    beside, made = _read(shard), make_index(shard)
    if beside is None:
        raise ValueError(
            f"shards: expected an index beside {str(shard)!r}, got none that is whole and of a tar "
            "of that size and time of change. `supermix index` makes it."
        )
    if not beside.agrees(made):
        raise ValueError(
            f"shards: expected the index beside {str(shard)!r} to say what the tar holds, got "
            f"another. Remove {index_path(shard).name!r}; `supermix index` makes it anew."
        )
    return beside


def make_index(shard: Path) -> ShardIndex:
    """Read a shard from its first to its last byte.

    Raises:
        ValueError: as `load_index`.
    """
    try:
        with shard.open("rb") as file:
            before = os.fstat(file.fileno())
            members = list(_members(shard, file))
            file.seek(0)
            sha256 = hashlib.sha256()
            while block := file.read(1 << 20):
                sha256.update(block)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise ValueError(
            f"shards: expected a tar file, got {str(shard)!r}: {error.strerror}. Check the path."
        ) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(
            f"shards: expected a finished tar file, got {str(shard)!r}, which changes while it is "
            "read. Wait until it is written."
        )
    keys, doubles, places = _table(shard, members)
    return ShardIndex(after.st_size, after.st_mtime_ns, sha256.hexdigest(), keys, doubles, places)


def _table(
    shard: Path, members: list[tuple[str, str, int, int]]
) -> tuple[tuple[str, ...], tuple[int, ...], dict[str, Places]]:
    """Keys, doubles and places; see `ShardIndex`."""
    keys: list[str] = []
    seen: dict[str, int] = {}
    doubles: set[int] = set()
    rows: dict[str, dict[int, tuple[int, int]]] = {}  # suffix: row: offset, bytes
    for key, suffix, offset, size in members:
        if not keys or key != keys[-1]:
            keys.append(key)
            if seen.setdefault(key, len(keys) - 1) < len(keys) - 1:
                doubles.add(len(keys) - 1)
        found = rows.setdefault(suffix, {})
        if len(keys) - 1 in found:
            doubles.add(len(keys) - 1)
        found[len(keys) - 1] = offset, size
    if len(keys) * len(rows) > MOST_CELLS * max(len(members), 10_000):
        raise ValueError(
            f"shards: expected samples of few kinds of members, got {len(rows)} suffixes of "
            f"{len(keys)} samples in {str(shard)!r}, such as {next(iter(rows))!r}. A key ends at "
            "the first dot of a name: write the members as KEY.SUFFIX, with no dot in the key."
        )
    places = {suffix: np.full((len(keys), 2), -1, dtype=np.int64) for suffix in rows}
    for suffix, found in rows.items():
        places[suffix][list(found)] = list(found.values())
    return tuple(keys), tuple(sorted(doubles)), places


def _members(shard: Path, file: BinaryIO) -> Iterator[tuple[str, str, int, int]]:
    """Key, suffix, offset and bytes of each member that is part of a sample to webdataset."""
    from webdataset.tariterators import base_plus_ext

    for member in tar_members(shard, file):
        key, suffix = base_plus_ext(member.name)
        if key is not None:
            yield key, suffix.lower(), member.offset_data, member.size


def read_members(
    shard: Path, index: ShardIndex, row: int, suffixes: Iterable[str]
) -> dict[str, bytes]:
    """The content of a sample's members of these suffixes, of those that it has.

    A member's header is read with it and must be what the index says.

    Raises:
        ValueError: if the shard is not the one that was indexed any more.
    """
    members: dict[str, bytes] = {}
    suffix, offset = "", 0
    try:
        with shard.open("rb") as file:
            for suffix in suffixes:
                offset, size = index.places[suffix][row].tolist()
                if offset >= 0:
                    members[suffix] = _content(file, offset, size)
    except (OSError, tarfile.TarError) as error:
        name = f"{index.keys[row]}.{suffix}"
        raise ValueError(
            f"shards: expected {name!r} at byte {offset} of {str(shard)!r}, "
            f"got {error}. The file has changed since it was opened; start again, and its index is "
            "made anew."
        ) from error
    return members


def _content(file: BinaryIO, offset: int, size: int) -> bytes:
    """What follows the header before `offset`, which must be of a member of that size."""
    file.seek(offset - BLOCK)
    content = file.read(BLOCK + size)
    if len(content) != BLOCK + size:
        raise tarfile.TarError("the file's end before the member's")
    header = content[:BLOCK]  # by hand: TarInfo takes as long as to read the member
    if tarfile.nti(header[148:156]) not in tarfile.calc_chksums(header):  # type: ignore[attr-defined]
        raise tarfile.TarError("no header before it")
    if tarfile.nti(header[124:136]) != size:  # type: ignore[attr-defined]
        raise tarfile.TarError(f"a member of another size where {size} bytes were")
    return content[BLOCK:]


# -- the file beside a shard -----------------------------------------------------------------------


def _read(shard: Path) -> ShardIndex | None:
    """The index beside a shard, or None if there is none that can be believed."""
    path = index_path(shard)
    try:
        status = shard.stat()
        if path.stat().st_size > 4 * status.st_size + (1 << 24):  # than any of such a shard
            return None
        index = parse_index(path.read_bytes())
    except OSError:
        return None
    if index is None or (index.size, index.time) != (status.st_size, status.st_mtime_ns):
        return None
    return index


def parse_index(content: bytes) -> ShardIndex | None:
    """An index from a file's content; None if that is not as it was written, or makes no sense."""
    try:
        first, body = content.split(b"\n", 1)
        return _sensible(**json.loads(body)) if first.decode() == _first_line(body) else None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _sensible(
    size: Any, time: Any, sha256: Any, keys: Any, doubles: Any, places: Any
) -> ShardIndex | None:
    """The index that these make; None where no tar has such a one."""
    first = {key: row for row, key in reversed([*enumerate(keys)])}
    again = {row for row, key in enumerate(keys) if first[key] < row}
    tables = {suffix: _integers(rows) for suffix, rows in places.items()}
    if not (
        isinstance(keys, list)
        and all(type(key) is str for key in keys)
        and all(type(each) is int for each in (size, time, *doubles))
        and doubles == sorted({*doubles})
        and again <= {*doubles} <= {*range(len(keys))}
        and re.fullmatch("[0-9a-f]{64}", sha256)
        and all(len(table) == len(keys) for table in tables.values())
        and (not keys or np.any([t[:, 0] >= 0 for t in tables.values()], axis=0).all())
        and _lie_apart(np.concatenate([np.empty((0, 2), np.int64), *tables.values()]), size)
    ):
        return None
    return ShardIndex(size, time, sha256, tuple(keys), tuple(doubles), tables)


def _lie_apart(places: Places, size: int) -> bool:
    """Whether members (n, 2) follow headers of their own in a tar of that size."""
    offsets, sizes = places[(places != -1).any(axis=1)].T
    order = offsets.argsort()
    offsets, sizes = offsets[order], sizes[order]
    ends = np.append(offsets[1:] - BLOCK, np.int64(size))[: len(offsets)]
    return bool(
        ((offsets >= BLOCK) & (offsets % BLOCK == 0) & (sizes >= 0)).all()
        and (sizes <= ends - offsets).all()  # a sum might not fit 64 bits
    )


def _integers(rows: Any) -> Places:
    """Rows of two integers, (n, 2); a TypeError or ValueError for anything else."""
    if {*map(len, rows)} - {2}:
        raise ValueError("expected offset and bytes")
    return np.array(array("q", chain.from_iterable(rows)), np.int64).reshape(-1, 2)


def write_index(shard: Path, index: ShardIndex) -> None:
    """Write an index beside its shard; a warning where that cannot be done."""
    content = {
        "size": index.size,
        "time": index.time,
        "sha256": index.sha256,
        "keys": index.keys,
        "doubles": index.doubles,
        "places": {suffix: table.tolist() for suffix, table in index.places.items()},
    }
    body = json.dumps(content, separators=(",", ":")).encode()
    try:
        write_atomically(index_path(shard), _first_line(body).encode() + b"\n" + body)
    except OSError as error:
        warnings.warn(
            f"the index of {str(shard)!r} could not be written beside it ({error.strerror}); it is "
            "made anew by each process. Run `supermix index` where the folder can be written to.",
            stacklevel=4,
        )


def _first_line(body: bytes) -> str:
    return f"{FORMAT} {VERSION} {hashlib.sha256(body).hexdigest()}"
