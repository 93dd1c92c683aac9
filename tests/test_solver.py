"""The solver: Algorithm 1 against a slow reference, and what every row is owed."""

import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from reference import algorithm_1
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from supermix_transforms import solver
from supermix_transforms.losses import kl_divergence, mixing_objective, roughness
from supermix_transforms.masks import blur, mix_images, render
from supermix_transforms.methods import Surrogate, contrast, quality
from supermix_transforms.mixing import supermix
from supermix_transforms.results import ClassMaps, Mixed, Outcome
from supermix_transforms.solver import (
    METHODS,
    SolverSettings,
    margins,
    newton_step,
    solve,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = pytest.mark.parametrize("method", ["paper", "fast"])
EVERY = pytest.mark.parametrize("method", METHODS)
BASELINES = pytest.mark.parametrize("method", ["newton-tv", "sgd"])  # of section 4.4
KINDS = pytest.mark.parametrize("kind", ["paper", "contrast", "maps"])
CELLS = (3, 4)  # the grid on which `Cells` looks


class Cells(nn.Module):
    """A teacher whose logits are linear in averaged class maps, so that it has them."""

    def __init__(self, channels: int = 3, classes: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        features = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        features.weight = nn.Parameter(torch.randn(16, channels, 3, 3, generator=generator))
        self.features = nn.Sequential(features, nn.Tanh(), nn.AdaptiveAvgPool2d(CELLS))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, classes)
        self.head.weight = nn.Parameter(4 * torch.randn(classes, 16, generator=generator))
        self.head.bias = nn.Parameter(torch.zeros(classes))
        with torch.no_grad():  # so that every class has pictures
            self.head.bias -= self(smooth_noise(400, channels, (9, 7))).mean(dim=0)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.features(images)).flatten(1))

    def maps(self, images: Tensor) -> ClassMaps:
        with torch.no_grad():
            return ClassMaps(self.features(images), self.head.weight, self.head.bias)


