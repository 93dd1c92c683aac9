"""Write the mixed set D' once, as recipes or as mixed shards, on any number of processes.

The order of all samples in a pass is cut into units, a unit into batches, from which partners come.
A process makes every n-th unit, alone: nothing is exchanged between processes, and a unit's bytes
depend on nothing but the settings. What a killed run has finished stays; started again, it goes on.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch

from supermix_transforms.batchmix import BatchMix
from supermix_transforms.data.sampling import ShardSampler
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.data.views import ViewDraws
from supermix_transforms.loader import SuperMixCollate, Unconverged
from supermix_transforms.offline.forms import MIXES, Form, RecipeForm, ShardForm
from supermix_transforms.offline.ledger import Ledger, fingerprint, versions
from supermix_transforms.offline.mixedshards import PictureFormat
from supermix_transforms.offline.recipes import Layout
from supermix_transforms.offline.units import Order, Originals
from supermix_transforms.offline.writing import GenerateSummary, Run
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler, as_labeler
from supermix_transforms.transforms import SuperMix

__all__ = ["GenerateSummary", "check_choices", "generate", "process_state"]

FormName: TypeAlias = Literal["recipes", "shards"]
MixName: TypeAlias = Literal["supermix", "mixup", "cutmix"]


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
            folder that cannot be written to or that another run writes to, a full disk, samples
            that cannot be read (`ShardDataset`), and a process that ended before its units were
            finished. What is finished stays.
    """
    check_choices(mix, form, picture_format, quality, top, passes, k, batch_size, unit_batches)
    state = process_state()
    labeler = as_labeler(teacher)
    draws = ViewDraws(dataset.transform, seed=seed)
    if alpha is None:
        alpha = 3.0 if mix == "supermix" else 1.0
    if mix != "supermix" and partners != "random":
        raise ValueError(
            f"partners: expected to be left out with {mix!r}, which asks no teacher for partners, "
            f"got {partners!r}."
        )
    if form == "recipes":
        settings = replace(settings, quantised=True)
    transform: BatchMix
    if mix == "supermix":
        own: dict[str, Any] = {"partners": partners, "partner_cap": partner_cap}
        transform = SuperMix(labeler, k=k, alpha=alpha, settings=settings, **own)
    else:
        transform = MIXES[mix](k=k, alpha=alpha)
    mixer = SuperMixCollate(
        labeler,
        mix=transform,
        unconverged=unconverged,
        seed=seed,
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
        stored = ShardForm(dataset, labeler, picture_format, quality, top, unconverged)
    run = Run(
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


# -- what a folder is begun with -------------------------------------------------------------------


def check_choices(
    mix: str,
    form: str,
    picture_format: str,
    quality: int,
    top: int | None,
    passes: int,
    k: int,
    batch_size: int,
    unit_batches: int,
) -> None:
    """Raise a ValueError for what is wrong with options whatever teacher and pictures are."""
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
    if batch_size < k:
        raise ValueError(
            f"batch_size: expected at least k = {k} pictures, got {batch_size}. Partners come from "
            "the same batch."
        )


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
