"""The methods that `bench` compares: the batches they are given, and the running of them."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from supermix_transforms.commands.authors import authors_loop
from supermix_transforms.commands.measured import Measured, Sample
from supermix_transforms.demo import stack_pictures
from supermix_transforms.draws import Draw, draw_ring, draw_weights
from supermix_transforms.inputs import identities
from supermix_transforms.memory import group_size
from supermix_transforms.methods import ask, gradient_of
from supermix_transforms.results import Mixed
from supermix_transforms.settings import MethodName, SolverSettings
from supermix_transforms.solver import margins
from supermix_transforms.teacher import TeacherLabeler
from supermix_transforms.transforms import CutMix, MixUp, SuperMix

__all__ = [
    "AUTHORS",
    "METHODS",
    "SLOW",
    "UNSEARCHED",
    "Batch",
    "Made",
    "draw_batches",
    "is_float32",
    "largest_limit",
    "make_method",
    "make_sample",
    "measure",
    "recheck",
]

STEPPED = ("paper", "newton-tv", "sgd")  # SolverSettings methods whose step limit is chosen
AUTHORS = {"authors": 0.0, "authors-70": 0.7, "authors-same-dtype": 0.0}  # tolerances
UNSEARCHED = ("mixup", "cutmix", "lower-limit")
METHODS = ("fast", "fast-matched", *STEPPED, *AUTHORS, *UNSEARCHED)
SLOW = (*STEPPED, *AUTHORS)


class Batch(NamedTuple):
    """Pictures and what is asked of them, the same for every method."""

    images: Tensor  # (B, C, H, W) uint8, on the teacher's device
    classes: Tensor  # (B,) int64, the teacher's
    draw: Draw
    sources: Tensor  # (B, k), as the transforms draw them
    weights: Tensor  # (B, k)
    has_maps: bool


class Made(NamedTuple):
    """What a method made of a batch."""

    mixed: Mixed | None
    finished: Tensor | None = None  # (T, M) bool, after each step of the authors' loop
    seconds: tuple[float, ...] = ()  # since the start, where it read the clock itself


def draw_batches(
    pictures: Sequence[tuple[str, Tensor]],
    labeler: TeacherLabeler,
    *,
    k: int,
    alpha: float,
    count: int,
    batch_size: int,
    seed: int,
) -> list[Batch]:
    """At least `count` tuples in batches of one size, each batch another epoch's draw."""
    if len(pictures) < k:
        raise ValueError(
            f"images: expected at least k = {k} pictures, got {len(pictures)}. "
            "Pass more pictures, or a smaller k."
        )
    names, images = stack_pictures(pictures)
    number = math.ceil(count / batch_size)
    size = max(k, math.ceil(count / number))
    if len(names) < size:  # each as often as the others, so that tuples of k classes can be found
        size -= size % len(names)
        number = math.ceil(count / size)
    batches = []
    for epoch in range(number):
        rows = [(epoch * size + i) % len(names) for i in range(size)]
        part = labeler.prepare(images[rows])
        copies = [f"{names[row]} {i // len(names)}" for i, row in enumerate(rows)]
        draw = Draw(seed, epoch, identities(part, copies))
        logits, maps = labeler.examine(part)
        classes = logits.nan_to_num(nan=-math.inf).argmax(dim=1)
        sources = draw_ring(draw, classes, k)
        weights = draw_weights(draw, sources, alpha)
        tuples = sources.to(part.device), weights.to(part.device)
        batches.append(Batch(part, classes, draw, *tuples, maps is not None))
    return batches


def make_method(
    name: str, labeler: TeacherLabeler, *, k: int, alpha: float, max_steps: int | None = None
) -> Callable[[Batch], Made]:
    """The method called `name`; `max_steps` None is its own."""
    if name == "lower-limit":
        return lambda batch: _lower_limit(batch, labeler)
    if name in AUTHORS:

        def teacher(pictures: Tensor) -> Tensor:
            return labeler.logits(pictures, precise=name != "authors-same-dtype")

        def authors(batch: Batch) -> Made:
            images, classes, _, sources, weights, _ = batch
            run = authors_loop(
                images,
                teacher,
                sources=sources,
                weights=weights,
                classes=classes,
                tolerance=AUTHORS[name],
                max_steps=max_steps,
            )
            return Made(*run)

        return authors
    if name in ("mixup", "cutmix"):
        blind = (MixUp if name == "mixup" else CutMix)(k=k, alpha=alpha, teacher=labeler)

        def mix(batch: Batch) -> Made:
            mixed = blind.mix(batch.images, batch.classes, batch.draw).mixed
            assert mixed is not None
            return Made(mixed)

        return mix
    matched = name == "fast-matched"
    settings = SolverSettings(
        method=cast(MethodName, "fast" if matched else name), max_steps=max_steps
    )
    ours = SuperMix(
        labeler,
        k=k,
        alpha=alpha,
        partners="matched" if matched else "random",
        settings=settings,
    )
    return lambda batch: Made(ours.mix(batch.images, None, batch.draw).mixed)