def smooth_noise(count: int, channels: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    noise = torch.rand(count, channels, 3, 3, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, size, mode="bilinear")


def pictures(teacher, *, each: int = 2, channels: int = 3, size=(9, 7), seed: int = 0) -> Tensor:
    """For each class of `teacher` that noise can show, `each` pictures of it."""
    noise = smooth_noise(400, channels, size, seed)
    with torch.no_grad():
        classes = teacher(noise).argmax(dim=1)
    found = [noise[classes == c][:each] for c in range(int(classes.max()) + 1)]
    return torch.cat([rows for rows in found if len(rows) == each])


def tuples(images: Tensor, k: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Every picture with the next classes' ones; weights that differ."""
    count = len(images)
    sources = torch.stack([(torch.arange(count) + 2 * i) % count for i in range(k)], dim=1)
    weights = torch.rand(count, k, generator=torch.Generator().manual_seed(seed)) + 0.5
    return {"sources": sources, "weights": weights / weights.sum(dim=1, keepdim=True)}


def run(images: Tensor, teacher, *, kind: str = "paper", k: int = 2, **given) -> Mixed:
    """Solve all of `tuples(images, k)`, or what is given."""
    names = ("sources", "weights", "originals")
    parts = tuples(images, k) | {name: given.pop(name) for name in names if name in given}
    if "originals" not in parts:
        with torch.no_grad():
            floats = images / 255 if images.dtype == torch.uint8 else images
            parts["originals"] = teacher(floats).float()
    maps = teacher.maps(images) if kind == "maps" else None
    settings = SolverSettings(**{"method": "paper" if kind == "paper" else "fast", **given})
    return solve(images, teacher, **parts, settings=settings, maps=maps)


def check_finite(mixed: Mixed) -> None:
    for name, value in vars(mixed).items():
        if isinstance(value, Tensor):
            assert value.float().isfinite().all(), name
    assert mixed.masks.isfinite().all()


def rows_of(mixed: Mixed, rows, *, but: tuple[str, ...] = ()) -> dict[str, Tensor]:
    part = mixed[torch.as_tensor(rows)]
    return {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, Tensor) and name not in but
    }


class Spy:
    """Counts forwards and backwards by row; the last channel names the row.

    All pictures of a tuple carry the same number there, so their mix does, whatever its masks.
    """

    def __init__(self, teacher) -> None:
        self.teacher = teacher
        self.asked: list[list[int]] = []  # of each forward
        self.graph: list[bool] = []
        self.backwards: list[int] = []  # rows of each backward

    def __call__(self, images: Tensor) -> Tensor:
        self.asked.append(images[:, -1].mean(dim=(1, 2)).round().int().tolist())
        self.graph.append(images.requires_grad and torch.is_grad_enabled())
        logits = self.teacher(images[:, :-1])
        if logits.requires_grad:
            count = len(images)
            logits.register_hook(lambda _: self.backwards.append(count))
        return logits

    @staticmethod
    def name_rows(images: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures of their own for each tuple, with its number in a further channel."""
        rows, k = parts["sources"].shape
        own = images[parts["sources"].flatten()]
        names = torch.arange(rows).repeat_interleave(k).float()[:, None, None, None]
        own = torch.cat([own, names.expand(-1, 1, *own.shape[2:])], dim=1)
        return own, {**parts, "sources": torch.arange(rows * k).view(rows, k)}


# -- the Newton step (Eq. 6, 7) --------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("limits", [None, (1e-4, 2000.0)])
def test_one_newton_step_zeroes_a_linear_objective(sigma, limits):
    slope = torch.randn(5, 2, 4, 4)
    z = torch.randn(5, 2, 4, 4)

    def objective(z):
        return (slope * z).sum(dim=(1, 2, 3)) + 20

    step = newton_step(objective(z), slope, sigma, limits)
    assert_close(objective(z + step), torch.zeros(5), atol=2e-5, rtol=0)
    # smooth: along the blurred gradient, downhill
    smooth = blur(slope, sigma)
    assert_close(
        step / smooth, (step / smooth)[:, :1, :1, :1].expand_as(step), rtol=1e-3, atol=1e-3
    )
    assert ((step * slope).sum(dim=(1, 2, 3)) < 0).all()


def test_a_vanishing_gradient_gives_no_step():
    for limits in (None, (1e-4, 2000.0)):
        for loss in (torch.ones(2), torch.zeros(2)):
            assert (newton_step(loss, torch.zeros(2, 2, 4, 4), 1.0, limits) == 0).all()


def test_the_papers_step_length_is_clamped():
    slope = torch.full((3, 2, 4, 4), 1.0)
    slope[1] = 1e-4
    slope[2] = 1e-9
    loss = torch.tensor([1e-9, 1e6, 1.0])
    step = newton_step(loss, slope, 0.0, (1e-4, 2000.0))
    assert_close(step[:, 0, 0, 0], torch.tensor([-1e-4, -2000 * 1e-4, -2000 * 1e-9]))


def test_margins_are_the_lead_of_the_least_member():
    logits = torch.tensor([[5.0, 3.0, 1.0, 2.0], [5.0, 3.0, 1.0, 2.0]])
    members = torch.tensor([[True, True, False, False], [True, False, True, False]])
    assert_close(margins(logits, members), torch.tensor([1.0, -2.0]))


# -- Algorithm 1 against the reference -------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "k", "size", "mask_size", "sigma"),
    [
        ("paper", 2, (9, 7), None, None),
        ("paper", 2, (8, 8), 4, 0.8),
        ("paper", 3, (9, 7), 5, 1.5),
        ("paper", 3, (7, 12), None, None),
        ("newton-tv", 2, (9, 7), None, None),
        ("newton-tv", 3, (8, 8), 4, None),
        ("sgd", 2, (9, 7), None, None),
        ("sgd", 3, (8, 8), 4, None),
    ],
)
def test_the_papers_methods_are_algorithm_1(method, k, size, mask_size, sigma):
    teacher = Cells()
    images = pictures(teacher, size=size)
    parts = tuples(images, k)
    cells = mask_size or min(size)
    blurred = cells / 8 if method == "paper" else 0.0
    lr = 3.0 if method == "sgd" else None  # at the paper's 0.1, five steps are none
    chosen = {} if lr is None else {"lr": lr}

    def reference(dtype, row):
        return algorithm_1(
            images[parts["sources"][row]].to(dtype),
            parts["weights"][row],
            teacher.to(dtype),
            mask_size=cells,
            sigma=blurred if sigma is None else sigma,
            lambda_tv=0.0 if method == "paper" else 250.0,
            lr=lr,
            max_steps=5,
        )

    # Newton steps near a stationary point amplify rounding; a step is compared where the reference
    # itself is sure of it.
    exact, rounded = (
        [reference(dtype, row) for row in range(len(images))]
        for dtype in (torch.float64, torch.float32)
    )
    compared = []
    for steps in range(6):
        chosen |= {"method": method, "mask_size": mask_size, "sigma": sigma, "max_steps": steps}
        mixed = run(images, teacher, k=k, **chosen)
        for row, ((path, done), (second, _)) in enumerate(zip(exact, rounded, strict=True)):
            taken = min(steps, len(path) - 1)
            masks, mix = path[taken]
            if len(path) != len(second) or (second[taken][0] - masks).abs().max() > 2e-5:
                continue
            assert_close(mixed.masks[row].double(), masks, atol=1e-4, rtol=0)
            assert_close(mixed.images[row].double(), mix, atol=1e-4, rtol=0)
            assert int(mixed.steps[row]) == taken
            finished = done and taken == len(path) - 1
            assert bool(mixed.converged[row]) == finished
            compared.append((taken, finished))
    assert compared.count((5, False)) >= 1  # five steps were compared, and rows that ended before
    assert {(1, False), (2, False), (3, False), (4, False)} <= set(compared)
    assert any(finished and taken > 0 for taken, finished in compared)
    assert len(compared) > 4 * len(images)


def test_its_loss_is_the_objective_and_lambda_s_counts():
    assert METHODS["paper"].normalisation == "sigmoid"
    images = pictures(Cells())
    soft, sharp = (run(images, Cells(), lambda_s=v, max_steps=4) for v in (0.0, 100.0))
    assert not torch.equal(soft.mask_logits, sharp.mask_logits)


def test_newton_tv_with_a_blur_for_its_roughness_is_the_papers_method():
    teacher = Cells()
    images = pictures(teacher)
    paper = run(images, teacher, method="paper", max_steps=4)
    other = run(images, teacher, method="newton-tv", sigma=7 / 8, lambda_tv=0.0, max_steps=4)
    rows = torch.arange(len(images))
    assert_close(rows_of(other, rows), rows_of(paper, rows), atol=0, rtol=0)


@BASELINES
def test_the_baselines_masks_are_smoother_the_more_roughness_weighs(method):
    teacher = Cells()
    images = pictures(teacher)
    given = {"method": method, "margin": 1e6, "max_steps": 6, "lr": 1.0}
    rough, smooth = (run(images, teacher, lambda_tv=v, **given) for v in (0.0, 2500.0))
    assert roughness(smooth.masks).mean() < 0.5 * roughness(rough.masks).mean()


def test_sgd_goes_down_the_objective_by_the_learning_rate():
    teacher = Cells()
    images = pictures(teacher)
    given = {"method": "sgd", "margin": 1e6}
    small, large = (run(images, teacher, lr=lr, max_steps=1, **given) for lr in (0.1, 0.2))
    assert_close(large.mask_logits, 2 * small.mask_logits)  # it starts from zero
    parts = tuples(images, 2)
    wanted = teacher(images).argmax(dim=1)[parts["sources"]]
    target = torch.zeros(len(images), 6).scatter_add(1, wanted, parts["weights"])
    values = []
    for steps in range(0, 25, 6):
        mixed = run(images, teacher, max_steps=steps, **given)
        weights = {"lambda_s": 25.0, "lambda_tv": 250.0}
        values.append(mixing_objective(mixed.logits, target, mixed.masks, **weights))
    falls = torch.stack(values).diff(dim=0)
    assert (falls < 1e-6).all()
    assert falls.sum(dim=0).mean() < -0.01


@pytest.mark.parametrize("k", [2, 3])
@KINDS
def test_permuting_the_sources_permutes_the_masks(kind, k):
    teacher = Cells()
    images = pictures(teacher)
    parts = tuples(images, k)
    order = torch.tensor([1, 2, 0][:k] if k == 3 else [1, 0])
    mixed = run(images, teacher, kind=kind, k=k, max_steps=3)
    turned = run(
        images,
        teacher,
        kind=kind,
        k=k,
        max_steps=3,
        sources=parts["sources"][:, order],
        weights=parts["weights"][:, order],
    )
    assert_close(turned.masks, mixed.masks[:, order], atol=2e-3, rtol=0)
    assert_close(turned.images, mixed.images, atol=2e-3, rtol=0)
    assert mixed.steps.float().mean() > 0.2  # something was searched


# -- a teacher whose right answer is known ---------------------------------------------------------


def halves(images: Tensor) -> Tensor:
    """Class 3 * half + colour: the mean of each colour in the left half, then in the right."""
    middle = images.shape[-1] // 2
    left, right = images[..., :middle], images[..., middle:]
    return 10 * torch.cat([left.mean(dim=(2, 3)), right.mean(dim=(2, 3))], dim=1)


def one_half_each(size: int = 16) -> Tensor:
    """Picture 0 is red on the left, picture 1 green on the right; the other halves mislead."""
    images = torch.zeros(2, 3, size, size)
    images[0, 0, :, : size // 2] = 1.0
    images[0, 2, :, size // 2 :] = 0.95
    images[1, 1, :, size // 2 :] = 1.0
    images[1, 2, :, : size // 2] = 0.95
    return images


@EVERY
@pytest.mark.parametrize("flip", [False, True])
def test_each_picture_keeps_the_half_that_shows_its_class(method, flip):
    images = one_half_each()
    left, right = (1, 0) if flip else (0, 1)
    mixed = run(
        images,
        halves,
        method=method,
        margin=5.0,  # half and half leads by 0.25
        lr=1.0,
        sources=torch.tensor([[1, 0] if flip else [0, 1]]),
        weights=torch.tensor([[0.5, 0.5]]),
    )
    assert mixed.converged.all()
    masks = mixed.masks[0]
    # the lead of red over blue on the left is 10 m - 9.5 (1 - m): 5 of it needs m above 0.74
    assert masks[left, :, :8].mean() > 0.74
    assert masks[right, :, 8:].mean() > 0.74
    assert mixed.images[0, 0, :, :8].mean() > 0.74
    assert mixed.images[0, 1, :, 8:].mean() > 0.74
    assert set(mixed.logits[0].topk(2).indices.tolist()) == {0, 4}


def test_contrast_is_where_a_picture_has_detail():
    images = torch.full((3, 3, 40, 32), 0.5)
    images[0, :, :20, :16] += 0.2 * torch.rand(20, 16, generator=torch.Generator().manual_seed(0))
    images[1] = images[0].flip(-1)
    cells = contrast(images, 4)
    assert_close(cells.mean(dim=(1, 2)), torch.ones(3))
    assert cells[0, :2, :2].mean() > 10 * cells[0, 3, 3]
    assert_close(cells[1], cells[0].flip(-1), atol=1e-4, rtol=1e-4)
    assert (cells[2] == 1).all()  # nothing to see
    levels = (images * 255).round().to(torch.uint8)
    assert_close(contrast(levels, 4), cells, atol=0.1, rtol=0)


def test_masks_start_where_the_pictures_have_detail():
    """Without class maps: each picture is to be seen where it has something to show."""
    images = torch.full((2, 3, 32, 32), 0.5)
    noise = 0.3 * torch.rand(3, 32, 12, generator=torch.Generator().manual_seed(0))
    images[0, :, :, :12] += noise
    images[1, :, :, -12:] += noise
    mixed = run(
        images,
        lambda x: x.new_tensor([[0.0, 0.0, 9.0]]).repeat(len(x), 1),
        method="fast",
        max_steps=0,
        originals=torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]),
        sources=torch.tensor([[0, 1]]),
        weights=torch.tensor([[0.5, 0.5]]),
    )
    assert mixed.masks[0, 0, :, :8].min() > 0.9
    assert mixed.masks[0, 1, :, -8:].min() > 0.9


def test_pictures_that_are_not_mixed_do_not_count():
    teacher = Cells()
    images = pictures(teacher)
    given = {
        "sources": torch.tensor([[5, 2], [2, 7], [7, 5]]),
        "weights": torch.full((3, 2), 0.5),
        "originals": teacher(images).detach(),
    }
    for kind in ("contrast", "maps"):
        mixed = run(images, teacher, kind=kind, max_steps=3, **given)
        others = images.clone()
        others[[0, 1, 3, 4, 6]] = 0.0
        expected = run(others, teacher, kind=kind, max_steps=3, **given)
        assert_close(mixed.mask_logits, expected.mask_logits, atol=0, rtol=0)


def test_class_maps_start_the_search_where_the_classes_are():
    teacher = Cells()
    images = pictures(teacher)
    start = run(images, teacher, kind="maps", max_steps=0)
    blind = run(images, teacher, kind="paper", max_steps=0)
    assert start.converged.sum() > blind.converged.sum()
    assert (start.backwards == 0).all()
    assert (start.forwards == 1).all()


def test_a_surrogate_says_what_a_linear_teacher_would():
    teacher = Cells()
    images = pictures(teacher)
    maps = teacher.maps(images)
    sources = torch.tensor([[5, 2, 0], [2, 7, 1]])
    masks = torch.rand(2, 3, 9, 7).softmax(dim=1)
    used = torch.tensor([0, 1, 2, 5, 7])
    said = Surrogate.of_maps(maps, used).of_tuples(sources)(masks)
    cells = F.adaptive_avg_pool2d(masks, CELLS)
    expected = torch.einsum("bkhw,bknhw->bn", cells, maps.maps()[sources]) / 12 + maps.bias
    assert_close(said, expected, atol=1e-4, rtol=1e-4)


def test_a_surrogate_of_pictures_gives_each_its_logits_where_it_is_whole():
    teacher = Cells()
    images = pictures(teacher)
    logits = teacher(images).detach()
    surrogate = Surrogate.of_pictures(images, logits, torch.tensor([3, 4]), 4)
    masks = torch.zeros(2, 2, 9, 7)
    masks[:, 0] = 1
    said = surrogate.of_tuples(torch.tensor([[3, 4], [4, 3]]))(masks)
    assert_close(said, (logits - logits.mean(dim=1, keepdim=True))[3:5], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["contrast", "maps"])
def test_the_first_answer_is_used_without_a_backward(kind):
    teacher = Cells()
    spy = Spy(teacher)
    images, parts = Spy.name_rows(pictures(teacher), tuples(pictures(teacher), 2))
    originals = teacher(images[:, :-1]).detach()
    maps = teacher.maps(images[:, :-1]) if kind == "maps" else None
    settings = SolverSettings(max_steps=1, margin=3.0)
    mixed = solve(images, spy, **parts, originals=originals, settings=settings, maps=maps)
    assert (mixed.steps == 1).any()
    assert_close(mixed.forwards, mixed.steps + 1.0)
    assert (mixed.backwards == 0).all()
    assert not any(spy.graph)


def test_what_the_teacher_said_moves_the_start():
    """The mixes' logits differ from what class maps say; after one answer the start knows."""
    teacher = Cells()
    images = pictures(teacher)
    shift = torch.tensor([-1.0, 1.0, 0.0, -1.0, 1.0, 0.0])
    given = {
        "kind": "maps",
        "originals": teacher(images).detach(),
        "margin": 0.5,
    }
    members = torch.zeros(len(images), 6, dtype=torch.bool)
    classes = given["originals"].argmax(dim=1)[tuples(images, 2)["sources"]]
    members.scatter_(1, classes, True)

    def moved(x: Tensor) -> Tensor:
        return teacher(x) + shift

    moved.maps = teacher.maps
    first, second = (run(images, moved, max_steps=steps, **given) for steps in (0, 1))
    assert (second.backwards == 0).all()
    failed = ~first.converged
    gain = margins(second.logits, members) - margins(first.logits, members)
    assert gain[failed].mean() > 0.3


def test_half_precision_asks_for_a_larger_margin():
    teacher = Cells()
    images = pictures(teacher)
    parts = tuples(images, 2)
    originals = teacher(images).detach()
    members = torch.zeros(len(images), 6, dtype=torch.bool)
    members.scatter_(1, originals.argmax(dim=1)[parts["sources"]], True)
    for half, margin in ((False, 0.05), (True, 0.25)):
        mixed = solve(
            images, teacher, **parts, originals=originals, settings=SolverSettings(), half=half
        )
        lead = margins(mixed.logits, members)
        assert torch.equal(lead > margin, mixed.converged)
        assert mixed.converged.any()
    assert SolverSettings(margin=0.1).resolve(2, (9, 7), half=True).margin == 0.1
    assert SolverSettings(method="paper").resolve(2, (9, 7), half=True).margin == 0.0


# -- what fast promises ----------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "sparsity"), [(2, 0.074), (3, 0.104), (4, 0.124)])
@pytest.mark.parametrize("kind", ["contrast", "maps"])
def test_fast_masks_have_the_projected_sparsity(kind, k, sparsity):
    teacher = Cells()
    mixed = run(pictures(teacher), teacher, kind=kind, k=k)
    assert (mixed.sparsity <= sparsity + 1e-6).all()
    assert_close(mixed.sparsity, torch.full_like(mixed.sparsity, sparsity), atol=1e-3, rtol=0)
    other = run(pictures(teacher), teacher, kind=kind, k=k, sparsity=0.04)
    assert_close(other.sparsity, torch.full_like(other.sparsity, 0.04), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["contrast", "maps"])
def test_converged_rows_have_the_margin_and_others_their_best_iterate(kind):
    teacher = Cells()
    images = pictures(teacher)
    logits = teacher(images).detach()
    members = torch.zeros(len(images), 6, dtype=torch.bool)
    members.scatter_(1, logits.argmax(dim=1)[tuples(images, 2)["sources"]], True)
    mixed = run(images, teacher, kind=kind, margin=0.5, max_steps=6)
    lead = margins(mixed.logits, members)
    assert torch.equal(lead > 0.5, mixed.converged)
    assert mixed.converged.any()
    hard = run(images, teacher, kind=kind, margin=1e6, max_steps=4)
    assert (hard.outcome == Outcome.MAX_STEPS).all()
    best = margins(hard.logits, members)
    for steps in (0, 2):
        earlier = run(images, teacher, kind=kind, margin=1e6, max_steps=steps)
        assert (margins(earlier.logits, members) <= best + 1e-3).all()


@BOTH
def test_polish_lowers_kl_and_keeps_what_converged(method):
    teacher = Cells()
    images = pictures(teacher)
    target = torch.zeros(len(images), 6)
    parts = tuples(images, 2)
    target.scatter_add_(1, teacher(images).argmax(dim=1)[parts["sources"]], parts["weights"])
    plain, polished = (run(images, teacher, method=method, polish=p) for p in (0, 5))
    assert (polished.converged >= plain.converged).all()
    done = plain.converged
    assert done.sum() >= 3
    before, after = (kl_divergence(m.logits, target)[done] for m in (plain, polished))
    assert (after <= before).all()
    assert after.mean() < 0.9 * before.mean()
    # fast has no graph at its first check: who passes there is asked once more
    waits = (plain.steps == 0) & (method == "fast")
    assert (polished.steps == plain.steps + 5 + waits)[done].all()
    assert_close(teacher(polished.images).detach(), polished.logits, atol=1e-4, rtol=1e-4)


@BOTH
def test_the_converged_iterate_of_least_kl_is_kept(method):
    """To the precision of float32: late polish steps gain little."""
    teacher = Cells()
    images, parts = Spy.name_rows(pictures(teacher), tuples(pictures(teacher), 2))
    originals = teacher(images[:, :-1]).detach()
    wanted = originals.argmax(dim=1)[parts["sources"]]
    target = torch.zeros(len(wanted), 6).scatter_add(1, wanted, parts["weights"])
    members = torch.zeros(len(wanted), 6, dtype=torch.bool).scatter(1, wanted, True)
    least = torch.full((len(wanted),), torch.inf)

    def recorded(x):
        logits = teacher(x[:, :-1])
        rows = x[:, -1].mean(dim=(1, 2)).round().long()
        passed = margins(logits, members[rows]) > 0.25
        divergence = kl_divergence(logits.detach(), target[rows]).where(passed, torch.inf)
        least[rows] = torch.minimum(least[rows], divergence)
        return logits

    given = {"margin": 0.25, "polish": 12, "max_steps": 10, "originals": originals}
    mixed = run(images, recorded, method=method, **given, **parts)
    done = mixed.converged
    assert done.sum() >= 3
    assert_close(kl_divergence(mixed.logits, target)[done], least[done], atol=1e-6, rtol=1e-6)


# -- min_share and max_kl --------------------------------------------------------------------------


def asked_of(images: Tensor, teacher, mixed: Mixed) -> tuple[Tensor, Tensor, Tensor]:
    """Margin, share and KL of `run`'s mixes, asking the teacher for the pictures themselves."""
    parts = tuples(images, 2)
    with torch.no_grad():
        wanted = teacher(images).argmax(dim=1)[parts["sources"]]
        logits = teacher(mixed.images).double()
    members = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, wanted, True)
    target = torch.zeros_like(logits).scatter_add(1, wanted, parts["weights"].double())
    share = (logits.softmax(dim=1) * members).sum(dim=1)
    return margins(logits, members), share, kl_divergence(logits, target)


@EVERY
@pytest.mark.parametrize(
    "asked", [{"min_share": 0.9}, {"max_kl": 0.4}, {"min_share": 0.8, "max_kl": 0.5}]
)
def test_converged_rows_have_the_share_and_the_kl_that_were_asked_for(method, asked):
    teacher = Cells()
    images = pictures(teacher)
    given = {"method": method, "margin": 0.25, "lr": 1.0}
    plain = run(images, teacher, max_steps=20, **given)
    mixed = run(images, teacher, max_steps=20, **given, **asked)

    def good(mixed: Mixed) -> Tensor:
        margin, share, divergence = asked_of(images, teacher, mixed)
        enough = (share > asked.get("min_share", 0.0) - 1e-6) & (margin > 0.25 - 1e-5)
        return enough & (divergence < asked.get("max_kl", 1e9) + 1e-6)

    assert good(mixed)[mixed.converged].all()
    assert mixed.converged.sum() >= 3
    # it asks for more than the criterion, which is searched for
    early = plain.converged & ~good(plain)
    assert early.any()
    assert (mixed.steps > plain.steps)[early].all()
    same = plain.converged & good(plain)
    assert torch.equal(mixed.steps[same], plain.steps[same])


@pytest.mark.parametrize("asked", [{"min_share": 0.9}, {"max_kl": 0.15}])
@pytest.mark.parametrize("kind", ["contrast", "maps"])
def test_fast_finds_what_is_asked_for_in_most_rows(kind, asked):
    teacher = Cells()
    images = pictures(teacher)
    reached = [run(images, teacher, kind=kind, max_steps=n, **asked).converged for n in (0, 20)]
    assert reached[0].float().mean() < 0.3
    assert reached[1].float().mean() > 0.7


@EVERY
def test_a_bar_that_every_mix_passes_changes_nothing(method):
    teacher = Cells()
    images = pictures(teacher)
    plain = run(images, teacher, method=method, max_steps=5)
    mixed = run(images, teacher, method=method, max_steps=5, min_share=1e-9, max_kl=1e9)
    rows = torch.arange(len(images))
    assert_close(rows_of(mixed, rows), rows_of(plain, rows), atol=0, rtol=0)


@pytest.mark.parametrize("asked", [{"min_share": 1 - 1e-9}, {"max_kl": 0.0}])
@EVERY
def test_a_bar_that_no_mix_passes_is_an_outcome(method, asked):
    teacher = Cells()
    mixed = run(pictures(teacher), teacher, method=method, max_steps=4, **asked)
    assert (mixed.outcome == Outcome.MAX_STEPS).all()
    assert (mixed.steps == 4).all()
    check_finite(mixed)


def test_rows_that_miss_the_bar_keep_the_iterate_nearest_to_it():
    teacher = Cells()
    images = pictures(teacher)
    given = {"kind": "maps", "margin": 0.25, "min_share": 0.9999, "max_kl": 0.02}

    def missing(steps: int) -> Tensor:
        mixed = run(images, teacher, max_steps=steps, **given)
        margin, share, divergence = asked_of(images, teacher, mixed)
        short = torch.stack([share.logit() - torch.tensor(0.9999).logit(), 0.02 - divergence])
        return torch.minimum(margin, 0.25 + short.amin(dim=0))

    reached = torch.stack([missing(steps) for steps in range(7)])
    assert (reached.diff(dim=0) > -1e-3).all()
    assert (reached[-1] > reached[0] + 0.1).float().mean() > 0.5


@BOTH
def test_polish_keeps_the_share_that_was_asked_for(method):
    teacher = Cells()
    images = pictures(teacher)
    mixed = run(images, teacher, method=method, min_share=0.8, max_steps=20, polish=6)
    _, share, _ = asked_of(images, teacher, mixed)
    assert mixed.converged.sum() >= 3
    assert (share > 0.8 - 1e-6)[mixed.converged].all()


def test_quality_is_what_is_left_of_the_lesser_of_share_and_kl():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.1, 0.7]]).log() + 3
    members = torch.tensor([[True, True, False]] * 2)
    divergence = torch.tensor([0.1, 0.6])

    def spare(**given) -> Tensor:
        settings = SolverSettings(**given).resolve(2, (9, 7))
        return quality(logits, divergence, members, settings)

    def odds(share: float) -> float:
        return torch.tensor(share).logit().item()

    assert (spare() == torch.inf).all()
    share = torch.tensor([odds(0.8) - odds(0.6), odds(0.3) - odds(0.6)])
    assert_close(spare(min_share=0.6), share)
    assert_close(spare(max_kl=0.5), torch.tensor([0.4, -0.1]))
    assert_close(spare(min_share=0.6, max_kl=0.5), torch.tensor([0.4, odds(0.3) - odds(0.6)]))
    every = quality(
        logits, divergence, members | True, SolverSettings(min_share=0.9).resolve(2, (9, 7))
    )
    assert (every == torch.inf).all()  # the tuple's classes are all there are


