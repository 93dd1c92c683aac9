"""What one process of `generate` does: make its units, and, the first one, wait for the others."""

import contextlib
import io
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from supermix_transforms.files import sha256_of, writing_atomically
from supermix_transforms.inputs import identities
from supermix_transforms.loader import SuperMixCollate
from supermix_transforms.offline.forms import Form, MadeBatch
from supermix_transforms.offline.ledger import Ledger, UnitEntry
from supermix_transforms.offline.units import Order, Originals, Places
from supermix_transforms.results import Outcome

__all__ = ["GenerateSummary", "Run"]

POLL_SECONDS = 0.5
GRACE_SECONDS = 60.0  # without a process that had begun
START_SECONDS = 1800.0  # for one to begin
LOG_SECONDS = 60.0  # between two lines of progress, where there is no terminal
Show: TypeAlias = Callable[[Callable[[], dict[str, UnitEntry]]], None]
MEASURED = 64  # pictures that a dry run mixes


@dataclass(frozen=True)
class GenerateSummary:
    """What the folder holds, what this process did, and what is left to do."""

    out: str
    form: str
    process: int  # of these, whose summary this is
    processes: int
    units: int  # of the whole set
    finished: int  # of these
    mixes: int  # in what is finished, as are the next two
    converged: int
    bytes: int
    made: int  # mixes, by this process in this run, as are the next three
    seconds: float
    waiting: float  # seconds of these, for pictures
    skipped: int  # pictures that could not be read
    bytes_per_mix: float  # of what was made
    left_mixes: int
    left_bytes: int  # estimated
    left_hours: float  # estimated, with all processes as fast as this one


def _stack(samples: list[dict[str, Any]]) -> dict[str, Any] | None:
    return default_collate(samples) if samples else None


