"""What a student is trained on: loaders of originals with mixes, and of pictures held out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from supermix_transforms.data.picturesets import (
    OtherPictures,
    PictureSet,
    Readable,
    Shown,
    class_indices,
    open_folder,
    open_torchvision,
)
from supermix_transforms.data.sampling import ShardSampler
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.data.views import ViewDraws
from supermix_transforms.loader import SuperMixCollate
from supermix_transforms.offline.ledger import Ledger
from supermix_transforms.offline.mixedshards import stored_probs
from supermix_transforms.offline.replaying import replay
from supermix_transforms.teacher import TeacherLabeler

__all__ = [
    "TrainingData",
    "mixed_pictures",
    "of_recipes",
    "online",
    "open_source",
    "open_validation",
    "other_pictures",
]

HELD_OUT = 10  # one of so many samples, where nothing else is there to validate on


@dataclass(frozen=True)
class TrainingData:
    """The loaders of a run of `distill`."""

    train: DataLoader[Any]
    validation: DataLoader[Any] | None
    num_classes: int
    labels: Callable[[], Tensor]  # of the originals, (P,) int64, for `hints.HintLoss`


def open_source(
    *,
    shards: Sequence[str] | None = None,
    images: str | None = None,
    dataset: str | None = None,
    root: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    labelled: bool = True,
) -> Readable:
    """The pictures of shards, of a folder, or of a data set of torchvision.

    Shards that are not `labelled` may have no labels; 0 stands for each.

    Raises:
        ValueError: if it is not exactly one of them, and as they do.
    """
    asked = {"--shards": shards, "--images": images, "--dataset": dataset}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"pictures: expected one of {', '.join(asked)}, got {' and '.join(given) or 'none'}."
        )
    if shards is not None:
        return ShardDataset(list(shards), labels=None if labelled else _unread, cache_dir=cache_dir)
    if images is not None:
        return open_folder(images)
    assert dataset is not None
    return open_torchvision(dataset.removeprefix("torchvision/"), root or ".", split)


def open_validation(words: Sequence[str], **source: Any) -> Readable:
    """What is validated on, of the same kind as the training data.

    Args:
        words: shards, a folder, or a part of the data set.
        **source: the keywords of `open_source` for the training data.

    Raises:
        ValueError: as `open_source`, and for more than one folder or part.
    """
    if source.get("shards") is not None:
        return open_source(**{**source, "shards": words})
    if len(words) != 1:
        raise ValueError(f"validation: expected one folder or part, got {' '.join(words)}.")
    kind = "images" if source.get("images") is not None else "split"
    return open_source(**{**source, kind: words[0]})


def online(
    pictures: Readable,
    validation: Readable | None,
    *,
    labeler: TeacherLabeler | None,
    view: Callable[[int], Any],
    size: int,
    mix: Callable[..., Any] | None,
    after: Callable[..., Any] | None = None,
    unconverged: Any = "keep",
    target: Any = "soft",
    augment: Callable[[Tensor], Tensor] | None = None,
    labelled: bool = True,
    num_classes: int | None = None,
    hold_out: bool = True,
    seed: int = 0,
    **options: Any,
) -> TrainingData:
    """Batches of views, mixed by `mix` while training; without it plain ``(images, labels)``.

    Args:
        pictures: to learn from.
        validation: to judge on, the middle of each; None is a tenth of the pictures, the same in
            each run, or nothing with ``hold_out=False``.
        labeler: labels the mixes.
        view: from a size to a transform, as `views.VIEWS`.
        size: of the pictures, in pixels.
        mix: a transform as for `SuperMixCollate`.
        after: of each mix, as there.
        unconverged: as there.
        target: "soft" or "hard", of the mixes.
        augment: of each picture after its view, before anything is mixed.
        labelled: whether the pictures' own labels are learned; else the teacher's.
        num_classes: N, where neither a teacher nor the pictures tell.
        hold_out: False where `mix` brings mixes that were made of all pictures.
        seed: of all draws.
        **options: of the DataLoader.

    Raises:
        ValueError: if the number of classes is not known, or the pictures' are not the teacher's.
    """
    held_out = _tenth(len(pictures)) if validation is None and hold_out else []
    kept = sorted(set(range(len(pictures))) - set(held_out))
    views = Shown(pictures, ViewDraws(view(size), seed=seed), kept, augment)
    classes = _classes(pictures, views, labeler, labelled, num_classes)
    shown = mix.beside(views) if isinstance(mix, OtherPictures) else views
    collate = None
    if mix is not None:
        own: dict[str, Any] = {"after": after, "unconverged": unconverged, "target": target}
        collate = SuperMixCollate(labeler, mix=mix, seed=seed, **own)
    order: dict[str, Any] = {"shuffle": True}
    if isinstance(pictures, ShardDataset):  # reads stay local
        order = {"sampler": ShardSampler(shown, seed=seed)}
    train = DataLoader(shown, collate_fn=collate, **order, **options)
    judged: Shown | None = None
    if validation is not None:
        if labelled:
            _check_same_classes(pictures, validation)
        judged = _middle(validation, range(len(validation)), (size, size))
    elif hold_out:
        judged = _middle(pictures, held_out, (size, size))
    return TrainingData(
        train,
        None if judged is None else DataLoader(judged, **options),
        classes,
        partial(class_indices, pictures, kept),
    )


def _tenth(count: int) -> list[int]:
    """A random tenth of the samples, the same whatever the run's seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return sorted(order[: math.ceil(count / HELD_OUT)].tolist())


