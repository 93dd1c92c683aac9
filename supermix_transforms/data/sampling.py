"""The order in which samples of shards, or groups of recipes, are read."""

import itertools
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

__all__ = ["HasLengths", "ShardSampler"]


class HasLengths(Protocol):
    """A data set in parts, of these lengths: a `ShardDataset`, or what `replay` returns."""

    lengths: list[int]


class ShardSampler(Sampler[int]):
    """One order of all samples for each epoch, in which neighbours lie in few shards.

    Shards, or groups of recipes, are permuted, and samples are shuffled among `window` of them at a
    time, so that reads stay local. The order depends on (seed, epoch) alone. Accelerate splits it
    among ranks and calls `set_epoch`; without Accelerate, `rank` and `num_replicas` do as in
    torch's ``DistributedSampler``: rank r takes the samples r, r + num_replicas, ... of the order,
    and the first ones come once more where it does not come out even.

    Args:
        dataset: the samples.
        seed: of the order.
        window: shards that are shuffled together; with 0 the shards are shuffled and each keeps
            the order of its samples. Mixes of a group are then decoded in half the time, and teach
            less, for a batch's mixes are made of the pictures beside them.
        shuffle: without it samples come in the order of the shards.
        rank, num_replicas: of plain distributed training; both or none.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        dataset: HasLengths,
        *,
        seed: int = 0,
        window: int = 16,
        shuffle: bool = True,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        if window < 0:
            raise ValueError(f"window: expected at least 0 shards, got {window}.")
        if (rank is None) != (num_replicas is None):
            raise ValueError(
                f"rank, num_replicas: expected both or none, got {rank} and {num_replicas}."
            )
        if rank is not None and num_replicas is not None and not 0 <= rank < num_replicas:
            raise ValueError(f"rank: expected 0..{num_replicas - 1}, got {rank}.")
        self.lengths: list[int] = dataset.lengths
        self.seed = seed
        self.window = window
        self.shuffle = shuffle
        self.rank: int = rank or 0
        self.num_replicas: int = num_replicas or 1
        self.epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-sum(self.lengths) // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        total = len(self) * self.num_replicas
        order = itertools.islice(itertools.cycle(self._order()), total) if total else iter(())
        return itertools.islice(order, self.rank, None, self.num_replicas)

    def _order(self) -> Iterator[int]:
        if not self.shuffle:
            yield from range(sum(self.lengths))
            return
        random = np.random.default_rng([self.seed, self.epoch])
        starts = np.cumsum([0, *self.lengths])
        shards = random.permutation(len(self.lengths))
        for first in range(0, len(shards), self.window or 1):
            some = shards[first : first + (self.window or 1)]
            samples = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in some])
            yield from (random.permutation(samples) if self.window else samples).tolist()