class Run:
    """A process's share: every n-th unit, from the one of its rank on."""

    def __init__(
        self,
        ledger: Ledger,
        order: Order,
        originals: Originals,
        mixer: SuperMixCollate,
        form: Form,
        *,
        k: int,
        num_workers: int,
        rank: int,
        processes: int,
    ) -> None:
        self._ledger, self._order, self._originals = ledger, order, originals
        self._mixer, self._form, self._num_workers = mixer, form, num_workers
        self._rank, self._processes = rank, processes
        self._k = k
        self._made = self._bytes = 0
        self._seconds = self._waiting = 0.0

    def write(self, asked: dict[str, Any], versions: dict[str, str]) -> GenerateSummary:
        """Make what is not finished."""
        start = time.perf_counter()
        with self._ledger.writing(asked, versions, self._rank):
            finished = self._ledger.entries()
            mine = set(self._order.names[self._rank :: self._processes])
            self._ledger.sweep(mine)
            with _progress(len(self._order), self._rank) as show:
                show(finished.copy)
                for unit, batches in self._batches(mine - finished.keys()):
                    made = list(map(self._form.make, batches))
                    outcomes = torch.cat([torch.empty(0), *(outcome for _, outcome in made)])
                    with self._ledger.complaining():
                        self._finish(unit, [part for part, _ in made], outcomes)
                    show(self._ledger.entries)
                self._seconds = time.perf_counter() - start
                if self._rank == 0:
                    self._wait_for_others(show, finished.keys())
                    with self._ledger.complaining():
                        self._form.finish(self._ledger)
        return self._summary()

    def measure(self, asked: dict[str, Any]) -> GenerateSummary:
        """Make a few mixes and write nothing; with workers, as if they read meanwhile."""
        if self._ledger.is_begun:
            self._ledger.compare(asked)
        unit = next(self._order.units(set(self._order.names[:1])))
        some = [(unit.epoch, index) for index in unit.batches[0][:MEASURED]]
        few = some[: self._k]
        for places in (few, some):  # the first one is slow: libraries are loaded, caches filled
            start = time.perf_counter()
            images = _stack(self._originals.__getitems__(places))
            if images is None:
                raise ValueError(
                    f"generate: expected pictures to mix, got none of {len(places)} that can be "
                    "read. Look at the warnings before this for the reasons."
                )
            read = time.perf_counter()
            made, outcome = self._form.make(self._mix(images, unit.epoch))
            file = io.BytesIO()
            self._form.write(file, unit.name, [made])
            self._made, self._bytes = len(outcome), len(file.getvalue())
            reading, mixing = read - start, time.perf_counter() - read
            if self._num_workers > 0:  # they read while this process mixes
                reading = max(0.0, reading / self._num_workers - mixing)
            self._waiting, self._seconds = reading, reading + mixing
        return self._summary()

    def _batches(self, wanted: set[str]) -> Iterator[tuple[str, Iterator[MadeBatch]]]:
        """Each unit's name and its batches, which have to be used up before the next unit."""
        loader = DataLoader(
            self._originals,
            batch_sampler=Places(self._order, wanted),
            num_workers=self._num_workers,
            collate_fn=_stack,
        )
        units = ((unit, batch) for unit in self._order.units(wanted) for batch in unit.batches)
        pairs = zip(units, self._timed(loader), strict=True)
        for name, some in itertools.groupby(pairs, key=lambda pair: pair[0][0].name):
            # None: with on_error="skip", nothing of that batch could be read
            yield name, (self._mix(i, unit.epoch) for (unit, _), i in some if i is not None)

    def _timed(self, loader: Iterable[dict[str, Any] | None]) -> Iterator[dict[str, Any] | None]:
        """The batches; how long they are waited for is counted."""
        start = time.perf_counter()
        for batch in loader:
            self._waiting += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def _mix(self, batch: dict[str, Any], epoch: int) -> MadeBatch:
        images, index = batch["image"], batch["index"]
        self._mixer.set_epoch(epoch)
        # labels are not asked for: the teacher's are stored
        result = self._mixer.mix(images, None, identities(images, index.tolist()), {})
        return MadeBatch(result, index, batch["crop"], epoch)

    def _finish(self, unit: str, made: list[Any], outcomes: Tensor) -> None:
        """Write a unit's file, then its line in the manifest."""
        path = self._ledger.folder / f"{unit}{self._form.suffix}"
        with writing_atomically(path) as file:
            self._form.write(file, unit, made)
        entry = UnitEntry(
            unit=unit,
            file=path.name,
            mixes=len(outcomes),
            converged=int((outcomes == Outcome.CONVERGED).sum()),
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
            settings=self._ledger.settings_digest(),
        )
        self._ledger.enter(entry)
        self._made += entry.mixes
        self._bytes += entry.bytes

    def _wait_for_others(self, show: Show, before: Collection[str]) -> None:
        """Until all units are there, or whoever should make one is gone.

        Who was seen at work, or has made a unit that was not there `before`, has begun, and is
        missed sooner than who may still be copying shards.
        """
        ranks = {name: i % self._processes for i, name in enumerate(self._order.names)}
        begun: set[int] = set()
        gone, start = 0.0, time.monotonic()
        while True:
            alive = {rank for rank in range(1, self._processes) if self._ledger.is_alive(rank)}
            entries = self._ledger.entries()  # after that: who is gone has entered all
            show(entries.copy)
            missing = {rank for name, rank in ranks.items() if name not in entries}
            if not missing:
                return
            begun |= alive | {
                rank for name, rank in ranks.items() if name in entries.keys() - before
            }
            gone = gone + POLL_SECONDS if missing & (begun - alive) else 0.0
            late = bool(missing - begun) and time.monotonic() - start > START_SECONDS
            if gone > GRACE_SECONDS or late:
                raise ValueError(
                    f"generate: expected processes {sorted(missing - alive)} to finish their "
                    "units, got none of them at work. What is finished stays; start again to go on."
                )
            time.sleep(POLL_SECONDS)

    def _summary(self) -> GenerateSummary:
        entries = self._ledger.entries()
        mixes = sum(entry.mixes for entry in entries.values())
        left = self._order.samples * (len(self._order) - len(entries)) / len(self._order)
        each = self._bytes / max(1, self._made)
        pace = self._seconds / max(1, self._made) / self._processes
        return GenerateSummary(
            out=str(self._ledger.folder),
            form=self._form.name,
            process=self._rank,
            processes=self._processes,
            units=len(self._order),
            finished=len(entries),
            mixes=mixes,
            converged=sum(entry.converged for entry in entries.values()),
            bytes=sum(entry.bytes for entry in entries.values()),
            made=self._made,
            seconds=self._seconds,
            waiting=self._waiting,
            skipped=self._originals.dataset.skipped,
            bytes_per_mix=each,
            left_mixes=round(left),
            left_bytes=round(left * each),
            left_hours=left * pace / 3600,
        )


@contextlib.contextmanager
def _progress(units: int, rank: int) -> Iterator[Show]:
    """Of the first process, over what all have finished: a bar on a terminal, lines in a log.

    It is told how to find that out, which reads a file, and is left alone until there is need.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("units  {task.description}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    logged = not console.is_terminal
    with Progress(*columns, console=console, disable=rank > 0 or logged) as progress:
        task = progress.add_task("", total=units)
        start, before, spoken = time.perf_counter(), -1, time.perf_counter()

        def show(find: Callable[[], dict[str, UnitEntry]]) -> None:
            nonlocal before, spoken
            first, now = before < 0, time.perf_counter()
            if rank > 0 or (logged and not first and now - spoken < LOG_SECONDS):
                return
            entries = find()
            mixes = sum(entry.mixes for entry in entries.values())
            before = mixes if first else before
            rate = (mixes - before) / max(1e-3, now - start)
            text = f"{mixes:,} mixes, {rate:.1f} a second"
            progress.update(task, completed=len(entries), description=text)
            if logged and not first:
                spoken = now
                left = (units - len(entries)) * mixes / max(1, len(entries))
                # nothing made by this run yet tells no time
                ahead = (
                    f"{timedelta(seconds=round(left / rate))} left" if rate else "time left unknown"
                )
                console.print(
                    f"{len(entries):,} of {units:,} units, {text}, {ahead}", soft_wrap=True
                )

        yield show
