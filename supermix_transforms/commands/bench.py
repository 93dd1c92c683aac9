"""All ways to mix, side by side: how many mixes converge, and what one of them costs.

Source: SuperMix (Dabouei et al., CVPR 2021), section 4.4 and Fig. 7c.

**The same for all.** Batches are drawn once, as `SuperMix` draws them: pictures, tuples, weights.
``fast-matched`` has partners of its own, for the same pictures. Methods that take long have the
first batches only (`slow_count`), and ratios to ``fast`` are over the batches that both have.

**Converged** means the teacher's top k classes of the emitted 8-bit picture are its sources', all
of it asked again in float32 at another batch size. What the search said does not count, and mixes
that the authors' script would throw away do not either.

**Time** is the median over repeats; in each repeat the methods take turns, and each repeat starts
with another one. Our methods pay the originals' forward, MixUp and CutMix the teacher's label; the
authors' loop is given the originals' classes.

**Step limits.** A baseline is shown at the limit of at least 1 step at which a converged mix costs
least, found in one run at its largest limit. ``paper``, ``newton-tv`` and ``sgd``: a row that has
converged leaves the batch and no row depends on others, so that at a lower limit T a row takes the
T steps it took here, and the time is this run's, shared out by teacher calls (a backward weighs
what ``lower-limit`` measures). ``authors``: the batch's state and the clock are read after each
step. `BenchRow.at_largest_limit` has what was measured without that choice.
"""

import io
import itertools
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import supermix_transforms
from supermix_transforms.charts import Bar, cost_bars
from supermix_transforms.commands.contenders import (
    METHODS,
    SLOW,
    UNSEARCHED,
    draw_batches,
    is_float32,
    largest_limit,
    measure,
)
from supermix_transforms.commands.measured import Measured, backward_weight, wilson
from supermix_transforms.files import write_atomically
from supermix_transforms.mixing import check_k
from supermix_transforms.plots import require_matplotlib
from supermix_transforms.teacher import TeacherLabeler

__all__ = ["METHODS", "AtLimit", "BenchReport", "BenchRow", "bench", "make_row", "print_report"]


@dataclass(frozen=True)
class AtLimit:
    """A baseline as it was run, without a choice of its step limit."""

    max_steps: int
    converged: float
    ms_per_converged_image: float | None


@dataclass(frozen=True)
class BenchRow:
    """One method's figures; None where there is none: nothing converged, nothing is mixed, skipped.

    Calls and steps are means over all tuples, converged or not.
    """

    name: str
    tuples: int = 0
    max_steps: int | None = None  # the limit that the figures are for
    converged: float | None = None  # share of the tuples
    converged_interval: tuple[float, float] | None = None  # Wilson's, 95 %
    sparsity: float | None = None  # L_s, mean over converged mixes
    steps: float | None = None
    forwards_per_image: float | None = None
    backwards_per_image: float | None = None
    ms_per_converged_image: float | None = None
    ms_range: tuple[float, float] | None = None  # least and most of the repeats
    ratio_to_fast: float | None = None  # of these ms, on the batches that both have
    ratio_to_lower_limit: float | None = None
    at_largest_limit: AtLimit | None = None
    skipped: str | None = None  # why
    same_as: str | None = None  # the method that would have been run a second time


@dataclass(frozen=True)
class BenchReport:
    """What `bench` found, under what conditions."""

    methods: tuple[BenchRow, ...]
    out: str  # a folder with bench.json and
    chart: str  # PNG
    teacher: str
    device: str
    versions: dict[str, str]
    threads: int
    seed: int
    k: int
    alpha: float
    pictures: int  # different ones
    size: tuple[int, int]  # their height and width
    batch_size: int
    repeats: int


