"""Whether the units of a folder are what its settings and its manifest say."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supermix_transforms.data.tarindex import make_index, read_members
from supermix_transforms.offline.ledger import Ledger, UnitEntry, fingerprint
from supermix_transforms.offline.mixedshards import INFO, info_of
from supermix_transforms.offline.reading import open_unit
from supermix_transforms.results import Outcome

__all__ = ["Plan", "Sums", "info_problems", "look_at_recipes", "look_at_shard"]


@dataclass
class Sums:
    """What units add up to."""

    fields: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    steps: list[int] = field(default_factory=list)

    def add(self, outcomes: Iterable[str], steps: Iterable[int], entry: UnitEntry) -> None:
        """Of all mixes of a unit; raises a ValueError unless as many converged as were entered."""
        counted = Counter(outcomes)
        self.outcomes += counted
        self.steps += steps
        if counted[Outcome.CONVERGED.name] != entry.converged:
            raise ValueError(
                f"{entry.file}: expected {entry.converged} converged mixes, got "
                f"{counted[Outcome.CONVERGED.name]}"
            )


@dataclass(frozen=True)
class Plan:
    """What the settings say that there must be."""

    form: str
    passes: int
    samples: int  # of the shards, in a pass
    size: int  # samples of a unit
    each: int  # units of a pass
    units: int  # of all passes

    @classmethod
    def of(cls, ledger: Ledger, settings: dict[str, Any]) -> "Plan":
        """The plan of settings that are checked first; a ValueError if they are none."""
        try:
            lengths = [shard["samples"] for shard in settings["shards"]]
            numbers = {name: settings[name] for name in ("passes", "batch_size", "unit_batches")}
            numbers |= {"units": settings["units"], "samples": sum(lengths)}
            for name, number in numbers.items():
                if type(number) is not int or not 1 <= number < 1 << 48:
                    raise ValueError(f"{name} is {number!r}")
            size = numbers["batch_size"] * numbers["unit_batches"]
            each = -(-numbers["samples"] // size)
            if numbers["units"] != numbers["passes"] * each:
                raise ValueError(f"units is {numbers['units']}, of passes of {each}")
            if settings["form"] not in ("recipes", "shards"):
                raise ValueError(f"form is {settings['form']!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"recipes: expected settings that `supermix generate` wrote, got others in "
                f"{str(ledger.folder)!r}: {type(error).__name__}: {error}. Copy settings.json "
                "again, or generate anew."
            ) from error
        passes, samples, units = (numbers[name] for name in ("passes", "samples", "units"))
        return cls(settings["form"], passes, samples, size, each, units)

    def problems(self, entry: UnitEntry) -> list[str]:
        """What of a unit's line does not follow from the settings."""
        epoch, number = map(int, entry.unit.split("-"))
        suffix = {"recipes": ".recipe", "shards": ".tar"}[self.form]
        if epoch >= self.passes or number >= self.each or entry.file != f"{entry.unit}{suffix}":
            return [
                f"{entry.file}: expected {self.form}, {self.passes} passes of {self.each} units, "
                "got another unit: remove its line from the manifest"
            ]
        most = min(self.size, self.samples - number * self.size)
        if entry.mixes > most:
            return [f"{entry.file}: expected at most {most} mixes, got {entry.mixes}"]
        return []


def look_at_recipes(
    path: Path,
    entry: UnitEntry,
    settings: dict[str, Any],
    plan: Plan,
    verify: bool,
    sums: Sums,
) -> None:
    """Add up a file of recipes; raises a ValueError for what does not fit its entry."""
    reader = open_unit(path)
    if sum(reader.counts) != entry.mixes:
        raise ValueError(f"{path.name}: expected {entry.mixes} mixes, got {sum(reader.counts)}")
    sums.fields.update(reader.bytes_by_field())
    if not verify:
        return
    if reader.layout.settings != fingerprint(settings):
        raise ValueError(f"{path.name}: it was made with other settings than settings.json has")
    outcomes: list[str] = []
    steps: list[int] = []
    for group in map(reader.group, range(len(reader))):
        if len(group.sample) and int(group.sample.max()) >= plan.samples:
            raise ValueError(f"{path.name}: it has a sample that the shards have not")
        outcomes += (Outcome(int(value)).name for value in group.outcome)
        steps += group.steps.tolist()
    sums.add(outcomes, steps, entry)


def look_at_shard(path: Path, entry: UnitEntry, settings: dict[str, Any], sums: Sums) -> None:
    """Add up a shard of mixes; raises a ValueError for what does not fit its entry."""
    index = make_index(path)
    if len(index) != entry.mixes:
        raise ValueError(f"{path.name}: expected {entry.mixes} samples, got {len(index)}")
    suffixes = {str(settings.get("picture_format")), "cls", "json"}
    found = index.places.keys() - {"soft.json", "soft.npy"}
    labels = len(index.places.keys() & {"soft.json", "soft.npy"})
    lacking = any((places < 0).any() for places in index.places.values())
    if len(index) and (found != suffixes or labels != 1 or lacking):
        raise ValueError(f"{path.name}: expected {sorted(suffixes)} and a label of each sample")
    try:
        sources = [
            json.loads(read_members(path, index, row, ["json"])["json"])
            for row in range(len(index))
        ]
        sums.add(
            (Outcome[source["outcome"]].name for source in sources),
            [int(source["steps"]) for source in sources],
            entry,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path.name}: a sample does not say how it was made: {error}") from error


def info_problems(ledger: Ledger) -> list[str]:
    """What is wrong with ``_info.json`` of mixed shards, if there is one."""
    path = ledger.folder / INFO
    if not path.exists() or path.read_bytes() == info_of(ledger.entries().values()):
        return []
    return [f"{INFO} does not list the shards that are there: start generate again to write it"]
