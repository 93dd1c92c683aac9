"""Students: one loop on originals and mixes, what it learns from them, and how they are judged."""

from supermix_transforms.training.evaluation import evaluate
from supermix_transforms.training.loop import DistillSummary, distill, make_accelerator
from supermix_transforms.training.settings import MODERN, PAPER, DistillSettings

__all__ = [
    "MODERN",
    "PAPER",
    "DistillSettings",
    "DistillSummary",
    "distill",
    "evaluate",
    "make_accelerator",
]