def bench(
    pictures: Iterable[tuple[str, Tensor]],
    labeler: TeacherLabeler,
    *,
    out: str | Path,
    k: int = 2,
    alpha: float = 3.0,
    methods: Sequence[str] = METHODS,
    count: int = 30,
    slow_count: int = 10,
    batch_size: int = 10,
    repeats: int = 3,
    seed: int = 0,
    name: str = "teacher",
) -> BenchReport:
    """Measure methods of mixing on the same tuples; write ``bench.json`` and ``bench.png``.

    Progress is shown on a terminal. How things are counted: this module's docstring.

    Args:
        pictures: names with (C, H, W) uint8 pictures of one size. If they are fewer than a batch,
            each stands in it several times.
        labeler: the teacher.
        out: the folder; made if it is not there, the two files are replaced.
        k: pictures a mix.
        alpha: of the weights' Dirichlet distribution, also MixUp's and CutMix's.
        methods: some of `METHODS`.
        count: tuples, made up to whole batches.
        slow_count: the same for methods that search long.
        batch_size: tuples at most that are mixed at a time.
        repeats: how often each method is timed.
        seed: of all draws.
        name: what the JSON calls the teacher.

    Raises:
        ValueError: for unknown methods, settings out of range, fewer pictures than k, or pictures
            of several sizes.
        OSError: if a file cannot be written.
        ImportError: if matplotlib is not installed.
    """
    check_k(k, alpha)
    _check(methods, k, count, slow_count, batch_size, repeats)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {str(out)!r}. Name another one.")
    require_matplotlib()  # now, not after minutes of work
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(False), torch.enable_grad(), labeler.ready():
        named = list(itertools.islice(pictures, count))
        batches = draw_batches(
            named, labeler, k=k, alpha=alpha, count=count, batch_size=batch_size, seed=seed
        )
        images = batches[0].images
        skipped = {}
        if not all(batch.has_maps for batch in batches):
            skipped["fast-matched"] = "the teacher has no class maps, which tell who mixes well"
        same_as = {}
        if {"authors", "authors-same-dtype"} <= set(methods) and is_float32(labeler, images[:4]):
            same_as["authors-same-dtype"] = "authors"
        runs = [each for each in methods if each not in skipped and each not in same_as]
        if not runs:
            reasons = "; ".join(f"{each}: {reason}" for each, reason in skipped.items())
            raise ValueError(
                f"methods: expected one that this teacher allows, got {reasons}. Name others, too."
            )
        few = math.ceil(slow_count / len(images))
        lots = {each: batches[: few if each in SLOW else None] for each in runs}
        lots["lower-limit"] = batches  # always: it says what a backward weighs
        measured = measure(lots, labeler, k, alpha, repeats)

    size = (images.shape[-2], images.shape[-1])
    searches = {each: largest_limit(each, k, size) for each in runs if each not in UNSEARCHED}
    rows = {each: make_row(each, measured, searches.get(each)) for each in runs}
    rows |= {each: BenchRow(each, skipped=reason) for each, reason in skipped.items()}
    rows |= {each: replace(rows[one], name=each, same_as=one) for each, one in same_as.items()}
    report = BenchReport(
        methods=tuple(rows[each] for each in methods),
        out=str(folder),
        chart=str(folder / "bench.png"),
        teacher=name,
        device=_device_name(images.device),
        versions={
            "supermix-transforms": supermix_transforms.__version__,
            **{package: version(package) for package in ("torch", "torchvision")},
        },
        threads=torch.get_num_threads(),
        seed=seed,
        k=k,
        alpha=alpha,
        pictures=len(named),
        size=size,
        batch_size=len(images),
        repeats=repeats,
    )
    drawn = io.BytesIO()
    cost_bars([_bar(row) for row in report.methods if row.skipped is None]).savefig(drawn)
    write_atomically(folder / "bench.png", drawn.getvalue())
    write_atomically(folder / "bench.json", json.dumps(asdict(report), indent=1).encode())
    return report


