"""Train a student on originals and their mixes: one loop, from top to bottom.

    collate = SuperMixCollate(teacher)
    train = DataLoader(dataset, 128, shuffle=True, collate_fn=collate)
    summary = distill(student, train, validation, "run/", settings=PAPER)

What a batch holds decides what is learned from it: a `MixBatch` (online, or from `replay`) has
originals, mixes and the teacher's labels of both; of a plain ``(images, labels)`` the teacher is
asked where its labels are wanted. Runs on any number of processes that Accelerate knows of. Killed,
it goes on from its last checkpoint, and its weights end up the same if what a data set draws
depends on the sample and the epoch alone.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from supermix_transforms.batch import MixBatch
from supermix_transforms.draws import set_epoch_of
from supermix_transforms.files import write_atomically
from supermix_transforms.loader import SuperMixCollate
from supermix_transforms.results import TeacherLabels
from supermix_transforms.training.checkpoints import Checkpoint, Progress
from supermix_transforms.training.evaluation import evaluate
from supermix_transforms.training.hints import HintLoss
from supermix_transforms.training.loss import Pictured, batch_loss
from supermix_transforms.training.settings import PAPER, DistillSettings

__all__ = ["DistillSummary", "distill", "make_accelerator", "print_distilled"]


@dataclass(frozen=True)
class DistillSummary:
    """What a run came to; ``results.json`` holds the same."""

    top1: float | None  # of the last epoch, in 0..1; None without validation
    top5: float | None
    ece: float | None  # expected calibration error
    agreement: float | None  # with the teacher's class; None without a teacher
    best_top1: float | None
    student_samples: int  # pictures that the student was trained on
    teacher_calls: float  # forwards and backwards while training, of one picture each
    seconds: dict[str, float]  # data, mixing, training
    process: int = 0  # whose summary this is
    settings: dict[str, Any] = field(default_factory=dict)


def distill(
    student: nn.Module,
    train: Any,
    validation: Any,
    out: str | Path,
    *,
    settings: DistillSettings = PAPER,
    teacher: Callable[[Tensor], TeacherLabels] | None = None,
    hints: HintLoss | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    accelerator: Any = None,
    described: Mapping[str, Any] | None = None,
    show: Callable[[str], None] = lambda line: None,
    advance: Callable[[int, int], None] = lambda done, steps: None,
) -> DistillSummary:
    """Train a student, or go on with a run that was stopped.

    The folder gets ``last.safetensors`` (all that is needed to go on), ``best.safetensors`` (the
    weights of the best validation, or of the last epoch where there is none), ``history.json`` and
    ``results.json``.

    A script for several processes ends with ``accelerator.end_training()``, or, without an
    accelerator of its own, with ``accelerate.PartialState().destroy_process_group()``: a process
    that just ends may be aborted while it lets go of the others.

    Args:
        student: images -> logits (B, N).
        train: a DataLoader of `MixBatch` or ``(images, labels)``, not prepared yet.
        validation: a DataLoader of ``(images, labels)``, or None.
        out: a folder; made if it is not there.
        settings: `PAPER`, `MODERN`, or others.
        teacher: a `TeacherLabeler`: labels originals where a batch does not hold its labels, and
            is what the student is compared with in the end.
        hints: a loss of the originals' features, that is added. "crd" wants batches with the place
            of each sample among those whose labels it was given: ``(images, labels, places)``, as
            samples ``(picture, label, place)`` are stacked, also by a `SuperMixCollate`.
        mean, std: of each channel in 0..1; uint8 pictures are divided by 255 first.
        accelerator: None makes one, on the CPU where there is no GPU. One of your own needs
            ``DataLoaderConfiguration(use_seedable_sampler=True)``, or a loader with a sampler that
            has `set_epoch`: a run that goes on then has the same order. Its trackers are given
            each epoch's figures; it may accumulate gradients.
        described: what else the run is made of, as JSON has it: data, transforms, networks. It is
            kept beside the settings, and must be the same when the run goes on.
        show: is given a line for each epoch, on the first process.
        advance: is told how many of all steps are done, after each, on the first process.

    Raises:
        TypeError: for loaders that are none of torch's.
        ImportError: for a validation without torchmetrics.
        ValueError: for batches that hold too little for the settings, a validation that cannot be
            judged (its first batch is looked at before anything is trained), a run that was begun
            with other settings, another student, or other batches or processes, and a loss that is
            not finite.
    """
    _check_loaders(train, validation)
    if settings.labels == "teacher" and validation is not None and teacher is None:
        raise ValueError(
            'labels="teacher": expected a teacher whose classes the validation is judged by, got '
            "none. Pass teacher=, or no validation."
        )
    accelerator = make_accelerator(settings) if accelerator is None else accelerator
    network = Pictured(student, mean, std, hints)
    optimiser = torch.optim.SGD(
        network.parameters(),
        settings.lr,
        settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
    )
    # the average would else be of what is trained beside the student, and hold the teacher twice
    judged = network if hints is None else Pictured(student, mean, std)
    average = _average(judged, settings)
    model, optimiser, train = accelerator.prepare(network, optimiser, train)
    judged.to(accelerator.device)
    if average is not None:
        average.to(accelerator.device)
    if validation is not None:
        # what cannot be judged is said now, not after an epoch
        first = _first_batch(validation, accelerator.device)
        evaluate(judged, first, accelerator, teacher, settings.labels)
        validation = accelerator.prepare(validation)
    steps_per_epoch = len(train)
    steps = settings.epochs * steps_per_epoch
    all_settings = {
        **asdict(settings),
        **network.normalisation,
        "hints": None if hints is None else hints.method,
        "mixed_precision": accelerator.mixed_precision,
        "accumulate": accelerator.gradient_accumulation_steps,
        **(described or {}),
    }
    # with another order of batches a step's number would say nothing
    order = {"batches_an_epoch": steps_per_epoch, "processes": accelerator.num_processes}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    scaler = accelerator.scaler  # of fp16
    checkpoint = Checkpoint(folder, network, optimiser, average, all_settings | order, scaler)
    progress = checkpoint.load()
    _check_same_step(progress.step, folder, accelerator)

    begun, saved = (progress.step, time.perf_counter()), progress.step

    def save() -> None:
        if accelerator.is_main_process:
            checkpoint.save(progress)

    while progress.epoch < settings.epochs:
        _set_epoch(train, progress.epoch)
        model.train()
        total = torch.tensor(progress.loss, device=accelerator.device)
        for batch in _timed(_rest(train, progress.batch), progress):
            # what a step draws depends on its number alone, so that it can be made again
            torch.manual_seed(hash((settings.seed, progress.step, accelerator.process_index)))
            start = time.perf_counter()
            if isinstance(batch, MixBatch) and settings.mixes_batches:
                batch.mix()  # here, to be timed
            mixed = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = settings.rate(progress.step, steps, steps_per_epoch)
            with accelerator.accumulate(model):
                loss, samples = batch_loss(model, batch, settings, teacher, hints is not None)
                accelerator.backward(loss)
                optimiser.step()
                optimiser.zero_grad()
            if average is not None and accelerator.sync_gradients:
                average.update_parameters(judged)
            total = loss.detach() + total
            progress.samples += samples * accelerator.num_processes
            progress.calls += _calls(batch, settings) * accelerator.num_processes
            progress.step += 1
            progress.batch += 1
            progress.seconds["mixing"] += mixed - start
            progress.seconds["training"] += time.perf_counter() - mixed
            if accelerator.is_main_process:
                advance(progress.step, steps)
            # accumulated gradients are in no checkpoint
            if progress.step - saved >= settings.save_steps and accelerator.sync_gradients:
                progress.loss = _finite(accelerator.reduce(total, "mean"), progress)
                saved = progress.step
                save()
        entry = _epoch_entry(progress, accelerator.reduce(total, "mean") / steps_per_epoch)
        if validation is not None:
            asked = settings.labels == "teacher" or progress.epoch + 1 == settings.epochs
            entry |= evaluate(
                judged if average is None else average.module,
                validation,
                accelerator,
                teacher if asked else None,
                settings.labels,
            )
        progress.history.append(entry)
        progress.epoch, progress.batch, progress.loss = progress.epoch + 1, 0, 0.0
        accelerator.log(entry, step=progress.step)
        top1 = entry.get("top1", -1.0)
        better = validation is None or top1 > progress.best
        progress.best = max(top1, progress.best)
        if accelerator.is_main_process:
            if better:
                checkpoint.save_best()
            write_atomically(folder / "history.json", json.dumps(progress.history).encode())
            show(_line(entry, settings.epochs, _seconds_left(progress.step, steps, *begun)))
        saved = progress.step
        save()
    summary = _summary(progress, all_settings, validation is not None, accelerator.process_index)
    if accelerator.is_main_process:
        content = json.dumps(asdict(summary), indent=1) + "\n"
        write_atomically(folder / "results.json", content.encode())
    return summary


# -- parts of the loop ----------------------------------------------------------------------------


def _check_loaders(train: Any, validation: Any) -> None:
    loaders = {"train": train} | ({} if validation is None else {"validation": validation})
    for name, loader in loaders.items():
        if not isinstance(loader, DataLoader):  # others would not be shared among processes
            raise TypeError(
                f"{name}: expected a torch.utils.data.DataLoader, got {type(loader).__name__}. "
                "What mixes belongs into it: DataLoader(..., collate_fn=SuperMixCollate(teacher))."
            )
    if len(train) == 0:
        raise ValueError(
            "train: expected at least one batch an epoch, got none. Use a smaller batch_size, or "
            "drop_last=False."
        )


def _first_batch(validation: Any, device: torch.device) -> list[Any]:
    """Of a loader that is not prepared yet."""
    from accelerate.utils import send_to_device

    for batch in validation:
        return [batch if isinstance(batch, MixBatch) else send_to_device(batch, device)]
    return []


def _check_same_step(step: int, folder: Path, accelerator: Any) -> None:
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"out: expected every process to go on from the same step, got {steps}. Choose a "
            f"folder that all machines see, or remove {str(folder)!r} everywhere to begin anew."
        )


def _calls(batch: Any, settings: DistillSettings) -> float:
    """Forwards and backwards of the teacher that a batch took, in pictures."""
    if isinstance(batch, MixBatch):
        return batch.calls if settings.mixes_batches else 0.0
    return len(batch[0]) if settings.asks_teacher else 0.0


def _timed(batches: Any, progress: Progress) -> Iterator[Any]:
    """The batches; how long they are waited for is counted."""
    iterator = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(iterator, None)
        progress.seconds["data"] += time.perf_counter() - start
        if batch is None:
            return
        yield batch


def _rest(train: Any, done: int) -> Any:
    """The batches of an epoch after the first `done`."""
    from accelerate import skip_first_batches

    if done == 0:
        return train
    collate = getattr(train, "collate_fn", None)
    if isinstance(collate, SuperMixCollate):
        collate.take_short()  # the first batch to come may be the epoch's last
    return skip_first_batches(train, done)


def _set_epoch(train: Any, epoch: int) -> None:
    """Tell the order, and who draws the mixes."""
    for name in ("dataset", "collate_fn"):
        set_epoch_of(getattr(train, name, None), epoch)
    train.set_epoch(epoch)


def _average(network: nn.Module, settings: DistillSettings) -> Any:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    if settings.ema == 0:
        return None

    def average(averages: Any, values: Any, count: Any) -> None:
        # else the first weights, which are noise, would be most of a short run's average
        decay = min(settings.ema, (1 + float(count)) / (10 + float(count)))
        get_ema_multi_avg_fn(decay)(averages, values, count)

    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def make_accelerator(settings: DistillSettings, **options: Any) -> Any:
    """One whose shuffled loaders have an order by epoch, which a run that goes on can repeat.

    Args:
        settings: of the run; its seed is that of the order, and its trackers are told all of them.
        **options: of `accelerate.Accelerator`.
    """
    from accelerate import Accelerator, DataLoaderConfiguration

    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed)
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, dataloader_config=order, **options)
    if accelerator.log_with:
        told = {name: str(value) for name, value in asdict(settings).items()}
        accelerator.init_trackers("supermix", told)
    return accelerator


# -- what is kept ----------------------------------------------------------------------------------


def _epoch_entry(progress: Progress, loss: Tensor) -> dict[str, Any]:
    value = _finite(loss, progress)
    return {"epoch": progress.epoch, "loss": value, "samples": progress.samples}


def _finite(loss: Tensor, progress: Progress) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise ValueError(
            f"distill: expected a finite loss, got {value} in epoch {progress.epoch}. Begin in "
            "another folder with a lower lr or more warmup_epochs; the last checkpoint is as it "
            "was."
        )
    return value


def _line(entry: dict[str, Any], epochs: int, left: float) -> str:
    shown = [f"{name} {100 * entry[name]:.2f} %" for name in ("top1", "top5") if name in entry]
    start = f"epoch {entry['epoch'] + 1} of {epochs}: loss {entry['loss']:.4f}"
    end = [f"{timedelta(seconds=round(left))} left"] if entry["epoch"] + 1 < epochs else []
    return "  ".join([start, *shown, *end])


def _seconds_left(step: int, steps: int, first: int, since: float) -> float:
    """At the pace of this call, which began `since` with step `first`."""
    return (steps - step) * (time.perf_counter() - since) / max(1, step - first)


def print_distilled(summary: DistillSummary) -> None:
    """What came out, on standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    for name in ("top1", "best_top1", "top5", "ece", "agreement"):
        value = getattr(summary, name)
        if value is not None:
            console.print(f"{name} {100 * value:.2f} %")
    seconds = ", ".join(f"{name} {each:.0f} s" for name, each in summary.seconds.items())
    console.print(
        f"{summary.student_samples:,} pictures for the student, {summary.teacher_calls:,.0f} calls "
        f"of the teacher; {seconds}",
        soft_wrap=True,
    )


def _summary(
    progress: Progress, settings: dict[str, Any], validated: bool, process: int
) -> DistillSummary:
    last = progress.history[-1] if progress.history else {}
    return DistillSummary(
        top1=last.get("top1"),
        top5=last.get("top5"),
        ece=last.get("ece"),
        agreement=last.get("agreement"),
        best_top1=progress.best if validated else None,
        student_samples=progress.samples,
        teacher_calls=progress.calls,
        seconds=progress.seconds,
        process=process,
        settings=settings,
    )
