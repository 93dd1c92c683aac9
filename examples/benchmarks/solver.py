"""How many tuples the solver mixes, and at what cost, on real pictures with real teachers.

    python examples/benchmarks/solver.py --data ../shared/data --out docs/results/solver.json

Settings were fixed on shards 0-1 of the ImageNet sample; the figures come from shards 2-3, and
from the CIFAR-10 test pictures. Cases that stand in the file already are not run again, so the
script can be stopped and called again. Prints the JSON.

A mix counts as converged if the teacher's top k classes of the picture that is handed out (uint8)
are the classes of its sources, everything asked again in float32 at another batch size.
`forwards` and `backwards` are teacher calls a mixed image, its share of the originals included.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from cifar_resnet import MEAN, STD, cifar10_resnet56
from torch import Tensor

from supermix_transforms import SolverSettings, SuperMix, TeacherLabeler
from supermix_transforms.inputs import identities
from supermix_transforms.mixing import Draw
from supermix_transforms.models import load_teacher
from supermix_transforms.solver import margins

BATCH, CHECK_BATCH, SEED = 100, 37, 0
CASES = [
    # data set, k, method, partners
    ("cifar10", 2, "fast", "random"),
    ("cifar10", 2, "fast", "matched"),
    ("cifar10", 2, "paper", "random"),
    ("imagenet", 2, "fast", "random"),
    ("imagenet", 2, "fast", "matched"),
    ("imagenet", 3, "fast", "random"),
    ("imagenet", 3, "fast", "matched"),
    ("imagenet", 2, "paper", "random"),
    ("imagenet", 3, "paper", "random"),
]


def pictures(data: Path, name: str, split: str, tuning: bool) -> Tensor:
    """uint8 (P, 3, H, W), shuffled: ImageNet shards 2-3 (0-1 for tuning), CIFAR-10 test."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, data / "unpack.py", name, folder, "--format", "npz"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        arrays = np.load(Path(folder, f"{split}.npz"))
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    if name == "imagenet-sample":  # shard s holds the classes s, s + 4, s + 8, ...
        images = images[(labels % 4 < 2) == tuning]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    return images[order].permute(0, 3, 1, 2).contiguous()


def run(images: Tensor, teacher: TeacherLabeler, k: int, method: str, partners: str) -> dict:
    settings = SolverSettings(method=method)
    transform = SuperMix(teacher, k=k, partners=partners, settings=settings)
    mixes, seconds, converged = [], 0.0, []
    for batch in images.split(BATCH):
        start = time.perf_counter()
        result = transform.mix(batch, None, Draw(SEED, 0, identities(batch)))
        seconds += time.perf_counter() - start
        mixes.append(result.mixed)
        converged.append(recheck(teacher, batch, result.mixed.images, result.mixed.sources))

    def mean(name: str) -> float:
        return round(torch.cat([getattr(mix, name) for mix in mixes]).double().mean().item(), 4)

    forwards, backwards = mean("forwards"), mean("backwards")
    return {
        "tuples": len(images),
        "converged": round(torch.cat(converged).double().mean().item(), 4),
        "converged_in_search": mean("converged"),
        "sparsity": mean("sparsity"),
        "steps": mean("steps"),
        "forwards_per_image": forwards,
        "backwards_per_image": backwards,
        "pairs_per_image": round((forwards + backwards) / 2, 4),
        "ms_per_image": round(1000 * seconds / len(images), 1),
    }


@torch.no_grad()
def recheck(teacher: TeacherLabeler, originals: Tensor, mixed: Tensor, sources: Tensor) -> Tensor:
    """Whether the teacher's top k classes are the sources', in float32."""

    def ask(images: Tensor) -> Tensor:
        return torch.cat([teacher.examine(part)[0] for part in images.split(CHECK_BATCH)])

    logits = ask(mixed)
    wanted = torch.zeros_like(logits, dtype=torch.bool)
    return margins(logits, wanted.scatter(1, ask(originals).argmax(dim=1)[sources], True)) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/solver.json"))
    parser.add_argument("--tuning", action="store_true", help="ImageNet shards 0-1 instead of 2-3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tuples", type=int, help="at most so many of each case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    report = {"results": []}
    if options.out.exists():
        report = json.loads(options.out.read_text())
    report |= {
        "command": "python examples/benchmarks/solver.py",
        "seed": SEED,
        "batch": BATCH,
        "threads": options.threads,
        "device": f"CPU, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "torchvision")},
    }
    cifar = TeacherLabeler(
        cifar10_resnet56(options.data / "cifar10/resnet56.safetensors"), mean=MEAN, std=STD
    )
    lite0 = load_teacher("efficientnet-lite0")
    imagenet = TeacherLabeler(lite0.model, mean=lite0.mean, std=lite0.std)
    sets = {
        "cifar10": (pictures(options.data, "cifar10", "test", False), cifar),
        "imagenet": (pictures(options.data, "imagenet-sample", "sample", options.tuning), imagenet),
    }
    shards = "0-1" if options.tuning else "2-3"
    keys = ("data", "k", "method", "partners")
    done = [[result[key] for key in keys] for result in report["results"]]
    if report.setdefault("shards", shards) != shards:
        parser.error(
            f"{options.out} holds figures of shards {report['shards']}. Name another --out."
        )
    for name, k, method, partners in CASES:
        if [name, k, method, partners] in done:
            continue
        case = {"data": name, "k": k, "method": method, "partners": partners}
        images, teacher = sets[name]
        case |= run(images[: options.tuples], teacher, k, method, partners)
        report["results"].append(case)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(case), file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
