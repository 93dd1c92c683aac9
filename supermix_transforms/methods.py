"""What tells one solver from another: where it starts, its loss, and its step.

Source: SuperMix (Dabouei et al., CVPR 2021), section 3.1: the paper's method and the Newton step;
section 4.4: its two baselines; docs/solver.md for the fast one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from supermix_transforms.losses import kl_divergence, mixing_objective, sparsity
from supermix_transforms.masks import Normalisation, average, blur, project, render
from supermix_transforms.results import ClassMaps
from supermix_transforms.settings import MethodName, Resolved

__all__ = [
    "METHODS",
    "Logits",
    "Method",
    "Surrogate",
    "Tuples",
    "ask",
    "contrast",
    "finite_rows",
    "gradient_of",
    "margins",
    "newton_step",
    "quality",
]

Logits: TypeAlias = Callable[[Tensor], Tensor]

# The fast method's constants (docs/solver-log.md has the trials). Tau and delta are in logits.
TAU = 0.5  # temperature of the smooth maximum over the other classes
LEAD = 1.0  # of each class over the others, that the loss asks for
KL_WEIGHT = 2.0
MOMENTUM = 0.5
NEAR = -0.7  # margin from which a row is expected to pass its next check, in logits
STEP_CLAMP = 6.0  # elementwise bound of a step, in mask logits
START_STEPS, START_RATE, START_MARGIN = 60, 0.3, 2.0
START_SIGMA = 3 / 16  # of the surrogate's masks, in mask sizes
START_SPARSITY, START_KL = 20.0, 1.0  # weights of the surrogate's terms
# The second start: how much of the surrogate's error is believed in, and the weight of staying near
REVISION_STEPS, REVISION_TRUST, REVISION_STAY = 20, 0.85, 4.0

CONTRAST_DETAIL, CONTRAST_SCALE = 7, 20  # pixels a cell; the blur's sigma in a side's parts

LENGTH_LIMITS = (1e-4, 2000.0)  # of the paper's step; the bounds are the authors' code's


class Tuples(NamedTuple):
    """B tuples to be mixed, and what is asked of each."""

    images: Tensor  # (P, C, H, W)
    sources: Tensor  # (B, k) rows of images
    weights: Tensor  # (B, k)
    targets: Tensor  # (B, N), Eq. 2
    members: Tensor  # (B, N) bool, the classes that must come first

    def rows(self, rows: Tensor) -> "Tuples":
        return Tuples(self.images, *(value[rows] for value in self[1:]))

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    @property
    def coarse(self) -> tuple[int, int]:
        """The size at which sparsity is measured while searching: a quarter from 128 px on."""
        height, width = self.size
        return (height // 4, width // 4) if min(height, width) >= 128 else (height, width)


class Surrogate(NamedTuple):
    """What a linear teacher would say of mixes, known without asking the real one.

    The logits of a mix are `bias` and the sum over images and cells of mask times `shares`.
    """

    shares: Tensor  # (P, N, h, w) of each picture's cells in its logits
    bias: Tensor  # (N,)

    @classmethod
    def of_maps(cls, maps: ClassMaps, used: Tensor) -> "Surrogate":
        """From the class maps of the pictures `used` (U,); 0 for all others."""
        shares = ClassMaps(maps.features[used], maps.weight, maps.bias).maps()
        shares = shares / (shares.shape[-2] * shares.shape[-1])
        empty = shares.new_zeros(len(maps.features), *shares.shape[1:])
        return cls(empty.index_copy(0, used, shares), maps.bias)

    @classmethod
    def of_pictures(cls, images: Tensor, logits: Tensor, used: Tensor, cells: int) -> "Surrogate":
        """Where there are no class maps: each picture's logits (P, N), spread over its contrast."""
        seen = contrast(images[used], cells)
        level = (logits - logits.mean(dim=1, keepdim=True))[used]
        shares = level[:, :, None, None] * seen[:, None] / cells**2
        empty = shares.new_zeros(len(images), *shares.shape[1:])
        return cls(empty.index_copy(0, used, shares), shares.new_zeros(logits.shape[1]))

    def of_tuples(self, sources: Tensor) -> Callable[[Tensor], Tensor]:
        """Masks (B, k, H, W) of the tuples `sources` (B, k) to logits (B, N)."""
        cells = (self.shares.shape[-2], self.shares.shape[-1])
        # Laid out once, for a product whose vector comes first: the other way it takes eleven times
        # as long on the CPU, any other order of the shares is copied at every step.
        shares = self.shares[sources].flatten(3).transpose(2, 3).flatten(1, 2)  # (B, k * h * w, N)

        def logits(masks: Tensor) -> Tensor:
            weights = average(masks, cells).flatten(1)  # (B, k * h * w)
            return self.bias + (weights[:, None] @ shares)[:, 0]

        return logits


