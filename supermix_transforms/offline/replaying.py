"""Make the mixes of recipes again, without a teacher, in the workers of any DataLoader.

    recipes = replay("recipes/", ShardDataset("train-{000000..001281}.tar"))
    sampler = ShardSampler(recipes)
    loader = DataLoader(recipes, 256, sampler=sampler, num_workers=8, collate_fn=recipes.collate)

In any order, a batch decodes each picture once, and a process has the records of a few groups in
memory (`reading.KEPT`), and those of a batch's own mixes. Neighbours share pictures: a sampler with
``window=0``, which shuffles groups and keeps neighbours together, decodes hardly more pictures than
there are mixes, others up to k times as many. Such batches teach less (docs/reproduction.md).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from supermix_transforms.batch import MixBatch, MixResult, OutputForm, TargetForm
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.data.views import Crop
from supermix_transforms.offline.ledger import versions
from supermix_transforms.offline.reading import RecipeGroups
from supermix_transforms.offline.recipes import Array, Group, Kind, picture_digest
from supermix_transforms.offline.stored import (
    joined,
    labels_of,
    part_of,
    parts_of,
    place_in_kind,
    weights_of,
)
from supermix_transforms.quantised import LEVELS, STEP, blend_parts
from supermix_transforms.results import Mixed, TeacherLabels

__all__ = ["Replay", "ReplayedMix", "replay"]

# mixes whose masks are made together: one by one small ones would pay for the calls, and those of
# all of a batch would fill the memory
AT_ONCE = 32


class ReplayedMix(NamedTuple):
    """A mix, its own original, and where its record is."""

    mixed: Tensor  # (3, H, W) uint8
    image: Tensor  # (3, H, W) uint8, the first of its sources
    label: Any  # of `image`, the data set's; None for output="tuple" and "dict"
    number: int  # of the mix
    group: Group  # the records of the batch
    row: int  # there


class Replay(Dataset[ReplayedMix]):
    """The mixes of a folder of recipes, as a map-style dataset; see `replay`.

    Attributes:
        lengths: mixes of each group, for `ShardSampler`.
        settings: what the folder was made with.
    """

    def __init__(
        self, recipes: str | Path, dataset: ShardDataset, output: OutputForm, target: TargetForm
    ) -> None:
        for name, value, allowed in (
            ("output", output, ("batch", "tuple", "concat", "dict")),
            ("target", target, ("soft", "hard")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {value!r}.")
        self._groups = RecipeGroups(recipes, dataset)
        self.settings: dict[str, Any] = self._groups.settings
        self.lengths: list[int] = self._groups.lengths
        self._starts = np.cumsum([0, *self.lengths])
        self._dataset, self._view = dataset, self._groups.view
        self._output, self._target = output, target

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> ReplayedMix:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[ReplayedMix]:
        """The mixes of a batch; each picture is decoded once.

        With the dataset's ``on_error="skip"`` mixes that cannot be made are left out and counted.

        Raises:
            ValueError: for recipes that are damaged, pictures that cannot be read or are others
                than those that were mixed, and a batch of which nothing is left.
        """
        rows = self._by_group(indices)
        found = {mix.number: mix for mix in self._mixes(rows, self._parts(rows))}
        if not found:
            raise ValueError(
                f"recipes: expected a batch of {len(indices)} mixes, got none that can be made. "
                "Look at the warnings before this for the reasons."
            )
        return [found[index] for index in indices if index in found]

    def collate(self, mixes: list[ReplayedMix]) -> Any:
        """A batch in the form that ``output=`` asked for.

        In a `MixBatch`, ``images`` are the own originals of the mixes, and ``sources`` are -1 for
        pictures that are none of these; ``extra`` has "index" of each mix (M,) and "sources", the
        indices (M, k) in the data set.
        """
        mixed = torch.stack([mix.mixed for mix in mixes])
        if self._output in ("tuple", "dict"):  # needs nothing of the originals
            label = self._labels(mixes)
            targets = label.hard if self._target == "hard" else label.probs
            names = ("pixel_values", "labels")
            pair = (mixed, targets)
            return pair if self._output == "tuple" else dict(zip(names, pair, strict=True))
        numbers = torch.tensor([mix.number for mix in mixes])
        batch = MixBatch(
            torch.stack([mix.image for mix in mixes]),
            default_collate([mix.label for mix in mixes]),
            ids=numbers,
            extra={"index": numbers, "sources": torch.stack([_samples(mix) for mix in mixes])},
            mixer=_Replayed(self._output, self._target),
        )
        batch.hold(self._result(batch, mixed, mixes))
        return batch.form()

    # -- records, pictures and mixes of a batch --------------------------------------------------

    def _by_group(self, indices: Sequence[int]) -> dict[int, list[int]]:
        """Groups, and the rows of each that are asked for."""
        rows: dict[int, list[int]] = defaultdict(list)
        for index in indices:
            number = int(np.searchsorted(self._starts, index, side="right")) - 1
            rows[number].append(int(index - self._starts[number]))
        return rows

    def _parts(self, rows: Mapping[int, Sequence[int]]) -> dict[int, Group]:
        """What is asked for of each group that can be read."""
        parts: dict[int, Group] = {}
        for number, asked in rows.items():
            try:
                parts[number] = part_of(self._groups[number], asked)
            except ValueError as error:
                self._leave_out(error, len(asked))
        return parts

    def _mixes(
        self, rows: Mapping[int, Sequence[int]], parts: Mapping[int, Group]
    ) -> Iterator[ReplayedMix]:
        if not parts:
            return
        records = joined(list(parts.values()))
        numbers = [int(self._starts[number]) + row for number in parts for row in rows[number]]
        firsts = {int(self._starts[number]): number for number in parts}
        pictures, labels = self._pictures(records)
        for begin in range(0, len(numbers), AT_ONCE):
            some = range(begin, min(begin + AT_ONCE, len(numbers)))
            for row, masks in zip(some, parts_of(records, some, self._view.size), strict=True):
                sources = records.source[row].tolist()
                if not all(place in pictures for place in sources):
                    self._leave_out(ValueError("a picture that it is made of cannot be read"), 1)
                    continue
                mixed = blend_parts([pictures[place] for place in sources], masks)
                number, own = numbers[row], sources[0]
                if number in firsts:
                    self._compare(parts[firsts[number]], mixed, firsts[number])
                image = torch.from_numpy(pictures[own])
                mix = torch.from_numpy(mixed)
                yield ReplayedMix(mix, image, labels[own], number, records, row)

    def _pictures(self, records: Group) -> tuple[dict[int, Array], dict[int, Any]]:
        """Views and labels, by row of the originals, of those that can be read."""
        places: dict[int, list[int]] = defaultdict(list)  # of a picture, its views
        for place, sample in enumerate(records.sample.tolist()):
            places[sample].append(place)
        pictures: dict[int, Array] = {}
        labels: dict[int, Any] = {}
        labelled = self._output in ("batch", "concat")
        for sample, picture, label in self._dataset.readable(list(places), labelled=labelled):
            picture = self._view.prepare(picture)
            for place in places[sample]:
                crop = Crop._make([*records.crop[place].tolist(), int(records.flip[place])])
                pictures[place], labels[place] = self._view.cut(picture, crop), label
        return pictures, labels

    def _compare(self, group: Group, mixed: Array, number: int) -> None:
        """The first mix of a group says whether pictures are decoded as they were then."""
        if np.array_equal(picture_digest(mixed), group.digest):
            return
        raise ValueError(
            f"recipes: expected the pixels that were generated, got others in group {number}. The "
            f"recipes were made with {self._groups.versions}, here are {versions()}: a picture is "
            "decoded or resized otherwise. Install those versions, or generate anew."
        )

    def _leave_out(self, error: ValueError, count: int) -> None:
        if self._dataset.on_error == "raise":
            raise error
        self._dataset.skip(*[str(error)] * count)

    # -- a batch ---------------------------------------------------------------------------------

    def _labels(self, mixes: Sequence[ReplayedMix]) -> TeacherLabels:
        """The teacher's, of the mixes."""
        columns = _columns(mixes, ("index", "log_prob", "rest"), [mix.row for mix in mixes])
        return labels_of(int(self.settings["num_classes"]), *columns)

    def _result(self, batch: MixBatch, mixed: Tensor, mixes: list[ReplayedMix]) -> MixResult:
        own = [int(mix.group.source[mix.row, 0]) for mix in mixes]
        originals = ("original_index", "original_log_prob", "original_rest")
        teacher = labels_of(int(self.settings["num_classes"]), *_columns(mixes, originals, own))
        label = self._labels(mixes)
        kinds, outcome, steps = (
            torch.from_numpy(column.astype(np.int64))
            for column in _columns(mixes, ("kind", "outcome", "steps"), [mix.row for mix in mixes])
        )
        groups = np.searchsorted(self._starts, [mix.number for mix in mixes], side="right")
        nothing = torch.full((len(mixes),), torch.nan)
        logits, fixed = None, None
        if self._output == "batch" and bool((kinds == Kind.LOGITS).all()):
            logits = torch.stack([_mask_logits(mix) for mix in mixes])
        elif self._output == "batch":
            parts = [
                parts_of(group, [mix.row for mix in some], self._view.size)
                for group, some in groupby(mixes, key=lambda mix: mix.group)
            ]
            fixed = torch.from_numpy(np.concatenate(parts)) / LEVELS
        result = Mixed(
            images=mixed,
            sources=_rows_of(mixes, groups),
            weights=torch.stack([weights_of(m.group, m.row) for m in mixes]),
            outcome=outcome,
            steps=steps,
            sparsity=nothing,
            forwards=nothing,
            backwards=nothing,
            mask_logits=logits,
            quantised=True,
            fixed_masks=fixed,
        )
        return MixResult(batch.images, batch.labels, teacher, result, label, label.probs)


