"""Write the mixed set D' once, as recipes or as mixed shards, on any number of processes.

The order of all samples in a pass is cut into units, a unit into batches, from which partners come.
A process makes every n-th unit, alone: nothing is exchanged between processes, and a unit's bytes
depend on nothing but the settings. What a killed run has finished stays; started again, it goes on.
"""

import contextlib
import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from supermix_transforms.files import sha256_of, writing_atomically
from supermix_transforms.forms import MIXES, Form, MadeBatch, RecipeForm, ShardForm
from supermix_transforms.inputs import identities
from supermix_transforms.ledger import Ledger, UnitEntry, fingerprint, versions
from supermix_transforms.loader import SuperMixCollate, Unconverged
from supermix_transforms.mixedshards import PictureFormat
from supermix_transforms.recipes import Layout
from supermix_transforms.results import Outcome
from supermix_transforms.shards import ShardDataset, ShardSampler
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler, as_labeler
from supermix_transforms.units import Order, Originals, Places
from supermix_transforms.views import ViewDraws

__all__ = ["GenerateSummary", "generate", "print_generated", "process_state"]

FormName: TypeAlias = Literal["recipes", "shards"]
MixName: TypeAlias = Literal["supermix", "mixup", "cutmix"]
POLL_SECONDS = 0.5
GRACE_SECONDS = 60.0  # for a process to begin
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


def generate(
    dataset: ShardDataset,
    teacher: Any,
    out: str | Path,
    *,
    mix: MixName = "supermix",
    k: int = 2,
    alpha: float | None = None,
    partners: Literal["random", "matched"] = "random",
    partner_cap: int = 2,
    settings: SolverSettings = SolverSettings(),
    unconverged: Unconverged = "keep",
    passes: int = 1,
    form: FormName = "recipes",
    picture_format: PictureFormat = "png",
    quality: int = 95,
    top: int | None = 10,
    batch_size: int = 256,
    unit_batches: int = 8,
    window: int = 16,
    seed: int = 0,
    num_workers: int = 0,
    dry_run: bool = False,
) -> GenerateSummary:
    """Write a mix for each sample and pass to a folder, or go on with what was begun there.

    Every process of a launch (``accelerate launch``, torchrun) calls it with the same arguments;
    nothing else is needed. The folder's file system must have ``flock``.

    Args:
        dataset: the samples. Its transform says how they are looked at: v2 Resize, CenterCrop,
            RandomCrop, RandomResizedCrop, RandomHorizontalFlip; what is random is drawn here, anew
            for each pass.
        teacher: as for `SuperMix`. A labeler's temperature is that of the labels.
        out: the folder; made if it is not there.
        mix: ``"supermix"``, or ``"mixup"`` and ``"cutmix"``, labelled by the teacher.
        k: pictures a mix.
        alpha: of the weights; None is 3 for supermix, 1 for the others.
        partners, partner_cap: as for `SuperMix`.
        settings: the solver's; recipes set `quantised`.
        unconverged: as for `SuperMixCollate`.
        passes: mixes made of each sample, κ of the paper.
        form: ``"recipes"``, which `replay` makes pictures of, or ``"shards"``, WebDataset tars of
            mixed pictures.
        picture_format, quality: of pictures in shards. The teacher labels what is decoded again.
        top: classes that are kept of the teacher's labels; None keeps all.
        batch_size: pictures that are mixed together; partners come from these.
        unit_batches: batches a unit, which is written as one file.
        window: as for `ShardSampler`.
        seed: of all draws.
        num_workers: processes that read pictures.
        dry_run: mix a few pictures, write nothing, and say what the rest would take.

    Returns:
        What the folder holds; on processes other than the first, what is finished so far.

    Raises:
        ValueError: for settings out of range or other than those the folder was begun with, a
            folder that can not be written to or that another run writes to, a full disk, samples
            that can not be read (`ShardDataset`), and a process that ended before its units were
            finished. What is finished stays.
    """
    _check_choices(mix, form, picture_format, quality, top, passes, batch_size, unit_batches)
    state = process_state()
    labeler = as_labeler(teacher)
    draws = ViewDraws(dataset.transform, seed=seed)
    if alpha is None:
        alpha = 3.0 if mix == "supermix" else 1.0
    if form == "recipes":
        settings = replace(settings, quantised=True)
    mixer = SuperMixCollate(
        labeler,
        k=k,
        alpha=alpha,
        partners=partners,
        partner_cap=partner_cap,
        settings=settings,
        mix=None if mix == "supermix" else MIXES[mix](k=k, alpha=alpha),
        unconverged=unconverged,
        seed=seed,
    )
    if batch_size < k:
        raise ValueError(
            f"batch_size: expected at least k = {k} pictures, got {batch_size}. Partners come from "
            "the same batch."
        )
    mixer.take_short()  # the last batch of a pass, which may be the only one to be made
    order = Order(ShardSampler(dataset, seed=seed, window=window), passes, batch_size, unit_batches)
    num_classes = _num_classes(dataset, draws, labeler)
    top = min(top or num_classes, labeler.top or num_classes, num_classes)
    asked = {
        "form": form,
        "shards": dataset.identity,
        "view": asdict(draws.view),
        "transform": [str(step) for step in draws.steps],
        "teacher": labeler.digest,
        "temperature": labeler.temperature,
        "num_classes": num_classes,
        "mix": mix,
        "k": k,
        "alpha": alpha,
        "partners": partners,
        "partner_cap": partner_cap,
        "solver": asdict(settings),
        "unconverged": unconverged,
        "passes": passes,
        "units": len(order),
        "top": top,
        "batch_size": batch_size,
        "unit_batches": unit_batches,
        "window": window,
        "seed": seed,
    }
    stored: Form
    if form == "recipes":
        cells = settings.resolve(k, draws.view.size).mask_size
        height, width = draws.view.size
        layout = Layout(k, cells, num_classes, top, height, width, fingerprint(asked))
        stored = RecipeForm(layout)
    else:
        asked |= {"picture_format": picture_format, "quality": quality}
        stored = ShardForm(dataset, labeler, picture_format, quality, top)
    run = _Run(
        Ledger(out),
        order,
        Originals(dataset, draws),
        mixer,
        stored,
        k=k,
        num_workers=num_workers,
        rank=state.process_index,
        processes=state.num_processes,
    )
    return run.measure(asked) if dry_run else run.write(asked, versions())


