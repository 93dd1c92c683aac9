"""A rank of a launch trains on shards that are mixed online; test_train_ranks.py judges.

torchrun --nproc-per-node N tests/train_script.py SHARDS OUT WORKERS [STEP]

With a STEP the last rank kills itself before it. Each rank writes what its student is shown.
"""

import json
import os
import signal
import sys
from pathlib import Path

from accelerate import PartialState
from colours import colour_teacher
from distill_script import student
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from supermix_transforms import ShardDataset, ShardSampler, SuperMixCollate
from supermix_transforms.training import DistillSettings, distill

BATCH, EPOCHS = 4, 2
SETTINGS = DistillSettings(epochs=EPOCHS, lr=0.05, warmup_epochs=1, kd="both", save_steps=1)


def main(shards: Path, out: Path, workers: int, last: int | None) -> None:
    state = PartialState(cpu=True)
    out.mkdir(exist_ok=True)
    log = out / f"seen{state.process_index}.jsonl"
    seen = []

    def show(network, inputs) -> None:
        if not network.training:
            return
        if len(seen) == last and state.is_last_process:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(inputs[0].flatten(1).double().sum(dim=1).tolist())  # a number for each picture
        with log.open("a") as file:
            file.write(f"{json.dumps(seen[-1])}\n")

    dataset = ShardDataset(shards, transform=v2.Compose([v2.CenterCrop(16), v2.PILToTensor()]))
    collate = SuperMixCollate(colour_teacher(), seed=5)
    sampler = ShardSampler(dataset, seed=5, window=2)
    train = DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, collate_fn=collate)
    validation = DataLoader(dataset, BATCH, num_workers=workers)
    network = student()
    network.register_forward_pre_hook(show)
    distill(network, train, validation, out, settings=SETTINGS)
    state.destroy_process_group()


if __name__ == "__main__":
    folder, result, count, *step = sys.argv[1:]
    main(Path(folder), Path(result), int(count), int(step[0]) if step else None)
