"""Figures of a benchmark: samples of a method, their time, and what a lower step limit would give.

Nothing here runs anything; `bench` says how the figures are to be read.
"""

import math
import statistics
from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["Measured", "Sample", "backward_weight", "wilson"]


@dataclass(frozen=True)
class Sample:
    """A method's figures on one batch, each (M,) on the CPU; the same in every repeat."""

    passed: Tensor  # bool, re-checked
    steps: Tensor
    forwards: Tensor
    backwards: Tensor
    sparsity: Tensor
    finished: Tensor | None = None  # (T, M) bool

    def at(self, limit: int | None) -> "Sample":
        """As if the search had been stopped after `limit` steps; see `bench` for why that is so."""
        if limit is None:
            return self
        steps = self.steps.clamp(max=limit)
        if self.finished is None:
            # each step fewer saves a check; no gradient is taken of the last one
            forwards, backwards = self.forwards - (self.steps - steps), self.backwards
            passed, backwards = self.passed & (self.steps <= limit), backwards.clamp(max=limit)
        else:
            forwards, backwards = 2.0 * steps, steps.float()
            passed = self.passed & self.finished[min(limit, len(self.finished)) - 1]
        return replace(self, passed=passed, steps=steps, forwards=forwards, backwards=backwards)

    def work(self, weight: float) -> float:
        """Teacher calls in forwards, of which a backward is worth `weight`."""
        return float(self.forwards.sum() + weight * self.backwards.sum())


@dataclass(frozen=True)
class Measured:
    """A method's samples, and what they took; see `bench` for how a lower limit is found."""

    samples: list[Sample]
    times: list[list[tuple[float, ...]]]  # repeats of batches; seconds after each step, or the end

    def seconds(self, limit: int | None, weight: float, batches: int | None = None) -> list[float]:
        """What the first `batches` take in each repeat, stopped after `limit` steps."""

        def each(sample: Sample, stamps: tuple[float, ...]) -> float:
            if sample.finished is not None and limit is not None:
                return stamps[min(limit, len(stamps)) - 1]
            return stamps[-1] * sample.at(limit).work(weight) / sample.work(weight)

        samples = self.samples[:batches]
        return [sum(map(each, samples, repeat)) for repeat in self.times]

    def converged(self, limit: int | None, batches: int | None = None) -> int:
        return sum(int(sample.at(limit).passed.sum()) for sample in self.samples[:batches])

    def ms(self, limit: int | None, weight: float, batches: int | None = None) -> float | None:
        """Milliseconds a converged mix, the median over repeats, or None."""
        converged = self.converged(limit, batches)
        if converged == 0:
            return None
        return 1000 * statistics.median(self.seconds(limit, weight, batches)) / converged

    def best_limit(self, weight: float) -> int:
        """The limit at which a converged mix costs least; the largest if there never is one."""
        most = max(1, *(int(sample.steps.max()) for sample in self.samples))
        return min(
            range(1, most + 1), key=lambda limit: (self.ms(limit, weight) or math.inf, -limit)
        )


def backward_weight(lower: Measured) -> float:
    """How many forwards a backward costs, from the ``lower-limit``'s three times a batch."""
    pair = statistics.median(sum(b - a for a, b, _ in repeat) for repeat in lower.times)
    check = statistics.median(sum(c - b for _, b, c in repeat) for repeat in lower.times)
    return max(0.0, pair / check - 1)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    Example:
        >>> wilson(9, 10)
        (0.5958, 0.9821)
    """
    z = 1.959964
    share, spread = successes / trials, z**2 / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)
