"""Augmentations of single pictures by name, with which the paper compares (Table 1)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

__all__ = ["load_policy"]

POLICIES: dict[str, Callable[[], v2.Transform]] = {
    "autoaugment-cifar10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "autoaugment-imagenet": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
    "cutout": lambda: v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
    "randaugment": v2.RandAugment,
    "trivialaugment": v2.TrivialAugmentWide,
}


def load_policy(name: str | Path) -> Callable[[Any], Any]:
    """An augmentation of a picture (C, H, W) uint8, which keeps its size and dtype.

    Args:
        name: of `POLICIES`.

    Raises:
        ValueError: for another name.
    """
    if str(name) not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {str(name)!r}.")
    return POLICIES[str(name)]()
