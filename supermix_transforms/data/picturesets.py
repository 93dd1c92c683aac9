"""Pictures to train on: of shards, of a folder, or of torchvision's data sets, in their views."""

import bisect
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torchvision.datasets
from torch import Tensor
from torch.utils.data import Dataset

from supermix_transforms.data.pictures import SUFFIXES, read_picture
from supermix_transforms.data.shards import check_some
from supermix_transforms.data.views import ViewDraws
from supermix_transforms.draws import Draw, Purpose, generator, seeded, set_epoch_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Beside",
    "Other",
    "OtherPictures",
    "PictureSet",
    "Readable",
    "Shown",
    "class_indices",
    "open_folder",
    "open_torchvision",
]


class Readable(Protocol):
    """What `Shown` reads: a `ShardDataset` or a `PictureSet`."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> Any: ...

    def readable(
        self, indices: Sequence[int], *, labelled: bool = True
    ) -> Iterator[tuple[int, "Image", Any]]: ...


class PictureSet:
    """A data set of pairs ``(PIL image, class index)``, as torchvision's are without a transform.

    Attributes:
        classes: names in the order of their indices; None where nobody labelled the pictures, whose
            label is 0 then.
    """

    def __init__(self, dataset: Any, classes: Sequence[str] | None) -> None:
        self._dataset = dataset
        self.classes: tuple[str, ...] | None = None if classes is None else tuple(classes)

    def __len__(self) -> int:
        return len(self._dataset)

    def label(self, index: int) -> Any:
        """The class index alone; the picture is not read where the data set has `targets`."""
        targets = getattr(self._dataset, "targets", None)
        return self._dataset[index][1] if targets is None else targets[index]

    def readable(
        self, indices: Sequence[int], *, labelled: bool = True
    ) -> Iterator[tuple[int, "Image", Any]]:
        """Index, picture (RGB) and label of each of these.

        Raises:
            ValueError: for a picture that cannot be read.
        """
        for index in indices:
            picture, label = self._dataset[index]
            yield index, picture.convert("RGB"), label if labelled else None


def open_folder(path: str | Path) -> PictureSet:
    """The pictures of a folder: of its subfolders, each a class; or its own, of no class.

    Subfolders are searched at any depth, in the order of their names.

    Raises:
        ValueError: if there is no such folder, no picture in it, or none in a class.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"images: expected a folder of pictures, got {str(path)!r}, which is not one. Check "
            "the path, or pass tars as --shards."
        )
    flat = any(map(_is_picture, folder.iterdir()))
    kind = _OneClass if flat else torchvision.datasets.ImageFolder
    try:
        found = kind(
            folder,
            loader=_load,
            is_valid_file=_is_picture,
        )
    except (FileNotFoundError, RuntimeError) as error:
        raise ValueError(
            f"images: expected pictures ({', '.join(SUFFIXES)}) in {str(path)!r}, or in a "
            f"subfolder for each class, got {str(error).splitlines()[0]}"
        ) from error
    return PictureSet(found, None if flat else found.classes)


def _load(name: str | Path) -> "Image":
    return read_picture(str(name), Path(name).read_bytes())


def _is_picture(name: str | Path) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