# -- finished rows ---------------------------------------------------------------------------------


@KINDS
def test_a_finished_row_is_the_same_alone_and_beside_slow_ones(kind):
    teacher = Cells()
    images = pictures(teacher)
    together = run(images, teacher, kind=kind)
    assert len(together.steps.unique()) > 1  # quick ones and slow ones
    parts = tuples(images, 2)
    for row in range(len(images)):
        alone = run(
            images,
            teacher,
            kind=kind,
            sources=parts["sources"][row : row + 1],
            weights=parts["weights"][row : row + 1],
        )
        expected = rows_of(together, [row], but=("forwards", "backwards"))
        seen = rows_of(alone, [0], but=("forwards", "backwards"))
        if int(together.steps[row]) <= 5:  # later, rounding has grown
            assert_close(seen, expected, atol=1e-3, rtol=1e-3)


@BOTH
def test_finished_rows_are_not_asked_again(method):
    teacher = Cells()
    spy = Spy(teacher)
    images, parts = Spy.name_rows(pictures(teacher), tuples(pictures(teacher), 2))
    originals = teacher(images[:, :-1]).detach()
    mixed = run(images, spy, method=method, originals=originals, **parts)
    assert len(mixed.steps.unique()) > 1
    search = spy.asked
    asked = torch.zeros(len(mixed))
    for rows in search:
        assert len(set(rows)) == len(rows)
        asked[torch.tensor(rows)] += 1
    assert_close(mixed.forwards, asked)
    assert (asked >= mixed.steps + 1).all()
    # once a row is gone it stays away
    for row in range(len(mixed)):
        there = [i for i, rows in enumerate(search) if row in rows]
        last = max(there)
        assert all(row not in rows for rows in search[last + 1 :])