def print_report(report: BenchReport) -> None:
    """The figures as a table on standard output, and where the files are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    table = Table(box=box.SIMPLE_HEAD, padding=0, caption="ms a converged mix")
    table.add_column("method", no_wrap=True)
    for title in ("tuples", "limit", "converged", "L_s", "fwd", "bwd", "ms", "× fast"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in report.methods:
        if row.skipped is not None:
            table.add_row(row.name, "skipped")
            continue
        table.add_row(
            row.name,
            str(row.tuples),
            shown(row.max_steps, "d"),
            shown(row.converged, ".0%"),
            shown(row.sparsity, ".3f"),
            shown(row.forwards_per_image, ".2f"),
            shown(row.backwards_per_image, ".2f"),
            shown(row.ms_per_converged_image, ".1f"),
            shown(row.ratio_to_fast, ".2f"),
        )
    console = Console()
    console.print(table)
    for row in report.methods:
        if row.skipped is not None:
            console.print(f"{row.name} skipped: {row.skipped}", soft_wrap=True, highlight=False)
    for file in (report.chart, f"{report.out}{os.sep}bench.json"):
        console.print(file, soft_wrap=True, highlight=False, markup=False)


def _check(
    methods: Sequence[str], k: int, count: int, slow_count: int, batch_size: int, repeats: int
) -> None:
    unknown = next((name for name in methods if name not in METHODS), None)
    if unknown is not None:
        near = get_close_matches(unknown, METHODS, 1)
        hint = f"Did you mean {near[0]}?" if near else "Choose among these."
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {unknown!r}. {hint}")
    if not methods or len(set(methods)) < len(methods):
        got = "none" if not methods else f"one twice: {', '.join(methods)}"
        raise ValueError(f"methods: expected each name once, got {got}. Name at least one, once.")
    if count < k:
        raise ValueError(
            f"count: expected at least k = {k} tuples, got {count}. "
            "A batch of them has as many pictures."
        )
    if batch_size < k:
        raise ValueError(
            f"batch_size: expected at least k = {k} pictures, got {batch_size}. "
            "Partners come from the same batch."
        )
    for name, value in (("slow_count", slow_count), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}. Pass a larger one.")


def make_row(name: str, measured: dict[str, Measured], largest: int | None) -> BenchRow:
    """The figures of a method whose search gives up after `largest` steps, if it searches."""
    own, lower = measured[name], measured["lower-limit"]
    weight = backward_weight(lower)
    limit = own.best_limit(weight) if name in SLOW else None
    at = [sample.at(limit) for sample in own.samples]
    passed = torch.cat([sample.passed for sample in at])
    converged = int(passed.sum())
    ms = own.ms(limit, weight)
    each = [1000 * seconds / max(1, converged) for seconds in own.seconds(limit, weight)]

    def mean(field: str, rows: Tensor | slice = slice(None)) -> float:
        values = torch.cat([getattr(sample, field) for sample in at])[rows]
        return round(float(values.double().mean()), 4)

    def ratio_to(other: Measured | None) -> float | None:
        theirs = None if other is None else other.ms(None, weight, len(at))
        return None if ms is None or theirs is None else round(ms / theirs, 3)

    row = BenchRow(
        name,
        tuples=len(passed),
        steps=mean("steps"),
        forwards_per_image=mean("forwards"),
        backwards_per_image=mean("backwards"),
        ms_per_converged_image=_rounded(ms),
        ms_range=None if ms is None else (round(min(each), 3), round(max(each), 3)),
        ratio_to_fast=ratio_to(measured.get("fast")),
        ratio_to_lower_limit=ratio_to(lower),
    )
    if name == "lower-limit":
        return row  # it mixes nothing
    row = replace(
        row,
        max_steps=largest if limit is None else limit,
        converged=round(converged / len(passed), 4),
        converged_interval=wilson(converged, len(passed)),
        sparsity=mean("sparsity", passed) if converged else None,
    )
    if limit is None or largest is None:
        return row
    share = round(own.converged(None) / len(passed), 4)
    return replace(row, at_largest_limit=AtLimit(largest, share, _rounded(own.ms(None, weight))))


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 3)


def _bar(row: BenchRow) -> Bar:
    if row.ms_per_converged_image is None:
        return Bar(row.name, None, "nothing converged")
    ms = row.ms_per_converged_image
    text = f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"
    if row.converged is not None:
        text += f" · {row.converged:.0%} converged"
    if row.at_largest_limit is not None:
        text += f" at {row.max_steps} steps"
    return Bar(row.name, ms, text)


def _device_name(device: torch.device) -> str:
    """What a reader of the figures wants to know of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}"
