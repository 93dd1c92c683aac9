"""What mixes are worth: to their teacher, and to a network that had no part in making them.

    python examples/benchmarks/quality.py --data ../shared/data --out docs/results/quality.json

All contenders but `fast, matched` mix the same tuples with the same weights: 1,000 of CIFAR-100's
test pictures, 1,000 of its training pictures after crop and flip (ResNet-56 makes them, ResNet-20
judges), 100 of the ImageNet sample's shards 2-3 (EfficientNet-Lite0; no judge). Variants of the
fast method are left out for the training pictures. Data sets that stand in the file already are not
run again. Prints the JSON. Means over all tuples, converged or not:

- `judged`: all k classes are among the judge's first five; its difference from `fast`, paired by
  tuples, with a 95 % interval (`judged_less_fast`).
- `converged`: the teacher's first k classes are the tuple's, asked again.
- `teacher_share`: the teacher's probability on the k classes together.
- `share_error`: |share - r| of the first image, its share being of that probability.
- `kl`: KL(r || teacher), nats.
- `edge_length`: of the borders between masks, in picture sides (L1); `regions`: connected areas
  of one owner, at least 1 % of the picture.
- `forwards`, `backwards`: teacher calls a mix, the originals' share included.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from real_data import SEED, cifar_teacher, load, pictures
from reports import Report, options_of
from scipy import ndimage
from torch import Tensor
from torchvision.transforms import v2

from supermix_transforms import CutMix, MixUp, SolverSettings, SuperMix, TeacherLabeler
from supermix_transforms.batchmix import BatchMix
from supermix_transforms.draws import Draw, draw_ring, draw_weights
from supermix_transforms.inputs import identities
from supermix_transforms.losses import kl_divergence
from supermix_transforms.masks import blur, mix_images, owners, project, render
from supermix_transforms.mixing import soft_targets
from supermix_transforms.results import Mixed, Outcome
from supermix_transforms.solver import margins

K, ALPHA, BATCH, FIRST = 2, 3.0, 100, 5
SMOOTH_CELLS, SMOOTH_SIGMA = 16, 3.0  # of random masks: as smooth as the fast method's start
AREA = 0.01  # regions that are smaller are not counted
TUPLES = {"cifar100 train, augmented": 1000, "cifar100 test": 1000, "imagenet shards 2-3": 100}
VARIANTS = {
    **{f"fast, polish {steps}": {"polish": steps} for steps in (1, 2, 4, 8)},
    **{f"fast, min_share {share}": {"min_share": share} for share in (0.3, 0.5, 0.7)},
    **{f"fast, max_kl {nats}": {"max_kl": nats} for nats in (1.0, 0.5)},
}

Mixer = Callable[[Tensor, Tensor, Draw], Mixed]  # pictures, their classes, what decides


def contenders(teacher: TeacherLabeler, *, variants: bool) -> dict[str, Mixer]:
    def of(transform: BatchMix) -> Mixer:
        def mix(images: Tensor, classes: Tensor, draw: Draw) -> Mixed:
            mixed = transform.mix(images, classes, draw, relabel=True).mixed
            assert mixed is not None
            return mixed

        return mix

    def searched(partners: str = "random", **settings) -> Mixer:
        settings = SolverSettings(**settings)
        return of(SuperMix(teacher, k=K, alpha=ALPHA, partners=partners, settings=settings))

    return {
        "fast": searched(),
        **{name: searched(**settings) for name, settings in VARIANTS.items() if variants},
        "fast, matched": searched("matched"),
        "fast, matched, polish 4": searched("matched", polish=4),
        "paper": searched(method="paper"),
        "random smooth masks": smooth_masks,
        "MixUp": of(MixUp(k=K, alpha=ALPHA)),
        "CutMix": of(CutMix(k=K, alpha=ALPHA)),
    }


def smooth_masks(images: Tensor, classes: Tensor, draw: Draw) -> Mixed:
    """Masks as smooth and sparse as the solver's, that nobody chose."""
    sources = draw_ring(draw, classes, K)
    noise = torch.Generator().manual_seed(draw.seed)
    z = torch.randn(len(sources), K, SMOOTH_CELLS, SMOOTH_CELLS, generator=noise)
    size = (images.shape[-2], images.shape[-1])
    sparsity = SolverSettings().resolve(K, size).sparsity
    masks = render(project(blur(z, SMOOTH_SIGMA), sparsity, size), size)
    mixed = mix_images(images[sources], masks)
    return Mixed.unsearched(mixed, sources, masks, Outcome.CONVERGED)


