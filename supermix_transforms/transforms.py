"""`SuperMix`, `MixUp` and `CutMix` as torchvision v2 transforms of whole batches.

Each takes what torchvision's own MixUp takes, ``(images, labels, ...)`` or a mapping, with k >= 2
images a mix and weights drawn for each. Segmentation masks and bounding boxes in the batch travel
along.
"""

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from supermix_transforms.batch import MixResult
from supermix_transforms.batchmix import BatchMix
from supermix_transforms.draws import Draw, Purpose, draw_ring, draw_weights, generator
from supermix_transforms.inputs import LabelsGetter, check_labels
from supermix_transforms.masks import mix_images
from supermix_transforms.mixing import (
    label_mixes,
    or_labels,
    supermix,
    unmixed,
    weighted_labels,
)
from supermix_transforms.partners import match_partners
from supermix_transforms.results import Mixed, Outcome
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler, as_labeler

__all__ = ["CutMix", "MixUp", "SuperMix"]


class SuperMix(BatchMix):
    """Mix the images of a batch so that a teacher sees every one of them (SuperMix, CVPR 2021).

    Takes ``(images, labels, ...)`` or a mapping and returns it with the mixed images in the place
    of the images and the teacher's probabilities (B, N) float32 in the place of the labels. uint8
    images stay uint8. A batch of fewer than k images comes back as it is, labelled by the teacher.

    Args:
        teacher: a module or callable images -> logits, a list of them, or a `TeacherLabeler` (which
            knows mean and std). It is held unregistered: no submodule, not in ``state_dict``.
        k: images a mix.
        alpha: concentration of the Dirichlet weights.
        partners: ``"random"``, the paper's, or ``"matched"``: from class maps, those that mix well
            (see `match_partners`).
        partner_cap: how often a picture may be a partner in each place of a tuple (matched).
        settings: the solver's.
        labels_getter: as in torchvision's MixUp; None where the batch has no labels.
        box_threshold: least share of a box that must still be seen in the mix for it to be kept.
        seed: None draws from torch's global generator; an integer makes the draw depend on it, the
            epoch (`set_epoch`) and the pictures alone.

    Raises:
        ValueError: for bad settings or inputs; the message says what was expected.
    """

    def __init__(
        self,
        teacher: Any,
        *,
        k: int = 2,
        alpha: float = 3.0,
        partners: Literal["random", "matched"] = "random",
        partner_cap: int = 2,
        settings: SolverSettings = SolverSettings(),
        labels_getter: LabelsGetter = "default",
        box_threshold: float = 0.3,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            k=k, alpha=alpha, labels_getter=labels_getter, box_threshold=box_threshold, seed=seed
        )
        if partners not in ("random", "matched"):
            raise ValueError(f'partners: expected "random" or "matched", got {partners!r}.')
        if partner_cap < 1:
            raise ValueError(f"partner_cap: expected at least 1, got {partner_cap}.")
        self.teacher: TeacherLabeler = as_labeler(teacher)
        self.partners = partners
        self.partner_cap = partner_cap
        self.settings = settings

    def mix(
        self,
        images: Tensor,
        labels: Tensor | None,
        draw: Draw,
        *,
        redraws: int = 0,
        relabel: bool = False,
    ) -> MixResult:
        """Mix pictures (B, C, H, W) on the teacher's device.

        Args:
            images: uint8 or floating.
            labels: (B,) or (B, N); the label of mixes for which the teacher has no finite answer.
            draw: seed, epoch and identities.
            redraws: how often tuples that did not converge are drawn again.
            relabel: nothing here; the labels come from the search.
        """
        with torch.inference_mode(False), self.teacher.ready():
            tau = self.teacher.temperature
            logits, maps = self.teacher.examine(images)
            if labels is not None:
                labels = check_labels(labels, len(images), logits.shape[1])
            teacher = self.teacher.label(or_labels(logits, labels, temperature=tau))
            if len(images) < self.k:
                mixed = replace(unmixed(images, self.k), logits=logits)
                return MixResult(images, labels, teacher, mixed, teacher, teacher.probs)

            mixed = self._supermix(images, logits, maps, draw, None)
            for attempt in range(1, redraws + 1):
                rows = (~mixed.converged).nonzero().flatten()
                if len(rows) == 0:
                    break
                again = draw._replace(attempt=attempt)
                second = self._supermix(images, logits, maps, again, rows)
                # every attempt's calls count, but the originals' forward only once
                share = len(images) / len(rows)
                forwards = mixed.forwards.index_add(0, rows, second.forwards - share)
                backwards = mixed.backwards.index_add(0, rows, second.backwards)
                better = second.converged.nonzero().flatten()
                mixed = mixed.update(rows[better], second[better])
                mixed = replace(mixed, forwards=forwards, backwards=backwards)

            assert mixed.logits is not None
            lost = mixed.outcome == Outcome.NOT_FINITE
            expected = None if labels is None else weighted_labels(mixed, labels, logits.shape[1])
            label = self.teacher.label(or_labels(mixed.logits, expected, lost, temperature=tau))
            return MixResult(images, labels, teacher, mixed, label, label.probs)

    def _supermix(
        self, images: Tensor, logits: Tensor, maps: Any, draw: Draw, rows: Tensor | None
    ) -> Mixed:
        """The mixes of one draw, of all rows or some of them."""
        classes = logits.nan_to_num(nan=-math.inf).argmax(dim=1)
        if self.partners == "matched" and draw.attempt == 0:
            if maps is None:
                raise ValueError(
                    'partners="matched": expected a teacher whose logits are linear in an averaged '
                    "feature map, got one without class maps (a list, a plain callable, or another "
                    'head). Use partners="random".'
                )
            sources = match_partners(maps, classes, self.k, draw, cap=self.partner_cap).cpu()
        else:
            sources = draw_ring(draw, classes, self.k)
        sources = sources if rows is None else sources[rows.cpu()]
        weights = draw_weights(draw, sources, self.alpha)
        return supermix(
            images,
            self.teacher,
            sources=sources,
            weights=weights,
            settings=self.settings,
            originals=logits,
            maps=maps,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, partners={self.partners!r}, settings={self.settings}"


class _Blind(BatchMix):
    """A mix whose masks are drawn, not searched; `_masks` draws them."""

    def __init__(
        self,
        *,
        k: int = 2,
        alpha: float = 1.0,
        num_classes: int | None = None,
        teacher: Any = None,
        labels_getter: LabelsGetter = "default",
        box_threshold: float = 0.3,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            k=k, alpha=alpha, labels_getter=labels_getter, box_threshold=box_threshold, seed=seed
        )
        self.num_classes = num_classes
        self.teacher: TeacherLabeler | None = None if teacher is None else as_labeler(teacher)

    @abstractmethod
    def _masks(self, draw: Draw, sources: Tensor, weights: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks (M, k, H, W) of the tuples `sources` (M, k)."""

    def mix(
        self,
        images: Tensor,
        labels: Tensor | None,
        draw: Draw,
        *,
        redraws: int = 0,
        relabel: bool = False,
    ) -> MixResult:
        """Mix pictures (B, C, H, W), uint8 or floating; labels (B,), (B, N) or None.

        With `relabel` there are no targets: the caller labels the mixes itself.
        """
        if labels is not None:
            labels = check_labels(labels, len(images), self.num_classes)
        indices = labels is not None and labels.ndim == 1
        if self.teacher is None and indices and not self.num_classes and not relabel:
            raise ValueError(
                f"{type(self).__name__}: expected num_classes for labels that are class indices, "
                "got None. Pass num_classes=, or a teacher= that labels the mixes."
            )
        if len(images) < self.k:
            mixed = unmixed(images, self.k)
        else:
            classes = None
            if labels is not None:
                classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
            sources = draw_ring(draw, classes, self.k)
            weights = draw_weights(draw, sources, self.alpha)
            size = (images.shape[-2], images.shape[-1])
            masks = self._masks(draw, sources, weights, size).to(images.device)
            sources = sources.to(images.device)
            mixed = Mixed.unsearched(
                mix_images(images[sources], masks), sources, masks, Outcome.CONVERGED
            )
        if relabel:
            return MixResult(images, labels, None, mixed, None, None)
        if self.teacher is not None:
            label, mixed = label_mixes(self.teacher, mixed, labels)
            if self.num_classes not in (None, label.num_classes):
                raise ValueError(
                    f"num_classes: expected {label.num_classes}, the teacher's, got "
                    f"{self.num_classes}. Leave it out, or pass another teacher."
                )
            if labels is not None:
                check_labels(labels, len(images), label.num_classes)
            return MixResult(images, labels, None, mixed, label, label.probs)
        targets = None
        if labels is not None:
            targets = weighted_labels(mixed, labels, self.num_classes or labels.shape[-1])
        return MixResult(images, labels, None, mixed, None, targets)


class MixUp(_Blind):
    """Mix k images of a batch as wholes, ``sum r_i x_i`` with r ~ Dirichlet(alpha) for each mix.

    At k = 2 and without a teacher it does what torchvision's MixUp does, but for the weights, which
    are drawn for each sample here.

    Args:
        k: images a mix.
        alpha: concentration of the weights; 1 is uniform.
        num_classes: N, needed where labels are class indices and there is no teacher.
        teacher: labels the mixes; without it the sources' labels are weighted (Eq. 2).
        labels_getter: as in torchvision's MixUp; None where the batch has no labels.
        box_threshold: boxes follow the image of the largest weight.
        seed: as for `SuperMix`.
    """

    def _masks(self, draw: Draw, sources: Tensor, weights: Tensor, size: tuple[int, int]) -> Tensor:
        return weights[:, :, None, None].expand(-1, -1, *size)


class CutMix(_Blind):
    """Paste boxes of k - 1 other images into each image; labels by the areas that are seen.

    Boxes are pasted one after the other, each as large as its image's weight among those pasted so
    far, so that areas follow r ~ Dirichlet(alpha) but for what the border cuts off.

    Args:
        k: images a mix.
        alpha: concentration of the weights; 1 is uniform.
        num_classes: N, needed where labels are class indices and there is no teacher.
        teacher: labels the mixes; without it the sources' labels are weighted by realised area.
        labels_getter: as in torchvision's CutMix; None where the batch has no labels.
        box_threshold: least share of a box that must still be seen in the mix for it to be kept.
        seed: as for `SuperMix`.
    """

    def _masks(self, draw: Draw, sources: Tensor, weights: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size
        owner = np.zeros((len(sources), height, width), dtype=np.int64)
        parts = weights.numpy().astype(np.float64)
        upto = np.cumsum(parts, axis=1)
        # a small alpha leaves nothing of some images
        shares = np.divide(parts, upto, out=np.zeros_like(parts), where=upto > 0)
        for row, ids in enumerate(draw.ids[sources].tolist()):
            random = generator(draw, ids, Purpose.RECTANGLES)
            for i in range(1, sources.shape[1]):
                half = 0.5 * math.sqrt(shares[row, i])
                y, x = random.integers(height), random.integers(width)
                top, left = max(0, y - int(half * height)), max(0, x - int(half * width))
                owner[row, top : y + int(half * height), left : x + int(half * width)] = i
        places = torch.arange(sources.shape[1])[:, None, None]
        return (torch.from_numpy(owner)[:, None] == places).float()
