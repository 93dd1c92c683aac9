"""Mixes as records of a recipe, and the masks that a record gives back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from supermix_transforms.batch import MixResult
from supermix_transforms.masks import steps_of
from supermix_transforms.offline.recipes import (
    FIELDS,
    Array,
    Group,
    Kind,
    Layout,
    picture_digest,
)
from supermix_transforms.quantised import LEVELS, exact_parts
from supermix_transforms.results import Mixed, TeacherLabels

__all__ = [
    "joined",
    "labels_of",
    "part_of",
    "parts_of",
    "place_in_kind",
    "to_group",
    "weights_of",
]

MOST_STEPS = (1 << 16) - 1
WHOLE = (1 << 16) - 1  # a weight of 1


def to_group(result: MixResult, *, index: Tensor, crop: Tensor, layout: Layout) -> Group:
    """The record of a batch's mixes; mixes that follow each other share pictures where they can.

    Args:
        result: of pictures whose masks are multiples of 1/255: searched with ``quantised=True``,
            drawn as boxes, or constant.
        index: (B,) of the originals in the data set.
        crop: (B, 5), see `views.Crop`.
        layout: what the file's groups have in common.
    """
    mixed, teacher, label = result.mixed, result.teacher, result.mixed_teacher
    assert mixed is not None and teacher is not None and label is not None
    order = _walk(mixed.sources.cpu())
    rows = torch.tensor(order, dtype=torch.int64, device=mixed.images.device)
    mixed, label = mixed[rows], label[rows]
    originals, source = _by_first_use(mixed.sources.cpu(), len(index))
    kind, grid, share, box = _masks(mixed, layout)
    classes = np.dtype("<u2" if layout.num_classes <= 1 << 16 else "<u4")
    own = _top(teacher[originals.to(teacher.log_probs.device)], layout.top, classes)
    new = _top(label, layout.top, classes)
    crops = crop[originals].numpy()
    upto = (WHOLE * mixed.weights.double().cumsum(dim=1)[:, :-1]).round().clamp(0, WHOLE)
    weight = np.diff(upto.cpu().numpy().astype(np.int64), axis=1, prepend=0)
    digest = picture_digest(mixed.images[0].cpu().numpy()) if len(rows) > 0 else np.empty(0, "u1")
    return Group(
        sample=index[originals].numpy().astype("<u4"),
        crop=crops[:, :4].astype("<i2"),
        flip=crops[:, 4].astype("u1"),
        original_index=own[0],
        original_log_prob=own[1],
        original_rest=own[2],
        source=source.astype("<u2"),
        weight=weight.astype("<u2"),
        outcome=mixed.outcome.cpu().numpy().astype("u1"),
        steps=mixed.steps.clamp(max=MOST_STEPS).cpu().numpy().astype("<u2"),
        index=new[0],
        log_prob=new[1],
        rest=new[2],
        kind=kind,
        grid=grid,
        share=share,
        box=box,
        digest=digest,
    )


def _walk(sources: Tensor) -> list[int]:
    """An order of the mixes (M, k) in which one's last picture is the next one's first."""
    row_of = {int(own): row for row, own in enumerate(sources[:, 0])}
    order: list[int] = []
    left = dict.fromkeys(range(len(sources)))
    while left:
        row: int | None = next(iter(left))
        while row is not None and row in left:
            del left[row]
            order.append(row)
            row = row_of.get(int(sources[row, 1]))
    return order


def _by_first_use(sources: Tensor, count: int) -> tuple[Tensor, Array]:
    """The originals in the order in which mixes use them, and the mixes' rows among these.

    Those that no mix uses come last.
    """
    order = dict.fromkeys([*sources.flatten().tolist(), *range(count)])
    originals = torch.tensor(list(order))
    place = torch.empty_like(originals)
    place[originals] = torch.arange(count)
    return originals, place[sources].numpy()


def _top(labels: TeacherLabels, n: int, classes: np.dtype[np.unsignedinteger]) -> list[Array]:
    index, log_prob, rest = labels.top(n)
    return [
        index.cpu().numpy().astype(classes),
        log_prob.cpu().numpy().astype("<f2"),
        rest.clamp(0, 1).cpu().numpy().astype("<f2"),
    ]


def _masks(mixed: Mixed, layout: Layout) -> tuple[Array, Array, Array, Array]:
    """Kind, grid, share and box of each mix's masks."""
    count, k, w = len(mixed), layout.k, layout.mask_size
    kind = np.full(count, Kind.LOGITS, dtype="u1")
    grid = np.empty((0, k - 1, w, w), dtype="i1")
    shares: list[Array] = []
    boxes: list[Array] = []
    if mixed.mask_logits is not None:
        grid = steps_of(mixed.mask_logits, mixed.normalisation).cpu().numpy()
    else:
        for row, masks in enumerate(mixed.masks.cpu()):
            constant = bool((masks == masks[:, :1, :1]).all())
            kind[row] = Kind.CONSTANT if constant else Kind.BOXES
            if constant:
                shares.append((LEVELS * masks[:-1, 0, 0]).round().numpy())
            else:
                boxes.append(np.stack([_box(mask.numpy()) for mask in masks[1:]]))
    return (
        kind,
        grid,
        np.array(shares, dtype="<u2").reshape(-1, k - 1),
        np.array(boxes, dtype="<u2").reshape(-1, k - 1, 4),
    )


