"""Masks in whole numbers."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from supermix_transforms import mix_images
from supermix_transforms.masks import render, steps_of
from supermix_transforms.quantised import (
    LEVELS,
    LIMIT,
    ONE,
    PARTS,
    STEP,
    _table,
    blend_parts,
    exact_parts,
    quantise,
    whole_weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(k: int, cells: int = 16, count: int = 5) -> torch.Tensor:
    return 3 * torch.randn(count, k, cells, cells)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_parts_sum_to_255_and_are_near_the_masks(k):
    z = logits(k)
    smooth = torch.nn.functional.avg_pool2d(z, 5, 1, 2)  # masks of a search are smooth
    parts = exact_parts(quantise(smooth), (45, 64))
    assert parts.dtype == torch.uint8
    assert (parts.sum(dim=1) == LEVELS).all()
    masks = parts / LEVELS
    assert (masks - render(smooth, (45, 64))).abs().mean() < 0.04


@pytest.mark.parametrize("k", [2, 3])
def test_a_row_does_not_depend_on_its_batch(k):
    steps = quantise(logits(k))
    together = exact_parts(steps, (33, 20))
    for row in range(len(steps)):
        assert torch.equal(exact_parts(steps[row : row + 1], (33, 20))[0], together[row])


def test_steps_of_steps_are_the_same():
    steps = quantise(logits(3))
    back = STEP * torch.cat([steps, torch.zeros_like(steps[:, :1])], dim=1).float()
    assert torch.equal(quantise(back), steps)


def test_steps_are_bounded_and_what_is_largest_stays_so():
    z = 100 * torch.randn(4, 3, 8, 8)
    steps = quantise(z).short()
    spread = torch.cat([steps, torch.zeros_like(steps[:, :1])], dim=1)
    assert (spread.amax(dim=1) - spread.amin(dim=1)).max() == LIMIT
    largest = spread.gather(1, z.argmax(dim=1, keepdim=True))[:, 0]
    assert torch.equal(largest, spread.amax(dim=1))


def test_masks_of_sigmoids_are_rounded_as_softmaxes_of_their_logarithms():
    z = logits(2, count=1)
    expected = quantise(torch.nn.functional.logsigmoid(z))
    assert torch.equal(steps_of(z, "sigmoid"), expected)


def test_no_rounded_exponential_is_near_a_half():
    """So any exp in double precision gives this table."""
    with localcontext() as context:
        context.prec = 40
        for below, value in enumerate(_table(torch.device("cpu")).tolist()):
            exact = ONE * (Decimal(-below) / PARTS).exp()
            assert abs(exact - value) < Decimal("0.499999")


def test_whole_weights_round_what_the_first_have_together():
    weights = torch.tensor([[1, 1, 1]])
    assert whole_weights(weights).tolist() == [[85, 85, 85]]
    assert whole_weights(torch.tensor([[1, 1]])).tolist() == [[128, 127]]
    assert whole_weights(torch.tensor([[1, 10**6]])).tolist() == [[0, 255]]


def test_a_blend_is_the_exact_mean_rounded_for_every_pair_and_part():
    first, second = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    for part in range(LEVELS + 1):
        pair = [a.astype(np.uint8)[None] for a in (first, second)]
        parts = np.stack([np.full_like(pair[0][0], p) for p in (part, LEVELS - part)])
        total = first * part + second * (LEVELS - part)
        assert np.array_equal(blend_parts(pair, parts)[0], (2 * total + LEVELS) // (2 * LEVELS))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_blend_is_what_the_teacher_was_shown(k):
    images = torch.randint(0, 256, (1, k, 3, 40, 30), dtype=torch.uint8)
    z = logits(k, count=1)
    masks = render(z, (40, 30), quantised=True)
    parts = exact_parts(quantise(z), (40, 30))[0].numpy()
    again = blend_parts(list(images[0].numpy()), parts)
    assert np.array_equal(again, mix_images(images, masks)[0].numpy())


def test_the_gradient_of_rounded_masks_is_that_of_the_masks():
    z = logits(2).requires_grad_()
    weights = torch.randn(5, 2, 20, 20)
    (rounded,) = torch.autograd.grad((render(z, (20, 20), quantised=True) * weights).sum(), z)
    (smooth,) = torch.autograd.grad((render(z, (20, 20)) * weights).sum(), z)
    assert torch.equal(rounded, smooth)


@pytest.mark.parametrize(("cells", "size"), [(1, (5, 4)), (8, (8, 8)), (16, (16, 33)), (3, (2, 9))])
def test_odd_sizes(cells, size):
    parts = exact_parts(quantise(logits(2, cells)), size)
    assert parts.shape == (5, 2, *size)
    assert (parts.int().sum(dim=1) == LEVELS).all()


def test_masks_are_the_same_under_autocast():
    logits = (torch.randn(2, 2, 5, 5) / STEP).round().clamp(-60, 60) * STEP
    expected = render(logits, (33, 33), quantised=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(render(logits, (33, 33), quantised=True), expected)
