"""How a student is trained: the settings of `distill`, and the paper's."""

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["MODERN", "PAPER", "DistillSettings"]


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
        if not all(0 <= place <= 1 for place in self.milestones):
            raise ValueError(
                f"milestones: expected parts of all steps, in 0..1, got {self.milestones}. Divide "
                "epochs by their number."
            )
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

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher's labels of originals are wanted."""
        return self.kd != "none" or self.labels == "teacher"

    @property
    def mixes_batches(self) -> bool:
        """Whether anything of a batch's mixes is used: they themselves, or their teacher."""
        return self.learn == "both" or self.asks_teacher

    def rate(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """The learning rate of a step of all `steps`."""
        warmup = min(self.warmup_epochs * steps_per_epoch, steps / 10)
        if step < warmup:
            return self.lr * min(1.0, (step + 1) / warmup)
        if self.schedule == "cosine":
            done = (step - warmup) / max(1.0, steps - warmup)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr * self.gamma ** sum(step >= place * steps for place in self.milestones)


PAPER = DistillSettings()
"""The paper's (section 4.1), for CIFAR-100 and 50,000 pictures an epoch."""

MODERN = DistillSettings(epochs=300, nesterov=True, schedule="cosine", ema=0.9998)
"""Half as long, with a cosine schedule and averaged weights."""
