"""Masks: from logits on a coarse grid to pixels, and the mixing function itself.

Source: SuperMix (Dabouei et al., CVPR 2021), Eq. 1 and 4. Up-sampling and blur are two small matrix
products with fixed matrices, one for the rows and one for the columns: that is deterministic on
CUDA too, where the backward of a bilinear ``interpolate`` is not.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from supermix_transforms.losses import sparsity as sparsity_of
from supermix_transforms.losses import widen
from supermix_transforms.quantised import LEVELS, exact_parts, quantise

__all__ = [
    "Normalisation",
    "average",
    "blend",
    "blur",
    "mix_images",
    "normalise",
    "owners",
    "project",
    "render",
    "steps_of",
    "upsample",
]

Normalisation = Literal["sigmoid", "softmax"]
MAX_LOG_SCALE = math.log(1e3)  # bounds of the scale that `project` looks for


@lru_cache(maxsize=64)
def _bilinear(cells: int, pixels: int, device: torch.device) -> Tensor:
    """The matrix (pixels, cells) of a bilinear resize, ``align_corners=False``."""
    with torch.inference_mode(False), torch.no_grad():  # cached, so it must serve autograd later
        columns = F.interpolate(torch.eye(cells)[None], size=pixels, mode="linear")[0]
        return columns.T.contiguous().to(device)


@lru_cache(maxsize=64)
def _gaussian(cells: int, sigma: float, device: torch.device) -> Tensor:
    """The symmetric matrix (cells, cells) of a Gaussian blur whose border is a mirror."""
    with torch.inference_mode(False), torch.no_grad():
        position = torch.arange(cells, dtype=torch.float64)
        weights = torch.zeros(cells, cells, dtype=torch.float64)
        for turn in range(-math.ceil(4 * sigma / cells) - 1, math.ceil(4 * sigma / cells) + 2):
            shift = 2 * cells * turn
            same = position[:, None] - position[None, :] - shift
            mirrored = position[:, None] + position[None, :] + 1 - shift
            for distance in (same, mirrored):
                weights += (-((distance / sigma) ** 2) / 2).exp()
        return (weights / weights.sum(dim=1, keepdim=True)).float().to(device)


@lru_cache(maxsize=64)
def _averaging(pixels: int, cells: int, device: torch.device) -> Tensor:
    """The matrix (cells, pixels) of adaptive average pooling."""
    with torch.inference_mode(False), torch.no_grad():
        return F.adaptive_avg_pool1d(torch.eye(pixels)[None], cells)[0].T.contiguous().to(device)


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (..., h, w) to (..., H, W), float32 at least."""
    rows = _bilinear(logits.shape[-2], size[0], logits.device)
    columns = _bilinear(logits.shape[-1], size[1], logits.device)
    return _between(rows, logits, columns)


