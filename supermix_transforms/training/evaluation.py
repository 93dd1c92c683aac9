"""What a student is judged by."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from supermix_transforms.batch import MixBatch
from supermix_transforms.results import TeacherLabels
from supermix_transforms.training.loss import check_classes

__all__ = ["evaluate"]


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
        validation: a prepared DataLoader of ``(images, labels)``, or some of its batches.
        accelerator: which prepared it.
        teacher: whose classes the student's are compared with.
        labels: "teacher": its classes stand for the labels.

    Raises:
        ImportError: without torchmetrics.
        ValueError: if there is nothing to judge on, for batches that are mixed, and for labels or a
            teacher of other classes than the student's.
    """
    from accelerate.utils import broadcast

    try:
        from torchmetrics.functional.classification import (
            multiclass_accuracy,
            multiclass_calibration_error,
        )
    except ImportError as error:
        raise ImportError(
            f"validation needs torchmetrics, which is not here ({error}). Install it: pip install "
            '"supermix-transforms[distill]", or pass no validation.'
        ) from error

    # statistics of batches are each process's own; those of the first one are saved
    broadcast([*student.buffers()])
    training = student.training
    student.eval()
    seen: dict[str, list[Tensor]] = defaultdict(list)
    with torch.no_grad():
        for batch in validation:
            if isinstance(batch, MixBatch):
                raise ValueError(
                    "validation: expected batches (images, labels), got mixes. Leave "
                    "collate_fn=SuperMixCollate(...) out of its loader."
                )
            images, targets, *_ = batch
            with accelerator.autocast():  # whatever of it was prepared
                logits = student(images)
            each = {"probs": logits.float().softmax(dim=1), "labels": targets}
            if teacher is not None:
                known = teacher(images)
                check_classes(logits, known)
                each["classes"] = known.hard
            for name, value in accelerator.gather_for_metrics(each).items():
                seen[name].append(value.cpu())
    student.train(training)
    if not seen:
        raise ValueError(
            "validation: expected at least one batch, got none. Use a smaller batch_size or "
            "drop_last=False, or pass no validation."
        )
    every = {name: torch.cat(values) for name, values in seen.items()}
    probs, truth = every["probs"], every["classes" if labels == "teacher" else "labels"]
    classes = probs.shape[1]
    if not 0 <= int(truth.min()) <= int(truth.max()) < classes:
        raise ValueError(
            f"validation: expected labels in 0..{classes - 1}, one for each output of the student, "
            f"got {int(truth.min())}..{int(truth.max())}."
        )
    micro: dict[str, Any] = {"num_classes": classes, "average": "micro"}
    found = {
        "top1": multiclass_accuracy(probs, truth, **micro),
        "top5": multiclass_accuracy(probs, truth, top_k=min(5, classes), **micro),
        "ece": multiclass_calibration_error(probs, truth, num_classes=classes),
    }
    if "classes" in every:
        found["agreement"] = multiclass_accuracy(probs, every["classes"], **micro)
    return {name: float(value) for name, value in found.items()}