class _OneClass(torchvision.datasets.ImageFolder):
    """All pictures below a folder, whatever its subfolders."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        return ["."], {".": 0}


def open_torchvision(name: str, root: str | Path, split: str = "train") -> PictureSet:
    """A data set of torchvision that is there already, of pictures with classes: CIFAR100, ...

    Args:
        name: of the class in `torchvision.datasets`.
        root: where its files are.
        split: as the data set calls it; one with ``train=`` has "train" and "test".

    Raises:
        ValueError: for a name or a split that is none, files that are not there, and a data set
            without classes.
    """
    kind = vars(torchvision.datasets).get(name) if name in torchvision.datasets.__all__ else None
    options = {} if kind is None else inspect.signature(kind).parameters
    if kind is None or not {"train", "split"} & options.keys():
        raise ValueError(
            "dataset: expected a data set of torchvision that has parts, such as CIFAR100, got "
            f"{name!r}. See torchvision.datasets for the names; a folder is --images."
        )
    if "train" in options and split not in ("train", "test"):
        raise ValueError(f'dataset: expected "train" or "test" of {name}, got {split!r}.')
    part = {"train": split == "train"} if "train" in options else {"split": split}
    try:
        found = kind(root, **part)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"dataset: expected {name}, {split!r}, in {str(root)!r}, got {type(error).__name__}: "
            f"{str(error).splitlines()[0].rstrip('.')}. Fetch it first: "
            f"torchvision.datasets.{name}({str(root)!r}, download=True)."
        ) from error
    if not hasattr(found, "classes"):
        raise ValueError(
            f"dataset: expected pictures with classes, got {name}, which names none. Use --images "
            "with a folder for each class."
        )
    return PictureSet(found, [str(each) for each in found.classes])


def class_indices(pictures: Readable, indices: Sequence[int]) -> Tensor:
    """The class of each of these samples, (P,) int64.

    Pictures are read only where a data set of torchvision has no ``targets``.

    Raises:
        ValueError: for labels that cannot be read, or are no class indices.
    """
    labels = [pictures.label(index) for index in indices]
    try:
        return torch.tensor([int(label) for label in labels])
    except (TypeError, ValueError) as error:
        raise ValueError(f"labels: expected class indices, got others: {error}.") from error


class Shown(Dataset[tuple[Tensor, Any, int]]):
    """Some samples ``(picture, label, place)`` as a view shows them, drawn anew in each epoch.

    What is drawn depends on seed, epoch and index alone, so a run that goes on sees the same. Its
    workers must not be persistent, or they would never hear of another epoch.

    Args:
        dataset: a `ShardDataset` or a `PictureSet`.
        draws: the views.
        indices: of the samples, those that are shown; ascending.
        augment: of each picture (3, H, W) uint8 after its view; draws from torch's global
            generator. One with `set_epoch` hears of it.
    """

    def __init__(
        self,
        dataset: Readable,
        draws: ViewDraws,
        indices: Sequence[int],
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._dataset, self._draws = dataset, draws
        self.indices = indices
        # of each shard; of what has no shards, one
        whole: list[int] = getattr(dataset, "lengths", [len(dataset)])
        starts = itertools.accumulate(whole, initial=0)
        bounds = [bisect.bisect_left(indices, start) for start in starts]
        self.lengths: list[int] = [b - a for a, b in itertools.pairwise(bounds)]
        self._augment, self._epoch = augment, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        set_epoch_of(self._augment, epoch)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, Any, int]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[tuple[Tensor, Any, int]]:
        view, samples = self._draws.view, []
        at = {self.indices[place]: place for place in places}
        for index, picture, label in self._dataset.readable([self.indices[p] for p in places]):
            picture = view.prepare(picture)
            image = torch.from_numpy(view.cut(picture, self._draws(picture, self._epoch, index)))
            if self._augment is not None:
                draw = Draw(self._draws.seed, self._epoch, torch.tensor([index]))
                with seeded(draw, Purpose.AUGMENT, image.device):
                    image = self._augment(image)
            samples.append((image, label, at[index]))
        check_some(samples, len(places))
        return samples


NOTHING: Mapping[Any, Any] = MappingProxyType({})


class Other(NamedTuple):
    """A picture beside a sample."""

    picture: Tensor  # (C, H, W)
    probs: Tensor  # (N,), or (0,) where it brings no label


class Beside(Dataset[Any]):
    """Samples with an `Other` picture each, as a last field, or as "other" of a mapping.

    Each epoch goes on in the order of the other pictures where the last one stopped, so that all
    are seen equally often. It depends on seed, epoch and place alone, as `Shown` does.

    Args:
        dataset: the samples.
        pictures, seed: as for `OtherPictures`.
    """

    def __init__(self, dataset: Dataset[Any], pictures: Dataset[Any], seed: int) -> None:
        self._dataset: Any = dataset
        self._pictures: Any = pictures
        self._seed, self._epoch = seed, 0
        self.lengths: list[int] = getattr(dataset, "lengths", [len(self)])

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        for part in (self._dataset, self._pictures):
            set_epoch_of(part, epoch)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int) -> Any:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        count = len(self._pictures)
        turns = [divmod(self._epoch * len(self) + place, count) for place in places]
        rows = [int(_order(self._seed, turn, count)[at]) for turn, at in turns]
        samples = zip(_samples(self._dataset, places), _samples(self._pictures, rows), strict=False)
        return [_joined(sample, other) for sample, other in samples]


class OtherPictures:
    """A ``mix=`` for `SuperMixCollate`: other pictures beside the originals, in the place of mixes.

        others = OtherPictures(unlabelled)
        collate = SuperMixCollate(teacher, mix=others)
        loader = DataLoader(others.beside(dataset), 128, num_workers=8, collate_fn=collate)

    The paper's baseline of unlabelled pictures (Tables 2 and 3, "ImgNet32"): the teacher labels
    them. Of mixes that were written as shards they bring their own labels.

    Args:
        pictures: samples ``(picture, label, ...)``, uint8 tensors (C, H, W) of the originals' size.
            A label that is a tensor of probabilities (N,) is handed on; another is not.
        seed: of their order.
    """

    def __init__(self, pictures: Dataset[Any], *, seed: int = 0) -> None:
        self._pictures, self._seed = pictures, seed

    def beside(self, dataset: Dataset[Any]) -> Beside:
        """The samples of `dataset`, each with one of these pictures, read by the same worker."""
        return Beside(dataset, self._pictures, self._seed)

    def __call__(
        self, images: Tensor, labels: Tensor | None = None, *, extra: Mapping[Any, Any] = NOTHING
    ) -> Any:
        """The pictures that came with a batch; `extra` is what else its samples held.

        Raises:
            ValueError: for a batch that is not of `beside`.
        """
        found = next((part for part in extra.values() if isinstance(part, Other)), None)
        if found is None:
            raise ValueError(
                "OtherPictures: expected samples that bring another picture each, got a batch "
                "without. Give the loader others.beside(dataset), and its collate mix=others."
            )
        pictures = found.picture.to(images)
        if labels is None:
            return pictures
        return pictures, found.probs.to(images.device) if found.probs.numel() else labels


@lru_cache(maxsize=4)  # turns that a batch is of, as a rule
def _order(seed: int, turn: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    draw = Draw(seed, turn, torch.empty(0, dtype=torch.int64))
    return generator(draw, (), Purpose.OTHERS).permutation(count)


def _samples(dataset: Any, places: Sequence[int]) -> Sequence[Any]:
    at_once = getattr(dataset, "__getitems__", None)
    return at_once(places) if at_once else [dataset[place] for place in places]


def _joined(sample: Any, other: Any) -> Any:
    picture, label = other[:2]
    soft = isinstance(label, Tensor) and label.ndim == 1
    beside = Other(picture, label if soft else torch.empty(0))
    return {**sample, "other": beside} if isinstance(sample, dict) else (*sample, beside)
