"""Train a student on originals and their mixes: one loop, from top to bottom.

    collate = SuperMixCollate(teacher, target="hard")
    train = DataLoader(dataset, 128, shuffle=True, collate_fn=collate)
    summary = distill(student, train, validation, "run/", settings=PAPER)

What a batch holds decides what is learned from it: a `MixBatch` (online, or from `replay`) has
originals, mixes and the teacher's labels of both; of a plain ``(images, labels)`` the teacher is
asked where its labels are wanted. Runs on any number of processes that Accelerate knows of. Killed,
it goes on with the very next batch.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from supermix_transforms.batch import MixBatch
from supermix_transforms.checkpoints import Checkpoint, Progress
from supermix_transforms.files import write_atomically
from supermix_transforms.hints import HintLoss
from supermix_transforms.losses import (
    cross_entropy,
    kd_loss,
    supermix_kd_loss,
    supermix_loss,
)
from supermix_transforms.results import TeacherLabels

__all__ = [
    "MODERN",
    "PAPER",
    "DistillSettings",
    "DistillSummary",
    "distill",
    "evaluate",
    "make_accelerator",
    "print_distilled",
]


@dataclass(frozen=True)
class DistillSettings:
    """How a student is trained.

    Raises:
        ValueError: for values out of range.
    """

    epochs: int = 600  # of the loader
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    warmup_epochs: float = 5.0  # but at most a tenth of all
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = (1 / 3, 1 / 2, 2 / 3, 5 / 6)  # of all steps; lr times `gamma`
    gamma: float = 0.1
    learn: Literal["both", "originals"] = "both"  # of batches that hold mixes
    labels: Literal["data", "teacher"] = "data"  # of originals; "teacher": its classes, as of mixes
    kd: Literal["none", "originals", "both"] = "none"  # where Eq. 8 stands for the cross-entropy
    kd_weight: float = 0.1  # lambda_KD
    temperature: float = 4.0  # tau, relative to that of the batch's labels
    ema: float = 0.0  # decay of averaged weights, less at first, which are evaluated then; 0: none
    label_smoothing: float = 0.0  # of the originals' labels
    save_steps: int = 1000  # between two checkpoints; one follows every epoch as well
    seed: int = 0  # of dropout and the like

    def __post_init__(self) -> None:
        for name in ("epochs", "save_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}.")
        for name, most in (
            ("lr", math.inf),
            ("momentum", 1),
            ("weight_decay", math.inf),
            ("warmup_epochs", math.inf),
            ("gamma", 1),
            ("kd_weight", 1),
            ("ema", 1),
            ("label_smoothing", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= most or value == math.inf:
                raise ValueError(f"{name}: expected a number in 0..{most}, got {value!r}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}.")
        if self.schedule not in ("step", "cosine"):
            raise ValueError(f'schedule: expected "step" or "cosine", got {self.schedule!r}.')
        if self.learn not in ("both", "originals"):
            raise ValueError(f'learn: expected "both" or "originals", got {self.learn!r}.')
        if self.labels not in ("data", "teacher"):
            raise ValueError(f'labels: expected "data" or "teacher", got {self.labels!r}.')
        if self.kd not in ("none", "originals", "both"):
            raise ValueError(f'kd: expected "none", "originals" or "both", got {self.kd!r}.')

    def rate(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """The learning rate of a step of all `steps`."""
        warmup = min(self.warmup_epochs * steps_per_epoch, steps / 10)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "cosine":
            done = (step - warmup) / max(1.0, steps - warmup)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr * self.gamma ** sum(step >= place * steps for place in self.milestones)


PAPER = DistillSettings()  # section 4.1, for CIFAR-100 and 50,000 pictures an epoch
MODERN = DistillSettings(epochs=300, nesterov=True, schedule="cosine", ema=0.9998)


@dataclass(frozen=True)
class DistillSummary:
    """What a run came to; ``results.json`` holds the same."""

    top1: float | None  # of the last epoch, in 0..1; None without validation
    top5: float | None
    ece: float | None  # expected calibration error
    agreement: float | None  # with the teacher's class; None without a teacher
    best_top1: float | None
    student_samples: int  # pictures that the student was trained on
    teacher_calls: float  # forwards and backwards while mixing, of one picture each
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
    weights of the best validation), ``history.json`` and ``results.json``.

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
        ValueError: for batches that hold too little for the settings, a run that was begun with
            other settings or another student, and a loss that is not finite.
    """
    accelerator = make_accelerator(settings) if accelerator is None else accelerator
    network = _Pictured(student, mean, std, hints)
    optimiser = torch.optim.SGD(
        network.parameters(),
        settings.lr,
        settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
    )
    # the average would else be of what is trained beside the student, and hold the teacher twice
    judged = network if hints is None else _Pictured(student, mean, std)
    average = _average(judged, settings)
    model, optimiser, train = accelerator.prepare(network, optimiser, train)
    validation = None if validation is None else accelerator.prepare(validation)
    if average is not None:
        average.to(accelerator.device)
    all_settings = {**asdict(settings), **(described or {})}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(folder, network, optimiser, average, all_settings)
    progress = checkpoint.load()
    steps_per_epoch = len(train)
    steps = settings.epochs * steps_per_epoch

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
            if isinstance(batch, MixBatch):
                batch.mix()  # here, to be timed
            mixed = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = settings.rate(progress.step, steps, steps_per_epoch)
            with accelerator.accumulate(model):
                loss, samples = _loss(model, batch, settings, teacher, hints is not None)
                accelerator.backward(loss)
                optimiser.step()
                optimiser.zero_grad()
            if average is not None and accelerator.sync_gradients:
                average.update_parameters(judged)
            total = loss.detach() + total
            progress.samples += samples * accelerator.num_processes
            progress.calls += _calls(batch) * accelerator.num_processes
            progress.step += 1
            progress.batch += 1
            progress.seconds["mixing"] += mixed - start
            progress.seconds["training"] += time.perf_counter() - mixed
            if accelerator.is_main_process:
                advance(progress.step, steps)
            # accumulated gradients are in no checkpoint
            if progress.step - saved >= settings.save_steps and accelerator.sync_gradients:
                progress.loss = float(accelerator.reduce(total, "mean"))
                saved = progress.step
                save()
        entry = _epoch_entry(progress, accelerator.reduce(total, "mean") / steps_per_epoch)
        if validation is not None:
            asked = settings.labels == "teacher" or progress.epoch + 1 == settings.epochs
            found = evaluate(
                judged if average is None else average.module,
                validation,
                accelerator,
                teacher if asked else None,
                settings.labels,
            )
            entry |= found
        progress.history.append(entry)
        progress.epoch, progress.batch, progress.loss = progress.epoch + 1, 0, 0.0
        accelerator.log(entry, step=progress.step)
        if accelerator.is_main_process:
            if entry.get("top1", -1.0) > progress.best:
                progress.best = entry["top1"]
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


