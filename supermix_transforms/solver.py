"""The search for masks: Algorithm 1 of the paper, and a faster one.

Source: SuperMix (Dabouei et al., CVPR 2021), section 3.1. The solver takes any callable from images
to logits; where the teacher has class maps, the fast method starts from them.

A row is one tuple of k images. One forward a step serves twice: it checks the iterate of the last
step and gives the gradient of the next. Rows that are finished leave the batch and never change
again.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from supermix_transforms.losses import kl_divergence, sparsity
from supermix_transforms.masks import Normalisation, blend, render
from supermix_transforms.memory import activation_bytes, footprint, group_size
from supermix_transforms.methods import (
    METHODS,
    Logits,
    Method,
    Surrogate,
    Tuples,
    ask,
    finite_rows,
    gradient_of,
    margins,
    newton_step,
    quality,
)
from supermix_transforms.results import ClassMaps, Mixed, Outcome
from supermix_transforms.settings import Resolved, SolverSettings

__all__ = ["SolverSettings", "margins", "newton_step", "solve"]

# Float32 pictures that a teacher keeps for a backward, at most; a ResNet-50's are 143, an
# EfficientNet-B7's 883. Where even so many fit, nothing is measured.
MOST_ACTIVATIONS = 2000


def solve(
    images: Tensor,
    teacher: Logits,
    *,
    sources: Tensor,
    weights: Tensor,
    originals: Tensor,
    settings: SolverSettings,
    maps: ClassMaps | None = None,
    half: bool = False,
) -> Mixed:
    """Algorithm 1: masks for which the teacher's top k classes are those of the k images.

    With ``min_share`` and ``max_kl`` a mix must meet these too, of the same answer of the teacher.
    Where images of a tuple share a class, the criterion is for the set of classes, and the weights
    of equal ones are added.

    Args:
        images: (P, C, H, W), uint8 or floating. The teacher is given uint8 pictures as float / 255.
        teacher: images -> logits (B, N), differentiable.
        sources: (M, k) int64 rows of `images`.
        weights: (M, k), rows sum to 1.
        originals: the teacher's logits of the images, (P, N).
        settings: the method and its values.
        maps: class maps of the images; the fast method starts from contrast where there are none.
        half: the teacher answers in half precision, which asks for a larger margin.

    Returns:
        `Mixed` of M rows. Nothing in it is NaN or inf if the images are not.

    Raises:
        ValueError: for a mask size or sparsity that does not fit the pictures or k.
    """
    method = METHODS[settings.method]
    k = sources.shape[1]
    resolved = settings.resolve(k, (images.shape[-2], images.shape[-1]), half=half)
    lost = ~finite_rows(originals)[sources].all(dim=1)
    classes = originals.nan_to_num(nan=-torch.inf).argmax(dim=1)
    wanted = classes[sources]  # (M, k)
    targets = weights.new_zeros(len(sources), originals.shape[1]).float()
    targets = targets.scatter_add(1, wanted, weights.float())  # Eq. 2
    members = torch.zeros_like(targets, dtype=torch.bool).scatter(1, wanted, True)
    problem = Tuples(images, sources, weights.float(), targets, members)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
    ):
        surrogate, used = None, sources.unique()
        if method.surrogate and maps is not None:
            surrogate = Surrogate.of_maps(maps, used)
        elif method.surrogate:
            cells = max(1, resolved.mask_size // 2)
            surrogate = Surrogate.of_pictures(images, originals, used, cells)
        parts = []
        chunk = _chunk(problem, teacher, surrogate, resolved)
        for rows in torch.arange(len(sources), device=images.device).split(chunk):
            part = problem.rows(rows)
            z = method.start(part, surrogate, resolved)
            z = torch.where(finite_rows(z)[:, None, None, None], z, 0.0)
            parts.append(_search(part, teacher, z, lost[rows], surrogate, method, resolved))
        return Mixed.concatenate(parts)


# -- the search ------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """Rows that are still searched; every field has one entry for each."""

    rows: Tensor  # their places in the problem
    z: Tensor  # (A, k, w, w) mask logits to be checked next
    u: Tensor  # (A, k, w, w) momentum
    lead: Tensor  # (A,) of the last check: the margin, or less where `quality` falls short
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
            lead=z.new_full((count,), -torch.inf),
            found=torch.zeros_like(lost),
            polish=torch.full((count,), polish, device=device),
            broken=lost,
        )

    def take(self, index: Tensor) -> "_Rows":
        return _Rows(*(value[index] for value in vars(self).values()))

    def moved(self, z: Tensor, u: Tensor) -> "_Rows":
        """The rows with new mask logits and momentum; those that are not finite stay, broken."""
        broken = ~(finite_rows(z) & finite_rows(u))
        stay = broken[:, None, None, None]
        z, u = torch.where(stay, self.z, z), torch.where(stay, 0.0, u)
        return replace(self, z=z, u=u, broken=broken)

    @staticmethod
    def join(parts: "list[_Rows]") -> "_Rows":
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return _Rows(*(torch.cat(column) for column in columns))

    def groups(self, near: float, size: int | None) -> Iterator["_Rows"]:
        """Rows that share a graph: alike in how near they are to passing, at most `size`.

        Few of the rows that are near, for they pass or fail evenly. Without a size all of them:
        nothing is counted then, for which a GPU would have to be waited for.
        """
        if size is None:
            yield self
            return
        order = self.lead.argsort(stable=True)
        far = int((self.lead <= near).sum())
        for part, most in ((order[:far], size), (order[far:], max(1, size // 3))):
            for index in part.split(most):
                if len(index) > 0:
                    yield self.take(index)


class _Asked(NamedTuple):
    """What the teacher said of some rows, and the graph that leads there."""

    part: Tuples
    leaf: Tensor
    masks: Tensor
    pictures: Tensor
    logits: Tensor


def _search(
    problem: Tuples,
    teacher: Logits,
    z: Tensor,
    lost: Tensor,
    surrogate: Surrogate | None,
    method: Method,
    settings: Resolved,
) -> Mixed:
    """Iterate from mask logits z (B, k, w, w) until each row has its outcome.

    Rows that are `lost` (B,) from the start, for the teacher has no finite answer for one of their
    images, end at once.
    """
    best = _Best(problem, z)
    now = _Rows.begin(z, lost, settings.polish)
    revise = None  # of z and the teacher's first answer, which then needs no backward
    if method.revise is not None and surrogate is not None:
        revise = partial(method.revise, surrogate)
    last = settings.max_steps + settings.polish
    if revise is not None and settings.polish > 0:
        last += 1  # who passes at once waits for a graph
    size = group_size(problem.images)

    def look(some: _Rows) -> _Asked:
        part = problem.rows(some.rows)
        leaf = some.z.detach().requires_grad_()
        masks = render(leaf, part.size, method.normalisation, quantised=settings.quantised)
        pictures = blend(part.images[part.sources], masks)
        best.forwards[some.rows] += 1
        return _Asked(part, leaf, masks, pictures, ask(teacher, pictures, part.images.dtype))

    for step in range(last + 1):
        moved = []
        for some in now.groups(method.near, size):
            with torch.set_grad_enabled(step < last and (step > 0 or revise is None)):
                seen = look(some)
            going = _judge(some, seen, best, method, settings, step)
            if len(going) == 0:
                del seen  # with its graph, before another one is made
                continue
            if step == 0 and revise is not None:
                some, part = some.take(going), seen.part.rows(going)
                z = revise(some.z, seen.logits[going], part, settings)
                z = torch.where(some.found[:, None, None, None], some.z, z)  # these are polished
                moved.append(some.moved(z, some.u))
                continue
            # A graph serves all of its rows or none. Rows that passed would pay for a backward in
            # vain, rows that failed pay for a second forward in a graph of their own: the fewer.
            if method.second_graph and 2 * len(going) < len(some.rows):
                some = some.take(going)
                del seen
                seen, going = look(some), torch.arange(len(going), device=going.device)
            if not seen.logits.requires_grad:
                warnings.warn(
                    "teacher: expected logits that depend on the pictures by a gradient, got none, "
                    "so the search has nothing to go by. Take torch.no_grad() or detach() out of "
                    "the teacher.",
                    stacklevel=2,
                )
            best.backwards[some.rows] += 1
            loss = method.loss(seen.logits, seen.masks, seen.part, settings)[going]
            gradient = gradient_of(loss.sum(), seen.leaf)[going]
            some, part = some.take(going), seen.part.rows(going)
            with torch.no_grad():
                z, u = method.update(some.z, some.u, loss.detach(), gradient, part, settings)
                some.polish = some.polish - some.found.long()
                moved.append(some.moved(z, u))
        if not moved:
            break
        now = _Rows.join(moved)
    return best.mixed(method.normalisation, settings.quantised)


@torch.no_grad()
def _judge(
    some: _Rows, seen: _Asked, best: "_Best", method: Method, settings: Resolved, step: int
) -> Tensor:
    """Note how far each row is; the indices of those that go on, (A,)."""
    finite = finite_rows(seen.logits) & ~some.broken
    margin = margins(seen.logits, seen.part.members)
    divergence = kl_divergence(seen.logits, seen.part.targets)
    spare = quality(seen.logits, divergence, seen.part.members, settings)
    passed = finite & (margin > settings.margin) & (spare >= 0)
    some.lead = torch.minimum(margin, settings.margin + spare)
    # the less KL the better, once converged
    fallback = some.lead if method.keep_best else torch.full_like(some.lead, step)
    score = torch.where(passed, -divergence, fallback)
    best.offer(some.rows, finite, passed, score, seen)
    some.found = some.found | passed
    over = torch.where(some.found, some.polish <= 0, step >= settings.max_steps)
    best.close(some.rows, some.found, finite, step)
    return (finite & ~over).nonzero().flatten()


def _chunk(
    problem: Tuples, teacher: Logits, surrogate: Surrogate | None, settings: Resolved
) -> int:
    """How many tuples are searched at a time; a teacher is measured only where that may matter."""
    images = problem.images
    known = footprint(
        images,
        k=problem.sources.shape[1],
        num_classes=problem.targets.shape[1],
        mask_size=settings.mask_size,
        coarse=problem.coarse,
        map_cells=0 if surrogate is None else surrogate.shares[0, 0].numel(),
        activations=4 * MOST_ACTIVATIONS * images[0].numel(),
    )
    size, count = group_size(images), len(problem.sources)
    if known.peak(count, size) > settings.memory:
        image = images[0] / 255 if images.dtype == torch.uint8 else images[0]
        measured = activation_bytes(teacher, image)
        known = known._replace(activations=measured)
    return known.rows_within(settings.memory, size)


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
        self, rows: Tensor, finite: Tensor, passed: Tensor, score: Tensor, seen: _Asked
    ) -> None:
        """Take the iterate of each row where it is better; the first one whatever it is.

        One that passed comes before all that did not, then the score decides.
        """
        before = self.passed[rows]
        better = (passed & ~before) | ((passed == before) & (score > self.score[rows]))
        better = (finite & better) | ~self.offered[rows]
        exact = seen.pictures.round() if self.images.dtype == torch.uint8 else seen.pictures
        for kept, offered in (
            (self.images, exact.to(self.images.dtype)),
            (self.z, seen.leaf),
            (self.logits, seen.logits.nan_to_num()),
            (self.passed, passed),
            (self.score, torch.where(finite, score, -torch.inf)),
        ):
            choice = better.view(-1, *[1] * (kept.ndim - 1))
            kept[rows] = torch.where(choice, offered, kept[rows])
        self.offered[rows] = True

    def close(self, rows: Tensor, found: Tensor, finite: Tensor, step: int) -> None:
        """The outcome of each row if this step was its last."""
        missed = torch.where(finite, Outcome.MAX_STEPS, Outcome.NOT_FINITE)
        self.outcome[rows] = torch.where(found, Outcome.CONVERGED, missed)
        self.steps[rows] = step

    def mixed(self, normalisation: Normalisation, quantised: bool) -> Mixed:
        size = self.problem.size
        levels = [
            sparsity(render(z, size, normalisation, quantised=quantised)) for z in self.z.split(64)
        ]
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
            quantised=quantised,
            forwards=self.forwards,
            backwards=self.backwards,
        )
