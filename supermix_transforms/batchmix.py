"""What all mixing transforms share: finding pictures and labels, carrying the rest along."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms import v2

from supermix_transforms.batch import MixResult
from supermix_transforms.dense import (
    check_fits,
    is_box_targets,
    is_tv,
    mix_boxes,
    mix_masks,
    refuse_untyped,
)
from supermix_transforms.draws import Draw
from supermix_transforms.inputs import (
    LabelsGetter,
    check_device,
    check_images,
    check_labels,
    find_images,
    find_labels,
    identities,
)
from supermix_transforms.masks import mix_images
from supermix_transforms.mixing import check_k
from supermix_transforms.results import Mixed
from supermix_transforms.teacher import TeacherLabeler

__all__ = ["BatchMix", "tell_epoch"]


class BatchMix(v2.Transform, ABC):
    """What the three have in common: finding pictures and labels, and carrying targets along.

    A subclass says how to mix in `mix`; nothing else is overridden.
    """

    teacher: TeacherLabeler | None

    def __init__(
        self,
        *,
        k: int,
        alpha: float,
        labels_getter: LabelsGetter,
        box_threshold: float,
        seed: int | None,
    ) -> None:
        super().__init__()
        check_k(k, alpha)
        if not 0 <= box_threshold <= 1:
            raise ValueError(f"box_threshold: expected a share in 0..1, got {box_threshold!r}.")
        self.k = k
        self.alpha = alpha
        self.labels_getter = labels_getter
        self.box_threshold = box_threshold
        self.seed = seed
        self.epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw anew: with an integer seed, the same batch is mixed otherwise in another epoch."""
        self.epoch = epoch

    @abstractmethod
    def mix(
        self,
        images: Tensor,
        labels: Tensor | None,
        draw: Draw,
        *,
        redraws: int = 0,
        relabel: bool = False,
    ) -> MixResult:
        """Mix pictures (B, C, H, W); every random choice comes from `draw`.

        `redraws` is for mixes that are searched for. With `relabel` the caller labels the mixes
        itself, so those that have no label yet need none.
        """

    def forward(self, *inputs: Any) -> Any:
        batch = inputs if len(inputs) > 1 else inputs[0]
        if isinstance(batch, Mapping):  # others than dict would be a single leaf of the tree
            batch = dict(batch)
        labels = find_labels(batch, self.labels_getter)
        leaves, spec = tree_flatten(batch, is_leaf=is_box_targets)
        self._refuse(leaves)
        found = find_images(batch, labels)
        images = check_images(found[0])
        check_device(images, None if self.teacher is None else self.teacher.device)
        refuse_untyped([leaf for leaf in leaves if leaf is not labels], found)
        place = None
        if labels is not None:
            place = next((i for i, leaf in enumerate(leaves) if leaf is labels), None)
            if place is None:
                raise ValueError(
                    "labels_getter: expected the very object that stands in the batch, got another "
                    f"{type(labels).__name__}. Return the entry itself, without a copy."
                )
            labels = check_labels(labels, len(images))
        if self.seed is None:
            draw = Draw(int(torch.randint(2**62, ())), 0, torch.arange(len(images)))
        else:
            draw = Draw(self.seed, self.epoch, identities(images))
        result = self.mix(images, labels, draw)
        assert result.mixed is not None
        leaves = [self._carry(leaf, found, result.mixed) for leaf in leaves]
        if place is not None:
            leaves[place] = result.targets
        return tree_unflatten(leaves, spec)

    def extra_repr(self) -> str:
        return f"k={self.k}, alpha={self.alpha}, seed={self.seed}"

    def _refuse(self, leaves: Sequence[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, PIL.Image.Image):
                raise ValueError(
                    f"{type(self).__name__}: expected pictures as one tensor (B, C, H, W), got a "
                    "PIL image. Add v2.ToImage() to the data set's transform and mix the batch."
                )
            if isinstance(leaf, (tv_tensors.KeyPoints, tv_tensors.Video)):
                raise ValueError(
                    f"{type(self).__name__}: expected pictures, labels, masks or boxes, got "
                    f"{type(leaf).__name__}, which cannot be mixed. Take it out of the batch."
                )
            if isinstance(leaf, tv_tensors.BoundingBoxes):
                raise ValueError(
                    f"{type(self).__name__}: expected boxes as a list of one dict a picture, got a "
                    "bare BoundingBoxes. Pass [{'boxes': ..., 'labels': ...}, ...]."
                )

    def _carry(self, leaf: Any, images: Sequence[Tensor], mixed: Mixed) -> Any:
        """A part of the batch as it belongs to the mixes."""
        if any(leaf is image for image in images):
            if leaf is images[0]:
                output = mixed.images
            else:
                check_fits(leaf, images[0])
                output = mix_images(leaf[mixed.sources], mixed.masks)
            return tv_tensors.wrap(output, like=leaf) if is_tv(leaf) else output
        if isinstance(leaf, tv_tensors.Mask):
            check_fits(leaf, images[0])
            return tv_tensors.wrap(mix_masks(leaf, mixed), like=leaf)
        if is_box_targets(leaf):
            return mix_boxes(leaf, mixed, self.box_threshold)
        return leaf


def tell_epoch(transform: Any, epoch: int) -> None:
    """`set_epoch` of a transform of ours, or of those in containers of torchvision."""
    if isinstance(transform, BatchMix):
        transform.set_epoch(epoch)
    for inner in getattr(transform, "transforms", ()):
        tell_epoch(inner, epoch)