def _box(mask: Array) -> Array:
    """Top, left, bottom, right around what is seen of a picture; what covers it is pasted later."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return np.zeros(4, dtype=np.int64)
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])


# -- and back --------------------------------------------------------------------------------------


def part_of(group: Group, rows: Sequence[int]) -> Group:
    """A copy of these mixes' records and the originals they use: the group need not be kept."""
    rows = list(rows)
    used, places = np.unique(group.source[rows], return_inverse=True)
    fields = {}
    for name, (_, shape) in FIELDS.items():
        which: Any = rows
        if shape[0] == "G":
            which = used
        elif shape[0] == "D":
            which = slice(None)
        elif shape[0] != "M":
            of_kind: Array = group.kind == Kind[str(shape[0])]
            which = (of_kind.cumsum() - 1)[rows][of_kind[rows]]
        fields[name] = vars(group)[name][which].copy()
    fields["source"] = places.reshape(len(rows), -1).astype("<u2")
    return Group(**fields)


def joined(parts: Sequence[Group]) -> Group:
    """The records of several groups as one of all their originals and mixes; it has no digest."""
    fields = {name: np.concatenate([vars(part)[name] for part in parts]) for name in FIELDS}
    starts = np.cumsum([0, *(len(part.sample) for part in parts[:-1])])
    # wider than in a file: a batch may hold more
    sources = [
        part.source.astype(np.int64) + start for part, start in zip(parts, starts, strict=True)
    ]
    return Group(**{**fields, "source": np.concatenate(sources), "digest": np.empty(0, "u1")})


def place_in_kind(group: Group, row: int) -> int:
    """Of a mix, its place among those of its kind."""
    return int((group.kind[:row] == group.kind[row]).sum())


def parts_of(group: Group, rows: Sequence[int], size: tuple[int, int]) -> Array:
    """Masks (R, k, H, W) uint8 of these mixes in parts of 255, their sum."""
    k = group.source.shape[1]
    kinds = group.kind[list(rows)]
    places = np.array([place_in_kind(group, row) for row in rows], dtype=int)
    parts = np.empty((len(rows), k, *size), dtype=np.uint8)
    grids = kinds == Kind.LOGITS
    if grids.any():  # at once: small pictures would each pay for the calls
        steps = torch.from_numpy(group.grid[places[grids]])
        parts[grids] = exact_parts(steps, size).numpy()
    for row in np.flatnonzero(kinds == Kind.CONSTANT):
        share = group.share[places[row]].astype(np.int64)
        parts[row] = np.array([*share, LEVELS - share.sum()])[:, None, None]
    for row in np.flatnonzero(kinds == Kind.BOXES):
        owner = np.zeros(size, dtype=np.int64)
        for number, (top, left, bottom, right) in enumerate(group.box[places[row]].astype(int), 1):
            owner[top:bottom, left:right] = number
        parts[row] = LEVELS * (owner == np.arange(k)[:, None, None])
    return parts


def weights_of(group: Group, row: int) -> Tensor:
    """The mixing weights r of Eq. 2 of a mix, (k,) float32."""
    weight = group.weight[row].astype(np.int64)
    return torch.tensor([*weight, WHOLE - weight.sum()], dtype=torch.float32) / WHOLE


def labels_of(num_classes: int, index: Array, log_prob: Array, rest: Array) -> TeacherLabels:
    """The teacher's labels of top classes (M, n)."""
    log_probs = torch.from_numpy(log_prob.astype(np.float16))
    if log_prob.shape[1] < num_classes:
        return TeacherLabels(
            log_probs,
            num_classes,
            torch.from_numpy(index.astype(np.int64)),
            torch.from_numpy(rest.astype(np.float32)),
        )
    dense = torch.empty(len(index), num_classes)
    dense.scatter_(1, torch.from_numpy(index.astype(np.int64)), log_probs.float())
    return TeacherLabels(dense.log_softmax(dim=1), num_classes)
