"""Labelled pictures in WebDataset tars, as a map-style dataset for a plain DataLoader.

    dataset = ShardDataset("train-{000000..001281}.tar", transform=transform)
    sampler = ShardSampler(dataset)
    loader = DataLoader(dataset, 256, sampler=sampler, num_workers=8, collate_fn=...)

A sample is one read at a known offset (`tarindex`) and a decode by Pillow, in the worker. All that
comes after is torch's and Accelerate's own: batches, ranks, resuming. Nothing but the picture and
its label is decoded, so no pickle in a shard is ever opened.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from supermix_transforms.data.cache import cached_path, fetch, published_index
from supermix_transforms.data.pictures import read_picture
from supermix_transforms.data.tarindex import PICTURES, ShardIndex, load_index, read_members

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Labels",
    "ShardDataset",
    "UnreadableError",
    "check_some",
    "check_there",
    "find_shards",
]

LABELS = ("cls", "txt", "json")
ELSEWHERE = re.compile(r"\w\w+:")  # a scheme, and no drive of Windows
MOST_MEMBER_BYTES = 1 << 30  # read at once
WORKERS = 1025  # places to count in
SHOWN = 5  # of the samples that are in order for an error, its message names so many

Labels: TypeAlias = Sequence[str] | Callable[[dict[str, bytes]], Any] | None


class UnreadableError(ValueError):
    """One sample's picture or label cannot be read; its shard is as it was."""


