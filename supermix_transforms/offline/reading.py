"""A folder of recipes as its groups, each read when it is asked for."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.data.views import View
from supermix_transforms.offline.ledger import Ledger, fingerprint
from supermix_transforms.offline.recipes import Group, RecipeReader

__all__ = ["RecipeGroups", "open_unit"]

KEPT = 32  # groups whose records stay in memory: 3 MB, two windows of `ShardSampler`


class RecipeGroups:
    """The groups of a folder of recipes, which fits the pictures that it was made of.

    Args:
        folder: what `generate` wrote.
        dataset: the pictures. With its ``on_error="skip"``, units that are missing or damaged are
            left out and counted in its `skipped`.

    Attributes:
        settings: what the folder was made with.
        versions: of the packages that it was made with.
        view: of the pictures.
        lengths: mixes of each group.

    Raises:
        ValueError: for a folder that is not finished, damaged, or without mixes, and for other
            pictures.
        TypeError: for a dataset that is not of shards.
    """

    def __init__(self, folder: str | Path, dataset: ShardDataset) -> None:
        ledger = Ledger(folder)
        self.settings: dict[str, Any] = ledger.settings()
        self.versions: Any = ledger.versions()
        self.view: View = self._view_of(ledger, dataset)
        self._samples = len(dataset)
        self._paths: list[Path] = []
        self._places: list[tuple[int, int]] = []  # unit and number of each group
        self.lengths: list[int] = []
        problems = self._open(ledger)
        if problems and dataset.on_error == "raise":
            raise ValueError(problems[0])
        for problem in problems:
            dataset.skip(problem)
        if sum(self.lengths) == 0:
            raise ValueError(f"recipes: expected mixes in {str(folder)!r}, got none.")
        self._kept: OrderedDict[int, Group] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Group:
        """A group.

        Raises:
            ValueError: if it is damaged, or speaks of pictures that the dataset does not have.
        """
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        if len(self._kept) == KEPT:
            self._kept.popitem(last=False)
        unit, place = self._places[number]
        group = open_unit(self._paths[unit]).group(place)
        if len(group.sample) and int(group.sample.max()) >= self._samples:
            raise ValueError(
                f"recipes: expected samples below {self._samples}, got "
                f"{int(group.sample.max())} in {str(self._paths[unit])!r}. Generate it anew."
            )
        self._kept[number] = group
        return group

    def _view_of(self, ledger: Ledger, dataset: ShardDataset) -> View:
        """The view, once all else of the settings is found to fit."""
        settings, folder = self.settings, str(ledger.folder)
        if settings.get("form") != "recipes":
            raise ValueError(
                f"recipes: expected a folder of recipes, got {settings.get('form')!r} in "
                f"{folder!r}. Read mixed shards with webdataset."
            )
        if not isinstance(dataset, ShardDataset):
            raise TypeError(
                f"dataset: expected a ShardDataset of the shards that {folder!r} was made of, "
                f"got {type(dataset).__name__}. Pass ShardDataset(urls)."
            )
        known, here = settings.get("shards"), dataset.identity
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
                same = (layout.k, layout.num_classes, layout.top, layout.height, layout.width) == (
                    *(settings.get(name) for name in ("k", "num_classes", "top")),
                    *self.view.size,
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
