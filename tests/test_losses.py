"""Losses: closed forms, gradients against finite differences, half types."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference import slow_masks, slow_objective, slow_roughness
from torch.testing import assert_close

from supermix_transforms.losses import (
    kd_loss,
    kl_divergence,
    mixing_objective,
    roughness,
    sparsity,
    supermix_kd_loss,
    supermix_loss,
)
from supermix_transforms.masks import blend, render

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = [torch.bfloat16, torch.float16]


def random_targets(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(rows, classes, dtype=dtype).softmax(dim=1)


# -- sparsity (Eq. 5) ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4])
def test_sparsity_is_0_for_one_owner_and_largest_for_even_masks(k):
    owner = torch.randint(k, (5, 9, 7))
    one_hot = F.one_hot(owner, k).permute(0, 3, 1, 2).float()
    assert_close(sparsity(one_hot), torch.zeros(5))
    assert_close(sparsity(torch.full((5, k, 9, 7), 1 / k)), torch.full((5,), (k - 1) / k**2))
    between = sparsity(torch.randn(5, k, 9, 7).softmax(dim=1))
    assert ((between > 0) & (between < (k - 1) / k**2)).all()


def test_sparsity_is_of_each_row():
    masks = torch.rand(5, 2, 9, 7)
    expected = torch.stack([(m * (m - 1)).abs().sum() / (2 * 9 * 7) for m in masks])
    assert_close(sparsity(masks), expected)


# -- roughness (section 4.4) -----------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3])
def test_roughness_is_the_mean_cube_of_the_steps_between_pixels(k):
    masks = torch.randn(5, k, 9, 7).softmax(dim=1)
    assert_close(roughness(masks), torch.stack([slow_roughness(m) for m in masks]))


def test_roughness_is_0_for_even_masks_and_grows_with_noise():
    assert_close(roughness(torch.full((5, 3, 9, 7), 1 / 3)), torch.zeros(5))
    assert_close(roughness(torch.rand(5, 3, 1, 1)), torch.zeros(5))  # nothing to compare with
    noise = torch.randn(5, 2, 9, 7)
    quiet, loud = (roughness((scale * noise).softmax(dim=1)) for scale in (0.5, 2.0))
    assert (quiet > 0).all()
    assert (loud > quiet).all()


def test_a_border_that_is_a_ramp_of_n_pixels_is_n_squared_times_less_rough():
    """Masks of few cells are smooth without this term, the more so the larger the picture."""

    def ramp(n: int) -> torch.Tensor:
        row = (torch.arange(12.0) - 2).clamp(0, n) / n
        return row.expand(1, 1, 5, 12)

    sharp = roughness(ramp(1))
    assert_close(sharp, torch.tensor([1 / 12]))
    for n in (2, 4, 8):
        assert_close(roughness(ramp(n)), sharp / n**2)


def test_roughness_does_not_care_about_mirrors_and_turns():
    masks = torch.randn(5, 2, 9, 7).softmax(dim=1)
    for turned in (masks.flip(2), masks.flip(3), masks.transpose(2, 3), masks.flip(1)):
        assert_close(roughness(turned), roughness(masks))


# -- KL --------------------------------------------------------------------------------------------


def test_kl_is_0_at_the_target_and_positive_elsewhere():
    target = random_targets(5, 4)
    assert_close(kl_divergence(target.log(), target), torch.zeros(5), atol=1e-6, rtol=0)
    assert_close(kl_divergence(target.log() + 3, target), torch.zeros(5), atol=1e-6, rtol=0)
    assert (kl_divergence(torch.randn(5, 4), target) > 0).all()


def test_kl_has_the_order_that_is_finite_for_a_target_with_zeros():
    target = torch.tensor([[0.25, 0.75, 0.0, 0.0]])
    expected = 0.25 * math.log(0.25 / 0.25) + 0.75 * math.log(0.75 / 0.25)
    assert_close(kl_divergence(torch.zeros(1, 4), target), torch.tensor([expected]))


def test_kl_of_a_one_hot_target_is_cross_entropy():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 3])
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert_close(kl_divergence(logits, F.one_hot(labels, 4).float()), expected)


@pytest.mark.parametrize("dtype", HALF)
def test_half_logits_are_widened_before_the_softmax(dtype):
    logits = (100 * torch.randn(5, 40)).to(dtype)  # a softmax in fp16 gives 0, its logarithm -inf
    target = random_targets(5, 40)
    loss = kl_divergence(logits, target)
    assert loss.dtype == torch.float32
    assert_close(loss, kl_divergence(logits.float(), target), rtol=0, atol=0)
    student = supermix_loss(logits, target.to(dtype), logits, target)
    assert student.dtype == torch.float32
    assert student.isfinite()
    distilled = kd_loss(logits, target.to(dtype), torch.arange(5))
    assert distilled.dtype == torch.float32
    assert distilled.isfinite()


# -- the objective (Eq. 3) -------------------------------------------------------------------------


def test_the_objective_is_kl_plus_weighted_sparsity_of_each_row():
    logits, target = torch.randn(5, 4), random_targets(5, 4)
    m = torch.randn(5, 2, 3, 3)
    objective = mixing_objective(logits, target, render(m, (9, 7), "sigmoid"), lambda_s=25.0)
    expected = [
        slow_objective(logits[b], target[b], slow_masks(m[b], (9, 7)), 25.0) for b in range(5)
    ]
    assert_close(objective, torch.stack(expected))


def test_the_objective_takes_roughness_in_if_it_has_a_weight():
    logits, target = torch.randn(5, 4), random_targets(5, 4)
    masks = render(torch.randn(5, 2, 3, 3), (9, 7), "sigmoid")
    given = {"lambda_s": 25.0, "lambda_tv": 250.0}
    objective = mixing_objective(logits, target, masks, **given)
    expected = [slow_objective(logits[b], target[b], masks[b], **given) for b in range(5)]
    assert_close(objective, torch.stack(expected))
    assert (objective > mixing_objective(logits, target, masks, lambda_s=25.0) + 0.01).all()


@pytest.mark.parametrize("lambda_tv", [0.0, 250.0])
@pytest.mark.parametrize("how", ["sigmoid", "softmax"])
@pytest.mark.parametrize("k", [2, 3])
def test_the_objectives_gradient_agrees_with_finite_differences(how, k, lambda_tv):
    images = torch.rand(2, k, 3, 5, 4, dtype=torch.float64)
    head = torch.randn(3 * 5 * 4, 4, dtype=torch.float64)
    target = random_targets(2, 4, torch.float64)

    def objective(z):
        masks = render(z, (5, 4), how)
        logits = (blend(images, masks).flatten(1) @ head).sin() * 2  # not linear, smooth
        return mixing_objective(logits, target, masks, lambda_s=25.0, lambda_tv=lambda_tv)

    z = torch.randn(2, k, 3, 3, dtype=torch.float64, requires_grad=True)
    assert objective(z).dtype == torch.float64
    assert torch.autograd.gradcheck(objective, (z,))


# -- the student's losses (Eq. 8, 9) ---------------------------------------------------------------


def test_supermix_loss_is_the_sum_of_two_means():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 3])
    mixed_logits, targets = torch.randn(3, 4), random_targets(3, 4)
    expected = F.cross_entropy(logits, labels) + F.cross_entropy(mixed_logits, targets)
    assert_close(supermix_loss(logits, labels, mixed_logits, targets), expected)
    hard = targets.argmax(dim=1)
    assert_close(
        supermix_loss(logits, F.one_hot(labels, 4).float(), mixed_logits, hard),
        F.cross_entropy(logits, labels) + F.cross_entropy(mixed_logits, hard),
    )


def test_no_mixes_add_nothing_and_keep_the_graph():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 3])
    none = torch.zeros(0, 4, requires_grad=True)
    loss = supermix_loss(logits, labels, none, torch.zeros(0, 4))
    assert_close(loss, F.cross_entropy(logits, labels).requires_grad_())
    loss.backward()  # every rank must take part in the backward
    assert none.grad is not None


def test_kd_loss_has_tau_squared_once():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 3])
    teacher = random_targets(5, 4)
    tau = 3.0
    soft = -(teacher * (logits / tau).log_softmax(dim=1)).sum(dim=1).mean()
    for weight in (0.0, 0.1, 1.0):
        expected = (1 - weight) * F.cross_entropy(logits, labels) + weight * tau**2 * soft
        assert_close(kd_loss(logits, teacher, labels, temperature=tau, weight=weight), expected)


def test_kd_gradients_keep_their_size_over_temperatures():
    """What tau squared is for: soft targets' gradients shrink by 1 / tau**2."""
    sizes = []
    for tau in (20.0, 40.0):
        logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
        teacher = (torch.tensor([[-1.0, 2.0, 0.5]]) / tau).softmax(dim=1)
        kd_loss(logits, teacher, torch.tensor([0]), temperature=tau, weight=1.0).backward()
        sizes.append(logits.grad.norm())
    assert_close(sizes[0], sizes[1], rtol=0.05, atol=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_kd_loss_wants_a_positive_temperature(temperature):
    with pytest.raises(ValueError, match=r"temperature: expected a positive number, got"):
        kd_loss(
            torch.zeros(1, 2), torch.full((1, 2), 0.5), torch.tensor([0]), temperature=temperature
        )


def student(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, dtype=torch.float64)


@pytest.mark.parametrize("hard", [True, False])
def test_supermix_kd_loss_has_eq_8_for_both_sets_or_the_soft_term_for_originals_only(hard):
    logits, labels, mixed = student(5), torch.tensor([0, 3, 2, 1, 3]), student(3)
    teacher, mixed_teacher, soft = (random_targets(n, 4, torch.float64) for n in (5, 3, 3))
    targets = soft.argmax(dim=1) if hard else soft
    options = {"temperature": 3.0, "weight": 0.2}

    def softly(given, probs):
        return -9 * (probs * (given / 3).log_softmax(dim=1)).sum(dim=1).mean()

    crossed = 0.8 * (F.cross_entropy(logits, labels) + F.cross_entropy(mixed, targets))
    originals = crossed + 0.2 * softly(logits, teacher)
    found = supermix_kd_loss(logits, labels, teacher, mixed, targets, **options)
    assert_close(found, originals)
    found = supermix_kd_loss(logits, labels, teacher, mixed, targets, mixed_teacher, **options)
    assert_close(found, originals + 0.2 * softly(mixed, mixed_teacher))


def test_supermix_kd_loss_without_weight_is_eq_9():
    logits, labels, mixed = student(5), torch.tensor([0, 3, 2, 1, 3]), student(3)
    teacher, soft = random_targets(5, 4, torch.float64), random_targets(3, 4, torch.float64)
    expected = supermix_loss(logits, labels, mixed, soft)
    assert_close(supermix_kd_loss(logits, labels, teacher, mixed, soft, weight=0.0), expected)
    assert_close(supermix_kd_loss(logits, labels, teacher, mixed, soft, soft, weight=0.0), expected)


def test_supermix_kd_loss_of_no_mixes_is_eq_8_and_keeps_the_graph():
    logits, labels, teacher = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 3]), random_targets(5, 4)
    none = torch.zeros(0, 4, requires_grad=True)
    loss = supermix_kd_loss(logits, labels, teacher, none, torch.zeros(0, 4))
    assert_close(loss.detach(), kd_loss(logits, teacher, labels))
    loss.backward()
    assert none.grad is not None


@pytest.mark.parametrize("both", [True, False])
def test_the_students_gradients_agree_with_finite_differences(both):
    labels, teacher = torch.tensor([0, 3, 2]), random_targets(3, 4, torch.float64)
    mixed_teacher = random_targets(2, 4, torch.float64) if both else None
    targets = random_targets(2, 4, torch.float64)

    def loss(logits, mixed):
        return supermix_kd_loss(logits, labels, teacher, mixed, targets, mixed_teacher)

    pair = student(3).requires_grad_(), student(2).requires_grad_()
    assert torch.autograd.gradcheck(loss, pair)


@pytest.mark.parametrize("dtype", HALF)
def test_the_students_losses_are_computed_in_float32(dtype):
    logits, labels, mixed = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 3]), torch.randn(3, 4)
    teacher, soft = random_targets(5, 4), random_targets(3, 4)
    half = [tensor.to(dtype) for tensor in (logits, teacher, mixed, soft)]
    exact = [tensor.float() for tensor in half]
    low = supermix_kd_loss(half[0], labels, half[1], half[2], half[3], half[3])
    high = supermix_kd_loss(exact[0], labels, exact[1], exact[2], exact[3], exact[3])
    assert low.dtype == torch.float32
    assert_close(low, high)
