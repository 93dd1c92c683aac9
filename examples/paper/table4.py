"""Table 4: a student on ImageNet, and panel g of Figure 6, by the command line alone.

    python examples/paper/table4.py --data ../shared/data --work imagenet/

The paper: ResNet-34 to ResNet-18, PyTorch's recipe and 10 epochs more (100), 1,000,000 mixes.
At its size, with the shards of ImageNet-1k, as two commands a row, on 8 GPUs:

    accelerate launch --multi_gpu --num_processes 8 -m supermix_transforms.cli generate \\
        --shards 'train-{0000..1281}.tar' --teacher torchvision/resnet34 --k 3 --out recipes/
    accelerate launch --multi_gpu --num_processes 8 -m supermix_transforms.cli distill \\
        --shards 'train-{0000..1281}.tar' --recipes recipes/ --validation 'val-{00..49}.tar' \\
        --student torchvision/resnet18 --epochs 100 --batch-size 32 --mixed-precision bf16 \\
        --target hard --out run/

docs/scale.md has what generating costs there. Without --shards this script runs all rows in small:
1,000 pictures, one of each class, EfficientNet-Lite0 to MobileNetV3-small at 96 pixels, an epoch.
That shows that they work; nothing is learned from one picture of a class.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from supermix_transforms.files import write_atomically

PAPER = {  # top-1 and top-5 errors, %
    "teacher": (26.69, 8.58),
    "ce": (30.25, 10.93),
    "at": (29.30, 10.00),
    "kd": (29.34, 10.12),
    "crd": (28.83, 9.87),
    "crd-kd": (28.62, 9.51),
    "mixup": (26.97, 8.73),
    "mixup-kd": (26.71, 8.56),
    "cutmix": (26.82, 8.64),
    "cutmix-kd": (26.67, 8.56),
    "supermix": (26.58, 8.49),
    "supermix-kd": (26.38, 8.34),
    "supermix-3": (26.35, 8.33),
    "supermix-3-kd": (26.17, 8.18),
}
ROWS = tuple(name for name in PAPER if name not in ("teacher", "at"))  # no maps of one size here

ASKED = ("teacher", "student", "epochs", "size")  # that a row's figures are of


def options_of(row: str) -> list[str]:
    """What `supermix distill` is asked for."""
    name, *rest = row.split("-")
    kd = ["--kd", "both"] if "kd" in row else []
    if name in ("ce", "kd", "crd"):
        hints = ["--hints", name] if name == "crd" else []
        return ["--learn", "originals", *hints, *(["--kd", "originals"] if kd else [])]
    return ["--mix", name, "--target", "hard", *(["--k", "3"] if "3" in rest else []), *kd]


def small_data(data: Path, work: Path) -> list[str]:
    folder = work / "shards"
    if not any(folder.glob("*.tar")):
        unpack = [sys.executable, str(data / "unpack.py"), "imagenet-sample", str(folder)]
        subprocess.run([*unpack, "--format", "shards"], check=True)
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="shards and runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results/table4.json"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--shards", nargs="+", help="other than the sample")
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--student", default="torchvision/mobilenet_v3_small")
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--size", default="96")
    options = parser.parse_args()
    shards = options.shards or small_data(options.data, options.work)
    content: dict[str, Any] = {"results": []}
    if options.out.exists():
        content = json.loads(options.out.read_text())
    content |= {"command": "python examples/paper/table4.py", "paper_errors": PAPER}
    for row in options.rows:
        asked = {"row": row, **{name: getattr(options, name) for name in ASKED}}
        if any(asked.items() <= result.items() for result in content["results"]):
            continue
        command = [sys.executable, "-m", "supermix_transforms.cli", "distill", "--json"]
        command += ["--shards", *shards, "--teacher", options.teacher, "--size", options.size]
        command += ["--student", options.student, "--epochs", options.epochs]
        run = "-".join(str(value).replace("/", "-") for value in asked.values())
        command += ["--out", str(options.work / run), *options_of(row)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        summary = json.loads(done.stdout)
        names = ("top1", "top5", "agreement", "student_samples", "teacher_calls", "seconds")
        content["results"].append({**asked, **{name: summary[name] for name in names}})
        write_atomically(options.out, (json.dumps(content, indent=1) + "\n").encode())
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
