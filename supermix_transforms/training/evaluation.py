"""What a student is judged by."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from supermix_transforms.results import TeacherLabels

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
            with accelerator.autocast():  # whatever of it was prepared
                logits = student(images)
            each = {"probs": logits.float().softmax(dim=1), "labels": targets}
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