def measure(
    images: Tensor, teacher: TeacherLabeler, judge: TeacherLabeler | None, *, variants: bool
) -> dict[str, dict[str, Tensor]]:
    """Each contender's figures of each mix, (M,) float64."""
    mixers = contenders(teacher, variants=variants)
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in mixers}
    for batch in images.split(BATCH):
        draw = Draw(SEED, 0, identities(batch))
        classes = teacher.examine(batch)[0].argmax(dim=1)
        for name, mix in mixers.items():
            mixed = mix(batch, classes, draw)
            weights = draw_weights(draw, mixed.sources, ALPHA)
            parts[name].append(figures(mixed, classes[mixed.sources], weights, teacher, judge))
    return {
        name: {key: torch.cat([part[key] for part in some]).double() for key in some[0]}
        for name, some in parts.items()
    }


@torch.no_grad()
def figures(
    mixed: Mixed,
    wanted: Tensor,
    weights: Tensor,
    teacher: TeacherLabeler,
    judge: TeacherLabeler | None,
) -> dict[str, Tensor]:
    logits = teacher.examine(mixed.images)[0]
    members = torch.zeros_like(logits, dtype=torch.bool).scatter(1, wanted, True)
    probs = logits.softmax(dim=1)
    together = (probs * members).sum(dim=1)
    share = probs.gather(1, wanted[:, :1])[:, 0] / together
    masks = mixed.masks
    steps = masks.diff(dim=2).abs().sum(dim=(1, 2, 3)) + masks.diff(dim=3).abs().sum(dim=(1, 2, 3))
    seen = {}
    if judge is not None:
        first = judge.examine(mixed.images)[0].topk(FIRST, dim=1).indices
        seen["judged"] = (first[:, None] == wanted[:, :, None]).any(dim=2).all(dim=1)
    return seen | {
        "converged": margins(logits, members) > 0,
        "teacher_share": together,
        "share_error": (share - weights[:, 0]).abs(),
        "kl": kl_divergence(logits, soft_targets(weights, wanted, logits.shape[1])),
        "edge_length": steps / 2 / masks.shape[-1],
        "regions": torch.tensor([count_regions(owner) for owner in owners(masks)]),
        "forwards": mixed.forwards,
        "backwards": mixed.backwards,
    }


def count_regions(owner: Tensor) -> int:
    """Connected areas of one owner in (H, W), the small ones left out."""
    count = 0
    for i in range(K):
        labelled, _ = ndimage.label((owner == i).numpy())
        count += int(
            (torch.from_numpy(labelled).flatten().bincount()[1:] >= AREA * owner.numel()).sum()
        )
    return count


def summary(measured: dict[str, dict[str, Tensor]]) -> list[dict]:
    rows = []
    for name, values in measured.items():
        row = {"contender": name} | {key: round(v.mean().item(), 4) for key, v in values.items()}
        row["pairs"] = round((row["forwards"] + row["backwards"]) / 2, 4)
        if "judged" in values:
            less = values["judged"] - measured["fast"]["judged"]
            row["judged_less_fast"] = interval(less)
        rows.append(row)
    return rows


def interval(values: Tensor) -> list[float]:
    """Mean and the ends of its 95 % interval."""
    error = 1.96 * values.std().item() / len(values) ** 0.5
    return [round(values.mean().item() + side * error, 4) for side in (0, -1, 1)]


def load_case(data: Path, name: str) -> tuple[Tensor, TeacherLabeler, TeacherLabeler | None]:
    count = TUPLES[name]
    if name.startswith("imagenet"):
        images, teacher = load(data, "imagenet")
        return images[:count], teacher, None
    images = pictures(data, "cifar100", name.split()[1].strip(","))[:count]
    if name.endswith("augmented"):
        torch.manual_seed(SEED)
        augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
        images = torch.stack([augment(image) for image in images])
    return images, cifar_teacher(data, "cifar100"), cifar_teacher(data, "cifar100", "resnet20")


def main() -> None:
    parser = options_of(__doc__, "quality")
    parser.add_argument("--tuples", type=int, help="at most so many of each data set")
    options = parser.parse_args()
    report = Report(options, "quality", seed=SEED, k=K, alpha=ALPHA)
    for name in TUPLES:
        if report.has(data=name):
            continue
        images, teacher, judge = load_case(options.data, name)
        images = images[: options.tuples]
        variants = not name.endswith("augmented")
        rows = summary(measure(images, teacher, judge, variants=variants))
        report.add({"data": name, "tuples": len(images), "contenders": rows})
    print(json.dumps(report.content))


if __name__ == "__main__":
    main()
