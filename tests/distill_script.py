"""A rank of a launch trains from recipes; or a process is killed. test_distill_ranks.py judges.

torchrun --nproc-per-node N distill_script.py SHARDS RECIPES OUT BATCH EPOCHS [SLEEP]
"""

import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from colours import NUM_CLASSES
from torch import nn
from torch.utils.data import DataLoader

from supermix_transforms import ShardDataset, ShardSampler, replay
from supermix_transforms.training import DistillSettings, distill


def student() -> nn.Module:
    """Without batch statistics, which two ranks would have of their own."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, NUM_CLASSES),
    )


def main() -> None:
    shards, recipes, out = (Path(word) for word in sys.argv[1:4])
    batch, epochs = int(sys.argv[4]), int(sys.argv[5])
    mixes = replay(recipes, ShardDataset(shards))
    sampler = ShardSampler(mixes, window=0)
    train = DataLoader(mixes, batch, sampler=sampler, collate_fn=mixes.collate)
    network = student()
    if len(sys.argv) > 6:  # so slow that it can be killed in mid-epoch
        network.register_forward_hook(lambda *_: time.sleep(float(sys.argv[6])))
    settings = DistillSettings(epochs=epochs, lr=0.05, warmup_epochs=1, kd="both", save_steps=1)
    distill(network, train, None, out, settings=settings)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
