"""Dense targets of a batch: segmentation masks and boxes that follow the pictures into a mix."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from supermix_transforms.masks import owners
from supermix_transforms.results import Mixed

__all__ = ["check_fits", "is_box_targets", "is_tv", "mix_boxes", "mix_masks", "refuse_untyped"]

OF_PICTURES = {"image_id", "size", "orig_size"}


def mix_masks(masks: Tensor, mixed: Mixed) -> Tensor:
    """Segmentation masks (B, ..., H, W) of the originals as those of the mixes, by pixel owner.

    Raises:
        ValueError: for masks of another size than the mixes.
    """
    if masks.ndim < 3 or masks.shape[-2:] != mixed.images.shape[-2:]:
        size = tuple(mixed.images.shape[-2:])
        raise ValueError(
            f"masks: expected (B, ..., H, W) with the mixes' size {size}, got "
            f"{tuple(masks.shape)}. Resize masks and pictures alike."
        )
    owner = owners(mixed.masks)  # (M, H, W)
    plain = masks.as_subclass(Tensor)[mixed.sources]  # (M, k, ..., H, W)
    index = owner.view(len(owner), 1, *[1] * (plain.ndim - 4), *owner.shape[1:])
    return plain.gather(1, index.expand(-1, 1, *plain.shape[2:]))[:, 0]


def mix_boxes(
    targets: Sequence[Mapping[str, Any]], mixed: Mixed, threshold: float
) -> list[dict[str, Any]]:
    """Boxes of the originals as those of the mixes: kept where enough of them is seen.

    Args:
        targets: one mapping a picture: ``boxes`` (n, 4) as tv_tensors.BoundingBoxes or x1, y1, x2,
            y2 in pixels; fields of length n follow their boxes, others come from the first source.
        mixed: the mixes, as many as pictures.
        threshold: least share of a box's pixels that its own picture owns in the mix.

    Returns:
        One dict a mix, the sources' boxes one after the other.

    Raises:
        ValueError: for another number of dicts, fields that differ, boxes that are not (n, 4).
    """
    per_box = _per_box_fields(targets, mixed)
    owner = owners(mixed.masks).cpu()  # once, not for each box
    outputs = []
    for row, sources in enumerate(mixed.sources.tolist()):
        kept: list[dict[str, Any]] = []
        for place, source in enumerate(dict.fromkeys(sources)):  # an unmixed row repeats its source
            target = targets[source]
            keep = _box_shares(target["boxes"], owner[row] == place) >= threshold
            rows = keep.nonzero().flatten()
            kept.append({name: _select(target[name], rows) for name in per_box})
        joined = {name: _join([target[name] for target in kept]) for name in per_box}
        outputs.append({**targets[sources[0]], **joined})
    return outputs


def _per_box_fields(targets: Sequence[Mapping[str, Any]], mixed: Mixed) -> list[str]:
    """Names of the fields that are as long as the boxes in every picture, checked.

    Not those that torchvision and COCO have of the whole picture, however many boxes there are.
    """
    names = set(targets[0])
    if len(targets) != len(mixed) or any(set(each) != names for each in targets):
        raise ValueError(
            f"boxes: expected one dict for each of {len(mixed)} pictures, all with the same "
            f"fields, got {len(targets)} with {sorted({str(n) for each in targets for n in each})}."
            " Give pictures without boxes empty tensors, boxes of shape (0, 4)."
        )
    for each in targets:
        boxes = each["boxes"]
        if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
            got = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
            raise ValueError(
                f"boxes: expected a tensor (n, 4) for each picture, got {got}. "
                "Pass tv_tensors.BoundingBoxes, or x1, y1, x2, y2 in pixels."
            )
    names -= OF_PICTURES
    return [
        name
        for name in targets[0]
        if name in names and all(_is_per_box(each, name) for each in targets)
    ]


def _is_per_box(target: Mapping[str, Any], name: str) -> bool:
    return _has_length(target[name]) and len(target[name]) == len(target["boxes"])


def _box_shares(boxes: Tensor, owned: Tensor) -> Tensor:
    """Share of each box's pixels inside the picture that are owned, (n,); owned (H, W) bool."""
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        boxes = v2.functional.convert_bounding_box_format(
            boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY
        )
    height, width = owned.shape
    shares = []
    for x1, y1, x2, y2 in boxes.as_subclass(Tensor).tolist():
        left, right = (min(max(0, side), width) for side in (math.floor(x1), math.ceil(x2)))
        top, bottom = (min(max(0, side), height) for side in (math.floor(y1), math.ceil(y2)))
        inside = owned[top:bottom, left:right]
        shares.append(inside.float().mean().item() if inside.numel() else 0.0)
    return torch.tensor(shares, device=boxes.device)


def _select(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        picked = value.as_subclass(Tensor)[rows.to(value.device)]
        return tv_tensors.wrap(picked, like=value) if is_tv(value) else picked
    return type(value)(value[row] for row in rows.tolist())


def _join(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        joined = torch.cat([value.as_subclass(Tensor) for value in values])
        return tv_tensors.wrap(joined, like=values[0]) if is_tv(values[0]) else joined
    return type(values[0])(item for value in values for item in value)


def _has_length(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim > 0)


def is_box_targets(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(item, Mapping) and "boxes" in item for item in value)
    )


def is_tv(value: Any) -> bool:
    return isinstance(value, tv_tensors.TVTensor)


def check_fits(leaf: Tensor, images: Tensor) -> None:
    if len(leaf) != len(images) or leaf.shape[-2:] != images.shape[-2:]:
        raise ValueError(
            f"{type(leaf).__name__}: expected the batch and size of the pictures "
            f"{tuple(images.shape)}, got {tuple(leaf.shape)}. Stack and resize them alike."
        )


def refuse_untyped(leaves: Sequence[Any], images: Sequence[Tensor]) -> None:
    """Raise for a plain tensor of the pictures' batch and size, which would stay unmixed.

    Stacking by ``default_collate`` makes a plain tensor of a tv_tensors.Mask.
    """
    for leaf in leaves:
        if (
            isinstance(leaf, Tensor)
            and not is_tv(leaf)
            and not any(leaf is image for image in images)
            and leaf.ndim >= 3
            and len(leaf) == len(images[0])
            and leaf.shape[-2:] == images[0].shape[-2:]
        ):
            raise ValueError(
                f"expected dense targets as tv_tensors.Mask, got a plain tensor "
                f"{tuple(leaf.shape)} of the pictures' batch and size, which would stay unmixed. "
                "Stacking drops the type: wrap it again, tv_tensors.Mask(x), or take it out."
            )