@pytest.mark.parametrize("polish", [0, 2])
@pytest.mark.parametrize("method", ["paper", "newton-tv", "sgd"])
def test_the_papers_methods_ask_one_forward_and_one_backward_a_step(method, polish):
    teacher = Cells()
    spy = Spy(teacher)
    images, parts = Spy.name_rows(pictures(teacher), tuples(pictures(teacher), 2))
    originals = teacher(images[:, :-1]).detach()
    given = {"method": method, "lr": 1.0, "max_steps": 12, "polish": polish}
    mixed = run(images, spy, originals=originals, **given, **parts)
    assert len(mixed.steps.unique()) > 1
    assert_close(mixed.forwards, mixed.steps + 1.0)  # the last one is the check that ends it
    assert len(spy.asked) == int(mixed.steps.max()) + 1
    assert len(spy.backwards) <= int(mixed.steps.max()) + 1
    # a row that passed may have shared the last graph of those that failed
    assert ((mixed.backwards == mixed.steps) | (mixed.backwards == mixed.steps + 1)).all()
    assert all(spy.graph[:-1])
    missed = mixed.outcome == Outcome.MAX_STEPS
    assert_close(mixed.backwards[missed], mixed.steps[missed].float())


def test_fast_gives_few_failing_rows_a_graph_of_their_own():
    teacher = Cells()
    spy = Spy(teacher)
    images, parts = Spy.name_rows(pictures(teacher), tuples(pictures(teacher), 2))
    originals = teacher(images[:, :-1]).detach()
    mixed = run(images, spy, method="fast", originals=originals, **parts)
    again = [
        set(second) < set(first)
        for first, second in zip(spy.asked[:-1], spy.asked[1:], strict=True)
        if 2 * len(second) < len(first)
    ]
    assert any(again)
    assert sum(map(len, spy.asked)) == round(float(mixed.forwards.sum()))
    assert sum(spy.backwards) == round(float(mixed.backwards.sum()))
    # no graph was followed back of which more than half had passed
    assert mixed.backwards.sum() <= 2 * mixed.steps.sum()


