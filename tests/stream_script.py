"""What each rank gets of a webdataset stream; test_stream_ranks.py starts it and judges.

torchrun --nproc-per-node N tests/stream_script.py FOLDER
"""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import torch
from colours import NUM_CLASSES, colour_teacher
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from supermix_transforms import MixLoader, SuperMix

BATCH, EPOCHS = 2, 2
CASES = {
    "all": ["--all"],
    "all by workers": ["--all", "--workers", "2"],
    "all by workers again": ["--all", "--workers", "2"],
    "equal": [],
    "equal by workers": ["--workers", "2"],
}


def example():
    path = Path(__file__).parents[1] / "examples" / "stream_shards.py"
    spec = importlib.util.spec_from_file_location("stream_shards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(folder: Path) -> list[str]:
    teacher = f"{Path(__file__).parent / 'colours.py'}:colour_teacher"
    known = {"shards": folder, "teacher": teacher, "batch-size": BATCH, "size": 6, "seed": 3}
    return [f"--{name}={value}" for name, value in known.items()]


def printed(stream_shards, folder: Path, words: list[str]) -> list[dict]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        stream_shards.main([*options(folder), f"--epochs={EPOCHS}", *words])
    return [json.loads(line) for line in output.getvalue().splitlines()]


def train(stream_shards, folder: Path) -> dict:
    """With unequally many batches on each rank, as the example's first lines say."""
    student = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, NUM_CLASSES))
    student = DistributedDataParallel(student)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    shards = sorted(map(str, folder.glob("*.tar")))
    transform = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    loader = stream_shards.stream(shards, transform, BATCH, workers=2)
    steps = 0
    with student.join():
        for images, targets in MixLoader(loader, SuperMix(colour_teacher())):
            nn.functional.cross_entropy(student(images), targets).backward()
            optimiser.step()
            optimiser.zero_grad()
            steps += 1
    weights = torch.cat([each.flatten() for each in student.parameters()]).tolist()
    return {"steps": steps, "weights": weights}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    stream_shards = example()
    results = {case: printed(stream_shards, folder, words) for case, words in CASES.items()}
    distributed.init_process_group("gloo")
    results["trained"] = train(stream_shards, folder)
    (folder / f"rank{distributed.get_rank()}.json").write_text(json.dumps(results))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
