"""How many pictures should share a graph on the CPU: ms an image of a forward and backward pair.

    python examples/benchmarks/groups.py --out docs/results/groups.json

EfficientNet-Lite0, 224 px, float32, channels_last. Sizes take turns; medians. Prints the JSON.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch

from supermix_transforms.models import load_teacher

SIZES, REPEATS = (1, 2, 3, 4, 8, 16, 64), 5

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("docs/results/groups.json"))
parser.add_argument("--threads", type=int, default=2)
arguments = parser.parse_args()
torch.set_num_threads(arguments.threads)

model = load_teacher("efficientnet-lite0").model
images = torch.randn(64, 3, 224, 224).contiguous(memory_format=torch.channels_last)
seconds: dict[int, list[float]] = {size: [] for size in SIZES}
for repeat in range(REPEATS + 1):  # the first warms up
    for size in SIZES:
        start = time.perf_counter()
        for part in images[: max(size, 24)].split(size):
            leaf = part.clone().requires_grad_()
            torch.autograd.grad(model(leaf).sum(), leaf)
        if repeat > 0:
            seconds[size].append((time.perf_counter() - start) / max(size, 24))

report = {
    "command": "python examples/benchmarks/groups.py",
    "ms_per_image": {size: round(1000 * statistics.median(s), 1) for size, s in seconds.items()},
    "threads": arguments.threads,
    "device": f"CPU, {platform.machine()}",
    "versions": {"torch": version("torch")},
}
arguments.out.parent.mkdir(parents=True, exist_ok=True)
arguments.out.write_text(json.dumps(report, indent=1) + "\n")
print(json.dumps(report))
