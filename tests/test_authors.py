"""The authors' loop: one step written out, when it ends, and what it hands out."""

import pytest
import torch
import torch.nn.functional as F
from picky import picky_net, picky_pictures
from torch.testing import assert_close

from supermix_transforms.commands.authors import authors_blur, authors_loop
from supermix_transforms.results import Outcome

pytestmark = pytest.mark.usefixtures("one_thread")


class Counted:
    """The picky net of pictures in 0..1; keeps how many it was shown in each call."""

    def __init__(self, spoiled=()):
        self.net, self.calls, self.spoiled = picky_net(), [], spoiled

    def __call__(self, pictures):
        self.calls.append(len(pictures))
        logits = self.net((pictures - 0.5) / 0.25)
        return -logits if len(self.calls) in self.spoiled else logits


def problem(count: int = 12) -> dict:
    images = torch.stack([picture for _, picture in picky_pictures()])
    rows = torch.arange(count)
    weights = torch.linspace(0.3, 0.7, count)
    return {
        "images": images,
        "classes": Counted()(images / 255).argmax(dim=1),
        "sources": torch.stack([rows, rows.roll(-1)], dim=1),
        "weights": torch.stack([weights, 1 - weights], dim=1),
    }


def loop(teacher=None, **options):
    given = problem() | options
    return authors_loop(given.pop("images"), teacher or Counted(), **given)


def test_a_step_is_that_of_the_script():
    given = problem()
    z = torch.zeros(12, 2, 8, 8, requires_grad=True)
    fine = F.interpolate(z, (17, 15), mode="bilinear").sigmoid()
    masks = fine / fine.sum(dim=1, keepdim=True)
    pictures = given["images"] / 255
    first, second = (pictures[given["sources"][:, i]] * masks[:, i, None] for i in (0, 1))
    log_probs = Counted()(first + second).log_softmax(dim=1)
    targets = torch.zeros(12, 30).scatter_add(
        1, given["classes"][given["sources"]], given["weights"]
    )
    divergence = F.kl_div(log_probs, targets, reduction="none").sum(dim=1)
    loss = divergence + 25 * (masks * (1 - masks)).mean(dim=(1, 2, 3))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    smooth = authors_blur(gradient, 1.0)
    length = (loss.abs() / (smooth * gradient).sum(dim=(1, 2, 3))).clamp(1e-4, 2000)
    expected = -length[:, None, None, None] * smooth
    mixed = loop(max_steps=1).mixed
    assert_close(mixed.mask_logits, expected.detach(), rtol=1e-3, atol=1e-3)


def test_the_blur_of_sigma_1_has_five_taps_and_zeros_outside():
    taps = torch.exp(-(torch.tensor([-2.0, -1, 0, 1, 2]) ** 2) / 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    spot = torch.zeros(1, 2, 9, 9)
    spot[0, 1, 4, 5] = 1
    blurred = authors_blur(spot, 1.0)
    assert_close(blurred[0, 1, 2:7, 3:8], kernel)
    assert blurred.sum().item() == pytest.approx(1)
    corner = torch.zeros(1, 1, 9, 9)
    corner[0, 0, 0, 0] = 1
    assert_close(authors_blur(corner, 1.0)[0, 0, :3, :3], kernel[2:, 2:])  # the rest is lost


def test_the_blur_of_sigma_2_is_shifted_by_half_a_cell():
    spot = torch.zeros(1, 1, 25, 25)
    spot[0, 0, 12, 12] = 1
    blurred = authors_blur(spot, 2.0)[0, 0]
    assert blurred.shape == (25, 25)
    place = torch.arange(25.0)
    row = blurred.sum(dim=0)
    assert (row * place).sum().item() == pytest.approx(12.5)
    assert int((row > 0).sum()) == 10
    assert row[12] == row[13]
    spread = (row * (place - 12.5) ** 2).sum().sqrt()
    assert spread == pytest.approx(2, abs=0.1)  # in cells; the tails are cut off


def test_each_step_asks_twice_for_the_whole_batch():
    teacher = Counted()
    run = loop(teacher, max_steps=5)
    assert teacher.calls == [12] * 10
    assert len(run.finished) == len(run.seconds) == 5
    assert 0 < int(run.finished[-1].sum()) < 12  # though some are finished
    assert run.mixed.forwards.tolist() == [10] * 12
    assert run.mixed.backwards.tolist() == [5] * 12
    assert list(run.seconds) == sorted(run.seconds)


def test_it_ends_when_so_few_are_unfinished_as_the_tolerance_allows():
    strict, loose = loop(), loop(tolerance=0.7)
    assert len(strict.finished) == 50
    few = ((~strict.finished).float().mean(dim=1) <= 0.7).tolist()
    assert len(loose.finished) == few.index(True) + 1  # of the same steps, the first with so few
    unfinished = (~loose.finished).float().mean(dim=1)
    assert unfinished[-1] <= 0.7
    assert (unfinished[:-1] > 0.7).all()
    assert torch.equal(strict.finished[: len(loose.finished)], loose.finished)


def test_the_tolerance_itself_is_allowed():
    finished = loop(max_steps=4).finished
    share = 1 - int(finished[2].sum()) / 12
    assert not torch.equal(finished[1].sum(), finished[2].sum())
    assert len(loop(tolerance=share, max_steps=4).finished) == 3


def test_masks_of_finished_rows_stay():
    early, late = loop(max_steps=3), loop(max_steps=12)
    rows = early.finished[-1]
    assert 0 < int(rows.sum()) < 12
    assert torch.equal(early.mixed.mask_logits[rows], late.mixed.mask_logits[rows])
    assert (early.mixed.mask_logits[~rows] != late.mixed.mask_logits[~rows]).any()


def test_a_finished_row_whose_check_fails_is_unfinished_again():
    calm, spoiled = loop(max_steps=3), loop(Counted(spoiled=(6,)), max_steps=3)
    assert calm.finished[-1].any()
    assert torch.equal(calm.finished[:2], spoiled.finished[:2])
    assert not spoiled.finished[2].any()
    assert (spoiled.mixed.outcome == Outcome.MAX_STEPS).all()


def test_pictures_are_cut_off_to_8_bits_not_rounded():
    run = loop(max_steps=2)
    images, sources = problem()["images"].double(), run.mixed.sources
    exact = (images[sources] * run.mixed.masks[:, :, None].double()).sum(dim=1)
    shown = run.mixed.images.double()
    assert ((exact - shown) > -1e-3).all()
    assert ((exact - shown) < 1 + 1e-3).all()
    assert (exact - shown).mean().item() == pytest.approx(0.5, abs=0.05)
