"""Slow and obvious: the paper's equations one tuple at a time, written without the package.

Nothing here imports `supermix_transforms`, so that a mistake there cannot hide here.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def slow_mix(images: Tensor, masks: Tensor) -> Tensor:
    """Eq. 1 pixel by pixel: images (B, k, C, H, W), masks (B, k, H, W) -> (B, C, H, W) float64."""
    batch, k, channels, height, width = images.shape
    mixed = torch.zeros(batch, channels, height, width, dtype=torch.float64)
    for b in range(batch):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    mixed[b, c, y, x] = sum(
                        float(images[b, i, c, y, x]) * float(masks[b, i, y, x]) for i in range(k)
                    )
    return mixed


def slow_mix_by_owner(values: Tensor, masks: Tensor) -> Tensor:
    """Each pixel's value from the image whose mask is the largest there.

    values (B, k, H, W), of any dtype; masks (B, k, H, W) -> (B, H, W).
    """
    batch, k, height, width = values.shape
    mixed = torch.zeros(batch, height, width, dtype=values.dtype)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                owner = max(range(k), key=lambda i: float(masks[b, i, y, x]))
                mixed[b, y, x] = values[b, owner, y, x]
    return mixed


def slow_blur(values: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (k, h, w) whose border is a mirror (half-sample symmetric), untruncated."""
    return _blur_last(_blur_last(values, sigma).transpose(1, 2), sigma).transpose(1, 2)


def _blur_last(values: Tensor, sigma: float) -> Tensor:
    if sigma == 0:
        return values
    length = values.shape[-1]
    reach = math.ceil(12 * sigma)  # exp(-72) beyond
    offsets = range(-reach, reach + 1)
    kernel = [math.exp(-(o**2) / (2 * sigma**2)) for o in offsets]
    blurred = torch.zeros_like(values)
    for x in range(length):
        for offset, weight in zip(offsets, kernel, strict=True):
            place = (x + offset) % (2 * length)  # the mirrored signal has this period
            place = place if place < length else 2 * length - 1 - place
            blurred[..., x] += values[..., place] * (weight / sum(kernel))
    return blurred


def slow_masks(m: Tensor, size: tuple[int, int]) -> Tensor:
    """Eq. 4: (k, w, w) -> (k, H, W)."""
    s = torch.sigmoid(F.interpolate(m[:, None], size, mode="bilinear", align_corners=False)[:, 0])
    return s / s.sum(dim=0)


def slow_roughness(masks: Tensor) -> Tensor:
    """Total variation of section 4.4, pixel by pixel: (k, H, W) -> scalar."""
    k, height, width = masks.shape
    total = torch.zeros((), dtype=masks.dtype)
    for i in range(k):
        for y in range(height):
            for x in range(width):
                down = masks[i, y + 1, x] - masks[i, y, x] if y + 1 < height else torch.zeros(())
                across = masks[i, y, x + 1] - masks[i, y, x] if x + 1 < width else torch.zeros(())
                total = total + down.abs() ** 3 + across.abs() ** 3
    return total / (k * height * width)


def slow_objective(
    logits: Tensor, target: Tensor, masks: Tensor, lambda_s: float, lambda_tv: float = 0.0
) -> Tensor:
    """Eq. 3 of one tuple: (N,), (N,), (k, H, W) -> scalar."""
    f = torch.softmax(logits, dim=0)
    divergence = sum(
        target[c] * torch.log(target[c] / f[c]) for c in range(len(target)) if target[c] > 0
    )
    rough = slow_roughness(masks) if lambda_tv > 0 else 0.0
    return divergence + lambda_tv * rough + lambda_s * (masks * (masks - 1)).abs().mean()


def algorithm_1(
    images: Tensor,
    weights: Tensor,
    teacher: Callable[[Tensor], Tensor],
    *,
    mask_size: int,
    sigma: float,
    lambda_s: float = 25.0,
    lambda_tv: float = 0.0,
    lr: float | None = None,
    max_steps: int = 50,
) -> tuple[list[tuple[Tensor, Tensor]], bool]:
    """Algorithm 1 for one tuple of pictures (k, C, H, W), float32 or float64, weights (k,).

    With `lr`, a step is one of plain gradient descent, the first baseline of section 4.4.

    Returns the masks (k, H, W) and the mix (C, H, W) before the first step and after each, and
    whether the teacher's top k classes of the last mix are those of the images.
    """
    k, size = len(images), tuple(images.shape[-2:])
    with torch.no_grad():
        classes = [int(teacher(images[i : i + 1])[0].argmax()) for i in range(k)]
        num_classes = teacher(images[:1]).shape[1]
    target = torch.zeros(num_classes, dtype=images.dtype)
    for r, y in zip(weights, classes, strict=True):
        target[y] += r

    path = []
    m = torch.zeros(k, mask_size, mask_size, dtype=images.dtype)
    for step in range(max_steps + 1):
        m.requires_grad_()
        masks = slow_masks(m, size)
        mixed = sum(images[i] * masks[i] for i in range(k))
        logits = teacher(mixed[None])[0]
        wanted = len(set(classes))
        done = set(logits.topk(wanted).indices.tolist()) == set(classes)
        path.append((masks.detach(), mixed.detach()))
        if done or step == max_steps:
            return path, done
        loss = slow_objective(logits, target, masks, lambda_s, lambda_tv)
        (gradient,) = torch.autograd.grad(loss, m)
        if lr is not None:
            m = m.detach() - lr * gradient
            continue
        smooth = slow_blur(gradient, sigma)
        length = float(loss.detach().abs() / (smooth * gradient).sum())
        length = min(max(length, 1e-4), 2000.0)  # the authors' bounds
        m = m.detach() - length * smooth
    raise AssertionError("not reached")
