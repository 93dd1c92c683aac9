"""Shards from elsewhere, copied whole into a folder on first use.

A copy is read to its end and, where its index lies beside the original (``URL.index``), compared
with that, before it gets its name: a file in the folder is a whole shard. All
processes of a machine share the folder; of those that want the same shard at once, one copies and
the others wait.
"""

import contextlib
import hashlib
import os
import re
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

from supermix_transforms.data.tarindex import ShardIndex, make_index, parse_index, write_index
from supermix_transforms.files import lock

__all__ = ["cached_path", "fetch", "published_index"]

BLOCK = 1 << 20
MOST_BYTES = 1 << 36  # of a shard; a stream without end would fill the disk
MOST_INDEX_BYTES = 1 << 28
MOST_SECONDS = 120.0  # without a byte; curl tries an address anew for half as long


def cached_path(url: str, cache_dir: Path) -> Path:
    """Where the copy of a shard is, or will be."""
    name = re.sub(r"[^\w.-]", "_", url.split("?")[0].rstrip("/").rpartition("/")[2])[-80:]
    return cache_dir / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"


def published_index(url: str) -> ShardIndex | None:
    """The index beside a shard elsewhere, or None if there is none that can be believed."""
    if url.startswith("pipe:"):
        return None  # a command says what it reads
    path, *query = url.split("?", 1)
    try:
        with _opened("?".join([f"{path}.index", *query])) as stream:
            content = b"".join(_blocks(stream, MOST_INDEX_BYTES))
    except (OSError, ValueError):
        return None
    return parse_index(content)


def fetch(url: str, target: Path, *, published: ShardIndex | None = None) -> None:
    """Copy a shard to `target`, unless it is there.

    Args:
        url: of any scheme that ``webdataset.gopen`` knows: http, https, hf, gs, ...; a ``pipe:``
            runs its command.
        target: see `cached_path`; its folder is made. Progress is shown on a terminal.
        published: what the copy must hold, if it is known.

    Raises:
        ValueError: if the shard cannot be had whole, is another one, or does not fit the disk, and
            if nothing comes for `MOST_SECONDS`. Nothing is left behind then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with lock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return
        try:
            with part.open("wb") as file, _opened(url) as stream, _shown(target.name) as advance:
                for block in _blocks(stream, MOST_BYTES):
                    file.write(block)
                    advance(len(block))
                file.flush()
                os.fsync(file.fileno())
            index = make_index(part)
            if published is not None and not index.agrees(published):
                raise ValueError(
                    f"a file with sha256 {index.sha256}, of which {url}.index, for "
                    f"{published.sha256}, says something else"
                )
            os.replace(part, target)
            write_index(target, index)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"shards: expected a whole tar at {url!r}, to be copied to {str(target.parent)!r}, "
                f"got: {error}. Nothing was kept; check address and free space, and start again."
            ) from error
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _shown(name: str) -> Iterator[Callable[[int], None]]:
    """What was copied so far, on a terminal; several workers would write over one another."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    quiet = get_worker_info() is not None or not console.is_terminal
    columns = (TextColumn("copying {task.description}"), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=quiet, transient=True) as progress:
        task = progress.add_task(name, total=None)
        yield lambda count: progress.advance(task, count)


@contextlib.contextmanager
def _opened(url: str) -> Iterator[Any]:
    from webdataset.gopen import gopen, set_options

    stream = gopen(url, "rb", bufsize=8192)
    try:
        yield stream
    except BaseException:
        # a command that has nothing more to say does not notice that nobody listens
        if set_options(stream, ignore_errors=True):
            stream.proc.kill()
        raise
    finally:
        stream.close()


def _blocks(stream: Any, most: int) -> Iterator[bytes]:
    """The content of a file or of a command's output, as it comes."""
    handle = getattr(stream, "stream", stream).fileno()
    waiting = select.poll()
    waiting.register(handle, select.POLLIN)
    total = 0
    while waiting.poll(1000 * MOST_SECONDS):
        block = os.read(handle, BLOCK)
        if not block:
            return
        total += len(block)
        if total > most:
            raise ValueError(f"more than {most} bytes")
        yield block
    raise TimeoutError(f"nothing for {MOST_SECONDS:g} seconds after {total} bytes")
