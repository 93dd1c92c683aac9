"""Mix pictures with a teacher and write down what came out: on packaged pictures, or your own."""

import io
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import length_hint
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from supermix_transforms.data.pictures import png, read_picture, to_tensor
from supermix_transforms.draws import Draw
from supermix_transforms.files import write_atomically
from supermix_transforms.inputs import identities
from supermix_transforms.member import device_of
from supermix_transforms.models import NamedTeacher, load_teacher
from supermix_transforms.plots import Panel, contact_sheet, make_panels, require_matplotlib
from supermix_transforms.results import Mixed
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler
from supermix_transforms.transforms import SuperMix

__all__ = ["MixSummary", "SummaryRow", "demo", "demo_pictures", "mix_pictures", "stack_pictures"]

# Of the pictures inside scikit-image, those in which the packaged teacher recognises something.
DEMO_FILES = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png")
SHEET = 8  # mixes on the contact sheet


@dataclass(frozen=True)
class SummaryRow:
    """Means over all mixes of one k."""

    k: int
    mixes: int
    converged: int  # mixes whose top k classes are those of their sources
    sparsity: float  # L_s
    steps: float
    forwards: float  # teacher calls a mix, the originals' own included
    backwards: float
    ms_per_picture: float  # wall time of mixing; without reading and writing files


@dataclass(frozen=True)
class MixSummary:
    """What `mix_pictures` did, and where it is."""

    out: str  # a folder with the mixes, as PNG, and the two files below
    labels: str  # JSON, an entry a mix
    contact_sheet: str  # PNG
    teacher: str
    seed: int
    rows: tuple[SummaryRow, ...]  # one for each k


