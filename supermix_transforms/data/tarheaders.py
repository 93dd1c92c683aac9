"""The members of a tar that nobody vouches for: all of them, to its end, or an error.

Readers of a tar stream are silent where it is damaged: at a header that is cut or wrong they stop,
as if the archive ended there. And `tarfile` believes a header: that the next one lies before it, so
that reading never ends, or that a name takes a terabyte of memory. Here headers lead forward and
stay inside the file, and the file is whole, up to the zeros at its end.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["BLOCK", "tar_members"]

BLOCK = tarfile.BLOCKSIZE
SKIPPED_NAMES = re.compile(r"__[^/]*__($|/)")  # metadata, to webdataset
EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# To search these takes tarfile and webdataset a time that grows with the square of the length.
MOST_HEADER_BYTES = 1 << 14
MOST_NAME = 1024
MOST_GLOBALS = 1000  # copied for each member


def tar_members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar in their order, without what is metadata to webdataset.

    Args:
        path: what messages call it.
        file: the tar, whose place may be moved between two members.

    Raises:
        ValueError: if it is no whole tar, at the first member that shows it, or at the end.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # they would all be kept
                if member.isreg() and not SKIPPED_NAMES.match(member.name):
                    yield member
            end: int = tar.offset
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise ValueError(
            f"shards: expected a whole uncompressed tar file, got {str(path)!r}: {error}. Copy it "
            "again, or unpack it (gunzip)."
        ) from error
    file.seek(end)
    tail = file.read(10 * tarfile.RECORDSIZE)
    while tail and not tail.strip(b"\0"):
        tail = file.read(10 * tarfile.RECORDSIZE)
    if tail or size < end + 2 * BLOCK:
        raise ValueError(
            f"shards: expected a whole tar file, got {str(path)!r} of {size} bytes, in which "
            f"{'no header follows' if tail else 'the end is missing'} at byte {end}. Samples after "
            "that would be lost. Copy the file again."
        )


class _Header(tarfile.TarInfo):
    """A header that leads forward inside of the file, and needs no more memory than names do."""

    def _proc_member(self, tar: Any) -> tarfile.TarInfo:  # which tarfile lets a subclass override
        sparse = self.type == tarfile.GNUTYPE_SPARSE
        if self.type in EXTENDED:
            if not 0 <= self.size <= MOST_HEADER_BYTES:
                raise tarfile.ReadError(
                    f"a header of {self.size} bytes at byte {self.offset}, where at most "
                    f"{MOST_HEADER_BYTES} are read"
                )
            start = tar.fileobj.tell()
            sparse = b"GNU.sparse." in tar.fileobj.read(self.size)
            tar.fileobj.seek(start)
        if sparse:  # its content is not what lies in the tar
            raise tarfile.ReadError(f"a sparse file at byte {self.offset}; pack without --sparse")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        size = os.fstat(tar.fileobj.fileno()).st_size
        if member.size < 0 or not self.offset < tar.offset <= size:
            raise tarfile.ReadError(
                f"a header at byte {self.offset} after which the next would be at byte "
                f"{tar.offset} of {size}"
            )
        if len(member.name) > MOST_NAME or len(tar.pax_headers) > MOST_GLOBALS:
            raise tarfile.ReadError(
                f"a name of {len(member.name)} characters and {len(tar.pax_headers)} global "
                f"entries at byte {self.offset}, where at most {MOST_NAME} and {MOST_GLOBALS} are "
                "read"
            )
        return member
