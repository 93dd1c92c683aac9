"""The search for masks: Algorithm 1 of the paper, and a faster one.

Source: SuperMix (Dabouei et al., CVPR 2021), section 3.1. The solver takes any callable from images
to logits; where the teacher has class maps, the fast method starts from them.

A row is one tuple of k images. One forward a step serves twice: it checks the iterate of the last
step and gives the gradient of the next. Rows that are finished leave the batch and never change
again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from supermix_transforms.losses import kl_divergence, mixing_objective, sparsity
from supermix_transforms.masks import (
    Normalisation,
    average,
    blend,
    blur,
    normalise,
    project,
    render,
    upsample,
)
from supermix_transforms.results import (
    ClassMaps,
    Mixed,
    Outcome,
)

__all__ = ["SolverSettings", "newton_step", "saliency", "solve"]

Logits: TypeAlias = Callable[[Tensor], Tensor]
Number = TypeVar("Number", int, float)
Hint: TypeAlias = ClassMaps | Tensor  # of each picture: its class maps, or its saliency (P, w, w)

# The fast method's constants (docs/solver.md has the trials). Tau and delta are in units of logits.
TAU = 0.5  # temperature of the smooth maximum over the other classes
DELTA = 0.5  # margin that the loss asks for, beyond the one that is checked
MOMENTUM = 0.6
NEAR = -0.7  # margin from which a row is expected to pass its next check, in logits
STEP_CLAMP = 6.0  # elementwise bound of a step, in mask logits
START_STEPS, START_RATE, START_MARGIN = 60, 0.3, 2.0
START_SPARSITY, START_KL = 20.0, 0.1  # weights of the surrogate's terms

SALIENCY_BLUR, SALIENCY_GAIN, SALIENCY_FLOOR = 1.0, 6.0, 1e-3

LENGTH_LIMITS = (1e-4, 2000.0)  # of the paper's step; the bounds are the authors' code's
ACTIVATIONS = 100  # bytes a teacher keeps for a backward, in float32 pictures; a ResNet-50's is 85
DEFAULT_MEMORY = 4 << 30


@dataclass(frozen=True)
class SolverSettings:
    """How masks are searched for. None is the method's own value.

    Raises:
        ValueError: for values out of range.
    """

    method: Literal["fast", "paper"] = "fast"
    mask_size: int | None = None  # w, cells a side; 8 up to 64 px, else 16
    sigma: float | None = None  # of the gradient's blur, in cells; fast 0.5, paper mask_size / 8
    sparsity: float | None = None  # L_s projected to (fast); 0.07, 0.10, 0.12 for k 2, 3, >= 4
    margin: float | None = None  # in logits, of the k classes over all others; fast 0.25, paper 0
    max_steps: int | None = None  # fast 20, paper 50; reaching it is an outcome, no error
    polish: int = 0  # further steps once converged; the converged iterate of least KL is kept
    lambda_s: float = 25.0  # weight of L_s (paper)
    memory: int | None = None  # bytes; tuples are solved in chunks that stay below it

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {list(METHODS)}, got {self.method!r}.")
        for name, least in (("mask_size", 1), ("max_steps", 0), ("polish", 0), ("memory", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}.")
        for name in ("sigma", "margin", "lambda_s"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value < float("inf")):
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}.")
        if self.sparsity is not None and not (_is_number(self.sparsity) and 0 < self.sparsity < 1):
            raise ValueError(f"sparsity: expected a number in (0, 1), got {self.sparsity!r}.")

    def resolve(self, k: int, size: tuple[int, int]) -> "Resolved":
        """Every None filled in, for k images of (height, width) pixels.

        Raises:
            ValueError: if the mask has more cells than the picture has pixels.
        """
        fast, short = self.method == "fast", min(size)
        mask_size = self.mask_size or min(8 if short <= 64 else 16, short)
        if mask_size > short:
            raise ValueError(
                f"mask_size: expected at most {short} cells for pictures of {size[0]} x {size[1]}, "
                f"got {mask_size}. Pass a smaller mask_size, or None."
            )
        return Resolved(
            mask_size=mask_size,
            sigma=_default(self.sigma, 0.5 if fast else mask_size / 8),
            sparsity=_default(self.sparsity, {2: 0.07, 3: 0.10}.get(k, 0.12)),
            margin=_default(self.margin, 0.25 if fast else 0.0),
            max_steps=_default(self.max_steps, 20 if fast else 50),
            polish=self.polish,
            lambda_s=self.lambda_s,
            memory=_default(self.memory, DEFAULT_MEMORY),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _default(value: Number | None, default: Number) -> Number:
    return default if value is None else value


class Resolved(NamedTuple):
    """`SolverSettings` for one k and one picture size, nothing left open."""

    mask_size: int
    sigma: float
    sparsity: float
    margin: float
    max_steps: int
    polish: int
    lambda_s: float
    memory: int


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


class Method(NamedTuple):
    """What tells one solver from another."""

    normalisation: Normalisation
    keep_best: bool  # what a row that never converges hands out: its best iterate, or its last
    near: float  # margin from which a row is expected to pass its next check, in logits
    start: Callable[[Tuples, Hint | None, Resolved], Tensor]  # -> mask logits z
    loss: Callable[[Tensor, Tensor, Tuples, Resolved], Tensor]  # logits, masks -> (B,)
    # z, momentum u, loss (B,), gradient -> next z and u
    update: Callable[[Tensor, Tensor, Tensor, Tensor, Tuples, Resolved], tuple[Tensor, Tensor]]


def solve(
    images: Tensor,
    teacher: Logits,
    *,
    sources: Tensor,
    weights: Tensor,
    originals: Tensor,
    settings: SolverSettings,
    maps: ClassMaps | None = None,
) -> Mixed:
    """Algorithm 1: masks for which the teacher's top k classes are those of the k images.

    Where images of a tuple share a class, the criterion is for the set of classes, and the weights
    of equal ones are added.

    Args:
        images: (P, C, H, W), uint8 or floating. The teacher is given uint8 pictures as float / 255.
        teacher: images -> logits (B, N), differentiable.
        sources: (M, k) int64 rows of `images`.
        weights: (M, k), rows sum to 1.
        originals: the teacher's logits of the images, (P, N).
        settings: the method and its values.
        maps: class maps of the images; the fast method starts from saliency where there are none.

    Returns:
        `Mixed` of M rows. Nothing in it is NaN or inf if the images are not.
    """
    method = METHODS[settings.method]
    k = sources.shape[1]
    resolved = settings.resolve(k, (images.shape[-2], images.shape[-1]))
    lost = ~_finite_rows(originals)[sources].all(dim=1)
    classes = originals.nan_to_num(nan=-torch.inf).argmax(dim=1)
    wanted = classes[sources]  # (M, k)
    targets = weights.new_zeros(len(sources), originals.shape[1]).float()
    targets = targets.scatter_add(1, wanted, weights.float())  # Eq. 2
    members = torch.zeros_like(targets, dtype=torch.bool).scatter(1, wanted, True)
    problem = Tuples(images, sources, weights.float(), targets, members)
    chunk = max(1, resolved.memory // (4 * images[0].numel() * (k + ACTIVATIONS)))

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
    ):
        hint: Hint | None = maps
        if hint is None and method.start is _fast_start:
            hint = saliency(images, teacher, classes, resolved.mask_size, chunk=chunk)
        parts = []
        for rows in torch.arange(len(sources), device=images.device).split(chunk):
            part = problem.rows(rows)
            z = method.start(part, hint, resolved)
            z = torch.where(_finite_rows(z)[:, None, None, None], z, 0.0)
            parts.append(_search(part, teacher, z, lost[rows], method, resolved))
        mixed = Mixed.concatenate(parts)
    if isinstance(hint, Tensor):  # saliency costs each picture a forward and a backward
        share = len(images) / len(sources)
        mixed.forwards.add_(share)
        mixed.backwards.add_(share)
    return mixed


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


def saliency(
    images: Tensor, teacher: Logits, classes: Tensor, mask_size: int, *, chunk: int = 64
) -> Tensor:
    """Where each picture's class is seen: ``|d logit / d pixel|`` on the masks' grid.

    Args:
        images: (P, C, H, W), as `solve` takes them.
        teacher: images -> logits.
        classes: (P,) int64, whose logit is asked for.
        mask_size: cells a side.
        chunk: pictures at a time.

    Returns:
        (P, w, w) float32, blurred, of mean 1; 1 everywhere if the teacher's answer does not depend
        on the picture.
    """
    parts = []
    for rows in torch.arange(len(images), device=images.device).split(chunk):
        leaf = images[rows].float().requires_grad_()
        logits = _ask(teacher, leaf, images.dtype)
        picked = logits.gather(1, classes[rows, None]).sum()
        slope = _gradient(picked, leaf).abs().sum(dim=1)  # (B, H, W)
        cells = blur(average(slope, (mask_size, mask_size)), SALIENCY_BLUR)
        mean = cells.mean(dim=(1, 2), keepdim=True)
        parts.append(torch.where((mean > 0) & mean.isfinite(), cells / mean, 1.0))
    return torch.cat(parts)


# -- the search ------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """Rows that are still searched; every field has one entry for each."""

    rows: Tensor  # their places in the problem
    z: Tensor  # (A, k, w, w) mask logits to be checked next
    u: Tensor  # (A, k, w, w) momentum
    margin: Tensor  # (A,) of the last check, in logits
    found: Tensor  # (A,) bool, has converged before
    polish: Tensor  # (A,) int64, further steps that remain once it has
    broken: Tensor  # (A,) bool, its last update was not finite

    @classmethod
    def begin(cls, z: Tensor, lost: Tensor, polish: int) -> "_Rows":
        count, device = len(z), z.device
        return cls(
            rows=torch.arange(count, device=device),
            z=z,
            u=torch.zeros_like(z),
            margin=z.new_full((count,), -torch.inf),
            found=torch.zeros_like(lost),
            polish=torch.full((count,), polish, device=device),
            broken=lost,
        )

    def take(self, index: Tensor) -> "_Rows":
        return _Rows(*(value[index] for value in vars(self).values()))


class _Check(NamedTuple):
    """What the teacher said of some rows."""

    part: Tuples
    leaf: Tensor
    masks: Tensor
    logits: Tensor
    going: Tensor  # indices of the rows that are not finished


def _search(
    problem: Tuples, teacher: Logits, z: Tensor, lost: Tensor, method: Method, settings: Resolved
) -> Mixed:
    """Iterate from mask logits z (B, k, w, w) until each row has its outcome.

    Rows that are `lost` (B,) from the start, for the teacher has no finite answer for one of their
    images, end at once.
    """
    best = _Best(problem, z)
    now = _Rows.begin(z, lost, settings.polish)
    last = settings.max_steps + settings.polish

    def check(now: _Rows, step: int) -> _Check:
        part = problem.rows(now.rows)
        leaf = now.z.detach().requires_grad_()
        masks = render(leaf, part.size, method.normalisation)
        pictures = blend(part.images[part.sources], masks)
        logits = _ask(teacher, pictures, part.images.dtype)
        with torch.no_grad():
            finite = _finite_rows(logits) & ~now.broken
            now.margin = margins(logits, part.members)
            passed = finite & (now.margin > settings.margin)
            # the less KL the better, once converged
            fallback = now.margin if method.keep_best else torch.full_like(now.margin, step)
            score = torch.where(passed, -kl_divergence(logits, part.targets), fallback)
            best.offer(now.rows, finite, passed, score, leaf, pictures, logits)
            now.found = now.found | passed
            over = torch.where(now.found, now.polish <= 0, step >= settings.max_steps)
            best.close(now.rows, now.found, finite, step)
        return _Check(part, leaf, masks, logits, (finite & ~over).nonzero().flatten())

    for step in range(last + 1):
        # A graph serves all of its rows or none: a row that passes pays for a backward in vain, one
        # that fails without a graph for a second forward. So the fast method checks rows that
        # nearly passed last time without.
        near = (now.margin > method.near) & ~now.found & (step < settings.max_steps)
        first = near.nonzero().flatten()
        if len(first) > 0:
            with torch.no_grad():
                failed = first[check(now.take(first), step).going]
            now = now.take(torch.cat([(~near).nonzero().flatten(), failed]))
            if len(now.rows) == 0:
                break

        with torch.set_grad_enabled(step < last):
            seen = check(now, step)
        if len(seen.going) == 0:
            break
        loss = method.loss(seen.logits, seen.masks, seen.part, settings)
        gradient = _gradient(loss[seen.going].sum(), seen.leaf)[seen.going]
        best.backwards[now.rows] += 1
        with torch.no_grad():
            now.polish = now.polish - now.found.long()
            loss, part = loss.detach()[seen.going], seen.part.rows(seen.going)
            now = now.take(seen.going)
            z, u = method.update(now.z, now.u, loss, gradient, part, settings)
            now.broken = ~(_finite_rows(z) & _finite_rows(u))
            stay = now.broken[:, None, None, None]
            now.z, now.u = torch.where(stay, now.z, z), torch.where(stay, 0.0, u)
    return best.mixed(method.normalisation)


class _Best:
    """What each row would hand out if it ended now."""

    def __init__(self, problem: Tuples, z: Tensor) -> None:
        count, (height, width) = len(z), problem.size
        self.problem = problem
        self.images = problem.images.new_zeros(count, problem.images.shape[1], height, width)
        self.z = z.clone()
        self.logits = torch.zeros_like(problem.targets)
        self.passed = torch.zeros(count, dtype=torch.bool, device=z.device)
        self.score = z.new_full((count,), -torch.inf)
        self.offered = torch.zeros(count, dtype=torch.bool, device=z.device)
        self.outcome = torch.zeros(count, dtype=torch.int64, device=z.device)
        self.steps = torch.zeros_like(self.outcome)
        self.forwards = z.new_zeros(count)
        self.backwards = z.new_zeros(count)

    def offer(
        self,
        rows: Tensor,
        finite: Tensor,
        passed: Tensor,
        score: Tensor,
        z: Tensor,
        pictures: Tensor,
        logits: Tensor,
    ) -> None:
        """Take the iterate of each row where it is better; the first one whatever it is.

        One that passed comes before all that did not, then the score decides.
        """
        before = self.passed[rows]
        better = (passed & ~before) | ((passed == before) & (score > self.score[rows]))
        better = (finite & better) | ~self.offered[rows]
        if self.images.dtype == torch.uint8:
            pictures = pictures.round()
        for kept, offered in (
            (self.images, pictures.to(self.images.dtype)),
            (self.z, z),
            (self.logits, logits.nan_to_num()),
            (self.passed, passed),
            (self.score, torch.where(finite, score, -torch.inf)),
        ):
            choice = better.view(-1, *[1] * (kept.ndim - 1))
            kept[rows] = torch.where(choice, offered, kept[rows])
        self.offered[rows] = True
        self.forwards[rows] += 1

    def close(self, rows: Tensor, found: Tensor, finite: Tensor, step: int) -> None:
        """The outcome of each row if this step was its last."""
        missed = torch.where(finite, Outcome.MAX_STEPS, Outcome.NOT_FINITE)
        self.outcome[rows] = torch.where(found, Outcome.CONVERGED, missed)
        self.steps[rows] = step

    def mixed(self, normalisation: Normalisation) -> Mixed:
        size = self.problem.size
        levels = [sparsity(render(z, size, normalisation)) for z in self.z.split(64)]
        lost = (self.outcome == Outcome.NOT_FINITE)[:, None]
        return Mixed(
            images=self.images,
            sources=self.problem.sources,
            weights=self.problem.weights,
            outcome=self.outcome,
            steps=self.steps,
            sparsity=torch.cat(levels),
            # where the teacher has no answer, Eq. 2 is the label
            logits=torch.where(lost, self.problem.targets.clamp(min=1e-12).log(), self.logits),
            mask_logits=self.z,
            normalisation=normalisation,
            forwards=self.forwards,
            backwards=self.backwards,
        )


def _ask(teacher: Logits, pictures: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits (B, N) float32; teachers get 8-bit pictures on 0..1."""
    return teacher(pictures / 255 if dtype == torch.uint8 else pictures.to(dtype)).float()


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    """d value / d leaf, 0 where there is no path between them (a constant teacher)."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient.detach()


def _finite_rows(values: Tensor) -> Tensor:
    return values.flatten(1).isfinite().all(dim=1)


# -- the paper's method ----------------------------------------------------------------------------


def _zero_start(problem: Tuples, hint: Hint | None, settings: Resolved) -> Tensor:
    """Algorithm 1, line 6."""
    rows, k = problem.sources.shape
    cells = settings.mask_size
    return problem.targets.new_zeros(rows, k, cells, cells)


def _paper_loss(logits: Tensor, masks: Tensor, problem: Tuples, settings: Resolved) -> Tensor:
    return mixing_objective(logits, problem.targets, masks, lambda_s=settings.lambda_s)


def _paper_update(
    z: Tensor, u: Tensor, loss: Tensor, gradient: Tensor, problem: Tuples, settings: Resolved
) -> tuple[Tensor, Tensor]:
    """Algorithm 1, lines 10 and 11."""
    return z + newton_step(loss, gradient, settings.sigma, LENGTH_LIMITS), u


# -- the fast method -------------------------------------------------------------------------------


def _fast_start(problem: Tuples, hint: Hint | None, settings: Resolved) -> Tensor:
    """Masks that a surrogate of the teacher, or its saliency, finds good: no teacher call."""
    if isinstance(hint, Tensor):
        z = SALIENCY_GAIN * hint.clamp(min=SALIENCY_FLOOR).log()[problem.sources]
    else:
        assert hint is not None
        z = _optimise_surrogate(problem, hint, settings)
    return project(z, settings.sparsity, problem.coarse)


def _optimise_surrogate(problem: Tuples, maps: ClassMaps, settings: Resolved) -> Tensor:
    """Adam on "logits = mean over cells of the masked class maps", (B, k, w, w).

    Each row's problem is its own, and Adam works element by element: a row's result does not depend
    on the others.
    """
    sources = problem.sources
    cells = maps.features.shape[-2:]
    used = sources.unique()
    place = torch.searchsorted(used, sources)
    shares = ClassMaps(maps.features[used], maps.weight, maps.bias).maps().flatten(2)
    shares = shares[place] / shares.shape[-1]  # (B, k, N, hw)
    sigma = settings.mask_size * 3 / 16
    v = _zero_start(problem, maps, settings).requires_grad_()
    optimiser = torch.optim.Adam([v], lr=START_RATE)
    for _ in range(START_STEPS):
        masks = normalise(upsample(blur(v, sigma), problem.coarse), "softmax")
        weights = average(masks, (cells[0], cells[1])).flatten(2)  # (B, k, hw)
        logits = maps.bias + torch.einsum("bku,bknu->bn", weights, shares)
        short = (START_MARGIN - _leads(logits, problem.members)).relu().square()
        loss = (
            torch.where(problem.members, short, 0.0).sum(dim=1)
            + START_SPARSITY * sparsity(masks)
            + START_KL * kl_divergence(logits, problem.targets)
        )
        v.grad = _gradient(loss.sum(), v)
        optimiser.step()
    return blur(v.detach(), sigma)


def _leads(logits: Tensor, members: Tensor) -> Tensor:
    """Each class's logit above the smooth maximum of all classes outside the tuple, (B, N)."""
    others = (logits / TAU).masked_fill(members, -torch.inf).logsumexp(dim=1, keepdim=True)
    return logits - TAU * others.clamp(min=-1e4)  # the tuple may hold all classes there are


def _fast_loss(logits: Tensor, masks: Tensor, problem: Tuples, settings: Resolved) -> Tensor:
    """A smooth hinge on each class's lead, plus KL to the target; sparsity is the projection's."""
    short = TAU * F.softplus((DELTA - _leads(logits, problem.members)) / TAU)
    hinge = torch.where(problem.members, short, 0.0).sum(dim=1)
    return hinge + kl_divergence(logits, problem.targets)


def _fast_update(
    z: Tensor, u: Tensor, loss: Tensor, gradient: Tensor, problem: Tuples, settings: Resolved
) -> tuple[Tensor, Tensor]:
    gradient = gradient - gradient.mean(dim=1, keepdim=True)
    step = newton_step(loss, gradient, settings.sigma).clamp(-STEP_CLAMP, STEP_CLAMP)
    u = MOMENTUM * u + step
    return project(z + u, settings.sparsity, problem.coarse), u


METHODS = {
    "fast": Method("softmax", True, NEAR, _fast_start, _fast_loss, _fast_update),
    "paper": Method("sigmoid", False, float("inf"), _zero_start, _paper_loss, _paper_update),
}