class Method(NamedTuple):
    """What tells one solver from another."""

    normalisation: Normalisation
    keep_best: bool  # what a row that never converges hands out: its best iterate, or its last
    surrogate: bool  # starts from what a `Surrogate` finds good
    near: float  # margin from which a row is expected to pass its next check, in logits
    second_graph: bool  # ask failing rows again where that is cheaper than one backward for all
    start: Callable[[Tuples, Surrogate | None, Resolved], Tensor]  # -> mask logits z
    loss: Callable[[Tensor, Tensor, Tuples, Resolved], Tensor]  # logits, masks -> (B,)
    # z, momentum u, loss (B,), gradient -> next z and u
    update: Callable[[Tensor, Tensor, Tensor, Tensor, Tuples, Resolved], tuple[Tensor, Tensor]]
    # surrogate, z, the teacher's logits for it -> a better start, without a backward
    revise: Callable[[Surrogate, Tensor, Tensor, Tuples, Resolved], Tensor] | None = None


def newton_step(
    loss: Tensor, gradient: Tensor, sigma: float, limits: tuple[float, float] | None = None
) -> Tensor:
    """Eq. 7: the Newton step with smooth projection, ``-L / <G*g, g> G*g`` of each row.

    On a linear loss one step leads to its zero; with sigma = 0 it is Eq. 6.

    Args:
        loss: (B,).
        gradient: of each row's loss, (B, k, w, w).
        sigma: of the Gaussian G, in cells.
        limits: bounds of ``L / <G*g, g>``; without them it is 0 where the gradient vanishes.

    Returns:
        (B, k, w, w); 0 where the gradient is.
    """
    smooth = blur(gradient, sigma)
    norm = (smooth * gradient).sum(dim=(1, 2, 3))
    if limits is None:
        length = torch.where(norm > 1e-12, loss / norm.clamp(min=1e-12), 0.0)
    else:  # a norm of 0 gives the upper limit, or NaN where the loss is 0 too
        length = (loss / norm).nan_to_num(nan=0.0).clamp(*limits)
    return -length[:, None, None, None] * smooth


def margins(logits: Tensor, members: Tensor) -> Tensor:
    """By how much the tuple's classes beat all others: (B, N) and (B, N) bool -> (B,)."""
    lowest = logits.masked_fill(~members, torch.inf).amin(dim=1)
    return lowest - logits.masked_fill(members, -torch.inf).amax(dim=1)


def quality(logits: Tensor, divergence: Tensor, members: Tensor, settings: Resolved) -> Tensor:
    """What each row has to spare of ``min_share`` and ``max_kl``, in logits and nats, (B,).

    Args:
        logits: (B, N).
        divergence: KL(r || f), (B,).
        members: (B, N) bool, the classes whose share of the probability counts.
        settings: ``min_share``, ``max_kl``.

    Returns:
        The lesser of the share's log odds above those of ``min_share`` and the KL below ``max_kl``;
        negative where one of them is missed, inf where neither is asked for.
    """
    inside, outside = (
        logits.masked_fill(out, -torch.inf).logsumexp(dim=1) for out in (~members, members)
    )
    share = settings.min_share
    odds = math.log(share / (1 - share)) if share > 0 else -math.inf
    return torch.minimum(inside - outside - odds, settings.max_kl - divergence)


