"""Note where each sample of a shard lies, ahead of time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from supermix_transforms.data.shards import check_there, find_shards
from supermix_transforms.data.tarindex import load_index, verify_index

__all__ = ["IndexSummary", "ShardSummary", "index_shards", "print_index"]


@dataclass(frozen=True)
class ShardSummary:
    """What a shard holds."""

    shard: str
    bytes: int
    samples: int
    members: dict[str, int]  # samples that have a member of this suffix
    doubles: int  # samples whose key was there before, or that have a suffix twice
    sha256: str


@dataclass(frozen=True)
class IndexSummary:
    """What `index_shards` found."""

    shards: tuple[ShardSummary, ...]
    samples: int
    bytes: int
    verified: bool
    problems: tuple[str, ...]  # of the shards that are not in `shards`


def index_shards(urls: str | Path | Sequence[str | Path], *, verify: bool = False) -> IndexSummary:
    """Write the index of each shard beside it, where it is not there yet or not up to date.

    Every shard that needs one is read from its first to its last byte; progress is shown on a
    terminal.

    Args:
        urls: as for `ShardDataset`.
        verify: read every shard and compare it with the index beside it; write nothing. What is
            wrong is listed in `problems`.

    Raises:
        ValueError: for addresses that are no files and, without `verify`, for shards that are not
            there or not whole.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    shards: list[Path] = []
    for shard in find_shards(urls):
        if not isinstance(shard, Path):
            raise ValueError(f"shards: expected files, got {shard!r}. Index them where they are.")
        shards.append(shard)
    if not verify:
        check_there(shards)
    sizes = [shard.stat().st_size if shard.exists() else 0 for shard in shards]
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    rows: list[ShardSummary] = []
    problems: list[str] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(sizes))
        for shard, size in zip(shards, sizes, strict=True):
            progress.update(task, description=shard.name)
            progress.advance(task, size)
            try:
                index = verify_index(shard) if verify else load_index(shard)
            except ValueError as error:
                if not verify:
                    raise
                problems.append(str(error))
                continue
            members = {suffix: int((at[:, 0] >= 0).sum()) for suffix, at in index.places.items()}
            rows.append(
                ShardSummary(
                    str(shard), index.size, len(index), members, len(index.doubles), index.sha256
                )
            )
    return IndexSummary(
        tuple(rows),
        sum(row.samples for row in rows),
        sum(row.bytes for row in rows),
        verify,
        tuple(problems),
    )


def print_index(summary: IndexSummary) -> None:
    """A line for each shard and for each problem on standard output."""
    from rich import box
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("shard", f"{len(summary.shards)} shards", overflow="fold")
    table.add_column("samples", f"{summary.samples:,}", justify="right")
    table.add_column("size", decimal(summary.bytes), justify="right")
    table.add_column("members")
    table.add_column("doubles", justify="right")
    for row in summary.shards:
        members = ", ".join(
            f"{suffix if suffix.isprintable() else ascii(suffix)} {count:,}"
            for suffix, count in row.members.items()
        )
        # Text, for names from a tar are no markup
        cells = row.shard, f"{row.samples:,}", decimal(row.bytes), members, str(row.doubles or "")
        table.add_row(*map(Text, cells))
    console = Console()
    console.print(table)
    for problem in summary.problems:
        console.print(f"WRONG: {problem}", markup=False, highlight=False, soft_wrap=True)
    if summary.verified and not summary.problems:
        console.print(f"all {len(summary.shards)} indices are what their tars hold")