def _check_same_classes(pictures: Readable, validation: Readable) -> None:
    """Of folders, an index means nothing but its place among the names."""
    ours, theirs = (getattr(each, "classes", None) for each in (pictures, validation))
    if isinstance(validation, PictureSet) and ours != theirs:
        shown = [", ".join((names or ("none",))[:5]) for names in (ours, theirs)]
        raise ValueError(
            f"validation: expected the classes of the training pictures, {shown[0]}, got "
            f"{shown[1]}. A folder to validate on has a subfolder of the same name for each class."
        )


def of_recipes(
    recipes: str | Path,
    dataset: ShardDataset,
    validation: Readable | None,
    *,
    target: Any = "soft",
    window: int = 16,
    seed: int = 0,
    **options: Any,
) -> TrainingData:
    """Batches of originals and mixes from recipes; nothing is held out, for they were made of all.

    Args:
        recipes: what `generate` wrote of the dataset.
        dataset: the pictures.
        validation: to judge on, or None.
        target: "soft" or "hard", of the mixes.
        window: groups of recipes that are shuffled together. 0 shuffles the groups and keeps the
            mixes of each together, which share pictures, so that fewest are decoded; they teach
            less.
        seed: of the order.
        **options: of the DataLoader.

    Raises:
        ValueError: as `replay`.
    """
    mixes = replay(recipes, dataset, target=target)
    sampler = ShardSampler(mixes, seed=seed, window=window)
    train = DataLoader(mixes, sampler=sampler, collate_fn=mixes.collate, **options)
    judged = None
    if validation is not None:
        size = mixes.settings["view"]["size"]
        judged = DataLoader(_middle(validation, range(len(validation)), size), **options)
    labels = partial(class_indices, dataset, range(len(dataset)))
    return TrainingData(train, judged, int(mixes.settings["num_classes"]), labels)


def mixed_pictures(folder: str | Path, size: int) -> tuple[OtherPictures, int]:
    """Mixes that `generate` wrote as shards, with their labels, and the number of classes.

    Raises:
        ValueError: for a folder that `generate` did not write as shards, or not to the end.
    """
    ledger = Ledger(folder)
    settings, entries = ledger.settings(), ledger.entries()
    if settings.get("form") != "shards":
        raise ValueError(
            f"mixed-shards: expected what `supermix generate --as shards` wrote, got "
            f"{str(folder)!r}, which holds recipes. Pass it as --recipes."
        )
    if len(entries) != settings.get("units"):
        raise ValueError(
            f"mixed-shards: expected {settings.get('units')} tars in {str(folder)!r}, got "
            f"{len(entries)}. Start `supermix generate` with the same options again: it goes on."
        )
    num_classes = int(settings["num_classes"])
    dataset = ShardDataset(folder, labels=partial(stored_probs, num_classes=num_classes))
    return OtherPictures(_middle(dataset, range(len(dataset)), (size, size))), num_classes


def other_pictures(
    words: Sequence[str], view: Any, *, seed: int = 0, cache_dir: str | None = None
) -> OtherPictures:
    """Pictures of shards or of a folder, whose own labels are not read, for a teacher to label.

    Args:
        words: shards as `ShardDataset` takes them, or one folder of pictures.
        view: of each, a transform as for `generate`.
        seed: of the views.
        cache_dir: for copies of shards from elsewhere.

    Raises:
        ValueError: as `ShardDataset` and `open_folder`.
    """
    pictures: Readable
    folder = Path(words[0])
    if len(words) == 1 and folder.is_dir() and not any(folder.glob("*.tar")):
        pictures = open_folder(folder)
    else:
        pictures = ShardDataset(list(words), labels=_unread, cache_dir=cache_dir)
    shown = Shown(pictures, ViewDraws(view, seed=seed), range(len(pictures)))
    return OtherPictures(shown, seed=seed)


def _unread(members: Mapping[str, bytes]) -> int:
    return 0


def _classes(
    pictures: Readable,
    shown: Shown,
    labeler: TeacherLabeler | None,
    labelled: bool,
    num_classes: int | None,
) -> int:
    names = pictures.classes if isinstance(pictures, PictureSet) else None
    known = None if labeler is None else labeler(shown[0][0][None]).num_classes
    if isinstance(pictures, PictureSet) and labelled:
        if names is None:
            raise ValueError(
                "images: expected a subfolder for each class, got pictures without any. Let the "
                "teacher label them: --labels teacher."
            )
        if known is not None and known != len(names):
            raise ValueError(
                f"labels: expected the teacher's {known} classes, got {len(names)}: "
                f"{', '.join(names[:3])}, ... Pass --labels teacher, to learn the teacher's "
                "classes, or a teacher of yours."
            )
        known = len(names)
    if known is not None and num_classes not in (None, known):
        raise ValueError(
            f"num-classes: expected the {known} classes of the teacher or of the pictures, got "
            f"{num_classes}. Leave it out, or make both alike."
        )
    if known is None and num_classes is None:
        raise ValueError(
            "distill: expected a number of classes, got no teacher that tells it. Pass "
            "--num-classes or --teacher."
        )
    return known if known is not None else int(num_classes or 0)


def _middle(pictures: Readable, indices: Sequence[int], size: Sequence[int]) -> Shown:
    """The middle of each picture, as large as it can be."""
    cut = v2.Compose([v2.Resize(max(size)), v2.CenterCrop(list(size))])
    return Shown(pictures, ViewDraws(cut, seed=0), indices)
