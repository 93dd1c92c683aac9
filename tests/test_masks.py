"""Masks: laws of rendering, blur and projection, and the mixing function."""

import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import slow_blur, slow_masks, slow_mix, slow_mix_by_owner
from torch.testing import assert_close

from supermix_transforms.losses import sparsity
from supermix_transforms.masks import (
    average,
    blend,
    blur,
    mix_images,
    normalise,
    owners,
    project,
    render,
    upsample,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# -- rendering (Eq. 4) -----------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    k=st.integers(1, 5),
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    how=st.sampled_from(["sigmoid", "softmax"]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_masks_are_in_0_to_1_and_sum_to_1(batch, k, cells, size, how, dtype, scale, seed):
    noise = torch.randn(batch, k, *cells, generator=torch.Generator().manual_seed(seed))
    masks = render((scale * noise).to(dtype), size, how)
    assert masks.shape == (batch, k, *size)
    assert masks.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((masks >= 0) & (masks <= 1)).all()  # false for NaN too
    assert_close(masks.sum(dim=1), torch.ones_like(masks[:, 0]), atol=1e-5, rtol=0)


def test_sigmoid_masks_are_eq_4():
    m = 3 * torch.randn(5, 3, 4, 4)
    expected = torch.stack([slow_masks(row, (9, 7)) for row in m])
    assert_close(render(m, (9, 7), "sigmoid"), expected)


def test_masks_stay_finite_where_every_sigmoid_underflows():
    m = torch.full((1, 2, 3, 3), -500.0)
    m[:, 0] += 1
    expected = torch.tensor([1.0, 0.0]).softmax(dim=0)
    assert_close(normalise(m, "sigmoid")[0, :, 0, 0], expected)


def test_softmax_masks_of_two_are_a_sigmoid_of_the_difference():
    z = torch.randn(5, 2, 9, 7)
    assert_close(normalise(z, "softmax")[:, 0], (z[:, 0] - z[:, 1]).sigmoid())


@pytest.mark.parametrize("how", ["sigmoid", "softmax"])
def test_permuting_logits_permutes_masks(how):
    z, order = torch.randn(5, 3, 4, 4), [2, 0, 1]
    assert_close(render(z[:, order], (9, 7), how), render(z, (9, 7), how)[:, order])


# -- matrices --------------------------------------------------------------------------------------


@given(
    cells=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_upsampling_is_a_bilinear_interpolate(cells, size):
    values = torch.randn(2, 3, *cells)
    expected = F.interpolate(values, size, mode="bilinear", align_corners=False)
    assert_close(upsample(values, size), expected, atol=2e-6, rtol=1e-5)


@given(
    pixels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
)
def test_average_is_adaptive_average_pooling(pixels, size):
    values = torch.randn(2, 3, *pixels)
    assert_close(average(values, size), F.adaptive_avg_pool2d(values, size), atol=2e-6, rtol=1e-5)


@given(
    cells=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    sigma=st.floats(0.1, 8.0),
)
def test_blur_is_scipys_gaussian_filter_with_a_mirrored_border(cells, sigma):
    values = torch.randn(2, 3, *cells, dtype=torch.float64)
    expected = scipy.ndimage.gaussian_filter(
        values.numpy(), (0, 0, sigma, sigma), mode="reflect", truncate=12.0
    )
    assert_close(blur(values, sigma), torch.from_numpy(expected), atol=1e-6, rtol=0)


@given(
    cells=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    sigma=st.floats(0.0, 8.0),
)
def test_blur_is_symmetric_and_keeps_the_mean(cells, sigma):
    a, b = torch.randn(2, *cells, dtype=torch.float64)
    assert_close((blur(a, sigma) * b).sum(), (a * blur(b, sigma)).sum(), atol=1e-5, rtol=0)
    assert_close(blur(a, sigma).mean(), a.mean(), atol=1e-6, rtol=0)


def test_blur_agrees_with_the_slow_one_and_none_is_none():
    values = torch.randn(3, 9, 7)
    assert_close(blur(values, 1.3), slow_blur(values, 1.3))
    assert blur(values, 0.0) is values
    assert_close(blur(values, 1e-200), values)


def test_autocast_around_leaves_the_matrices_alone():
    values = torch.randn(2, 9, 7)
    expected = upsample(values, (18, 13)), blur(values, 1.0), average(values, (3, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = upsample(values, (18, 13)), blur(values, 1.0), average(values, (3, 2))
    assert_close(seen, expected, atol=0, rtol=0)


def test_matrices_that_were_cached_under_inference_mode_serve_autograd():
    with torch.inference_mode():
        render(torch.zeros(1, 2, 5, 5), (23, 29))  # a size that no other test uses
        blur(torch.zeros(23, 29), 0.77)
    z = torch.randn(1, 2, 5, 5, requires_grad=True)
    blur(render(z, (23, 29)), 0.77).square().sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0


# -- projection ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    k=st.integers(2, 4),
    share=st.floats(0.2, 0.95),
    scale=st.sampled_from([0.2, 1.0, 50.0]),
    seed=st.integers(0, 2**16),
)
def test_projection_hits_the_asked_sparsity_from_below(k, share, scale, seed):
    z = scale * torch.randn(5, k, 4, 4, generator=torch.Generator().manual_seed(seed))
    wanted = share * (k - 1) / k**2
    level = sparsity(render(project(z, wanted, (9, 7)), (9, 7)))
    assert (level <= wanted + 1e-6).all()
    assert_close(level, torch.full((5,), wanted), atol=1e-4, rtol=0)


def test_projection_only_scales_and_centres():
    z = torch.randn(5, 3, 4, 4)
    projected = project(z, 0.1, (9, 7))
    assert_close(projected.mean(dim=1), torch.zeros(5, 4, 4), atol=1e-5, rtol=0)
    scale = projected / (z - z.mean(dim=1, keepdim=True))
    assert_close(scale, scale[:, :1, :1, :1].expand_as(scale), rtol=1e-3, atol=1e-3)


def test_projection_forgets_scale_and_offset():
    z, offset = torch.randn(5, 3, 4, 4), torch.randn(5, 1, 4, 4)
    expected = project(z, 0.1, (9, 7))
    assert_close(project(7 * z, 0.1, (9, 7)), expected, rtol=1e-3, atol=1e-4)
    assert_close(project(z + offset, 0.1, (9, 7)), expected, rtol=1e-3, atol=1e-4)
    assert_close(project(expected, 0.1, (9, 7)), expected, rtol=1e-3, atol=1e-4)


def test_projection_treats_rows_alone():
    z = torch.randn(5, 2, 4, 4)
    z[2] = 0  # equal over k: cannot be sharpened, and disturbs nobody
    together = project(z, 0.07, (9, 7))
    assert (together[2] == 0).all()
    for row in (0, 1, 3, 4):
        assert_close(together[row : row + 1], project(z[row : row + 1], 0.07, (9, 7)))


# -- mixing (Eq. 1) --------------------------------------------------------------------------------


def random_masks(k: int, size: tuple[int, int] = (9, 7)) -> torch.Tensor:
    return torch.randn(5, k, *size).mul(3).softmax(dim=1)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_mix_is_the_masked_sum_of_its_sources(k, channels):
    images, masks = torch.rand(5, k, channels, 9, 7), random_masks(k)
    assert_close(mix_images(images, masks), slow_mix(images, masks).float())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_one_hot_masks_select(dtype):
    images = (255 * torch.rand(5, 3, 3, 9, 7)).to(dtype)
    owner = torch.randint(3, (5, 9, 7))
    masks = F.one_hot(owner, 3).permute(0, 3, 1, 2).float()
    mixed = mix_images(images, masks)
    assert mixed.dtype == dtype
    for channel in range(3):
        selected = slow_mix_by_owner(images[:, :, channel], masks)
        assert_close(mixed[:, channel], selected, rtol=0, atol=0)
    assert_close(owners(masks), owner)


def test_one_image_is_left_as_it_is():
    images = torch.rand(5, 1, 3, 9, 7)
    assert_close(mix_images(images, torch.ones(5, 1, 9, 7)), images[:, 0], rtol=0, atol=0)


def test_equal_masks_average():
    images = torch.rand(5, 3, 3, 9, 7)
    assert_close(mix_images(images, torch.full((5, 3, 9, 7), 1 / 3)), images.mean(dim=1))


def test_uint8_is_rounded_to_the_nearest_level():
    images = torch.randint(256, (5, 2, 3, 9, 7), dtype=torch.uint8)
    masks = random_masks(2)
    mixed, exact = mix_images(images, masks), slow_mix(images, masks)
    assert mixed.dtype == torch.uint8
    assert ((mixed.double() - exact).abs() <= 0.5 + 1e-4).all()
    white = mix_images(torch.full_like(images, 255), masks)
    assert (white == 255).all()  # masks that sum to 1 + 1e-7 do not wrap around


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_pictures_are_summed_in_float32(dtype):
    images, masks = torch.rand(5, 3, 3, 9, 7).to(dtype), random_masks(3)
    mixed = mix_images(images, masks)
    assert mixed.dtype == dtype
    assert_close(mixed, slow_mix(images, masks).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_memory_format_does_not_matter():
    batch, sources = torch.rand(5, 3, 9, 7), torch.randint(5, (5, 2))
    masks = random_masks(2)
    last = batch.contiguous(memory_format=torch.channels_last)
    assert_close(mix_images(last[sources], masks), mix_images(batch[sources], masks))


def test_blend_gives_what_is_handed_out_and_a_straight_through_gradient():
    images = torch.randint(256, (5, 2, 3, 9, 7), dtype=torch.uint8)
    masks = random_masks(2).requires_grad_()
    mixed = blend(images, masks)
    assert_close(mixed.detach(), mix_images(images, masks.detach()).float(), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(mixed.sum(), masks)
    assert_close(gradient, images.float().sum(dim=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_inputs_are_unchanged(dtype):
    images, masks = (255 * torch.rand(5, 2, 3, 9, 7)).to(dtype), random_masks(2)
    before = images._version, masks._version
    mix_images(images, masks)
    project(masks, 0.1, (9, 7))
    render(masks, (18, 14))
    assert (images._version, masks._version) == before


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ((5, 3, 9, 7), (5, 2, 9, 7)),
        ((5, 2, 3, 9, 7), (5, 2, 3, 9, 7)),
        ((5, 2, 3, 9, 7), (5, 3, 9, 7)),
        ((5, 2, 3, 9, 7), (4, 2, 9, 7)),
        ((5, 2, 3, 9, 7), (5, 2, 7, 9)),
    ],
)
def test_shapes_that_do_not_fit_are_named(images, masks):
    with pytest.raises(ValueError, match=r"mix_images: expected images .* got .*Index a batch"):
        mix_images(torch.zeros(images), torch.zeros(masks))