def largest_limit(name: str, k: int, size: tuple[int, int]) -> int:
    """The steps at which a search of `k` pictures of (height, width) gives up by itself."""
    method = "paper" if name in AUTHORS else name.removesuffix("-matched")
    return SolverSettings(method=cast(MethodName, method)).resolve(k, size).max_steps


def _lower_limit(batch: Batch, labeler: TeacherLabeler) -> Made:
    """What no search can do without: the originals' forward, one gradient, one check.

    Pictures share a graph as the solver lets them, which on a CPU is faster than all in one.
    """
    device, dtype = batch.images.device, batch.images.dtype
    parts = batch.images.split(group_size(batch.images) or len(batch.images))
    clock = _Clock(device)
    labeler.examine(batch.images)
    originals = clock()
    for part in parts:
        leaf = part.float().requires_grad_()
        gradient_of(ask(labeler.logits, leaf, dtype).logsumexp(dim=1).sum(), leaf)
    gradient = clock()
    with torch.no_grad():
        for part in parts:
            ask(labeler.logits, part.float(), dtype)
    return Made(None, seconds=(originals, gradient, clock()))


class _Clock:
    """Seconds since it was made, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, 0.0
        self.start = self()

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.start


def measure(
    lots: dict[str, list[Batch]], labeler: TeacherLabeler, k: int, alpha: float, repeats: int
) -> dict[str, Measured]:
    """Run each method on its batches; in each repeat they take turns, another one first."""
    from rich.console import Console
    from rich.progress import Progress

    names = list(lots)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    times: dict[str, list[list[tuple[float, ...]]]] = {name: [] for name in names}
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("warm-up", total=(repeats + 1) * len(names))
        for name in names:
            make_method(name, labeler, k=k, alpha=alpha, max_steps=1)(lots[name][0])
            progress.advance(task)
        for repeat in range(repeats):
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                progress.update(task, description=name)
                run = make_method(name, labeler, k=k, alpha=alpha)
                times[name].append([])
                for batch in lots[name]:
                    clock = _Clock(batch.images.device)
                    made = run(batch)
                    total = clock()
                    # a loop's own stamps do not hold what came after its last step
                    tail = total - made.seconds[-1] if made.seconds else total
                    times[name][-1].append(tuple(s + tail for s in made.seconds or (0.0,)))
                    if repeat == 0:
                        samples[name].append(make_sample(made, batch, labeler))
                progress.advance(task)
    return {name: Measured(samples[name], times[name]) for name in names}


def make_sample(made: Made, batch: Batch, labeler: TeacherLabeler) -> Sample:
    """The figures of a batch, its mixes checked again."""
    mixed = made.mixed
    if mixed is None:  # the lower limit
        ones = torch.ones(len(batch.images))
        return Sample(ones.bool(), ones.long(), 3 * ones, ones, torch.zeros_like(ones))
    passed = recheck(batch.images, mixed.images, mixed.sources, labeler)
    if made.finished is not None:
        passed = passed & made.finished[-1]
    return Sample(
        passed=passed.cpu(),
        steps=mixed.steps.cpu(),
        forwards=mixed.forwards.cpu(),
        backwards=mixed.backwards.cpu(),
        sparsity=mixed.sparsity.cpu(),
        finished=None if made.finished is None else made.finished.cpu(),
    )


@torch.no_grad()
def recheck(originals: Tensor, mixes: Tensor, sources: Tensor, labeler: TeacherLabeler) -> Tensor:
    """Whether the teacher's top k classes are the sources', in float32, half a batch at a time."""

    def logits_of(images: Tensor) -> Tensor:
        return torch.cat([labeler.examine(part)[0] for part in images.split(len(images) // 2)])

    logits = logits_of(mixes)
    classes = logits_of(originals).nan_to_num(nan=-math.inf).argmax(dim=1)
    members = torch.zeros_like(logits, dtype=torch.bool).scatter(1, classes[sources], True)
    return margins(logits, members) > 0


def is_float32(labeler: TeacherLabeler, images: Tensor) -> bool:
    """Whether the teacher's answers are those without autocast, to the bit."""
    with torch.no_grad():
        pictures = images.float() / 255
        return torch.equal(labeler.logits(pictures), labeler.logits(pictures, precise=True))
