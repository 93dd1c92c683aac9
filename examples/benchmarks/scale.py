"""What the mixed set of ImageNet takes: hours, bytes and reads, from what was measured.

    python examples/benchmarks/scale.py --data ../shared/data --out docs/results/scale.json

Takes calls and bytes a mix from docs/results/offline.json (run offline.py first) and measures how
long one core takes for a picture of ImageNet's usual size (the sample's pictures, made 500 x 375,
JPEG of quality 90). Rates of teachers on a GPU are assumptions and stand beside the results. Prints
the JSON; docs/scale.md has the tables.
"""

import io
import json
import statistics
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from reports import Report, options_of
from torchvision.transforms import v2

from supermix_transforms.data.pictures import read_picture
from supermix_transforms.data.views import ViewDraws

SETS = {"ImageNet-1k": 1_281_167, "ImageNet-21k": 14_197_122}
SOURCE_BYTES = 110_000  # of a picture of ImageNet, the mean
SHARD_SAMPLES = 1000
RATES = {"2,000": 2000, "5,000": 5000, "10,000": 10_000}  # teacher forwards a second on a GPU
GPUS, PASSES = (1, 8, 64), (1, 5)
BACKWARD = 2.0  # forwards that a backward to the pixels takes on a GPU
SIZE, COUNT, TURNS = (500, 375), 100, 5


def milliseconds_a_picture(data: Path) -> float:
    """To decode, cut and resize one, on one core."""
    files = []
    with tarfile.open(sorted((data / "imagenet-sample").glob("*.tar"))[0]) as tar:
        for member in tar:
            if member.name.lower().endswith((".jpg", ".jpeg")) and len(files) < COUNT:
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                picture = Image.open(io.BytesIO(content)).convert("RGB").resize(SIZE)
                file = io.BytesIO()
                picture.save(file, "JPEG", quality=90)
                files.append(file.getvalue())
    draws = ViewDraws(v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]), seed=0)
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        for index, content in enumerate(files):
            picture = draws.view.prepare(read_picture("a picture", content))
            draws.view.cut(picture, draws(picture, 0, index))
        times.append(1000 * (time.perf_counter() - start) / len(files))
    return statistics.median(times)


def estimates(measured: dict[str, Any], decode_ms: float) -> dict[str, Any]:
    work = measured["forwards"] + BACKWARD * measured["backwards"]  # forwards a mix
    forms = {
        "recipes": measured["bytes_a_mix"],
        "jpg q95": measured["jpeg_bytes"]["q95"],
        "png": measured["png_bytes"],
    }
    a_gpu = {
        name: {
            "mixes_a_second": round(rate / work),
            "cores_to_decode": round(rate / work * decode_ms / 1000, 1),
            "megabytes_read_a_second": round(rate / work * SOURCE_BYTES / 1e6, 1),
        }
        for name, rate in RATES.items()
    }
    sets = {}
    for name, pictures in SETS.items():
        for passes in PASSES:
            mixes = pictures * passes
            sets[f"{name}, {passes} pass{'es' if passes > 1 else ''}"] = {
                "mixes": mixes,
                "gigabytes": {form: round(mixes * each / 1e9, 2) for form, each in forms.items()},
                "hours": {
                    f"{rate} a second": {
                        gpus: round(mixes * work / value / gpus / 3600, 2) for gpus in GPUS
                    }
                    for rate, value in RATES.items()
                },
            }
    return {
        "work_a_mix": round(work, 2),
        "decode_ms": round(decode_ms, 2),
        "on_a_gpu": a_gpu,
        "sets": sets,
        "source_gigabytes": {n: round(count * SOURCE_BYTES / 1e9) for n, count in SETS.items()},
        "shards": {name: -(-count // SHARD_SAMPLES) for name, count in SETS.items()},
    }


def main() -> None:
    parser = options_of(__doc__, "scale")
    parser.add_argument("--offline", type=Path, default=Path("docs/results/offline.json"))
    options = parser.parse_args()
    results = json.loads(options.offline.read_text())["results"]
    measured = next(result for result in results if result["part"] == "recipes")
    report = Report(
        options,
        "scale",
        assumed={"forwards_a_second": list(RATES.values()), "backward": BACKWARD},
    )
    report.content.pop("results", None)
    report.add(estimates(measured, milliseconds_a_picture(options.data)))
    print(json.dumps(report.content, indent=1))


if __name__ == "__main__":
    sys.exit(main())