def average(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of (..., H, W) to (..., h, w), float32 at least."""
    rows = _averaging(values.shape[-2], size[0], values.device)
    columns = _averaging(values.shape[-1], size[1], values.device)
    return _between(rows, values, columns)


def blur(values: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (..., h, w), sigma in cells; 0 changes nothing. float32 at least."""
    if sigma == 0:
        return values
    rows = _gaussian(values.shape[-2], sigma, values.device)
    columns = _gaussian(values.shape[-1], sigma, values.device)
    return _between(rows, values, columns)


def _between(rows: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """``rows @ values @ columns.T``, float32 at least, whatever autocast the caller is in."""
    values = widen(values)
    with torch.autocast(values.device.type, enabled=False):
        return rows.to(values.dtype) @ values @ columns.T.to(values.dtype)


def normalise(logits: Tensor, how: Normalisation) -> Tensor:
    """Logits (B, k, H, W) to masks in [0, 1] that sum to 1 over k, float32 at least.

    ``"sigmoid"`` is Eq. 4. ``"softmax"`` is the same family for k = 2; for k >= 3 it can be
    sharpened by scaling the logits, where two large ones under a sigmoid tie.
    """
    logits = widen(logits)
    if how == "softmax":
        return logits.softmax(dim=1)
    # s(z) / sum s(z) as a softmax of log s(z): where every sigmoid underflows, a quotient is 0 / 0
    return F.logsigmoid(logits).softmax(dim=1)


def render(
    logits: Tensor,
    size: tuple[int, int],
    how: Normalisation = "softmax",
    *,
    quantised: bool = False,
) -> Tensor:
    """Mask logits (B, k, w, w) to masks (B, k, H, W): resized, then normalised (Eq. 4).

    `quantised`: the masks are those that a recipe of these logits gives; their gradient is that of
    the masks that were not rounded.
    """
    masks = normalise(upsample(logits, size), how)
    if quantised:  # in this order the sum is exact
        parts = exact_parts(steps_of(logits.detach(), how), size)
        masks = (masks - masks.detach()) + parts / LEVELS
    return masks


def steps_of(logits: Tensor, how: Normalisation) -> Tensor:
    """Mask logits (B, k, w, w) as a recipe stores them, int8 (B, k - 1, w, w); see `quantised`."""
    return quantise(F.logsigmoid(logits) if how == "sigmoid" else logits)


def project(
    logits: Tensor, sparsity: float, size: tuple[int, int], *, halvings: int = 20
) -> Tensor:
    """Scale each row's logits so that its softmax masks have the wanted sparsity L_s (Eq. 5).

    The scale is found by bisection and approaches the wanted value from below, so L_s never exceeds
    it where it can be reached at all (logits that are equal over k cannot be sharpened).

    Args:
        logits: (B, k, w, w) float32.
        sparsity: wanted L_s, in (0, (k - 1) / k**2).
        size: height and width at which the masks are measured, in pixels.
        halvings: bisection steps; 20 leave the scale known to 2e-5.

    Returns:
        (B, k, w, w), centred over k.
    """
    logits = logits - logits.mean(dim=1, keepdim=True)
    fine = upsample(logits, size)  # linear: scaling before or after is the same
    low = fine.new_full((len(fine), 1, 1, 1), -MAX_LOG_SCALE)
    high = -low
    for _ in range(halvings):
        middle = (low + high) / 2
        level = sparsity_of((fine * middle.exp()).softmax(dim=1))
        soft = (level > sparsity)[:, None, None, None]
        low, high = torch.where(soft, middle, low), torch.where(soft, high, middle)
    return logits * high.exp()


def owners(masks: Tensor) -> Tensor:
    """Which of the k images owns each pixel: masks (B, k, H, W) -> (B, H, W) int64."""
    return masks.argmax(dim=1)


def blend(images: Tensor, masks: Tensor) -> Tensor:
    """Eq. 1, differentiable in the masks: (B, k, C, H, W), (B, k, H, W) -> (B, C, H, W).

    The sum is taken in float32 at least. The result is the picture that would be handed out: uint8
    pictures give float32 on 0..255, rounded with a straight-through gradient; others keep their
    dtype.
    """
    total = sum(widen(images[:, i]) * masks[:, i, None] for i in range(images.shape[1]))
    assert isinstance(total, Tensor)  # k >= 1
    if images.dtype == torch.uint8:
        return total + (total.round() - total).detach()
    return total.to(images.dtype)


def mix_images(images: Tensor, masks: Tensor) -> Tensor:
    """Eq. 1: the sum of k images, each weighted by its mask.

    Args:
        images: (B, k, C, H, W), uint8 or floating point.
        masks: (B, k, H, W), in [0, 1], summing to 1 over k.

    Returns:
        (B, C, H, W) in the dtype of the images; uint8 is rounded to the nearest level.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> images = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 4, 4)
        >>> mix_images(images, torch.full((1, 2, 4, 4), 0.5)).unique()
        tensor([0.5000])
    """
    if images.ndim != 5 or masks.ndim != 4 or images.shape[:2] + images.shape[3:] != masks.shape:
        raise ValueError(
            "mix_images: expected images (B, k, C, H, W) and masks (B, k, H, W), got "
            f"{tuple(images.shape)} and {tuple(masks.shape)}. Index a batch as images[sources]."
        )
    mixed = blend(images, masks)
    return mixed.round().to(torch.uint8) if images.dtype == torch.uint8 else mixed