class ShardDataset(Dataset[tuple[Any, Any]]):
    """Samples ``(picture, label)`` of WebDataset tars.

    A sample's picture is its first member of jpg, jpeg, png, webp, made RGB and upright; its label
    is read from ``cls`` (a class index), else ``txt`` (an index, or a name of `labels`), else
    ``json`` (an index, or an object with it under "cls" or "label"). Keys are as webdataset reads
    them.

    Args:
        urls: tars: a path, a brace pattern ``train-{000..127}.tar``, a folder (its ``*.tar``, in
            the order of their names), an address of any scheme of ``webdataset.gopen`` (``https:``,
            ``hf:``, ``gs:``; ``pipe:`` runs its command), or a list of these.
        transform: of the picture, a PIL image; any torchvision v2 transform.
        cache_dir: where shards from elsewhere are copied, each whole when it is first needed: at
            once if there is no index beside it (``URL.index``, of `supermix index`), else when one
            of its samples is read. Shared by all processes.
        labels: class names in the order of their indices, for shards that hold names; or a function
            of a sample's other members (suffix -> bytes) that returns its label.
        on_error: ``"raise"``, or ``"skip"``: samples that cannot be read are left out, counted in
            `skipped` and named in a warning. A shard that is damaged or has changed, and what the
            transform or the function `labels` raises, is always an error. Batches are short by what
            was left out, so those of several ranks may differ in size; `gather_for_metrics` needs
            equal ones: evaluate with "raise".

    Attributes:
        shards: the tars, in order.
        lengths: samples of each.

    Raises:
        ValueError: for shards that are not there or not whole, and for samples without a picture or
            label or with a key that occurs twice. For pictures and labels that cannot be read,
            when they are.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        *,
        transform: Callable[[Any], Any] | None = None,
        labels: Labels = None,
        cache_dir: str | Path | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error: expected "raise" or "skip", got {on_error!r}.')
        self.transform = transform
        self.labels: Labels = labels
        self.on_error = on_error
        self.shards: list[Path] = []
        self._indices: list[ShardIndex] = []
        self._urls: dict[Path, str] = {}  # of copies
        shards = find_shards(urls)
        check_there(shards)
        for shard in shards:
            if isinstance(shard, Path):
                path, index = shard, load_index(shard)
            else:
                path, index = self._elsewhere(shard, cache_dir)
            self.shards.append(path)
            self._indices.append(index)
        # by all workers, each in a place of its own: two could not add to one at once
        self._skipped = torch.zeros(WORKERS, dtype=torch.int64).share_memory_()
        self._rows: list[np.ndarray] = []  # of each index, those that are samples
        problems: list[str] = []
        for shard, index in zip(self.shards, self._indices, strict=True):
            found = self._problems(index)
            problems += [
                f"{index.keys[row]!r} in {shard.name} {what}" for row, what in found.items()
            ]
            self._rows.append(np.setdiff1d(np.arange(len(index)), list(found)))
        if problems and on_error == "raise":
            shown = "; ".join(problems[:SHOWN]) + ("; ..." if len(problems) > SHOWN else "")
            raise ValueError(
                f"shards: expected a picture ({', '.join(PICTURES)}) and a label "
                f"({', '.join(LABELS)}) for each key, got {len(problems)} without: {shown}. Mend "
                'the shards, pass labels=, or on_error="skip" to leave these out.'
            )
        if problems:
            self.skip(*problems)
        self.lengths: list[int] = [len(rows) for rows in self._rows]
        self._starts = np.cumsum([0, *self.lengths])
        if len(self) == 0:
            raise ValueError(
                f"shards: expected samples, got none in {len(self.shards)} shards, "
                f"first {str(self.shards[0])!r}. A sample has a picture ({', '.join(PICTURES)}) "
                f"and a label ({', '.join(LABELS)}) of one key."
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The sample at `index`; negative ones count from the end."""
        picture, label = self.read(index)
        return picture if self.transform is None else self.transform(picture), label

    def read(self, index: int, *, labelled: bool = True) -> tuple["Image", Any]:
        """The sample at `index` before the transform: picture, RGB and upright, and label.

        Without `labelled` the label is not read, and None.

        Raises:
            UnreadableError: for a picture or a label that cannot be read.
            ValueError: for a shard that has changed.
        """
        name, members = self._members(index, pictures=True, labelled=labelled)
        suffix = next(suffix for suffix in PICTURES if suffix in members)
        try:
            picture = read_picture(name, members.pop(suffix))
        except ValueError as error:
            raise UnreadableError(str(error)) from error
        return picture, self._label(name, members) if labelled else None

    def label(self, index: int) -> Any:
        """The label of the sample at `index`; its picture is not read.

        Raises:
            ValueError: as `read`.
        """
        return self._label(*self._members(index, pictures=False, labelled=True))

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """The samples of a batch; with ``on_error="skip"`` those of them that can be read."""
        samples = [
            (picture if self.transform is None else self.transform(picture), label)
            for _, picture, label in self.readable(indices)
        ]
        check_some(samples, len(indices))
        return samples

    def readable(
        self, indices: Sequence[int], *, labelled: bool = True
    ) -> Iterator[tuple[int, "Image", Any]]:
        """Index, picture and label of each of these, as `read` gives them.

        With ``on_error="skip"`` those that cannot be read are left out and counted.

        Raises:
            ValueError: as `read`.
        """
        for index in indices:
            try:
                sample = self.read(index, labelled=labelled)
            except UnreadableError as error:
                if self.on_error == "raise":
                    raise
                self.skip(str(error))
                continue
            yield index, *sample

    def name(self, index: int) -> str:
        """Shard and key of a sample."""
        shard, known, row = self._place(index)
        return f"{shard.name}/{known.keys[row]}"

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What tells the shards from others: name, samples and sha256 of each."""
        return [
            {"name": shard.name, "samples": length, "sha256": index.sha256}
            for shard, index, length in zip(self.shards, self._indices, self.lengths, strict=True)
        ]

    def skip(self, *problems: str) -> None:
        """Count what is left out, and warn."""
        shown = "; ".join(problems[:SHOWN]) + ("; ..." if len(problems) > SHOWN else "")
        worker = get_worker_info()
        self._skipped[0 if worker is None else 1 + worker.id % (WORKERS - 1)] += len(problems)
        warnings.warn(f"{len(problems)} samples skipped: {shown}", stacklevel=3)

    @property
    def skipped(self) -> int:
        """Samples left out so far, in all workers."""
        return int(self._skipped.sum())

    def _elsewhere(self, url: str, cache_dir: str | Path | None) -> tuple[Path, ShardIndex]:
        """Where the copy of a shard is, or will be, and the shard's index."""
        if cache_dir is None:
            raise ValueError(
                f"cache_dir: expected a folder for copies of shards from elsewhere, got None and "
                f"{url!r}. Pass one with room for them."
            )
        path = cached_path(url, Path(cache_dir))
        self._urls[path] = url
        if not path.exists():
            index = published_index(url)
            if index is not None:
                return path, index
            fetch(url, path)
        return path, load_index(path)

    def _problems(self, index: ShardIndex) -> dict[int, str]:
        """What is wrong with the samples of a shard, as far as its index tells."""

        def has(suffixes: Iterable[str], least: int = 0) -> Any:
            sizes = [index.places[each][:, 1] for each in suffixes if each in index.places]
            return np.any([size >= least for size in sizes] or [np.zeros(len(index), bool)], axis=0)

        def rows(found: Any, what: str) -> dict[int, str]:
            return dict.fromkeys(np.flatnonzero(found).tolist(), what)

        told = index.places.keys() if callable(self.labels) else LABELS
        problems = rows(~has(PICTURES), "has no picture")
        if not callable(self.labels):
            problems |= rows(~has(LABELS), "has no label")
        problems |= rows(
            has({*PICTURES, *told}, MOST_MEMBER_BYTES + 1),
            f"has a member of more than {MOST_MEMBER_BYTES} bytes",
        )
        return dict(sorted((problems | dict.fromkeys(index.doubles, "is there twice")).items()))

    def _place(self, index: int) -> tuple[Path, ShardIndex, int]:
        """Shard, its index, and the row of a sample there."""
        place = range(len(self))[index]
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        row = int(self._rows[number][place - self._starts[number]])
        return self.shards[number], self._indices[number], row

    def _members(
        self, index: int, *, pictures: bool, labelled: bool
    ) -> tuple[str, dict[str, bytes]]:
        """What a sample is called, and its picture, what tells its label, or both."""
        shard, known, row = self._place(index)
        if shard in self._urls and not shard.exists():
            fetch(self._urls[shard], shard, published=known)
        wanted = [
            suffix
            for suffix in known.places
            if (pictures if suffix in PICTURES else labelled)
            and (suffix in PICTURES or suffix in LABELS or callable(self.labels))
        ]
        return f"{known.keys[row]} in {shard}", read_members(shard, known, row, wanted)

    def _label(self, name: str, members: dict[str, bytes]) -> Any:
        if callable(self.labels):
            return self.labels(members)
        suffix = next(suffix for suffix in LABELS if suffix in members)
        text = members[suffix].decode("utf-8", "replace").strip()
        value: Any = text
        if suffix == "json":
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = text
            if isinstance(value, dict):
                value = value.get("cls", value.get("label", text))
        if self.labels is not None and value in self.labels:
            return list(self.labels).index(value)
        try:
            index = int(str(value))  # neither 1.5 nor True
            if not 0 <= index < 1 << 63:
                raise ValueError("no int64, or below 0")
            return index
        except ValueError:
            raise UnreadableError(
                f"shards: expected a class index as the label of {name!r}, got {text[:60]!r} in "
                f"its {suffix}. Pass the class names as labels=, or a function that reads it."
            ) from None


