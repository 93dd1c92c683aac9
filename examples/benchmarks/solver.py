"""How many tuples the solver mixes, and at what cost, on real pictures with real teachers.

    python examples/benchmarks/solver.py --data ../shared/data --out docs/results/solver.json

Settings were fixed on shards 0-1 of the ImageNet sample; the figures come from shards 2-3, and
from the CIFAR test pictures. Cases that stand in the file already are not run again, so the
script can be stopped and called again. Prints the JSON.

A mix counts as converged if the teacher's top k classes of the picture that is handed out (uint8)
are the classes of its sources, everything asked again in float32 at another batch size.
`forwards` and `backwards` are teacher calls a mixed image, its share of the originals included.
Intervals are of 95 %: Wilson's for shares, 1.96 standard errors for means.
"""

import json
import time

import torch
from real_data import SEED, load
from reports import Report, options_of
from torch import Tensor

from supermix_transforms import SolverSettings, SuperMix, TeacherLabeler
from supermix_transforms.commands.measured import wilson
from supermix_transforms.draws import Draw
from supermix_transforms.inputs import identities
from supermix_transforms.losses import kl_divergence
from supermix_transforms.mixing import soft_targets
from supermix_transforms.solver import margins

BATCH, CHECK_BATCH = 100, 37
CASES = [
    # data set, k, method, partners, tuples
    ("cifar10", 2, "fast", "random", 2000),
    ("cifar10", 2, "fast", "matched", 2000),
    ("cifar100", 2, "fast", "random", 2000),
    ("cifar100", 2, "fast", "matched", 2000),
    ("imagenet", 2, "fast", "random", 1000),
    ("imagenet", 2, "fast", "matched", 1000),
    ("imagenet", 3, "fast", "random", 1000),
    ("imagenet", 3, "fast", "matched", 1000),
    ("imagenet", 4, "fast", "random", 1000),
    ("imagenet", 4, "fast", "matched", 1000),
    ("imagenet-callable", 2, "fast", "random", 1000),
    ("cifar10", 2, "paper", "random", 1000),
    ("cifar100", 2, "paper", "random", 1000),
    ("imagenet", 2, "paper", "random", 100),
    ("imagenet", 3, "paper", "random", 100),
]


def batches(images: Tensor, tuples: int) -> list[tuple[int, Tensor]]:
    """Epochs of the pictures, in batches shuffled anew, until there are enough: (epoch, batch)."""
    parts: list[tuple[int, Tensor]] = []
    for epoch in range(-(-tuples // len(images))):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        parts += [(epoch, images[rows]) for rows in order.split(BATCH)]
    return parts[: -(-tuples // BATCH)]


def run(
    images: Tensor, teacher: TeacherLabeler, k: int, method: str, partners: str, tuples: int
) -> dict:
    settings = SolverSettings(method=method)
    transform = SuperMix(teacher, k=k, partners=partners, settings=settings)
    mixes, seconds, converged, divergence = [], 0.0, [], []
    for epoch, batch in batches(images, tuples):
        start = time.perf_counter()
        mixed = transform.mix(batch, None, Draw(SEED, epoch, identities(batch))).mixed
        seconds += time.perf_counter() - start
        mixes.append(mixed)
        classes, passed = recheck(teacher, batch, mixed.images, mixed.sources)
        converged.append(passed)
        wanted = soft_targets(mixed.weights, classes[mixed.sources], mixed.logits.shape[1])
        divergence.append(kl_divergence(mixed.logits, wanted))

    def column(name: str) -> Tensor:
        return torch.cat([getattr(mix, name) for mix in mixes]).double()

    passed, forwards, backwards = torch.cat(converged), column("forwards"), column("backwards")
    pairs, count = (forwards + backwards) / 2, len(passed)
    error = 1.96 * pairs.std() / count**0.5
    return {
        "tuples": count,
        "converged": round(passed.double().mean().item(), 4),
        "converged_interval": wilson(int(passed.sum()), count),
        "converged_in_search": round(column("converged").mean().item(), 4),
        "sparsity": round(column("sparsity").mean().item(), 4),
        "steps": round(column("steps").mean().item(), 4),
        "kl": round(torch.cat(divergence).mean().item(), 4),
        "forwards_per_image": round(forwards.mean().item(), 4),
        "backwards_per_image": round(backwards.mean().item(), 4),
        "pairs_per_image": round(pairs.mean().item(), 4),
        "pairs_interval": [round((pairs.mean() + side * error).item(), 2) for side in (-1, 1)],
        "ms_per_image": round(1000 * seconds / count, 1),
    }


@torch.no_grad()
def recheck(
    teacher: TeacherLabeler, originals: Tensor, mixed: Tensor, sources: Tensor
) -> tuple[Tensor, Tensor]:
    """The originals' classes, and whether a mix's top k classes are its sources', in float32."""

    def ask(images: Tensor) -> Tensor:
        return torch.cat([teacher.examine(part)[0] for part in images.split(CHECK_BATCH)])

    logits = ask(mixed)
    wanted = torch.zeros_like(logits, dtype=torch.bool)
    classes = ask(originals).argmax(dim=1)
    return classes, margins(logits, wanted.scatter(1, classes[sources], True)) > 0


def main() -> None:
    parser = options_of(__doc__, "solver")
    parser.add_argument("--tuning", action="store_true", help="ImageNet shards 0-1 instead of 2-3")
    parser.add_argument("--tuples", type=int, help="at most so many of each case")
    options = parser.parse_args()
    report = Report(options, "solver", seed=SEED, batch=BATCH)
    shards = "0-1" if options.tuning else "2-3"
    if report.content.setdefault("shards", shards) != shards:
        parser.error(f"{options.out} holds figures of other shards. Name another --out.")
    for name, k, method, partners, tuples in CASES:
        case = {"data": name, "k": k, "method": method, "partners": partners}
        if report.has(**case):
            continue
        images, teacher = load(options.data, name.split("-")[0], tuning=options.tuning)
        if name.endswith("-callable"):  # anything from pictures to logits: no class maps
            known = teacher
            teacher = TeacherLabeler(lambda batch, known=known: known.logits(batch))
        figures = run(images, teacher, k, method, partners, min(tuples, options.tuples or tuples))
        report.add(case | figures)
    print(json.dumps(report.content))


if __name__ == "__main__":
    main()