# -- a step ----------------------------------------------------------------------------------------


class _Pictured(nn.Module):
    """A network that takes pictures as data sets give them, with what is trained beside it."""

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        hints: HintLoss | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError(f"expected mean and std together, got mean={mean} and std={std}.")
        # the faster layout of convolutions, on CPUs (1.6 times) as on GPUs
        self.network = network.to(memory_format=torch.channels_last)
        self.hints = hints
        self._mean = None if mean is None else torch.tensor(mean)[:, None, None]
        self._std = None if std is None else torch.tensor(std)[:, None, None]

    def forward(self, images: Tensor, hinted: tuple[int, Tensor | None] | None = None) -> Any:
        """Logits; with `hinted`, how many originals there are and their places, a loss as well."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if self._mean is not None and self._std is not None:
            images = (images - self._mean.to(images.device)) / self._std.to(images.device)
        images = images.contiguous(memory_format=torch.channels_last)
        if hinted is None or self.hints is None:
            return self._logits(images)
        count, places = hinted
        with self.hints.watching(self.network) as seen:
            logits = self._logits(images)
        # in one forward, so that DistributedDataParallel sees all that is trained
        return logits, self.hints(seen, images[:count], places)

    def _logits(self, images: Tensor) -> Tensor:
        answer = self.network(images)
        logits: Tensor = getattr(answer, "logits", answer)
        return logits


def _loss(
    model: nn.Module,
    batch: Any,
    settings: DistillSettings,
    teacher: Callable[[Tensor], TeacherLabels] | None = None,
    hinted: bool = False,
) -> tuple[Tensor, int]:
    """The loss of a batch, and how many pictures the student was given."""
    images, labels, known = _originals(batch, settings, teacher)
    mixes = settings.learn == "both" and isinstance(batch, MixBatch) and batch.is_mixed
    pictures = torch.cat([images, batch.mixed]) if mixes else images
    # one forward: one batch's statistics
    every = model(pictures, (len(images), _places(batch))) if hinted else model(pictures)
    every, hint = every if hinted else (every, 0.0)
    logits, mixed_logits = every.split([len(images), len(pictures) - len(images)])
    kd = {"temperature": settings.temperature, "weight": settings.kd_weight}
    if settings.kd == "none":
        if mixes:
            loss = supermix_loss(logits, labels, mixed_logits, batch.targets)
        else:
            loss = cross_entropy(logits, labels, settings.label_smoothing)
        return loss + hint, len(pictures)
    assert known is not None
    soft = known.softened(settings.temperature)
    if not mixes:
        return kd_loss(logits, soft, labels, **kd) + hint, len(pictures)
    mixed_soft = None
    if settings.kd == "both":
        if batch.mixed_teacher is None:
            raise ValueError(
                'kd="both": expected the teacher\'s labels of the mixes, got none. Pass a teacher '
                'where the batches are made, or kd="originals".'
            )
        mixed_soft = batch.mixed_teacher.softened(settings.temperature)
    loss = supermix_kd_loss(logits, labels, soft, mixed_logits, batch.targets, mixed_soft, **kd)
    return loss + hint, len(pictures)


def _places(batch: Any) -> Tensor | None:
    """The third of ``(images, labels, places)``; of replayed mixes, the places of their own."""
    if not isinstance(batch, MixBatch):
        return batch[2] if len(batch) > 2 else None
    sources = batch.extra.get("sources")
    return batch.extra.get(2) if sources is None else sources[:, 0]


def _originals(
    batch: Any, settings: DistillSettings, teacher: Callable[[Tensor], TeacherLabels] | None
) -> tuple[Tensor, Tensor, TeacherLabels | None]:
    """Pictures, their labels, and, where the settings want them, the teacher's."""
    mixes = isinstance(batch, MixBatch)
    images, labels = (batch.images, batch.labels) if mixes else (batch[0], batch[1])
    known = batch.teacher if mixes else None
    wanted = settings.kd != "none" or settings.labels == "teacher"
    if wanted and known is None:
        if teacher is None:
            raise ValueError(
                f"distill: kd={settings.kd!r} and labels={settings.labels!r} need the teacher's "
                "labels of the originals, and there are none. Pass teacher=, or a teacher where "
                "the batches are made."
            )
        known = teacher(images)
    if settings.labels == "teacher":
        assert known is not None
        labels = known.hard
    if labels is None:
        raise ValueError(
            "distill: expected labels of the originals, got none. Pass labels_getter= where the "
            'batches are made, or labels="teacher".'
        )
    return images, labels, known