def check_some(samples: Sequence[Any], asked: int) -> None:
    """Raise a ValueError if nothing is left of a batch."""
    if not samples and asked > 0:
        raise ValueError(
            f"shards: expected a batch of {asked} samples, got none that can be read. Look at the "
            "warnings before this for the reasons."
        )


def find_shards(urls: str | Path | Sequence[str | Path]) -> list[Path | str]:
    """The tars that a path, a brace pattern, a folder, or a list of these stands for.

    Addresses elsewhere stay strings.

    Raises:
        ValueError: for folders without a tar, none at all, or one twice.
    """
    from braceexpand import braceexpand

    shards: list[Path | str] = []
    for url in [urls] if isinstance(urls, (str, Path)) else urls:
        for each in braceexpand(url) if isinstance(url, str) and "{" in url else [url]:
            if isinstance(each, str) and ELSEWHERE.match(each):
                shards.append(each)
                continue
            path = Path(each)
            found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
            if not found:
                raise ValueError(f"shards: expected *.tar in {str(path)!r}, got none.")
            shards += found
    if not shards:
        raise ValueError("shards: expected at least one tar, got an empty list.")
    if len(set(shards)) < len(shards):
        twice = next(shard for i, shard in enumerate(shards) if shard in shards[:i])
        raise ValueError(f"shards: expected each tar once, got {str(twice)!r} twice.")
    return shards


def check_there(shards: Sequence[Path | str]) -> None:
    """Raise a ValueError for a file that is not there: before hours of indexing, not after them."""
    missing = [each for each in shards if isinstance(each, Path) and not each.exists()]
    if missing:
        raise ValueError(
            f"shards: expected a tar file, got {str(missing[0])!r}: No such file or directory. "
            "Check the path."
        )