def process_state() -> Any:
    """Accelerate's, with the number of this process; a machine without an accelerator is one too.

    Left alone, Accelerate takes processes that torchrun started there for one process each.
    """
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


# -- the run of one process ------------------------------------------------------------------------


class _Run:
    """A process's share: of the units those whose place, divided by the processes, leaves rank."""

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
                show(finished)
                for unit, batches in self._batches(mine - finished.keys()):
                    parts, outcomes = zip(*map(self._form.make, batches), strict=True)
                    with self._ledger.complaining():
                        self._finish(unit, list(parts), torch.cat(outcomes))
                    show(self._ledger.entries())
                self._seconds = time.perf_counter() - start
                if self._rank == 0:
                    self._wait_for_others(show)
                    with self._ledger.complaining():
                        self._form.finish(self._ledger)
        return self._summary()

    def measure(self, asked: dict[str, Any]) -> GenerateSummary:
        """Make a few mixes and write nothing."""
        if self._ledger.is_begun:
            self._ledger.compare(asked)
        unit = next(self._order.units(set(self._order.names[:1])))
        some = [(unit.epoch, index) for index in unit.batches[0][:MEASURED]]
        few = some[: self._k]
        for places in (few, some):  # the first one is slow: libraries are loaded, caches filled
            start = time.perf_counter()
            images = default_collate(self._originals.__getitems__(places))
            self._waiting = time.perf_counter() - start
            made, outcome = self._form.make(self._mix(images, unit.epoch))
            file = io.BytesIO()
            self._form.write(file, unit.name, [made])
            self._made, self._bytes = len(outcome), len(file.getvalue())
            self._seconds = time.perf_counter() - start
        return self._summary()

    def _batches(self, wanted: set[str]) -> Iterator[tuple[str, Iterator[MadeBatch]]]:
        """Each unit's name and its batches, which have to be used up before the next unit."""
        loader = DataLoader(
            self._originals,
            batch_sampler=Places(self._order, wanted),
            num_workers=self._num_workers,
            collate_fn=default_collate,
        )
        units = ((unit, batch) for unit in self._order.units(wanted) for batch in unit.batches)
        pairs = zip(units, self._timed(loader), strict=True)
        for name, some in itertools.groupby(pairs, key=lambda pair: pair[0][0].name):
            yield name, (self._mix(images, unit.epoch) for (unit, _), images in some)

    def _timed(self, loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches; how long they are waited for is counted."""
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waiting += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _mix(self, batch: dict[str, Any], epoch: int) -> MadeBatch:
        images, index = batch["image"], batch["index"]
        self._mixer.set_epoch(epoch)
        # labels are not asked for: the teacher's are stored
        result = self._mixer.mix(images, None, identities(images, index.tolist()))
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
        )
        self._ledger.enter(entry)
        self._made += entry.mixes
        self._bytes += entry.bytes

    def _wait_for_others(self, show: Callable[[dict[str, UnitEntry]], None]) -> None:
        """Until all units are there, or whoever should make one is gone."""
        names = self._order.names
        gone = 0.0  # seconds
        while True:
            alive = {rank for rank in range(1, self._processes) if self._ledger.is_alive(rank)}
            entries = self._ledger.entries()  # after that: who is gone has entered all
            show(entries)
            missing = {i % self._processes for i, name in enumerate(names) if name not in entries}
            if not missing:
                return
            gone = 0.0 if missing <= alive else gone + POLL_SECONDS
            if gone > GRACE_SECONDS:
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
def _progress(units: int, rank: int) -> Iterator[Callable[[dict[str, UnitEntry]], None]]:
    """A bar on a terminal, of the first process, over what all have finished."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("units  {task.description}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    quiet = rank > 0 or not console.is_terminal
    with Progress(*columns, console=console, disable=quiet) as progress:
        task = progress.add_task("", total=units)
        start, before = time.perf_counter(), -1

        def show(entries: dict[str, UnitEntry]) -> None:
            nonlocal before
            mixes = sum(entry.mixes for entry in entries.values())
            before = mixes if before < 0 else before
            rate = (mixes - before) / max(1e-3, time.perf_counter() - start)
            text = f"{mixes:,} mixes, {rate:.1f} a second"
            progress.update(task, completed=len(entries), description=text)

        yield show


# -- what a folder is begun with -------------------------------------------------------------------


def _check_choices(
    mix: str,
    form: str,
    picture_format: str,
    quality: int,
    top: int | None,
    passes: int,
    batch_size: int,
    unit_batches: int,
) -> None:
    for name, value, allowed in (
        ("mix", mix, get_args(MixName)),
        ("form", form, get_args(FormName)),
        ("picture_format", picture_format, get_args(PictureFormat)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}.")
    for name, number, most in (
        ("quality", quality, 100),
        ("top", 1 if top is None else top, 1 << 16),
        ("passes", passes, 999),
        ("batch_size", batch_size, 1 << 15),
        ("unit_batches", unit_batches, 1 << 15),
    ):
        if not isinstance(number, int) or not 1 <= number <= most:
            raise ValueError(f"{name}: expected an integer in 1..{most}, got {number!r}.")


def _num_classes(dataset: ShardDataset, draws: ViewDraws, labeler: TeacherLabeler) -> int:
    """The teacher's, asked with one picture."""
    first = next(dataset.readable(range(len(dataset)), labelled=False), None)
    if first is None:
        raise ValueError(
            "shards: expected pictures, got none that can be read. Look at the warnings before "
            "this."
        )
    index, picture, _ = first
    prepared = draws.view.prepare(picture)
    image = torch.from_numpy(draws.view.cut(prepared, draws(prepared, 0, index)))
    return labeler(image[None]).num_classes


# -- for the command line --------------------------------------------------------------------------


def print_generated(summary: GenerateSummary) -> None:
    """What is there and what is left, on standard output."""
    from rich.console import Console
    from rich.filesize import decimal

    console = Console(highlight=False)
    converged = summary.converged / max(1, summary.mixes)
    what = f"{summary.mixes:,} mixes ({summary.form}) in {summary.finished:,} of {summary.units:,}"
    console.print(f"{what} units, {decimal(summary.bytes)}, in {summary.out}", soft_wrap=True)
    if summary.mixes > 0:
        each = summary.bytes / summary.mixes
        console.print(f"converged {converged:.1%}, {each:,.0f} bytes a mix")
    if summary.made > 0:
        rate, waiting = summary.made / summary.seconds, summary.waiting / summary.seconds
        console.print(
            f"{rate:.1f} mixes a second by this process, {waiting:.0%} of the time spent waiting "
            "for pictures"
        )
    if summary.skipped:
        console.print(f"{summary.skipped:,} pictures could not be read and were skipped")
    if summary.left_mixes > 0:
        console.print(
            f"left: {summary.left_mixes:,} mixes in {summary.units - summary.finished:,} units, "
            f"about {decimal(summary.left_bytes)} and {_duration(summary.left_hours)} on "
            f"{summary.processes} process{'es' if summary.processes > 1 else ''} like this one"
        )


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.0f} seconds"
