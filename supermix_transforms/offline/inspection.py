"""What is in a folder of mixes: figures, whether all is as it was written, and pictures."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from supermix_transforms.batch import MixBatch
from supermix_transforms.data.pictures import png
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.data.tarindex import index_path
from supermix_transforms.files import sha256_of, write_atomically
from supermix_transforms.losses import sparsity
from supermix_transforms.offline.ledger import Ledger
from supermix_transforms.offline.mixedshards import INFO
from supermix_transforms.offline.replaying import replay
from supermix_transforms.offline.verification import (
    Plan,
    Sums,
    info_problems,
    look_at_recipes,
    look_at_shard,
)
from supermix_transforms.plots import TOP, Panel, Seen, contact_sheet, require_matplotlib
from supermix_transforms.results import Outcome, TeacherLabels

__all__ = [
    "Inspection",
    "ReplaySummary",
    "inspect_mixes",
    "print_inspection",
    "print_replayed",
    "replay_pictures",
]


@dataclass(frozen=True)
class Inspection:
    """A folder that `generate` wrote."""

    out: str
    form: str
    units: int  # of the whole set
    finished: int
    mixes: int
    converged: int
    bytes: int
    bytes_by_field: dict[str, float]  # a mix; of recipes
    outcomes: dict[str, int]  # if verified
    steps: float | None  # mean, if verified
    verified: bool
    problems: tuple[str, ...]  # none, or what is wrong
    settings: dict[str, Any]
    versions: dict[str, str]


def inspect_mixes(out: str | Path, *, verify: bool = False) -> Inspection:
    """Look at a folder of recipes or mixed shards.

    Args:
        out: the folder.
        verify: read every byte: checksums, every value of every recipe, every tar to its end; what
            the manifest counts; that units are those of the settings, made with them, and no file
            is there that `generate` does not write. Progress is shown on a terminal.

    Raises:
        ValueError: if it is no such folder, or its settings or manifest cannot be read. What else
            is wrong inside of it is listed in `problems`.
    """
    from rich.console import Console
    from rich.progress import track

    ledger = Ledger(out)
    settings = ledger.settings()
    plan = Plan.of(ledger, settings)
    entries = ledger.entries()
    problems = []
    if len(entries) != plan.units:
        problems.append(
            f"{len(entries)} of {plan.units} units are there: start generate again to go on"
        )
    sums = Sums()
    console = Console(stderr=True)
    quiet = not (verify and console.is_terminal)
    for entry in track(entries.values(), "verify", console=console, disable=quiet, transient=True):
        path = ledger.path(entry)
        try:
            if verify and sha256_of(path) != entry.sha256:
                raise ValueError(f"{path.name}: its sha256 is not the one in the manifest")
            if plan.form == "recipes":
                look_at_recipes(path, entry, settings, plan, verify, sums)
            elif verify:
                look_at_shard(path, entry, settings, sums)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if verify:
        problems += ledger.problems()
        problems += [each for entry in entries.values() for each in plan.problems(entry)]
        known = {"report.html"}  # of `supermix report`
        if plan.form == "shards":
            known |= {INFO, *(index_path(Path(entry.file)).name for entry in entries.values())}
            problems += info_problems(ledger)
        problems += ledger.strays(known)
    mixes = sum(entry.mixes for entry in entries.values())
    return Inspection(
        out=str(ledger.folder),
        form=plan.form,
        units=plan.units,
        finished=len(entries),
        mixes=mixes,
        converged=sum(entry.converged for entry in entries.values()),
        bytes=sum(entry.bytes for entry in entries.values()),
        bytes_by_field={name: count / max(1, mixes) for name, count in sums.fields.items()},
        outcomes=dict(sums.outcomes),
        steps=float(np.mean(sums.steps)) if sums.steps else None,
        verified=verify,
        problems=tuple(problems),
        settings=settings,
        versions=ledger.versions(),
    )


def print_inspection(inspection: Inspection) -> None:
    """The summary on standard output."""
    from rich import box
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    console = Console(highlight=False)
    i = inspection
    console.print(
        f"{i.mixes:,} mixes ({i.form}) in {i.finished:,} of {i.units:,} units, {decimal(i.bytes)}, "
        f"converged {i.converged / max(1, i.mixes):.1%}",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("field")
    table.add_column("bytes a mix", justify="right")
    for name, each in i.bytes_by_field.items():
        table.add_row(name, f"{each:.1f}")
    if i.bytes_by_field:
        table.add_section()
        table.add_row("all", f"{sum(i.bytes_by_field.values()):.1f}")
        console.print(table)
    if i.outcomes:
        console.print("outcomes: " + ", ".join(f"{n} {c:,}" for n, c in i.outcomes.items()))
    shown = ("mix", "k", "alpha", "partners", "passes", "top", "seed", "num_classes")
    lines = ["  ".join(f"{name} {i.settings.get(name)}" for name in shown)]
    lines += ["  ".join(f"{name} {text}" for name, text in i.versions.items())]
    lines += [f"WRONG: {problem}" for problem in i.problems]
    for line in lines:  # of a file from anywhere: no markup
        console.print(line, markup=False, soft_wrap=True)
    if i.verified and not i.problems:
        console.print("all of it is as it was written")


# -- pictures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplaySummary:
    """What `replay_pictures` wrote."""

    out: str  # a folder with the mixes, as PNG, and the two files below
    labels: str  # JSON, an entry a mix
    contact_sheet: str  # PNG
    mixes: int


def replay_pictures(
    recipes: str | Path, dataset: ShardDataset, out: str | Path, *, count: int = 16
) -> ReplaySummary:
    """Make the first mixes of recipes again and write them down, to be looked at.

    Args:
        recipes: the folder that `generate` wrote.
        dataset: the shards that they were made of.
        out: a folder for PNG files, ``labels.json`` and ``contact-sheet.png``; made if it is not
            there.
        count: mixes, at most; shown are those all of whose pictures have mixes of their own near.

    Raises:
        ValueError: as `replay`, and for a count below 1.
        ImportError: if matplotlib is not installed.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1 mix, got {count}.")
    require_matplotlib()
    mixes = replay(recipes, dataset)
    # some more, for a mix's partner is the own original of one of the next
    more = mixes.__getitems__(range(min(len(mixes), count + max(mixes.lengths))))
    batch = mixes.collate(more)
    rows = [row for row in range(len(more)) if bool((batch.sources[row] >= 0).all())][:count]
    if not rows:
        raise ValueError(
            f"recipes: expected a mix in {str(recipes)!r} whose pictures all have mixes of their "
            f"own near it, got none among {len(more)}. Ask for more, with a larger count."
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    sheet, listing = folder / "contact-sheet.png", folder / "labels.json"
    panels, entries = [], []
    for row in rows:
        panel = _panel(batch, row)
        file = f"mix-{int(batch.extra['index'][row]):07d}.png"
        write_atomically(folder / file, png(panel.mix))
        sources = batch.extra["sources"][row].tolist()
        names = [dataset.name(sample) for sample in sources]
        entries.append(
            {
                "file": file,
                "sources": [
                    {"name": name, "class": int(label)}
                    for name, label in zip(names, panel.names, strict=True)
                ],
                "weights": [round(weight, 6) for weight in panel.weights],
                "teacher": [
                    {"class": seen.label, "probability": round(seen.probability, 6)}
                    for seen in panel.top
                ],
                "outcome": panel.outcome,
                "steps": panel.steps,
                "sparsity": round(panel.sparsity, 6),
            }
        )
        panels.append(panel)
    drawn = io.BytesIO()
    contact_sheet(panels).savefig(drawn, format="png")
    write_atomically(sheet, drawn.getvalue())
    write_atomically(listing, json.dumps({"mixes": entries}, indent=1).encode())
    return ReplaySummary(str(folder), str(listing), str(sheet), len(rows))


def _panel(batch: MixBatch, row: int) -> Panel:
    """A mix of a replayed batch, all of whose sources are in it."""
    sources, weights, masks = batch.sources, batch.weights, batch.masks
    teacher, label = batch.teacher, batch.mixed_teacher
    assert sources is not None and weights is not None and masks is not None
    assert isinstance(teacher, TeacherLabels) and isinstance(label, TeacherLabels)
    indices, log_probs, _ = label.top(min(TOP, label.log_probs.shape[1]))
    return Panel(
        inputs=batch.images[sources[row]],
        masks=masks[row],
        mix=batch.mixed[row],
        names=tuple(str(int(name)) for name in teacher.hard[sources[row]]),
        weights=tuple(weights[row].tolist()),
        top=tuple(
            Seen(int(index), str(int(index)), float(log_prob.exp()))
            for index, log_prob in zip(indices[row], log_probs[row], strict=True)
        ),
        outcome=Outcome(int(batch.outcome[row])).name.lower().replace("_", " "),
        sparsity=float(sparsity(masks[row : row + 1])),
        steps=int(batch.steps[row]),
    )


def print_replayed(summary: ReplaySummary) -> None:
    """Where the files are, on standard output."""
    from rich.console import Console

    console = Console()
    for file in (summary.contact_sheet, summary.labels, f"{summary.out}: {summary.mixes} mixes"):
        console.print(file, soft_wrap=True, highlight=False, markup=False)
