"""What a student's step costs, and what is lost when only the largest of its labels are stored.

    python examples/benchmarks/distillation.py --data ../shared/data --work students/

CIFAR-100, ResNet-56 to ResNet-20, k 2. Parts that stand in the file are not run again. Prints JSON.

- `labels`: the soft part of Eq. 8, tau 4, of the ResNet-20 beside the pictures, for 2,000 training
  pictures in a random crop and flip and for their SuperMix mixes: with the n largest labels stored
  (float16, the rest as `softened` spreads it) against all logits. Mean of the loss, mean of its
  absolute error over pictures, the error of the batch's loss, and the cosine of the gradients of
  the logits.
- `steps`: pictures a second that a student in bf16 (or --float32, for CPUs that have no fast one)
  is trained on, 128 originals and 128 mixes a step, with 0 and 2 workers: mixes
  replayed from recipes, against torchvision's CutMix of the same originals, and mixed online by the
  teacher. The medians over steps; all take turns.
- `recipes` and `paying`: the time that it takes to write the mixes of --shards thousand pictures,
  and from which number of steps on that is less than mixing online takes.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from real_data import CIFAR100_STATISTICS, ResNet, cifar_teacher
from reports import Report, options_of
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from supermix_transforms import (
    ShardDataset,
    ShardSampler,
    SuperMixCollate,
    TeacherLabels,
    generate,
    replay,
)
from supermix_transforms.losses import cross_entropy

BATCH, SHARD, SEED, TEMPERATURE, TURNS = 128, 1000, 0, 4.0, 5
VIEW = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
TENSORS = v2.Compose([VIEW, v2.PILToTensor()])
STEPS, ONLINE = 12, 2  # in a row: more than workers have ready, so that reading is paid for


def shards_of(data: Path, work: Path) -> list[Path]:
    """Tars of 1,000 training pictures each."""
    folder = work / f"shards-{SHARD}"
    if not (folder / "classes.json").exists():
        unpack = [sys.executable, str(data / "unpack.py"), "cifar100", str(folder)]
        subprocess.run([*unpack, "--format", "shards", "--shard-size", str(SHARD)], check=True)
    return sorted(folder.glob("train-*.tar"))


# -- labels ----------------------------------------------------------------------------------------


def labels(data: Path, shards: list[Path]) -> Iterator[dict[str, Any]]:
    teacher = cifar_teacher(data, "cifar100")
    student = cifar_teacher(data, "cifar100", net="resnet20")
    dataset = ShardDataset(shards[:2], transform=TENSORS)
    collate = SuperMixCollate(teacher, seed=SEED)
    torch.manual_seed(SEED)
    batches = [batch.mix() for batch in DataLoader(dataset, 200, collate_fn=collate)]
    kinds = {
        "originals": [(batch.images, batch.teacher) for batch in batches],
        "mixes": [(batch.mixed, batch.mixed_teacher) for batch in batches],
    }
    for kind, seen in kinds.items():
        logits = torch.cat([student(images).log_probs for images, _ in seen])
        known = torch.cat([label.log_probs for _, label in seen])
        whole, whole_gradient = _soft_loss(logits, TeacherLabels.from_logits(known))
        for top in (1, 2, 3, 5, 10, 20, 50, 100):
            part, gradient = _soft_loss(logits, TeacherLabels.from_logits(known, top=top))
            cosine = torch.nn.functional.cosine_similarity(gradient, whole_gradient, dim=1)
            yield {
                "part": "labels",
                "of": kind,
                "top": top,
                "pictures": len(logits),
                "loss": round(float(whole.mean()), 4),
                "mean_error": round(float((part - whole).abs().mean()), 4),
                "error_of_the_mean": round(float((part - whole).mean()), 4),
                "gradient_cosine": round(float(cosine.mean()), 4),
            }


def _soft_loss(logits: torch.Tensor, known: TeacherLabels) -> tuple[torch.Tensor, torch.Tensor]:
    """``tau**2 * H`` of each picture, and its gradient by the logits."""
    logits = logits.clone().requires_grad_()
    targets = known.softened(TEMPERATURE)
    loss = -(TEMPERATURE**2) * (targets * (logits / TEMPERATURE).log_softmax(dim=1)).sum(dim=1)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


# -- steps -----------------------------------------------------------------------------------------


class Student:
    """A ResNet-20 and a step of its training."""

    def __init__(self, precision: str) -> None:
        torch.manual_seed(SEED)
        self._half = precision == "bf16"
        network = ResNet(3, classes=100, project=True)
        self._network = network.to(memory_format=torch.channels_last).train()
        self._optimiser = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        mean, std = (torch.tensor(each)[:, None, None] for each in CIFAR100_STATISTICS)
        self._mean, self._std = 255 * mean, 255 * std

    def step(self, images: torch.Tensor, targets: torch.Tensor) -> int:
        images = ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            logits = self._network(images)
        cross_entropy(logits, targets).backward()
        self._optimiser.step()
        self._optimiser.zero_grad()
        return len(images)


def with_cutmix(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Originals, and torchvision's CutMix of them."""
    images, labels = default_collate(samples)
    mixed, targets = v2.CutMix(num_classes=100)(images, labels)
    hard = torch.nn.functional.one_hot(labels, 100).to(targets)
    return torch.cat([images, mixed]), torch.cat([hard, targets])


