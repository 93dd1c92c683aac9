"""What comes out: outcomes, labels, class maps and mixes, as plain records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supermix_transforms.losses import sparsity
from supermix_transforms.masks import Normalisation, render

__all__ = ["ClassMaps", "Mixed", "Outcome", "TeacherLabels"]

STEEPEST, HALVINGS = 60.0, 24  # where the log of a tail's ratio is searched, and how finely


class Outcome(IntEnum):
    """How the search for a tuple's masks ended."""

    # the teacher's top k classes of the mix are those of its sources, as clearly as was asked for
    CONVERGED = 0
    MAX_STEPS = 1  # the steps were used up before that; the mix is the best one found
    NOT_FINITE = 2  # the teacher answered NaN or inf; the label is Eq. 2's
    UNMIXED = 3  # fewer than k pictures were there: the picture is the original


class ClassMaps(NamedTuple):
    """The last feature map of each picture and the linear classifier over its average.

    ``logits = features.mean(dim=(2, 3)) @ weight.T + bias``.
    """

    features: Tensor  # (B, D, h, w) float32
    weight: Tensor  # (N, D) float32
    bias: Tensor  # (N,) float32

    def maps(self) -> Tensor:
        """The share of each cell in each logit, (B, N, h, w) float32, without the bias."""
        with torch.autocast(self.features.device.type, enabled=False):
            return torch.einsum("nd,bdhw->bnhw", self.weight, self.features)


@dataclass(frozen=True, eq=False)
class TeacherLabels:
    """A teacher's probabilities for B pictures: dense, or the n largest of each.

    Dense labels hold ``log_probs`` (B, N) float32 and nothing else. Sparse ones hold the n largest
    as ``log_probs`` (B, n) float16, largest first, with their class ``indices`` (B, n) int64 and
    the mass of all other classes, ``rest`` (B,) float32.
    """

    log_probs: Tensor
    num_classes: int
    indices: Tensor | None = None
    rest: Tensor | None = None

    @classmethod
    def from_logits(
        cls, logits: Tensor, *, temperature: float = 1.0, top: int | None = None
    ) -> "TeacherLabels":
        """Labels of logits (B, N) at a temperature, whole or reduced to the ``top`` largest."""
        log_probs = (logits.float() / temperature).log_softmax(dim=1)
        dense = cls(log_probs, log_probs.shape[1])
        if top is None or top >= dense.num_classes:
            return dense
        indices, largest, rest = dense.top(top)
        return cls(largest.half(), dense.num_classes, indices, rest)

    @classmethod
    def from_probs(cls, probs: Tensor) -> "TeacherLabels":
        """Dense labels of probabilities (B, N)."""
        return cls(probs.float().log(), probs.shape[1])

    @property
    def probs(self) -> Tensor:
        """Probabilities (B, N) float32; what sparse labels left out is spread evenly."""
        if self.indices is None or self.rest is None:
            return self.log_probs.exp()
        kept = self.log_probs.float().exp()
        kept = kept * ((1 - self.rest) / kept.sum(dim=1)).unsqueeze(1)  # undo float16's rounding
        others = self.num_classes - kept.shape[1]
        spread = (self.rest / max(others, 1)).unsqueeze(1)
        return spread.expand(-1, self.num_classes).scatter(1, self.indices, kept)

    def softened(self, temperature: float) -> Tensor:
        """Probabilities (B, N) float32 at a temperature that many times higher than these labels'.

        Of sparse labels, the classes that were left out have even parts of what is left of the
        mass. How much that is at another temperature depends on how it falls from class to class:
        geometrically, it is taken, from the least that is stored, to the rest that is known.

        Raises:
            ValueError: if the temperature is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}.")
        if self.indices is None or self.rest is None:
            return (self.log_probs / temperature).softmax(dim=1)
        log_probs = self.probs.gather(1, self.indices).log()
        others = self.num_classes - log_probs.shape[1]
        kept = (log_probs / temperature).exp()
        left = _tail(log_probs[:, -1], self.rest, others, temperature)
        whole = kept.sum(dim=1) + left
        spread = (left / whole / max(others, 1)).unsqueeze(1)
        kept = kept / whole.unsqueeze(1)
        return spread.expand(-1, self.num_classes).scatter(1, self.indices, kept)

    @property
    def hard(self) -> Tensor:
        """The most probable class, (B,) int64."""
        return self.log_probs.argmax(dim=1) if self.indices is None else self.indices[:, 0]

    def top(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The n most probable: indices (B, n) int64, log-probs (B, n) float32, rest mass (B,).

        Raises:
            ValueError: if n is not in 1..N, or more than sparse labels hold.
        """
        if not 1 <= n <= self.log_probs.shape[1]:
            raise ValueError(
                f"top: expected n in 1..{self.log_probs.shape[1]}, got {n}. "
                "Make the labels with a larger top=, or with top=None to keep all classes."
            )
        log_probs, indices = self.log_probs.float().topk(n, dim=1)
        if self.indices is not None:
            indices = self.indices.gather(1, indices)
        if self.rest is None:
            return indices, log_probs, (1 - log_probs.exp().sum(dim=1)).clamp(min=0)
        left = self.log_probs.float().exp().sum(dim=1) - log_probs.exp().sum(dim=1)
        return indices, log_probs, self.rest + left.clamp(min=0)

    def __len__(self) -> int:
        return len(self.log_probs)

    def __getitem__(self, rows: Tensor) -> "TeacherLabels":
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str | int) -> "TeacherLabels":
        return self._each(lambda tensor: tensor.to(device))

    def pin_memory(self) -> "TeacherLabels":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TeacherLabels":
        return TeacherLabels(
            change(self.log_probs),
            self.num_classes,
            None if self.indices is None else change(self.indices),
            None if self.rest is None else change(self.rest),
        )


