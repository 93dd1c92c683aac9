"""What is mixed in which file: the order of all passes, cut into units and batches."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from supermix_transforms.data.sampling import ShardSampler
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.data.views import ViewDraws

__all__ = ["Order", "Originals", "Places", "Unit"]


class Unit(NamedTuple):
    """A part of a pass that is written as one file."""

    epoch: int
    number: int  # in its pass
    batches: list[list[int]]  # samples

    @property
    def name(self) -> str:
        return f"{self.epoch:03d}-{self.number:06d}"


class Order:
    """The units of all passes, in their order."""

    def __init__(
        self, sampler: ShardSampler, passes: int, batch_size: int, unit_batches: int
    ) -> None:
        self._sampler, self._passes = sampler, passes
        self._batch_size, self._size = batch_size, batch_size * unit_batches
        self._each = math.ceil(len(sampler) / self._size)  # units a pass

    def __len__(self) -> int:
        return self._passes * self._each

    @property
    def samples(self) -> int:
        return self._passes * len(self._sampler)

    @property
    def names(self) -> list[str]:
        passes, numbers = range(self._passes), range(self._each)
        return [Unit(*each, []).name for each in itertools.product(passes, numbers)]

    def units(self, wanted: set[str]) -> Iterator[Unit]:
        """Those of these names."""
        for epoch in range(self._passes):
            self._sampler.set_epoch(epoch)
            samples = iter(self._sampler)
            for number in range(self._each):
                some = list(itertools.islice(samples, self._size))
                size = self._batch_size
                batches = [some[first : first + size] for first in range(0, len(some), size)]
                unit = Unit(epoch, number, batches)
                if unit.name in wanted:
                    yield unit


class Originals(Dataset[dict[str, Any]]):
    """Samples of (pass, index), as the pass looks at them."""

    def __init__(self, dataset: ShardDataset, draws: ViewDraws) -> None:
        self._draws = draws
        self.dataset = dataset

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        epoch, view = places[0][0], self._draws.view
        samples = []
        for index, picture, _ in self.dataset.readable([i for _, i in places], labelled=False):
            try:
                picture = view.prepare(picture)
                crop = self._draws(picture, epoch, index)
                image = torch.from_numpy(view.cut(picture, crop))
            except ValueError as error:  # of a picture that is too large or too small for the view
                problem = f"{error} It is {self.dataset.name(index)!r}."
                if self.dataset.on_error == "raise":
                    raise ValueError(problem) from error
                self.dataset.skip(problem)
                continue
            samples.append({"image": image, "crop": torch.tensor(crop), "index": index})
        return samples


class Places:
    """A batch sampler: (pass, index) of each batch of the wanted units."""

    def __init__(self, order: Order, wanted: set[str]) -> None:
        self._order, self._wanted = order, wanted

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for unit in self._order.units(self._wanted):
            for batch in unit.batches:
                yield [(unit.epoch, index) for index in batch]