def test_rows_share_a_graph_with_few_others_on_the_cpu_if_their_pictures_are_large():
    teacher, sizes = Cells(), []

    def watched(x):
        sizes.append(len(x))
        return teacher(x)

    large = pictures(teacher).repeat_interleave(25, dim=2).repeat_interleave(32, dim=3)
    run(large, watched, originals=teacher(large).detach(), method="paper", max_steps=1)
    assert max(sizes) == 4 * 224 * 224 // (225 * 224) == 3 < len(large)


def test_memory_is_a_bound_for_chunks_and_changes_nothing_else():
    teacher = Cells()
    images = pictures(teacher)
    sizes = []

    def watched(x):
        sizes.append(len(x))
        return teacher(x)

    originals = teacher(images).detach()
    for method in ("paper", "fast"):
        whole = run(images, watched, method=method, originals=originals, max_steps=4)
        assert max(sizes) == len(images)
        sizes.clear()
        parts = run(
            images,
            watched,
            method=method,
            originals=originals,
            max_steps=4,
            memory=100_000,
        )
        assert 2 < max(sizes) < len(images)  # 1 and 2 are what the teacher is measured with
        sizes.clear()
        but = ("forwards", "backwards")
        rows = torch.arange(len(images))
        assert_close(
            rows_of(parts, rows, but=but), rows_of(whole, rows, but=but), atol=2e-3, rtol=2e-3
        )
        assert len(run(images, teacher, method=method, max_steps=0, memory=1)) == len(images)