def contrast(images: Tensor, cells: int) -> Tensor:
    """Where a picture has detail: ``|picture - blurred picture|`` on a coarse grid.

    Args:
        images: (P, C, H, W), uint8 or floating.
        cells: a side of the grid.

    Returns:
        (P, cells, cells) float32 of mean 1; 1 everywhere for a picture without detail.
    """
    side = CONTRAST_DETAIL * cells
    fine = average(images.float(), (side, side))
    detail = (fine - blur(fine, side / CONTRAST_SCALE)).abs().mean(dim=1)
    seen = average(detail, (cells, cells))
    mean = seen.mean(dim=(1, 2), keepdim=True)
    least = 1e-6 * fine.abs().mean(dim=(1, 2, 3))[:, None, None]
    return torch.where((mean > least) & mean.isfinite(), seen / mean, 1.0)


def ask(teacher: Logits, pictures: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits (B, N) float32; teachers get 8-bit pictures on 0..1."""
    return teacher(pictures / 255 if dtype == torch.uint8 else pictures.to(dtype)).float()


def gradient_of(value: Tensor, leaf: Tensor) -> Tensor:
    """d value / d leaf, 0 where there is no path between them (a constant teacher)."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient.detach()


def finite_rows(values: Tensor) -> Tensor:
    return values.flatten(1).isfinite().all(dim=1)


# -- the paper's method and its baselines (section 4.4) --------------------------------------------


def _zero_start(problem: Tuples, surrogate: Surrogate | None, settings: Resolved) -> Tensor:
    """Algorithm 1, line 6."""
    rows, k = problem.sources.shape
    cells = settings.mask_size
    return problem.targets.new_zeros(rows, k, cells, cells)


def _paper_loss(logits: Tensor, masks: Tensor, problem: Tuples, settings: Resolved) -> Tensor:
    return mixing_objective(logits, problem.targets, masks, lambda_s=settings.lambda_s)


def _paper_update(
    z: Tensor, u: Tensor, loss: Tensor, gradient: Tensor, problem: Tuples, settings: Resolved
) -> tuple[Tensor, Tensor]:
    """Algorithm 1, lines 10 and 11; without a blur, Eq. 6."""
    return z + newton_step(loss, gradient, settings.sigma, LENGTH_LIMITS), u


def _baseline_loss(logits: Tensor, masks: Tensor, problem: Tuples, settings: Resolved) -> Tensor:
    """All of Eq. 3: where nothing smooths the step, the loss asks for smooth masks."""
    weights = {"lambda_s": settings.lambda_s, "lambda_tv": settings.lambda_tv}
    return mixing_objective(logits, problem.targets, masks, **weights)


def _descent(
    z: Tensor, u: Tensor, loss: Tensor, gradient: Tensor, problem: Tuples, settings: Resolved
) -> tuple[Tensor, Tensor]:
    """Plain gradient descent on each row's own loss."""
    return z - settings.lr * blur(gradient, settings.sigma), u


# -- the fast method -------------------------------------------------------------------------------


def _fast_start(problem: Tuples, surrogate: Surrogate | None, settings: Resolved) -> Tensor:
    """Masks that the surrogate finds good: no teacher call."""
    assert surrogate is not None
    z = _zero_start(problem, surrogate, settings)
    z = _optimise_surrogate(problem, surrogate, settings, z, steps=START_STEPS)
    return project(z, settings.sparsity, problem.coarse)


def _fast_revise(
    surrogate: Surrogate, z: Tensor, logits: Tensor, problem: Tuples, settings: Resolved
) -> Tensor:
    """The start again, near z, for a surrogate that is moved to what the teacher said of z."""
    told = surrogate.of_tuples(problem.sources)(render(z, problem.coarse))
    shift = REVISION_TRUST * (logits - told)
    z = _optimise_surrogate(
        problem, surrogate, settings, z, steps=REVISION_STEPS, shift=shift, stay=REVISION_STAY
    )
    return project(z, settings.sparsity, problem.coarse)


def _optimise_surrogate(
    problem: Tuples,
    surrogate: Surrogate,
    settings: Resolved,
    z: Tensor,
    *,
    steps: int,
    shift: Tensor | float = 0.0,
    stay: float = 0.0,
) -> Tensor:
    """Adam from z (B, k, w, w) on the surrogate's logits, moved by `shift` (B, N).

    Each row's problem is its own, and Adam works element by element: a row's result does not depend
    on the others.
    """
    predict = surrogate.of_tuples(problem.sources)
    sigma = settings.mask_size * START_SIGMA
    v = torch.zeros_like(z).requires_grad_()
    optimiser = torch.optim.Adam([v], lr=START_RATE)
    for _ in range(steps):
        with torch.enable_grad():
            masks = render(z + blur(v, sigma), problem.coarse)
            logits = predict(masks) + shift
            short = (START_MARGIN - _leads(logits, problem.members)).relu().square()
            loss = (
                torch.where(problem.members, short, 0.0).sum(dim=1)
                + START_SPARSITY * sparsity(masks)
                + START_KL * kl_divergence(logits, problem.targets)
                + stay * v.square().mean(dim=(1, 2, 3))
            )
            v.grad = gradient_of(loss.sum(), v)
        optimiser.step()
    return z + blur(v.detach(), sigma)


def _leads(logits: Tensor, members: Tensor) -> Tensor:
    """Each class's logit above the smooth maximum of all classes outside the tuple, (B, N)."""
    others = (logits / TAU).masked_fill(members, -torch.inf).logsumexp(dim=1, keepdim=True)
    return logits - TAU * others.clamp(min=-1e4)  # the tuple may hold all classes there are


def _fast_loss(logits: Tensor, masks: Tensor, problem: Tuples, settings: Resolved) -> Tensor:
    """What each class's lead falls short, plus KL to the target; sparsity is the projection's.

    Each shortfall is weighted by itself: where they do not depend on each other, the shortest step
    that makes up for all of them does so. The weights are held, as Newton's step asks for a loss
    that is near to linear.
    """
    short = torch.where(problem.members, LEAD - _leads(logits, problem.members), 0.0).relu()
    return (short.detach() * short).sum(dim=1) + KL_WEIGHT * kl_divergence(logits, problem.targets)


def _fast_update(
    z: Tensor, u: Tensor, loss: Tensor, gradient: Tensor, problem: Tuples, settings: Resolved
) -> tuple[Tensor, Tensor]:
    gradient = gradient - gradient.mean(dim=1, keepdim=True)
    step = newton_step(loss, gradient, settings.sigma).clamp(-STEP_CLAMP, STEP_CLAMP)
    u = MOMENTUM * u + step
    return project(z + u, settings.sparsity, problem.coarse), u


PAPER = Method(
    normalisation="sigmoid",
    keep_best=False,
    surrogate=False,
    near=math.inf,
    second_graph=False,
    start=_zero_start,
    loss=_paper_loss,
    update=_paper_update,
)

METHODS: dict[MethodName, Method] = {
    "fast": Method(
        normalisation="softmax",
        keep_best=True,
        surrogate=True,
        near=NEAR,
        second_graph=True,
        start=_fast_start,
        loss=_fast_loss,
        update=_fast_update,
        revise=_fast_revise,
    ),
    "paper": PAPER,
    "newton-tv": PAPER._replace(loss=_baseline_loss),
    "sgd": PAPER._replace(loss=_baseline_loss, update=_descent),
}
