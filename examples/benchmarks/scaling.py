"""Does the cost grow with the number of tuples only, and how with k; what would a GPU do?

    python examples/benchmarks/scaling.py --data ../shared/data --out docs/results/scaling.json

100 pictures of the ImageNet sample's shards 0-1, EfficientNet-Lite0, random partners; repeats take
turns, medians. Prints the JSON.

- `tuples`: seconds for 200, 400 and 800 tuples of the same pictures, and `to_a_line`: ms a tuple by
  those of the first row.
- `k`: ms a tuple for k of 2, 3 and 4, and by those of k 2.
- `gpu_estimate`: an estimate, not a measurement. Teacher calls a mix as above, the FLOPs that torch
  counts for a ResNet-34 at 224 px (a gradient for the pictures alone), at `utilisation` of an
  H200's 989 TFLOP/s in bf16.
"""

import json
import statistics
import sys
import time

import torch
import torchvision
from real_data import SEED, load
from reports import Report, options_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from supermix_transforms import supermix
from supermix_transforms.draws import Draw, draw_ring, draw_weights
from supermix_transforms.inputs import identities
from supermix_transforms.results import Mixed

PICTURES, ALPHA = 100, 3.0
H200_FLOPS = 989e12  # bf16, dense, the maker's figure
UTILISATION = (0.2, 0.4)


def draw(images: Tensor, classes: Tensor, k: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` tuples of the pictures: sources and weights."""
    parts = []
    for epoch in range(-(-count // len(images))):
        one = Draw(SEED, epoch, identities(images))
        sources = draw_ring(one, classes, k)
        parts.append((sources, draw_weights(one, sources, ALPHA)))
    sources, weights = (torch.cat(part)[:count] for part in zip(*parts, strict=True))
    return sources, weights


def flops(side: int = 224) -> tuple[int, int]:
    """Of a ResNet-34's forward and of the gradient for its picture."""
    net = torchvision.models.resnet34().eval().requires_grad_(False)
    image = torch.zeros(1, 3, side, side, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        logits = net(image)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(logits.sum(), image)
    return forward.get_total_flops(), backward.get_total_flops()


def calls(mixed: Mixed) -> tuple[float, float]:
    return mixed.forwards.mean().item(), mixed.backwards.mean().item()


def main() -> None:
    parser = options_of(__doc__, "scaling")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    report = Report(options, "scaling", seed=SEED, repeats=options.repeats)
    images, teacher = load(options.data, "imagenet", tuning=True)
    images = images[:PICTURES]
    logits, maps = teacher.examine(images)
    classes = logits.argmax(dim=1)
    cases = [(2, 200), (2, 400), (2, 800), (3, 200), (4, 200)]
    times: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    made: dict[tuple[int, int], tuple[float, float]] = {}
    for repeat in range(options.repeats):
        for case in cases[repeat:] + cases[:repeat]:
            sources, weights = draw(images, classes, *case)
            start = time.perf_counter()
            mixed = supermix(
                images, teacher, sources=sources, weights=weights, originals=logits, maps=maps
            )
            times[case].append(time.perf_counter() - start)
            made[case] = calls(mixed)
            print(case, times[case][-1], made[case], file=sys.stderr, flush=True)

    ms = {case: 1000 * statistics.median(some) / case[1] for case, some in times.items()}
    forward, backward = flops()
    a_mix = made[2, 800][0] * forward + made[2, 800][1] * backward
    report.content |= {
        "tuples": [
            {
                "count": count,
                "seconds": round(statistics.median(times[2, count]), 2),
                "ms_per_tuple": round(ms[2, count], 1),
                "to_a_line": round(ms[2, count] / ms[2, 200], 3),
            }
            for count in (200, 400, 800)
        ],
        "k": [
            {
                "k": k,
                "forwards": round(made[k, 200][0], 3),
                "backwards": round(made[k, 200][1], 3),
                "ms_per_tuple": round(ms[k, 200], 1),
                "by_k_2": round(ms[k, 200] / ms[2, 200], 3),
            }
            for k in (2, 3, 4)
        ],
        "gpu_estimate": {
            "teacher": "torchvision/resnet34",
            "forward_gflop": round(forward / 1e9, 3),
            "backward_gflop": round(backward / 1e9, 3),
            "mix_gflop": round(a_mix / 1e9, 2),
            "utilisation": UTILISATION,
            "mixes_per_second": [round(share * H200_FLOPS / a_mix) for share in UTILISATION],
        },
    }
    report.write()
    print(json.dumps(report.content))


if __name__ == "__main__":
    main()
