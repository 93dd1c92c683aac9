"""Masks in whole numbers, so that a recipe gives the same pixels on any machine, in any batch.

Mask logits are rounded to steps of half a logit, resized with weights that are 16ths, and turned
into parts of 255 by a table. All of it is integers, held in floating point numbers that are wide
enough for them: no rounding depends on the order of a sum. The mixed value of a pixel is an integer
divided by 255, never halfway between two levels, so it too is rounded alike everywhere.
docs/format.md has it step by step.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LEVELS", "LIMIT", "STEP", "blend_parts", "exact_parts", "quantise", "whole_weights"]

Array: TypeAlias = npt.NDArray[Any]

STEP = 0.5  # of a mask logit
LIMIT = 12  # steps that a logit may lie below the largest of its cell
TAPS = 16  # parts of a cell's width
PARTS = 512  # of a logit, after the resize: TAPS² / STEP
LEVELS = 255  # parts of a pixel that the masks share
ONE = 1 << 20  # of the table of exponentials


def quantise(logits: Tensor) -> Tensor:
    """Logits (M, k, w, w) of softmax masks as steps above the last image's, int8 (M, k - 1, w, w).

    A logit far below the largest of its cell is raised to `LIMIT` steps below it: its mask is
    0.0025 of the largest there.
    """
    lowered = (logits - logits.amax(dim=1, keepdim=True)).clamp(min=-LIMIT * STEP)
    steps = (lowered / STEP).round()
    return (steps[:, :-1] - steps[:, -1:]).to(torch.int8)


def exact_parts(steps: Tensor, size: tuple[int, int]) -> Tensor:
    """Steps (M, k - 1, w, w) int8 as masks (M, k, H, W) uint8 in parts of 255, their sum.

    The same for each row alone and on every device.
    """
    fine = _resized(steps, size)
    if steps.shape[1] > 1:
        return whole_weights(_exponentials(fine)).to(torch.uint8)
    place = fine.to(torch.int32).add_(int(LIMIT * STEP * PARTS)).flatten()
    first = _pair_table(steps.device).index_select(0, place).view(len(steps), *size)
    return torch.stack([first, LEVELS - first], dim=1)


def blend_parts(pictures: Sequence[Array], parts: Array) -> Array:
    """The mix (C, H, W) uint8 of k pictures (C, H, W) uint8, with `parts` (k, H, W) uint8 of each.

    ``sum x_i m_i / 255``, rounded, in 16 bits.
    """
    total: Array = np.full(pictures[0].shape, 128, dtype=np.uint16)
    for picture, part in zip(pictures, parts.astype(np.uint16), strict=True):
        total += picture * part
    total += total >> 8
    return (total >> 8).astype(np.uint8)


def whole_weights(parts: Tensor) -> Tensor:
    """Positive integers (M, k, ...) as shares (M, k, ...) int64 of `LEVELS` that sum to it.

    What the images up to one have together is rounded, halves upwards.
    """
    total = parts.sum(dim=1, keepdim=True)
    upto = (2 * LEVELS * parts.cumsum(dim=1) + total) // (2 * total)
    return upto.diff(dim=1, prepend=torch.zeros_like(upto[:, :1]))


def _resized(steps: Tensor, size: tuple[int, int]) -> Tensor:
    """Steps (M, k - 1, w, w) at pixels, in `PARTS` of a logit: small integers, hence exact."""
    rows = _taps(steps.shape[2], size[0], steps.device)
    columns = _taps(steps.shape[3], size[1], steps.device)
    with torch.autocast(steps.device.type, enabled=False):  # exact, whoever reads the masks
        return rows @ steps.to(rows.dtype) @ columns.T


def _exponentials(fine: Tensor) -> Tensor:
    """``ONE * exp(z - max z)`` of logits (M, k - 1, ...) and the last image's 0, int64."""
    parts = F.pad(fine, (0, 0, 0, 0, 0, 1))
    below = (parts.amax(dim=1, keepdim=True) - parts).long()
    return _table(fine.device)[below]


@lru_cache(maxsize=8)
def _table(device: torch.device) -> Tensor:
    """``ONE * exp(-i / PARTS)``, rounded, int64."""
    below = np.arange(int(2 * LIMIT * STEP * PARTS) + 1)
    return torch.from_numpy(np.rint(ONE * np.exp(-below / PARTS)).astype(np.int64)).to(device)


@lru_cache(maxsize=8)
def _pair_table(device: torch.device) -> Tensor:
    """The first of two images' parts for every difference of their logits, uint8."""
    with torch.inference_mode(False):
        most = int(LIMIT * STEP * PARTS)
        fine = torch.arange(-most, most + 1, dtype=torch.float64)[:, None, None, None]
        return whole_weights(_exponentials(fine))[:, 0].flatten().to(device, torch.uint8)


@lru_cache(maxsize=64)
def _taps(cells: int, pixels: int, device: torch.device) -> Tensor:
    """The matrix (pixels, cells) of a bilinear resize in 16ths of a cell.

    A pixel's centre lies ``(2 p + 1) cells / (2 pixels) - 1/2`` cells from the first cell's, at
    least 0 and at most the last one's; 16ths are rounded, halves upwards.
    """
    with torch.inference_mode(False):
        place = ((2 * torch.arange(pixels) + 1) * cells - pixels).clamp(0, (cells - 1) * 2 * pixels)
        left = (place // (2 * pixels)).clamp(max=max(0, cells - 2))
        right = ((place - left * 2 * pixels) * TAPS + pixels) // (2 * pixels)
        taps = torch.zeros(pixels, cells, dtype=torch.int64)
        taps.scatter_add_(1, left[:, None], (TAPS - right)[:, None])
        if cells > 1:
            taps.scatter_add_(1, left[:, None] + 1, right[:, None])
        # a GPU may shorten the factors of a float32 product
        return taps.to(device, torch.float32 if device.type == "cpu" else torch.float64)
