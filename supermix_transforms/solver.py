"""The search for masks: Algorithm 1 of the paper, and a faster one.

Source: SuperMix (Dabouei et al., CVPR 2021), section 3.1. The solver takes any callable from images
to logits; where the teacher has class maps, the fast method starts from them.

A row is one tuple of k images. One forward a step serves twice: it checks the iterate of the last
step and gives the gradient of the next. Rows that are finished leave the batch and never change
again.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from supermix_transforms.losses import kl_divergence, sparsity
from supermix_transforms.masks import Normalisation, blend, render
from supermix_transforms.methods import (
    METHODS,
    Hint,
    Logits,
    Method,
    Resolved,
    Tuples,
    ask,
    finite_rows,
    gradient_of,
    margins,
    newton_step,
    saliency,
)
from supermix_transforms.results import ClassMaps, Mixed, Outcome

__all__ = ["SolverSettings", "margins", "newton_step", "saliency", "solve"]

Number = TypeVar("Number", int, float)

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
    lost = ~finite_rows(originals)[sources].all(dim=1)
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
        if hint is None and method.wants_hint:
            hint = saliency(images, teacher, classes, resolved.mask_size, chunk=chunk)
        parts = []
        for rows in torch.arange(len(sources), device=images.device).split(chunk):
            part = problem.rows(rows)
            z = method.start(part, hint, resolved)
            z = torch.where(finite_rows(z)[:, None, None, None], z, 0.0)
            parts.append(_search(part, teacher, z, lost[rows], method, resolved))
        mixed = Mixed.concatenate(parts)
    if isinstance(hint, Tensor):  # saliency costs each picture a forward and a backward
        share = len(images) / len(sources)
        mixed.forwards.add_(share)
        mixed.backwards.add_(share)
    return mixed


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
        logits = ask(teacher, pictures, part.images.dtype)
        with torch.no_grad():
            finite = finite_rows(logits) & ~now.broken
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
        gradient = gradient_of(loss[seen.going].sum(), seen.leaf)[seen.going]
        best.backwards[now.rows] += 1
        with torch.no_grad():
            now.polish = now.polish - now.found.long()
            loss, part = loss.detach()[seen.going], seen.part.rows(seen.going)
            now = now.take(seen.going)
            z, u = method.update(now.z, now.u, loss, gradient, part, settings)
            now.broken = ~(finite_rows(z) & finite_rows(u))
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