# -- outcomes --------------------------------------------------------------------------------------


@EVERY
def test_reaching_max_steps_is_an_outcome(method):
    teacher = Cells()
    images = pictures(teacher)
    for steps in (0, 1, 3):
        mixed = run(images, teacher, method=method, max_steps=steps, margin=1e6)
        assert (mixed.outcome == Outcome.MAX_STEPS).all()
        assert (mixed.steps == steps).all()
        assert not mixed.converged.any()
        check_finite(mixed)
    assert (run(images, teacher, method="paper", max_steps=0).masks == 0.5).all()


@EVERY
@pytest.mark.parametrize("path", ["none", "through zero", "through a ReLU"])
def test_a_constant_teacher_ends_at_max_steps(method, path):
    def constant(x):
        logits = x.new_zeros(len(x), 4)
        if path == "through zero":
            logits = logits + 0 * x.mean(dim=(1, 2, 3))[:, None]
        if path == "through a ReLU":
            logits = logits + (x.mean(dim=(1, 2, 3))[:, None] - 10).relu()
        return logits

    warned = path == "none"  # where there is nothing to go by
    with (
        pytest.warns(UserWarning, match="depend on the pictures by a gradient, got none")
        if warned
        else nullcontext()
    ):
        mixed = run(torch.rand(5, 3, 9, 7), constant, method=method, max_steps=4)
    assert (mixed.outcome == Outcome.MAX_STEPS).all()  # a tie is no top k
    check_finite(mixed)


class Holding:
    """A teacher that notes, when it is asked, how much its earlier graphs still hold."""

    def __init__(self, teacher) -> None:
        self.teacher, self.held, self.asked = teacher, weakref.WeakSet(), []

    def __call__(self, images: Tensor) -> Tensor:
        self.asked.append((len(images), len(self.held)))

        class Saved:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

        def pack(tensor: Tensor) -> Saved:
            saved = Saved(tensor.detach())  # else an output would hold its own graph
            self.held.add(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            return self.teacher(images)


@pytest.mark.parametrize("size", [4, 64])  # of groups
def test_a_graph_is_let_go_before_the_teacher_is_asked_again(size, monkeypatch):
    monkeypatch.setattr(solver, "group_size", lambda images: size)
    teacher = Cells()
    images = pictures(teacher, each=8)
    holding = Holding(teacher)
    with torch.no_grad():
        originals = teacher(images)
    mixed = run(images, holding, kind="contrast", originals=originals)
    assert mixed.backwards.sum() > 0
    assert all(held == 0 for _, held in holding.asked)


class Failing:
    """A teacher that answers `value` for a tuple from its call number `call` on."""

    def __init__(self, teacher, row: int, value: float, call: int) -> None:
        self.teacher, self.row, self.value, self.call, self.calls = teacher, row, value, call, 0

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.teacher(images[:, :-1])
        self.calls += 1
        hit = images[:, -1].mean(dim=(1, 2)).round().int() == self.row
        hit = hit & (self.calls > self.call)
        spoiled = logits * torch.where(hit, torch.nan, 1.0)[:, None]  # in the backward too
        if self.value == self.value:
            spoiled = torch.where(hit[:, None], self.value + 0 * logits, logits)
        return spoiled


@pytest.mark.parametrize("call", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@BOTH
def test_a_row_without_a_finite_answer_ends_alone(method, value, call):
    teacher = Cells()
    images, parts = Spy.name_rows(pictures(teacher), tuples(pictures(teacher), 2))
    originals = teacher(images[:, :-1]).detach()
    plain = Failing(teacher, -1, value, call)
    given = {"method": method, "margin": 1.0, "max_steps": 4, "originals": originals, **parts}
    expected = run(images, plain, **given)
    row = int((expected.steps > 2).nonzero()[0])  # still searched when the failure comes
    mixed = run(images, Failing(teacher, row, value, call), **given)
    assert mixed.outcome[row] == Outcome.NOT_FINITE
    assert mixed.steps[row] < expected.steps[row]
    check_finite(mixed)
    assert_close(mixed.masks.sum(dim=1), torch.ones_like(mixed.masks[:, 0]))
    target = torch.zeros(6).scatter_add(
        0, originals.argmax(dim=1)[parts["sources"][row]], parts["weights"][row]
    )
    assert_close(mixed.logits[row].softmax(dim=0), target)  # Eq. 2 is its label
    others = [r for r in range(len(mixed)) if r != row]
    but = ("forwards", "backwards")
    assert_close(
        rows_of(mixed, others, but=but), rows_of(expected, others, but=but), atol=5e-3, rtol=5e-3
    )


@KINDS
@pytest.mark.parametrize("memory", [None, 1])
def test_originals_without_a_finite_answer_end_their_tuples(kind, memory):
    teacher = Cells()
    images = pictures(teacher)
    originals = teacher(images).detach()
    expected = run(images, teacher, kind=kind, originals=originals.clone(), max_steps=4)
    originals[3, 2] = torch.nan
    originals[4] = torch.inf
    mixed = run(images, teacher, kind=kind, originals=originals, max_steps=4, memory=memory)
    lost = torch.isin(tuples(images, 2)["sources"], torch.tensor([3, 4])).any(dim=1)
    assert torch.equal(mixed.outcome == Outcome.NOT_FINITE, lost)
    check_finite(mixed)
    but = ("forwards", "backwards")
    others = (~lost).nonzero().flatten()
    assert_close(
        rows_of(mixed, others, but=but), rows_of(expected, others, but=but), atol=1e-3, rtol=1e-3
    )


def test_class_maps_that_are_not_finite_leave_the_search_a_start():
    teacher = Cells()
    images = pictures(teacher)
    originals, maps = teacher(images).detach(), teacher.maps(images)
    maps.features[3] = torch.nan
    mixed = solve(
        images,
        teacher,
        **tuples(images, 2),
        originals=originals,
        settings=SolverSettings(),
        maps=maps,
    )
    check_finite(mixed)


@EVERY
def test_gradients_that_explode_end_the_row(method):
    def steep(x):
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([mean * 0, 1e30 * (mean - 0.5), mean * 0 + 1], dim=1)

    mixed = run(torch.rand(6, 3, 9, 7), steep, method=method, max_steps=5)
    check_finite(mixed)


# -- the criterion ---------------------------------------------------------------------------------


@KINDS
def test_a_tuple_of_one_class_is_judged_as_a_set(kind):
    teacher = Cells()
    images = pictures(teacher, each=3)
    mixed = run(
        images,
        teacher,
        kind=kind,
        k=3,
        sources=torch.tensor([[0, 1, 2], [0, 1, 3], [3, 4, 6]]),
        weights=torch.tensor([[0.2, 0.3, 0.5]] * 3),
    )
    classes = teacher(images).argmax(dim=1)
    assert classes[:3].unique().numel() == 1
    assert mixed.converged.all()
    for row, members in enumerate([{0}, {0, 3}, {3, 6}]):
        wanted = {int(classes[m]) for m in members}
        assert set(mixed.logits[row].topk(len(wanted)).indices.tolist()) == wanted


def test_weights_of_equal_classes_are_added():
    teacher = Cells()
    images = pictures(teacher, each=3)
    sources, weights = torch.tensor([[0, 1, 3]]), torch.tensor([[0.2, 0.3, 0.5]])
    seen = []
    method = METHODS["paper"]

    def loss(logits, masks, problem, settings):
        seen.append(problem.targets)
        return mixing_objective(logits, problem.targets, masks, lambda_s=25.0)

    originals = teacher(images).detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "paper", method._replace(loss=loss))
        run(images, teacher, margin=1e6, max_steps=1, k=3, sources=sources, weights=weights)
    classes = originals.argmax(dim=1)
    expected = torch.zeros(1, 6)
    expected[0, classes[0]], expected[0, classes[3]] = 0.5, 0.5
    assert_close(seen[0], expected)


@KINDS
def test_a_tuple_that_holds_all_classes_is_done_at_once(kind):
    teacher = Cells(classes=2)
    images = pictures(teacher)
    mixed = run(images, teacher, kind=kind)
    assert mixed.converged.all()
    assert (mixed.steps == 0).all()
    check_finite(mixed)
    polished = run(images, teacher, kind=kind, polish=3)
    assert polished.converged.all()
    check_finite(polished)


# -- kinds of pictures -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_dtype_channels_and_memory_format(method, channels, dtype):
    teacher = Cells(channels)
    images = pictures(teacher, channels=channels)
    images = (255 * images).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)

    def asked(x):
        assert x.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
        assert x.min() >= 0
        assert x.max() <= 1
        return teacher(x.float())

    before = images._version
    mixed = run(images, asked, method=method, max_steps=8)
    assert images._version == before
    assert mixed.images.dtype == dtype
    assert mixed.images.shape == images.shape
    for value in (mixed.masks, mixed.mask_logits, mixed.logits, mixed.sparsity):
        assert value.dtype == torch.float32
    assert mixed.converged.any()
    check_finite(mixed)

    # what is handed out is what the teacher judged
    out = mixed.images / 255 if dtype == torch.uint8 else mixed.images
    assert_close(asked(out).detach(), mixed.logits, atol=1e-4, rtol=1e-4)
    again = mix_images(images[mixed.sources], mixed.masks)
    assert_close(again, mixed.images, atol=1 if dtype == torch.uint8 else 1e-2, rtol=0)
    assert_close(again.float(), mixed.images.float(), atol=1e-3, rtol=0.01)

    last = images.contiguous(memory_format=torch.channels_last)
    other = run(last, asked, method=method, max_steps=2)
    same = run(images, asked, method=method, max_steps=2)
    assert_close(other.masks, same.masks, atol=5e-3, rtol=0)