@dataclass(frozen=True, eq=False)
class Mixed:
    """M mixed pictures and how each came about.

    ``mask_logits`` is None where the masks are not a rendered grid (MixUp, CutMix); ``fixed_masks``
    holds them then. MixUp and CutMix search for nothing, so they count as converged.
    """

    images: Tensor  # (M, C, H, W), dtype of the sources
    sources: Tensor  # (M, k) int64, rows of the pictures that were mixed
    weights: Tensor  # (M, k) float32, r of Eq. 2
    outcome: Tensor  # (M,) int64, values of Outcome
    steps: Tensor  # (M,) int64, solver steps taken; 0 where the start was good enough
    sparsity: Tensor  # (M,) float32, L_s of Eq. 5 of the masks as they are
    forwards: Tensor  # (M,) float32, teacher forwards, its share of the originals' included
    backwards: Tensor  # (M,) float32
    logits: Tensor | None = None  # (M, N) float32, the teacher's for `images`, where it was asked
    mask_logits: Tensor | None = None  # (M, k, w, w) float32
    normalisation: Normalisation = "softmax"
    quantised: bool = False  # the masks are those of a recipe
    fixed_masks: Tensor | None = None  # (M, k, H, W) float32

    @property
    def masks(self) -> Tensor:
        """(M, k, H, W) float32 in [0, 1], summing to 1 over k; rendered at each call."""
        if self.mask_logits is None:
            assert self.fixed_masks is not None
            return self.fixed_masks
        height, width = self.images.shape[-2:]
        size = (height, width)
        return render(self.mask_logits, size, self.normalisation, quantised=self.quantised)

    @property
    def converged(self) -> Tensor:
        """(M,) bool: the teacher's top k classes of the mix are those of its sources."""
        return self.outcome == Outcome.CONVERGED

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def unsearched(
        cls, images: Tensor, sources: Tensor, masks: Tensor, outcome: Outcome
    ) -> "Mixed":
        """Mixes that no solver made; the weights are the areas that the masks give."""
        nothing = torch.zeros(len(images), device=images.device)
        return cls(
            images=images,
            sources=sources,
            weights=masks.mean(dim=(2, 3)),
            outcome=torch.full((len(images),), int(outcome), device=images.device),
            steps=nothing.long(),
            sparsity=sparsity(masks),
            forwards=nothing,
            backwards=nothing.clone(),
            fixed_masks=masks,
        )

    @staticmethod
    def concatenate(parts: "Sequence[Mixed]") -> "Mixed":
        """Parts of one kind, one after the other."""
        if len(parts) == 1:
            return parts[0]
        first = vars(parts[0])
        values: dict[str, Any] = {
            name: torch.cat([vars(part)[name] for part in parts])
            for name, value in first.items()
            if isinstance(value, Tensor)
        }
        return replace(parts[0], **values)

    def __getitem__(self, rows: Tensor) -> "Mixed":
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str | int) -> "Mixed":
        return self._each(lambda tensor: tensor.to(device))

    def pin_memory(self) -> "Mixed":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Mixed":
        values: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **values)

    def update(self, rows: Tensor, other: "Mixed") -> "Mixed":
        """A copy in which the given rows come from `other`, one of its rows for each."""
        values: dict[str, Any] = {
            name: value.index_copy(0, rows, vars(other)[name])
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **values)


def _tail(last: Tensor, rest: Tensor, count: int, temperature: float) -> Tensor:
    """The sum of ``p ** (1 / temperature)`` over `count` classes whose p add up to `rest`, (B,).

    They are taken to be ``exp(last) * ratio ** j``, j = 1..count, with the ratio in 0..1 that gives
    the rest; all alike where the rest is more than that.
    """

    def series(log_ratio: Tensor) -> Tensor:
        return log_ratio.exp() * (count * log_ratio).expm1() / log_ratio.expm1()

    low, high = torch.full_like(last, -STEEPEST), torch.zeros_like(last)  # of the ratio's log
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = last.exp() * series(middle) > rest
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    falling = (last / temperature).exp() * series(middle / temperature)
    even = count * (rest / max(count, 1)) ** (1 / temperature)
    return torch.where(rest < count * last.exp(), falling, even)
