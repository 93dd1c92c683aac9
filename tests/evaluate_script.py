"""Each rank judges a student whose batch statistics are its own; test_distill_ranks.py compares.

torchrun --nproc-per-node N tests/evaluate_script.py OUT
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from colours import NUM_CLASSES, pictures
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from supermix_transforms.training import evaluate


def main() -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(3)
    student = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, NUM_CLASSES),
    )
    with torch.no_grad():  # far from those of the first rank
        student[1].running_mean += 3 * accelerator.process_index
    loader = accelerator.prepare(DataLoader(TensorDataset(*pictures(32)), 4))
    found = evaluate(student, loader, accelerator)
    out = Path(sys.argv[1]) / f"rank{accelerator.process_index}.json"
    out.write_text(json.dumps({**found, "mean": float(student[1].running_mean.sum())}))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
