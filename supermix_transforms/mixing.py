"""From pictures, tuples and weights to mixes and their labels."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from supermix_transforms.inputs import check_device, check_images, check_labels
from supermix_transforms.results import ClassMaps, Mixed, Outcome, TeacherLabels
from supermix_transforms.solver import SolverSettings, solve
from supermix_transforms.teacher import TeacherLabeler, as_labeler

__all__ = [
    "check_k",
    "keep_rows",
    "label_mixes",
    "label_originals",
    "or_labels",
    "soft_targets",
    "supermix",
    "unmixed",
    "weighted_labels",
]

INDEX_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def soft_targets(weights: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Eq. 2: the sources' labels, weighted.

    Args:
        weights: (M, k), rows sum to 1.
        labels: of the sources, class indices (M, k) or probabilities (M, k, N).
        num_classes: N.

    Returns:
        (M, N) float32; weights of equal classes are added.
    """
    weights = weights.float()
    if labels.ndim == 3:
        return (weights[:, :, None] * labels.float()).sum(dim=1)
    return weights.new_zeros(len(weights), num_classes).scatter_add(1, labels, weights)


def weighted_labels(mixed: Mixed, labels: Tensor, num_classes: int) -> Tensor:
    """Eq. 2 with the samples' own labels, (M, N), in the labels' dtype if that is floating."""
    targets = soft_targets(mixed.weights, labels[mixed.sources], num_classes)
    return targets.to(labels.dtype) if labels.is_floating_point() else targets


