"""What a student learns from a batch: one forward of all its pictures, and their loss.

Equations 8 and 9 of the paper; what the batch holds decides which.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from supermix_transforms.batch import MixBatch
from supermix_transforms.losses import (
    cross_entropy,
    kd_loss,
    supermix_kd_loss,
    supermix_loss,
)
from supermix_transforms.results import TeacherLabels
from supermix_transforms.training.hints import HintLoss
from supermix_transforms.training.settings import DistillSettings

__all__ = ["Pictured", "batch_loss", "check_classes", "sample_places"]


class Pictured(nn.Module):
    """A network that takes pictures as data sets give them, with what is trained beside it."""

    _mean: Tensor | None
    _std: Tensor | None

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
        self.network: nn.Module = network.to(memory_format=torch.channels_last)
        self.hints = hints
        for name, value in (("_mean", mean), ("_std", std)):
            numbers = None if value is None else torch.tensor(value)[:, None, None]
            self.register_buffer(name, numbers, persistent=False)

    @property
    def normalisation(self) -> dict[str, list[float] | None]:
        """Mean and std of each channel in 0..1, or None."""
        buffers = {"mean": self._mean, "std": self._std}
        return {
            name: None if value is None else [round(each, 6) for each in value.flatten().tolist()]
            for name, value in buffers.items()
        }

    def forward(self, images: Tensor, hinted: tuple[int, Tensor | None] | None = None) -> Any:
        """Logits; with `hinted`, how many originals there are and their places, a loss as well."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if self._mean is not None and self._std is not None:
            images = (images - self._mean) / self._std
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


def batch_loss(
    model: nn.Module,
    batch: Any,
    settings: DistillSettings,
    teacher: Callable[[Tensor], TeacherLabels] | None = None,
    hinted: bool = False,
) -> tuple[Tensor, int]:
    """The loss of a batch, and how many pictures the student was given."""
    images, labels, known = _originals(batch, settings, teacher)
    mixes = settings.learn == "both" and isinstance(batch, MixBatch) and batch.is_mixed
    pictures = _joined(images, batch.mixed) if mixes else images
    # one forward: one batch's statistics
    every = model(pictures, (len(images), sample_places(batch))) if hinted else model(pictures)
    every, hint = every if hinted else (every, 0.0)
    check_classes(every, known or (batch.mixed_teacher if mixes else None))
    logits, mixed_logits = every.split([len(images), len(pictures) - len(images)])
    labels = _smoothed(labels, logits.shape[1], settings.label_smoothing)
    kd = {"temperature": settings.temperature, "weight": settings.kd_weight}
    if settings.kd == "none":
        if mixes:
            loss = supermix_loss(logits, labels, mixed_logits, batch.targets)
        else:
            loss = cross_entropy(logits, labels)
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


def _joined(images: Tensor, mixed: Tensor) -> Tensor:
    if mixed.dtype != images.dtype:  # else the originals would become 0..255 in float
        raise ValueError(
            f"distill: expected mixes of the originals' {images.dtype}, got {mixed.dtype}. Convert "
            "pictures before they are stacked, or in the transform that mixes them."
        )
    return torch.cat([images, mixed])


def _smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels (B,) or (B, N) with a part of them spread over all classes, (B, N); or as they are."""
    if smoothing == 0:
        return labels
    if labels.ndim == 1:
        labels = torch.nn.functional.one_hot(labels, classes)
    return (1 - smoothing) * labels.float() + smoothing / classes


def check_classes(logits: Tensor, known: TeacherLabels | None) -> None:
    """Raise a ValueError unless there is a logit for each of the teacher's classes."""
    if logits.ndim != 2 or (known is not None and logits.shape[1] != known.num_classes):
        wanted = "N" if known is None else f"{known.num_classes}, the teacher's classes"
        raise ValueError(
            f"student: expected logits (B, {wanted}), got {tuple(logits.shape)}. Give it as many "
            "outputs, or the teacher fewer: TeacherLabeler(classes=...)."
        )


def sample_places(batch: Any) -> Tensor | None:
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
    known = batch.teacher if mixes and settings.mixes_batches else None
    if settings.asks_teacher and known is None:
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