@dataclass
class _Replayed:
    """Stands where a batch has its mixer; there is nothing left to mix."""

    output: OutputForm
    target: TargetForm

    def mix(self, images: Tensor, labels: Tensor | None, ids: Tensor, extra: Any) -> MixResult:
        raise AssertionError("a replayed batch holds its mixes")


def replay(
    recipes: str | Path,
    dataset: ShardDataset,
    *,
    output: Literal["batch", "tuple", "concat", "dict"] = "batch",
    target: Literal["soft", "hard"] = "soft",
) -> Replay:
    """The mixes that `generate` described, made again from the pictures; no teacher is needed.

    Args:
        recipes: the folder that `generate` wrote.
        dataset: the same shards. Its transform is not applied: recipes hold crop and flip. Its
            `on_error` holds here, too: with ``"skip"``, mixes that cannot be made are counted in
            its `skipped`.
        output: what `Replay.collate` returns: a `MixBatch`, or a form of `SuperMixCollate`.
        target: ``"soft"`` or ``"hard"``.

    Raises:
        ValueError: for a folder that is not finished or damaged, and for other shards.
    """
    return Replay(recipes, dataset, output, target)


def _columns(
    mixes: Sequence[ReplayedMix], names: Sequence[str], rows: Sequence[int]
) -> list[Array]:
    """These fields of each mix's group, at one row for each."""
    pairs = list(zip(mixes, rows, strict=True))
    return [np.stack([vars(mix.group)[name][row] for mix, row in pairs]) for name in names]


def _samples(mix: ReplayedMix) -> Tensor:
    """Indices (k,) in the data set of what a mix is made of."""
    return torch.from_numpy(mix.group.sample[mix.group.source[mix.row]].astype(np.int64))


def _rows_of(mixes: Sequence[ReplayedMix], groups: Array) -> Tensor:
    """Rows (M, k) of the batch whose own originals each mix is made of; -1 where none is."""
    samples = [mix.group.sample[mix.group.source[mix.row]].tolist() for mix in mixes]
    pictures = [[(group, one) for one in each] for group, each in zip(groups, samples, strict=True)]
    row = {sources[0]: number for number, sources in enumerate(pictures)}
    return torch.tensor([[row.get(picture, -1) for picture in sources] for sources in pictures])


def _mask_logits(mix: ReplayedMix) -> Tensor:
    """(k, w, w) of a mix whose masks are a grid."""
    steps = torch.from_numpy(mix.group.grid[place_in_kind(mix.group, mix.row)].astype(np.float32))
    return STEP * torch.cat([steps, torch.zeros_like(steps[:1])])