def or_labels(
    logits: Tensor,
    labels: Tensor | None,
    lost: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Logits with the sample's own label in rows where the teacher's answer is not finite.

    They are those of the label at the temperature that they will be divided by.
    """
    lost = ~logits.isfinite().all(dim=1) if lost is None else lost
    if labels is None:
        return torch.where(lost[:, None], temperature * logits.nan_to_num(0.0, 0.0, 0.0), logits)
    if labels.ndim == 1:
        labels = torch.nn.functional.one_hot(labels, logits.shape[1])
    own = temperature * labels.float().clamp(min=1e-12).log()
    return torch.where(lost[:, None], own, logits)


def label_originals(
    labeler: TeacherLabeler, images: Tensor, labels: Tensor | None
) -> TeacherLabels:
    """The teacher's labels of originals, in float32; the samples' own must fit its classes."""
    logits = labeler.examine(images)[0]
    if labels is not None:
        labels = check_labels(labels, len(images), logits.shape[1])
    return labeler.label(or_labels(logits, labels, temperature=labeler.temperature))


def label_mixes(
    labeler: TeacherLabeler, mixed: Mixed, labels: Tensor | None
) -> tuple[TeacherLabels, Mixed]:
    """The teacher's labels of mixes; where it has no finite answer, Eq. 2's, and that outcome."""
    logits = labeler.ask(mixed.images)
    mixed = replace(mixed, forwards=mixed.forwards + 1)
    lost = ~logits.isfinite().all(dim=1)
    if not bool(lost.any()):
        return labeler.label(logits), mixed
    expected = None if labels is None else weighted_labels(mixed, labels, logits.shape[1])
    own = or_labels(logits, expected, lost, temperature=labeler.temperature)
    gone = torch.full_like(mixed.outcome, Outcome.NOT_FINITE)
    return labeler.label(own), replace(mixed, outcome=torch.where(lost, gone, mixed.outcome))


def supermix(
    images: Tensor,
    teacher: Any,
    *,
    sources: Tensor,
    weights: Tensor,
    settings: SolverSettings = SolverSettings(),
    originals: Tensor | None = None,
    maps: ClassMaps | None = None,
) -> Mixed:
    """Mix tuples of pictures so that the teacher sees all k classes in each mix (Algorithm 1).

    Args:
        images: (P, C, H, W), uint8 or floating, on the teacher's device.
        teacher: a module or callable images -> logits, a list of them, or a `TeacherLabeler`.
        sources: (M, k) int64, rows of `images`; any M.
        weights: (M, k), r of Eq. 2; rows sum to 1.
        settings: method and values.
        originals: the teacher's logits of `images`, (P, N), if they are known; `maps` is then used
            as it is given. Both come from one ``TeacherLabeler.examine(images)``.
        maps: class maps of `images`.

    Returns:
        `Mixed` of M rows.

    Raises:
        ValueError: for pictures, sources or weights that do not fit, or on another device than the
            teacher.
    """
    labeler = as_labeler(teacher)
    images = check_images(images)
    check_device(images, labeler.device)
    sources, weights = _check_tuples(sources, weights, len(images), images.device)
    with torch.inference_mode(False), labeler.ready():
        if originals is None:
            originals, maps = labeler.examine(images)
        if originals.ndim != 2 or len(originals) != len(images):
            raise ValueError(
                f"originals: expected logits ({len(images)}, N) of {len(images)} pictures, got "
                f"{tuple(originals.shape)}. Pass TeacherLabeler.examine(images)[0], or None."
            )
        originals = originals.clone() if originals.is_inference() else originals
        maps = maps and ClassMaps(*(t.clone() if t.is_inference() else t for t in maps))
        mixed = solve(
            images,
            labeler.logits,
            sources=sources,
            weights=weights,
            originals=originals,
            settings=settings,
            maps=maps,
            half=labeler.half,
        )
    mixed.forwards.add_(len(images) / max(1, len(mixed)))  # the originals' own forward
    return mixed


def unmixed(images: Tensor, k: int) -> Mixed:
    """The originals as they are, for a batch that is too small to mix."""
    count, (height, width) = len(images), images.shape[-2:]
    masks = torch.zeros(count, k, height, width, device=images.device)
    masks[:, 0] = 1
    sources = torch.arange(count, device=images.device)[:, None].repeat(1, k)
    # in storage of their own: whoever changes mixes in place must not change originals
    return Mixed.unsearched(images.clone(), sources, masks, Outcome.UNMIXED)


def settled_rows(mixed: Mixed) -> Tensor:
    """Of mixes that converged, and of pictures that were not to be mixed, (R,) int64."""
    outcome = mixed.outcome
    return ((outcome == Outcome.CONVERGED) | (outcome == Outcome.UNMIXED)).nonzero().flatten()


def keep_rows(mixed: Mixed, rows: Tensor) -> Mixed:
    """Some of the mixes; what the others cost the teacher is added to their calls."""
    kept, count = mixed[rows], len(rows)
    if count in (0, len(mixed)):
        return kept
    forwards = (mixed.forwards.sum() - kept.forwards.sum()) / count
    backwards = (mixed.backwards.sum() - kept.backwards.sum()) / count
    return replace(kept, forwards=kept.forwards + forwards, backwards=kept.backwards + backwards)


def check_k(k: object, alpha: object) -> None:
    """Raise a ValueError unless k is an integer of at least 2 and alpha a positive number."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 2:
        raise ValueError(f"k: expected an integer of at least 2 images a mix, got {k!r}.")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        raise ValueError(
            f"alpha: expected a positive number, Dirichlet(alpha)'s concentration, got {alpha!r}."
        )


def _check_tuples(
    sources: Tensor, weights: Tensor, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    for name, value in (("sources", sources), ("weights", weights)):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name}: expected a tensor (M, k), got {type(value).__name__}. Pass "
                "torch.as_tensor(...) of it."
            )
    if sources.ndim != 2 or sources.shape[1] < 2 or sources.dtype not in INDEX_TYPES:
        raise ValueError(
            f"sources: expected indices (M, k) with k of at least 2, got {sources.dtype} "
            f"{tuple(sources.shape)}. Each row names the pictures of one mix."
        )
    if len(sources) == 0 or sources.min() < 0 or sources.max() >= count:
        span = f"{int(sources.min())}..{int(sources.max())}" if len(sources) else "no row"
        raise ValueError(
            f"sources: expected rows of {count} pictures, 0..{count - 1}, got {span}. Index the "
            "pictures that are passed."
        )
    if weights.shape != sources.shape:
        raise ValueError(
            f"weights: expected one for each source, {tuple(sources.shape)}, got "
            f"{tuple(weights.shape)}. Draw them with draw_weights, or give each 1 / k."
        )
    weights = weights.float()
    if not bool(((weights >= 0).all()) & ((weights.sum(dim=1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "weights: expected numbers of at least 0 whose rows sum to 1, got rows summing to "
            f"{weights.sum(dim=1)[:4].tolist()}. Divide each row by its sum."
        )
    with torch.inference_mode(False):
        sources, weights = sources.to(device).long(), weights.to(device)
        return (
            sources.clone() if sources.is_inference() else sources,
            weights.clone() if weights.is_inference() else weights,
        )