def steps(
    data: Path, shards: list[Path], recipes: Path, workers: int, precision: str
) -> dict[str, Any]:
    options = {"batch_size": BATCH, "num_workers": workers, "drop_last": True}
    dataset = ShardDataset(shards, transform=TENSORS)
    mixes = replay(recipes, ShardDataset(shards), output="concat")
    collate = SuperMixCollate(cifar_teacher(data, "cifar100"), output="concat", seed=SEED)

    def of(data_set: Any, collate: Callable[..., Any], **sampling: Any) -> Iterable[Any]:
        sampler = ShardSampler(data_set, seed=SEED, **sampling)
        return DataLoader(data_set, sampler=sampler, collate_fn=collate, **options)

    loaders = {
        "CutMix": of(dataset, with_cutmix),
        "replay": of(mixes, mixes.collate),
        "replay by groups": of(mixes, mixes.collate, window=0),
        "online": of(dataset, collate),
    }
    student = Student(precision)
    streams = {name: _endless(loader) for name, loader in loaders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    pictures = 0
    for turn in range(TURNS + 1):
        for name, stream in streams.items():
            for _ in range(ONLINE if name == "online" else STEPS):
                start = time.perf_counter()
                batch = next(stream)
                images, targets = batch.to("cpu") if name == "online" else batch
                pictures = student.step(images, targets)
                if turn > 0:  # the first is for warming up
                    seconds[name].append(time.perf_counter() - start)
    each = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "part": "steps",
        "workers": workers,
        "pictures_a_step": pictures,
        "ms_a_step": {name: round(1000 * value) for name, value in each.items()},
        "pictures_a_second": {name: round(pictures / value) for name, value in each.items()},
        "replay_by_cutmix": round(each["CutMix"] / each["replay"], 3),
        "by_groups_by_cutmix": round(each["CutMix"] / each["replay by groups"], 3),
        "mixing_ms_a_step": round(1000 * (each["online"] - each["CutMix"])),
    }


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def paying(made: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """From which number of steps on to write recipes first takes less time than to mix online."""
    first = next(step for step in steps if step["workers"] == 0)
    saved = (first["ms_a_step"]["online"] - first["ms_a_step"]["replay"]) / 1000
    return {
        "part": "paying",
        "mixes": made["mixes"],
        "generate_seconds": made["seconds"],
        "steps": round(made["seconds"] / saved),
        "passes": round(made["seconds"] / saved * BATCH / made["mixes"], 2),
    }


def made_recipes(data: Path, shards: list[Path], out: Path) -> dict[str, Any]:
    start = time.perf_counter()
    dataset = ShardDataset(shards, transform=VIEW)
    teacher = cifar_teacher(data, "cifar100")
    summary = generate(dataset, teacher, out, batch_size=200, unit_batches=5, seed=SEED)
    return {
        "part": "recipes",
        "mixes": summary.mixes,
        "seconds": round(time.perf_counter() - start, 1),
        "ms_a_mix": round(1000 * (time.perf_counter() - start) / summary.mixes, 1),
        "converged": round(summary.converged / summary.mixes, 4),
    }


def main() -> None:
    parser = options_of(__doc__, "distillation")
    parser.add_argument("--work", type=Path, required=True, help="shards and recipes")
    parser.add_argument("--shards", type=int, default=4, help="of 1,000 pictures, that are mixed")
    parser.add_argument("--float32", action="store_true", help="instead of bf16")
    options = parser.parse_args()
    precision = "float32" if options.float32 else "bf16"
    report = Report(options, "distillation", k=2, seed=SEED, precision=precision)
    shards = shards_of(options.data, options.work)[: options.shards]
    if not report.has(part="labels"):
        for result in list(labels(options.data, shards)):
            report.add(result)
    recipes = options.work / f"distillation-{options.shards}"
    if not report.has(part="recipes"):
        report.add(made_recipes(options.data, shards, recipes))
    for workers in (0, 2):
        if not report.has(part="steps", workers=workers):
            report.add(steps(options.data, shards, recipes, workers, precision))
    if not report.has(part="paying"):
        results = report.content["results"]
        made = next(result for result in results if result["part"] == "recipes")
        report.add(paying(made, [result for result in results if result["part"] == "steps"]))
    print(json.dumps(report.content, indent=1))


if __name__ == "__main__":
    main()
