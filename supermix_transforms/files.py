"""Files that are there whole or not at all, and locks that die with their process."""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["lock", "sha256_of", "try_lock", "write_atomically", "writing_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, after a power cut too.

    One of that name is replaced.
    """
    with writing_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def writing_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name at the end, and is removed if that is not reached."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; its file stays, or two could hold two of one name."""
    import fcntl  # not on Windows, where nothing is generated, and no shard is fetched

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def try_lock(path: Path, *, seconds: float = 0.0) -> Iterator[bool]:
    """Whether this process holds the lock inside; it tries for some seconds at most."""
    import fcntl

    end = time.monotonic() + seconds
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    yield False
                    return
                time.sleep(0.05)
            else:
                yield True
                return