def demo_pictures(size: int = 224) -> list[tuple[str, Tensor]]:
    """Pictures that come inside scikit-image, (3, size, size) uint8, with their names.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError(
            f"demo: expected scikit-image, got {error}. Install it: "
            'pip install "supermix-transforms[demo]"'
        ) from error
    folder = Path(skimage.data.__file__).parent  # read there: its functions may use the network
    return [
        (name, to_tensor(read_picture(name, (folder / name).read_bytes()), size))
        for name in DEMO_FILES
    ]


def named_labeler(
    teacher: NamedTeacher,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | None = None,
) -> TeacherLabeler:
    """A labeler with a named teacher's normalisation and size, or with another normalisation.

    Args:
        teacher: as `load_teacher` returns it.
        mean: per channel of pictures in 0..1, instead of the teacher's; with `std`.
        std: with `mean`.
        device: None is a GPU, if there is one and the teacher is a module.

    Raises:
        ValueError: if the teacher cannot be called, or one of mean and std is missing.
    """
    model = teacher.model
    if not callable(model):
        raise ValueError(
            f"teacher: expected a module or a callable, got {type(model).__name__}. "
            "Return the model itself from the function."
        )
    if mean is None and std is None:
        mean, std = teacher.mean, teacher.std
    if isinstance(model, torch.nn.Module):
        wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device_of(wanted))
        device = None  # where its weights are
    return TeacherLabeler(model, mean=mean, std=std, size=teacher.size, device=device)


def demo(out: str | Path = "supermix-demo", *, seed: int = 0) -> MixSummary:
    """Mix packaged pictures with a packaged teacher, k = 2 and k = 3; no download.

    Raises:
        ImportError: if something of the ``demo`` extra is not installed.
    """
    teacher = load_teacher("efficientnet-lite0")
    return mix_pictures(
        demo_pictures(),
        named_labeler(teacher),
        k=(2, 3),
        seed=seed,
        out=out,
        name="efficientnet-lite0",
        class_names=teacher.class_names,
    )


def mix_pictures(
    pictures: Iterable[tuple[str, Tensor]],
    labeler: TeacherLabeler,
    *,
    out: str | Path,
    k: int | Sequence[int] = 2,
    alpha: float = 3.0,
    partners: Literal["random", "matched"] = "random",
    settings: SolverSettings = SolverSettings(),
    seed: int = 0,
    count: int | None = None,
    batch_size: int = 32,
    name: str = "teacher",
    class_names: Sequence[str] | None = None,
) -> MixSummary:
    """Mix named pictures; write the mixes, ``labels.json`` and ``contact-sheet.png`` into a folder.

    Each file appears whole or not at all, ``labels.json`` last. Progress is shown on a terminal.

    Args:
        pictures: names with (C, H, W) uint8 pictures of one size; gone through once for each k, and
            again as long as `count` asks for more.
        labeler: the teacher.
        out: the folder; made if it is not there, files of the same names are replaced.
        k: pictures a mix; several are done one after the other.
        alpha: of the weights' Dirichlet distribution.
        partners: "random", or "matched": found by the teacher's class maps.
        settings: of the solver.
        seed: of all draws.
        count: mixes for each k; None makes one for each picture.
        batch_size: pictures at a time; partners come from the same batch. The last one may have up
            to k - 1 more; all have fewer where a smaller `count` needs no more.
        name: what the JSON calls the teacher.
        class_names: in label order; None writes numbers.

    Raises:
        ValueError: for settings out of range, fewer pictures than k, pictures of several sizes, and
            "matched" with a teacher that has no class maps.
        OSError: if a file cannot be written.
        ImportError: if matplotlib is not installed.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn

    ks = dict.fromkeys([k] if isinstance(k, int) else k)
    mixers = [
        SuperMix(labeler, k=each, alpha=alpha, partners=partners, settings=settings) for each in ks
    ]
    if not mixers:
        raise ValueError("k: expected at least one number of images a mix, got none.")
    if count is not None and count < 1:
        raise ValueError(f"count: expected at least 1 mix, or None, got {count}.")
    if batch_size < max(ks):
        raise ValueError(
            f"batch_size: expected at least k = {max(ks)} pictures, got {batch_size}. "
            "Partners come from the same batch."
        )
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {str(out)!r}. Name another one.")
    require_matplotlib()  # now, not after minutes of work
    folder.mkdir(parents=True, exist_ok=True)
    sheet, listing = folder / "contact-sheet.png", folder / "labels.json"
    listing.unlink(missing_ok=True)  # it must not describe another run's mixes if this one fails
    if count is not None:  # batches that make hardly more mixes than are wanted
        batch_size = max(*ks, math.ceil(count / math.ceil(count / batch_size)))

    entries: list[dict[str, Any]] = []
    panels: list[Panel] = []
    rows: list[SummaryRow] = []
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for mixer in mixers:
            total = count or length_hint(pictures) or None
            task = progress.add_task(f"k = {mixer.k}", total=total)
            mine: list[dict[str, Any]] = []
            shown: list[Panel] = []
            seconds = 0.0
            for epoch, names, images in _batches(pictures, batch_size, mixer.k, count is not None):
                start = time.perf_counter()
                draw = Draw(seed, epoch, identities(images, names))
                done = mixer.mix(labeler.prepare(images), None, draw)
                seconds += time.perf_counter() - start
                assert done.mixed is not None  # SuperMix has
                assert done.teacher is not None  # both
                mixed, labels = done.mixed, done.teacher.hard
                left = len(images) if count is None else count - len(mine)
                batch = make_panels(done.images, mixed, labels, class_names, count=left)
                for row, panel in enumerate(batch):
                    file = f"k{mixer.k}-{len(mine):05d}.png"  # a source's name could lead away
                    write_atomically(folder / file, png(panel.mix))
                    mine.append(_entry(file, row, panel, mixed, names, labels))
                shown += batch[: max(1, SHEET // len(mixers)) - len(shown)]
                progress.update(task, completed=len(mine))
                if len(mine) == count:
                    break
            entries += mine
            panels += shown
            rows.append(_summarise(mixer.k, mine, seconds))

    report = {
        "teacher": name,
        "alpha": alpha,
        "partners": partners,
        "seed": seed,
        "batch_size": batch_size,
        "solver": asdict(settings),
        "mixes": entries,
    }
    drawn = io.BytesIO()
    contact_sheet(panels).savefig(drawn, format="png")
    write_atomically(sheet, drawn.getvalue())
    content = json.dumps(report, indent=1, ensure_ascii=False)
    write_atomically(listing, content.encode(errors="replace"))  # of names that are no UTF-8
    return MixSummary(str(folder), str(listing), str(sheet), name, seed, tuple(rows))


def print_summary(summary: MixSummary) -> None:
    """The figures as a table on standard output, and where the files are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("k", "mixes", "converged", "L_s", "steps", "forwards", "backwards", "ms/picture"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in summary.rows:
        numbers = (f"{value:.2f}" for value in (row.steps, row.forwards, row.backwards))
        share = f"{row.converged / row.mixes:.0%}"
        sparsity, time_taken = f"{row.sparsity:.3f}", f"{row.ms_per_picture:.0f}"
        table.add_row(str(row.k), str(row.mixes), share, sparsity, *numbers, time_taken)
    console = Console()
    console.print(table)
    for file in (summary.contact_sheet, summary.labels, f"{summary.out}{os.sep}k*.png"):
        console.print(file, soft_wrap=True, highlight=False, markup=False)


def _batches(
    pictures: Iterable[tuple[str, Tensor]], size: int, k: int, endless: bool
) -> Iterator[tuple[int, list[str], Tensor]]:
    """(pass, names, pictures): `size` at a time, and at the end what is left, but at least k."""
    for epoch in itertools.count():
        pending: list[tuple[str, Tensor]] = []
        total = 0
        for picture in pictures:
            total += 1
            pending.append(picture)
            if len(pending) == size + k:  # so at least k are left for the last batch
                yield epoch, *stack_pictures(pending[:size])
                del pending[:size]
        if total < k:
            raise ValueError(
                f"images: expected at least k = {k} pictures, got {total}. "
                "Pass more pictures, or a smaller k."
            )
        yield epoch, *stack_pictures(pending)
        if not endless:
            return


def stack_pictures(pictures: Sequence[tuple[str, Tensor]]) -> tuple[list[str], Tensor]:
    names, images = zip(*pictures, strict=True)
    kinds = {f"{image.dtype} {tuple(image.shape)}" for image in images}
    if len(kinds) > 1 or images[0].dtype != torch.uint8:
        raise ValueError(
            "images: expected uint8 pictures (C, H, W) of one size, got "
            f"{', '.join(sorted(kinds))}. Resize and crop them first."
        )
    return list(names), torch.stack(images)


def _entry(
    file: str, row: int, panel: Panel, mixed: Mixed, names: Sequence[str], labels: Tensor
) -> dict[str, Any]:
    """What ``labels.json`` says of a mix."""
    return {
        "file": file,
        "k": len(panel.names),
        "sources": [
            {"name": names[source], "label": int(labels[source]), "class": name}
            for source, name in zip(mixed.sources[row].tolist(), panel.names, strict=True)
        ],
        "weights": [round(weight, 6) for weight in panel.weights],
        "teacher": [
            {"label": seen.label, "class": seen.name, "probability": round(seen.probability, 6)}
            for seen in panel.top
        ],
        "outcome": panel.outcome,
        "steps": panel.steps,
        "sparsity": round(panel.sparsity, 6),
        "forwards": round(float(mixed.forwards[row]), 6),
        "backwards": round(float(mixed.backwards[row]), 6),
    }


def _summarise(k: int, entries: Sequence[dict[str, Any]], seconds: float) -> SummaryRow:
    def mean(name: str) -> float:
        return statistics.fmean(entry[name] for entry in entries)

    return SummaryRow(
        k=k,
        mixes=len(entries),
        converged=sum(entry["outcome"] == "converged" for entry in entries),
        sparsity=mean("sparsity"),
        steps=mean("steps"),
        forwards=mean("forwards"),
        backwards=mean("backwards"),
        ms_per_picture=1000 * seconds / len(entries),
    )