@BOTH
def test_pictures_made_under_inference_mode(method):
    teacher = Cells()
    images = pictures(teacher)
    expected = supermix(
        images, teacher, **tuples(images, 2), settings=SolverSettings(method=method, max_steps=3)
    )
    with torch.inference_mode():
        copies = images.clone()
        parts = {name: value.clone() for name, value in tuples(images, 2).items()}
        mixed = supermix(
            copies, teacher, **parts, settings=SolverSettings(method=method, max_steps=3)
        )
    assert not mixed.images.is_inference()
    assert_close(mixed.masks, expected.masks, atol=1e-4, rtol=0)


@BOTH
def test_neither_autocast_nor_no_grad_around_changes_a_mix(method):
    teacher = Cells()
    images = pictures(teacher)
    settings = SolverSettings(method=method, max_steps=3)
    expected = supermix(images, teacher, **tuples(images, 2), settings=settings)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = supermix(images, teacher, **tuples(images, 2), settings=settings)
    rows = torch.arange(len(images))
    assert_close(rows_of(mixed, rows), rows_of(expected, rows), atol=1e-6, rtol=0)


@EVERY
def test_inputs_are_unchanged(method):
    teacher = Cells()
    images = pictures(teacher)
    parts = tuples(images, 2) | {"originals": teacher(images).detach()}
    values = [images, *parts.values(), *teacher.parameters()]
    before = [value._version for value in values]
    copies = [value.detach().clone() for value in values]
    run(images, teacher, method=method, max_steps=3, **parts)
    assert [value._version for value in values] == before
    assert all(torch.equal(value, copy) for value, copy in zip(values, copies, strict=True))
    assert all(parameter.grad is None for parameter in teacher.parameters())


@KINDS
def test_the_same_call_gives_the_same_mixes(kind):
    teacher = Cells()
    images = pictures(teacher)
    first, second = (run(images, teacher, kind=kind, max_steps=5) for _ in range(2))
    rows = torch.arange(len(images))
    assert_close(rows_of(first, rows), rows_of(second, rows), atol=0, rtol=0)


# -- settings --------------------------------------------------------------------------------------


def test_there_is_a_method_for_each_name_that_settings_take():
    names = get_args(get_type_hints(SolverSettings)["method"])
    assert sorted(METHODS) == sorted(names)
    assert len(names) == 4


