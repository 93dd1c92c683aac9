"""The loop of the authors' script, as a baseline for `bench`: written anew from how it works.

Source: generation in github.com/alldbi/SuperMix, described in words, no line of it used. Other than
in `solve`, the whole batch goes on until enough of it is finished, and each step asks the teacher
twice: for a gradient, and for a check.
"""

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supermix_transforms.losses import mixing_objective, sparsity
from supermix_transforms.masks import blend, render
from supermix_transforms.methods import LENGTH_LIMITS, Logits, gradient_of, margins
from supermix_transforms.mixing import soft_targets
from supermix_transforms.results import Mixed, Outcome
from supermix_transforms.settings import SolverSettings

__all__ = ["AuthorsRun", "authors_blur", "authors_loop"]


class AuthorsRun(NamedTuple):
    """What came out, and how far the batch was after each step."""

    mixed: Mixed  # M rows; those that did not converge would be thrown away
    finished: Tensor  # (T, M) bool, after each step
    seconds: tuple[float, ...]  # T, since the start


def authors_loop(
    images: Tensor,
    teacher: Logits,
    *,
    sources: Tensor,
    weights: Tensor,
    classes: Tensor,
    tolerance: float = 0.0,
    max_steps: int | None = None,
) -> AuthorsRun:
    """Mix a batch until at most a share `tolerance` of it is unfinished, or the steps are used up.

    Everything is computed for every row in every step. The loss of finished rows is multiplied by
    0, so that their masks stay; one whose check fails later is unfinished again. Pictures are mixed
    as floats and cut off to 8 bits at the end. mask size, sigma and lambda_s are those of
    ``method="paper"``, which are the script's.

    Args:
        images: (P, C, H, W) uint8.
        teacher: pictures in 0..1 -> logits.
        sources: (M, k) int64 rows of `images`.
        weights: (M, k).
        classes: the teacher's, of `images`, (P,).
        tolerance: 0.7 is the script's own.
        max_steps: None is 50.
    """
    start = time.perf_counter()
    size = (images.shape[-2], images.shape[-1])
    settings = SolverSettings(method="paper", max_steps=max_steps).resolve(sources.shape[1], size)
    pictures, cells = images.float() / 255, settings.mask_size
    z = torch.zeros(*sources.shape, cells, cells, device=images.device)
    passed = torch.zeros(len(sources), dtype=torch.bool, device=images.device)
    history: list[Tensor] = []
    stamps: list[float] = []
    wanted, targets = classes[sources], None

    while len(history) < settings.max_steps:
        leaf = z.requires_grad_()
        masks = render(leaf, size, "sigmoid")
        logits = teacher(blend(pictures[sources], masks))
        if targets is None:  # the number of classes is known now
            targets = soft_targets(weights, wanted, logits.shape[1])
            members = torch.zeros_like(targets, dtype=torch.bool).scatter(1, wanted, True)
        loss = mixing_objective(logits, targets, masks, lambda_s=settings.lambda_s) * ~passed
        gradient = gradient_of(loss.sum(), leaf)
        with torch.no_grad():
            smooth = authors_blur(gradient, settings.sigma)
            slope = (smooth * gradient).sum(dim=(1, 2, 3))
            # 0 / 0 in finished rows
            length = (loss.abs() / slope).nan_to_num(nan=0.0).clamp(*LENGTH_LIMITS)
            z = z.detach() - length[:, None, None, None] * smooth
            masks = render(z, size, "sigmoid")
            mixes = blend(pictures[sources], masks)
            logits = teacher(mixes)
            passed = margins(logits, members) > 0
        history.append(passed)
        unfinished = int((~passed).sum())  # waits for the device, so that the time is right
        stamps.append(time.perf_counter() - start)
        if unfinished <= tolerance * len(passed):
            break

    steps = len(history)
    mixed = Mixed(
        images=(255 * mixes).clamp(0, 255).to(torch.uint8),
        sources=sources,
        weights=weights,
        outcome=torch.where(passed, Outcome.CONVERGED, Outcome.MAX_STEPS),
        steps=torch.full_like(passed, steps, dtype=torch.int64),
        sparsity=sparsity(masks),
        logits=logits,
        mask_logits=z,
        normalisation="sigmoid",
        forwards=torch.full_like(weights[:, 0], 2 * steps),
        backwards=torch.full_like(weights[:, 0], steps),
    )
    return AuthorsRun(mixed, torch.stack(history), tuple(stamps))


def authors_blur(values: Tensor, sigma: float) -> Tensor:
    """The script's Gaussian blur of (B, k, h, w): int(5 sigma) taps, outside is 0.

    With an even number of taps, as for sigma 2, the result is shifted by half a cell.
    """
    taps = max(1, int(5 * sigma))
    place = (torch.arange(taps, device=values.device) - (taps - 1) / 2) * 5 / taps
    weights = (-place.square() / 2).exp()
    kernel = torch.outer(weights, weights)[None, None]
    blurred = F.conv2d(values.flatten(0, 1)[:, None], kernel / kernel.sum(), padding=taps // 2)
    height, width = values.shape[-2:]
    return blurred[:, 0, :height, :width].reshape(values.shape)
