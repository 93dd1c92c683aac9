"""Make the mixes of recipes again, without a teacher, in the workers of any DataLoader.

    recipes = replay("recipes/", ShardDataset("train-{000000..001281}.tar"))
    sampler = ShardSampler(recipes)
    loader = DataLoader(recipes, 256, sampler=sampler, num_workers=8, collate_fn=recipes.collate)

In any order, a batch decodes each picture once, and a process has the records of at most `KEPT`
groups in memory, and those of a batch's own mixes. Neighbours share pictures: a sampler with
``window=0``, which shuffles groups and keeps neighbours together, decodes hardly more pictures than
there are mixes, others up to k times as many. Such batches teach less (docs/reproduction.md).
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from supermix_transforms.batch import MixBatch, MixResult, OutputForm, TargetForm
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.data.views import Crop, View
from supermix_transforms.offline.ledger import Ledger, fingerprint, versions
from supermix_transforms.offline.recipes import Array, Group, Kind, RecipeReader, picture_digest
from supermix_transforms.offline.stored import labels_of, part_of, parts_of, weights_of
from supermix_transforms.quantised import LEVELS, STEP, blend_parts
from supermix_transforms.results import Mixed, TeacherLabels

__all__ = ["Replay", "ReplayedMix", "open_unit", "replay"]

KEPT = 32  # groups whose records stay in memory: 3 MB, two windows of `ShardSampler`
SHOWN = 3


class ReplayedMix(NamedTuple):
    """A mix, its own original, and where its record is."""

    mixed: Tensor  # (3, H, W) uint8
    image: Tensor  # (3, H, W) uint8, the first of its sources
    label: Any  # of `image`, the data set's; None for output="tuple" and "dict"
    number: int  # of the mix
    group: Group  # as much of it as the batch needs
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
        ledger = Ledger(recipes)
        self.settings: dict[str, Any] = ledger.settings()
        self._versions = ledger.versions()
        self._dataset, self._output, self._target = dataset, output, target
        self._view = self._read_settings(ledger)
        self._paths: list[Path] = []
        self._places: list[tuple[int, int]] = []  # unit and number of each group
        self.lengths: list[int] = []
        problems = self._open(ledger)
        if problems and dataset.on_error == "raise":
            raise ValueError(problems[0])
        for problem in problems:
            dataset.skip(problem)
        self._starts = np.cumsum([0, *self.lengths])
        if len(self) == 0:
            raise ValueError(f"recipes: expected mixes in {str(recipes)!r}, got none.")
        self._kept: OrderedDict[int, Group] = OrderedDict()

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
        found: dict[int, ReplayedMix] = {}
        for number, rows in self._by_group(indices).items():
            found |= {mix.number: mix for mix in self._mixes(number, rows)}
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

    # -- a group ---------------------------------------------------------------------------------

    def _by_group(self, indices: Sequence[int]) -> dict[int, list[int]]:
        """Groups, and the rows of each that are asked for."""
        rows: dict[int, list[int]] = defaultdict(list)
        for index in indices:
            number = int(np.searchsorted(self._starts, index, side="right")) - 1
            rows[number].append(int(index - self._starts[number]))
        return rows

    def _mixes(self, number: int, rows: Sequence[int]) -> Iterator[ReplayedMix]:
        try:
            group = self._group(number)
        except ValueError as error:
            self._leave_out(error, len(rows))
            return
        part = part_of(group, rows)
        pictures: dict[int, Array] = {}
        labels: dict[int, Any] = {}
        place_of = {int(sample): place for place, sample in enumerate(part.sample)}
        labelled = self._output in ("batch", "concat")
        for sample, picture, label in self._dataset.readable(list(place_of), labelled=labelled):
            place = place_of[sample]
            top, left, height, width = part.crop[place].tolist()
            crop = Crop(top, left, height, width, int(part.flip[place]))
            pictures[place] = self._view.cut(self._view.prepare(picture), crop)
            labels[place] = label
        masks = parts_of(part, range(len(rows)), self._view.size)
        for row, (in_group, parts) in enumerate(zip(rows, masks, strict=True)):
            sources = part.source[row].tolist()
            if not all(place in pictures for place in sources):
                self._leave_out(ValueError("a picture that it is made of cannot be read"), 1)
                continue
            mixed = blend_parts([pictures[place] for place in sources], parts)
            if in_group == 0:
                self._compare(part, mixed, number)
            own = sources[0]
            place = int(self._starts[number]) + in_group
            image = torch.from_numpy(pictures[own])
            yield ReplayedMix(torch.from_numpy(mixed), image, labels[own], place, part, row)

    def _group(self, number: int) -> Group:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        if len(self._kept) == KEPT:
            self._kept.popitem(last=False)
        unit, place = self._places[number]
        group = open_unit(self._paths[unit]).group(place)
        if len(group.sample) and int(group.sample.max()) >= len(self._dataset):
            raise ValueError(
                f"recipes: expected samples below {len(self._dataset)}, got "
                f"{int(group.sample.max())} in {str(self._paths[unit])!r}. Generate it anew."
            )
        self._kept[number] = group
        return group

    def _compare(self, group: Group, mixed: Array, number: int) -> None:
        """The first mix of a group says whether pictures are decoded as they were then."""
        if np.array_equal(picture_digest(mixed), group.digest):
            return
        raise ValueError(
            f"recipes: expected the pixels that were generated, got others in group {number}. The "
            f"recipes were made with {self._versions}, here are {versions()}: a picture is decoded "
            "or resized otherwise. Install those versions, or generate anew."
        )

    def _leave_out(self, error: ValueError, count: int) -> None:
        if self._dataset.on_error == "raise":
            raise error
        self._dataset.skip(*[str(error)] * count)

    # -- opening ---------------------------------------------------------------------------------

    def _read_settings(self, ledger: Ledger) -> View:
        """The view, once all else is found to fit."""
        settings, folder = self.settings, str(ledger.folder)
        if settings.get("form") != "recipes":
            raise ValueError(
                f"recipes: expected a folder of recipes, got {settings.get('form')!r} in "
                f"{folder!r}. Read mixed shards with webdataset."
            )
        if not isinstance(self._dataset, ShardDataset):
            raise TypeError(
                f"dataset: expected a ShardDataset of the shards that {folder!r} was made of, "
                f"got {type(self._dataset).__name__}. Pass ShardDataset(urls)."
            )
        known, here = settings.get("shards"), self._dataset.identity
        if known != here:
            known = known if isinstance(known, list) else []
            pairs = zip(here, known, strict=False)
            other = next((a.get("name") for a, b in pairs if a != b), None)
            raise ValueError(
                f"recipes: expected the {len(known)} shards that {folder!r} was made of, got "
                f"{len(here)}" + ("." if other is None else f", of which {other} differs.") + " "
                "Open the same shards, in the same order."
            )
        try:
            view = settings["view"]
            return View(**{**view, "size": tuple(view["size"]), "resize": _tuple(view["resize"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"recipes: expected settings that `supermix generate` wrote, got {folder!r}: "
                f"{error}. Generate anew."
            ) from error

    def _open(self, ledger: Ledger) -> list[str]:
        """Find the groups; what is missing or damaged."""
        entries = ledger.entries()
        problems = []
        units = self.settings.get("units")
        if len(entries) != units:
            problems.append(
                f"recipes: expected {units} units in {str(ledger.folder)!r}, got {len(entries)}. "
                "Start `supermix generate` with the same options again: it goes on."
            )
        expected = fingerprint(self.settings)
        for _, entry in sorted(entries.items()):
            try:
                reader = open_unit(ledger.path(entry))
                layout, settings = reader.layout, self.settings
                same = (layout.k, layout.num_classes, (layout.height, layout.width)) == (
                    settings.get("k"),
                    settings.get("num_classes"),
                    self._view.size,
                )
                if layout.settings != expected or not same:
                    raise ValueError(
                        f"recipes: expected a unit of these settings, got {entry.file!r} of others "
                        f"in {str(ledger.folder)!r}. Generate into a folder of its own."
                    )
            except ValueError as error:
                problems.append(str(error))
                continue
            self._places += [(len(self._paths), place) for place in range(len(reader))]
            self._paths.append(ledger.path(entry))
            self.lengths += reader.counts
        return problems

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
            parts = [parts_of(mix.group, [mix.row], self._view.size) for mix in mixes]
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


def open_unit(path: Path) -> RecipeReader:
    """A file of recipes; each group is read when it is asked for.

    Raises:
        ValueError: as `RecipeReader`.
    """

    def read(offset: int, size: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)

    return RecipeReader(str(path), read, path.stat().st_size)


def _tuple(value: Any) -> Any:
    return None if value is None else tuple(value)


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
    place = int((mix.group.kind[: mix.row] == Kind.LOGITS).sum())
    steps = torch.from_numpy(mix.group.grid[place].astype(np.float32))
    return STEP * torch.cat([steps, torch.zeros_like(steps[:1])])