def test_none_is_the_methods_own_value():
    small, large = (7, 64), (224, 300)
    fast, paper = SolverSettings(), SolverSettings(method="paper")
    assert fast.resolve(2, large)[:5] == (16, 0.5, 0.074, 0.05, 20)
    assert paper.resolve(2, large)[:5] == (16, 2.0, 0.074, 0.0, 50)
    assert SolverSettings(method="newton-tv").resolve(2, large)[:5] == (16, 0.0, 0.074, 0.0, 50)
    assert SolverSettings(method="sgd").resolve(2, large)[:5] == (16, 0.0, 0.074, 0.0, 300)
    assert (fast.resolve(2, large).min_share, fast.resolve(2, large).max_kl) == (0.0, float("inf"))
    assert fast.resolve(3, (32, 32))[:3] == (16, 0.5, 0.104)
    assert paper.resolve(4, (32, 32))[:3] == (8, 1.0, 0.124)
    assert fast.resolve(2, small).mask_size == 7  # no more cells than pixels
    given = SolverSettings(mask_size=5, sigma=0.0, sparsity=0.2, margin=0.0, max_steps=0)
    assert given.resolve(2, large)[:5] == (5, 0.0, 0.2, 0.0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sloppy"}, r"method: expected one of \['fast', 'paper', .*, got 'sloppy'"),
        ({"mask_size": 0}, r"mask_size: expected an integer of at least 1, got 0"),
        ({"mask_size": 2.5}, r"mask_size: expected an integer of at least 1, got 2.5"),
        ({"max_steps": -1}, r"max_steps: expected an integer of at least 0, got -1"),
        ({"polish": -1}, r"polish: expected an integer of at least 0, got -1"),
        ({"memory": 0}, r"memory: expected an integer of at least 1, got 0"),
        ({"sigma": -1.0}, r"sigma: expected a number of at least 0, got -1.0"),
        ({"sigma": float("inf")}, r"sigma: expected a number of at least 0, got inf"),
        ({"sigma": "wide"}, r"sigma: expected a number of at least 0, got 'wide'"),
        ({"margin": float("nan")}, r"margin: expected a number of at least 0, got nan"),
        ({"lambda_s": -25}, r"lambda_s: expected a number of at least 0, got -25"),
        ({"lambda_tv": -1}, r"lambda_tv: expected a number of at least 0, got -1"),
        ({"lr": float("inf")}, r"lr: expected a number of at least 0, got inf"),
        ({"max_kl": -0.1}, r"max_kl: expected a number of at least 0, got -0.1"),
        ({"max_kl": "low"}, r"max_kl: expected a number of at least 0, got 'low'"),
        ({"min_share": 1.0}, r"min_share: expected a number in \[0, 1\), got 1.0"),
        ({"min_share": -0.1}, r"min_share: expected a number in \[0, 1\), got -0.1"),
        ({"min_share": float("nan")}, r"min_share: expected a number in \[0, 1\), got nan"),
        ({"min_share": None}, r"min_share: expected a number in \[0, 1\), got None"),
        ({"sparsity": 0.0}, r"sparsity: expected a number in \(0, 1\), got 0.0"),
        ({"sparsity": "low"}, r"sparsity: expected a number in \(0, 1\), got 'low'"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SolverSettings(**settings)


@pytest.mark.parametrize(("k", "most"), [(2, 0.25), (3, 2 / 9), (8, 7 / 64)])
def test_a_sparsity_that_k_images_can_not_have_is_named(k, most):
    message = rf"sparsity: expected less than {most:.4f}, the most that .*k={k} .*, got .*Pass"
    for sparsity in (most, 0.9):
        with pytest.raises(ValueError, match=message):
            SolverSettings(sparsity=sparsity).resolve(k, (9, 9))
    assert SolverSettings(sparsity=0.99 * most).resolve(k, (9, 9)).sparsity == 0.99 * most


@pytest.mark.parametrize("k", range(2, 20))
def test_the_default_sparsity_is_one_that_k_images_can_have(k):
    assert 0 < SolverSettings().resolve(k, (9, 9)).sparsity < (k - 1) / k**2


def test_a_mask_larger_than_the_picture_is_named():
    message = r"mask_size: expected at most 7 cells for pictures of 9 x 7, got 8. Pass a smaller"
    with pytest.raises(ValueError, match=message):
        run(torch.rand(4, 3, 9, 7), Cells(), mask_size=8)


def test_settings_are_frozen_and_can_be_replaced():
    settings = SolverSettings()
    with pytest.raises(AttributeError):
        settings.polish = 3
    assert replace(settings, polish=3).polish == 3


def test_coarse_measure_of_sparsity_agrees_with_the_full_one():
    """From 128 px on, the search measures L_s at a quarter of the size."""
    teacher = Cells()
    images = torch.rand(4, 3, 128, 132)
    mixed = run(images, teacher, kind="contrast", max_steps=0)
    assert_close(mixed.sparsity, torch.full((4,), 0.074), atol=2e-3, rtol=0)
    assert_close(
        mixed.sparsity,
        (lambda m: (m * (1 - m)).mean(dim=(1, 2, 3)))(render(mixed.mask_logits, (128, 132))),
    )


# -- waiting for a GPU -----------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what would make a CPU wait for a GPU, by the teacher call that it comes after."""

    OPS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.counts = [0]
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        if (name in self.OPS or masks) and not self.paused:
            self.counts[-1] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Adds what never gets to a dispatcher: reading a whole tensor."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "numpy", "__array__", "cpu"):
            self.waits.counts[-1] += 1
        return func(*args, **(kwargs or {}))


def test_what_counts_as_waiting():
    values = torch.arange(3.0)
    for wait in (
        lambda: values[0].item(),
        lambda: bool(values[0] > 0),
        lambda: int(values.sum()),
        lambda: values.tolist(),
        lambda: values.numpy(),
        lambda: values[values > 1],
        lambda: values.unique(),
        lambda: (values > 1).nonzero(),
    ):
        waits = Waits()
        with Reads(waits), waits:
            wait()
        assert waits.counts[0] >= 1
    waits = Waits()
    with Reads(waits), waits:
        torch.where(values > 1, values, 0.0)[torch.tensor([0, 1])].sum()
    assert waits.counts == [0]


@pytest.mark.parametrize("kind", ["paper", "contrast", "maps"])
def test_a_step_on_a_gpu_waits_for_one_count_only(kind, monkeypatch):
    monkeypatch.setattr(solver, "group_size", lambda images: None)  # as on a GPU
    teacher, waits = Cells(), Waits()
    images = pictures(teacher)
    maps = teacher.maps(images) if kind == "maps" else None
    parts = tuples(images, 2) | {"originals": teacher(images).detach()}
    adam = torch.optim.Adam.step

    def step(self):
        waits.paused = True  # its own count of steps is on the CPU, wherever the masks are
        adam(self)
        waits.paused = False

    monkeypatch.setattr(torch.optim.Adam, "step", step)

    def asked(x: Tensor) -> Tensor:
        waits.counts.append(0)
        return teacher(x)

    settings = SolverSettings(method="paper" if kind == "paper" else "fast", margin=1.0)
    solve(images, asked, **parts, settings=settings, maps=maps)  # fills the caches of matrices
    waits.counts.clear()
    waits.counts.append(0)
    with Reads(waits), waits:
        solve(images, asked, **parts, settings=settings, maps=maps)
    assert len(waits.counts) > 6
    assert max(waits.counts[1:]) == 1
    assert waits.counts[0] <= 1  # which pictures are mixed