def _calls(batch: Any) -> float:
    """Forwards and backwards of the teacher that a batch took, in pictures."""
    return batch.calls if isinstance(batch, MixBatch) else 0.0


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

    return skip_first_batches(train, done) if done else train


def _set_epoch(train: Any, epoch: int) -> None:
    """Tell the order, and who draws the mixes."""
    for name in ("dataset", "collate_fn"):
        part = getattr(train, name, None)
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)
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


# -- validation ------------------------------------------------------------------------------------


def evaluate(
    student: nn.Module,
    validation: Any,
    accelerator: Any,
    teacher: Callable[[Tensor], TeacherLabels] | None = None,
    labels: Literal["data", "teacher"] = "data",
) -> dict[str, float]:
    """top1, top5, ece and agreement, in 0..1, over all processes.

    Args:
        student: images -> logits (B, N).
        validation: a prepared DataLoader of ``(images, labels)``.
        accelerator: which prepared it.
        teacher: whose classes the student's are compared with.
        labels: "teacher": its classes stand for the labels.
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
    )

    training = student.training
    student.eval()
    seen: dict[str, list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        for images, targets, *_ in validation:
            each = {"probs": student(images).float().softmax(dim=1), "labels": targets}
            if teacher is not None:
                each["classes"] = teacher(images).hard
            for name, value in accelerator.gather_for_metrics(each).items():
                seen[name].append(value.cpu())
    student.train(training)
    every = {name: torch.cat(values) for name, values in seen.items()}
    probs, truth = every["probs"], every["classes" if labels == "teacher" else "labels"]
    classes = probs.shape[1]
    micro: dict[str, Any] = {"num_classes": classes, "average": "micro"}
    found = {
        "top1": multiclass_accuracy(probs, truth, **micro),
        "top5": multiclass_accuracy(probs, truth, top_k=min(5, classes), **micro),
        "ece": multiclass_calibration_error(probs, truth, num_classes=classes),
    }
    if "classes" in every:
        found["agreement"] = multiclass_accuracy(probs, every["classes"], **micro)
    return {name: float(value) for name, value in found.items()}


# -- what is kept ----------------------------------------------------------------------------------


def _epoch_entry(progress: Progress, loss: Tensor) -> dict[str, Any]:
    value = float(loss)
    if not math.isfinite(value):
        raise ValueError(
            f"distill: expected a finite loss, got {value} in epoch {progress.epoch}. Lower lr, or "
            "lengthen warmup_epochs; the last checkpoint is as it was."
        )
    return {"epoch": progress.epoch, "loss": value, "samples": progress.samples}


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
