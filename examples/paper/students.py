"""Students on CIFAR-100: what do mixes teach? ResNet-56 makes and labels them, ResNet-20 learns.

    python examples/paper/students.py --data ../shared/data --work students/ --methods ce kd

The paper (Table 2, ResNet-56 to ResNet-20, 234,000 steps; top-1, %): KD 70.66; MixUp 72.00,
CutMix 72.33, SuperMix 72.64; with KD 72.89, 72.67, 73.19. Here a run has --steps steps of 128
originals and 128 mixes; one that learns from originals alone has twice as many of 128, so that all
students see equally many pictures.

All methods read recipes of the same views, made once: a crop and a flip of each training picture,
before anything is mixed and before the teacher sees it. There are about 45,000 mixes in any case:
one of each picture if the student has 45,000 (--pictures), 22 of each if it has but 2,000. The last
5,000 training pictures are held out, and are what top-1 is measured on; --test measures on the test
set, once, when all is decided.

A run that was stopped goes on; finished ones stand in the JSON and are not run again. Calls with
other --seeds or --methods, one thread each, may share --work if each has an --out of its own.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from real_data import CIFAR100_STATISTICS, ResNet, cifar_teacher

from supermix_transforms import ShardDataset, ShardSampler, SolverSettings, generate, replay
from supermix_transforms.distill import PAPER, DistillSettings, distill
from supermix_transforms.files import write_atomically

BATCH, SHARD, HELD_OUT, MIXES, GROUP, SEED = 128, 1000, 5000, 45_000, 200, 0
VIEW = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
SETS: dict[str, dict[str, Any]] = {  # the mixed sets, by what `generate` is asked for
    "supermix": {},
    "matched": {"partners": "matched"},
    "polish": {"settings": SolverSettings(polish=4)},
    "cutmix": {"mix": "cutmix"},
    "mixup": {"mix": "mixup"},
}
METHODS: dict[str, dict[str, Any]] = {  # the set that is read, and what is learned from it
    "ce": {"set": "cutmix", "learn": "originals"},
    "kd": {"set": "cutmix", "learn": "originals", "kd": "originals"},
    **{
        f"{name}-{target}{'-kd' if kd == 'both' else ''}": {"set": name, "target": target, "kd": kd}
        for name in SETS
        for target in ("hard", "soft")
        for kd in ("none", "both")
    },
}


def shards_of(data: Path, work: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Tars of the training, the held-out and the test pictures."""
    folder = work / f"shards-{SHARD}"
    if not (folder / "classes.json").exists():
        unpack = [sys.executable, str(data / "unpack.py"), "cifar100", str(folder)]
        subprocess.run([*unpack, "--format", "shards", "--shard-size", str(SHARD)], check=True)
    train = sorted(folder.glob("train-*.tar"))
    kept = HELD_OUT // SHARD
    return train[:-kept], train[-kept:], sorted(folder.glob("test-*.tar"))


def recipes_of(name: str, data: Path, work: Path, shards: list[Path]) -> Path:
    """The folder of a mixed set; made, or gone on with, if it is not whole."""
    pictures = SHARD * len(shards)
    passes = MIXES // pictures
    out = work / f"{name}-{pictures}"
    dataset = ShardDataset(shards, transform=VIEW)
    teacher = cifar_teacher(data, "cifar100")
    options = {"passes": passes, "top": 20, "batch_size": GROUP, "unit_batches": 5, "seed": SEED}
    generate(dataset, teacher, out, **options, **SETS[name])
    return out


def settings_of(method: dict[str, Any], steps: int, steps_per_epoch: int, seed: int) -> Any:
    """`steps` steps of mixes, or twice as many of originals alone.

    The rate falls as a cosine: the paper's steps, made 100 times shorter, leave most of the
    training to rates so low that nothing is learned.
    """
    learn = method.get("learn", "both")
    epochs = max(1, round(steps * (2 if learn == "originals" else 1) / steps_per_epoch))
    return replace(
        PAPER,
        schedule="cosine",
        epochs=epochs,
        warmup_epochs=min(5.0, epochs / 10),
        learn=learn,
        kd=method.get("kd", "none"),
        seed=seed,
    )


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    method = METHODS[name]
    shards, held_out, test = shards_of(options.data, options.work)
    shards = shards[: options.pictures // SHARD]
    folder = recipes_of(method["set"], options.data, options.work, shards)
    mixes = replay(folder, ShardDataset(shards), target=method.get("target", "hard"))
    sampler = ShardSampler(mixes, seed=seed, window=0)
    loader = DataLoader(mixes, BATCH, sampler=sampler, collate_fn=mixes.collate)
    judged = ShardDataset(test if options.test else held_out, transform=v2.PILToTensor())
    settings: DistillSettings = settings_of(method, options.steps, len(loader), seed)
    torch.manual_seed(seed)
    student = ResNet(3, classes=100, project=True)
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)
    mean, std = CIFAR100_STATISTICS
    summary = distill(
        student,
        loader,
        DataLoader(judged, 500),
        options.work / "runs" / f"{name}-{options.steps}-{options.pictures}-{seed}",
        settings=settings,
        teacher=cifar_teacher(options.data, "cifar100"),
        mean=mean,
        std=std,
        accelerator=Accelerator(cpu=True, mixed_precision="bf16", dataloader_config=order),
        show=lambda line: print(f"{name} {seed}: {line}", file=sys.stderr, flush=True),
    )
    return {
        "method": name,
        "seed": seed,
        "steps": options.steps,
        "pictures": options.pictures,
        "judged_on": "test" if options.test else "held out",
        "top1": summary.top1,
        "top5": summary.top5,
        "agreement": summary.agreement,
        "student_samples": summary.student_samples,
        "seconds": {part: round(each) for part, each in summary.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="shards, recipes, checkpoints")
    parser.add_argument("--out", type=Path, default=Path("docs/results/students.json"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["ce", "kd"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1760)
    parser.add_argument("--pictures", type=int, default=45_000, help="that the student learns from")
    parser.add_argument("--test", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    content: dict[str, Any] = {"results": []}
    if options.out.exists():
        content = json.loads(options.out.read_text())
    content |= {
        "command": "python examples/paper/students.py",
        "device": "CPU, bf16",
        "versions": {package: version(package) for package in ("torch", "torchvision")},
    }
    for seed in options.seeds:  # one of each method first, so that what is there is paired
        for name in options.methods:
            case = {
                "method": name,
                "seed": seed,
                "steps": options.steps,
                "pictures": options.pictures,
                "judged_on": "test" if options.test else "held out",
            }
            if any(case.items() <= result.items() for result in content["results"]):
                continue
            content["results"].append(train(name, seed, options))
            write_atomically(options.out, (json.dumps(content, indent=1) + "\n").encode())
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
