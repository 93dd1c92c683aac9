"""What each rank does with shards; test_shard_ranks.py starts it and judges what it writes.

torchrun --nproc-per-node N tests/shard_script.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from colours import NUM_CLASSES, colour_teacher
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from supermix_transforms import (
    MixLoader,
    ShardDataset,
    ShardSampler,
    SuperMix,
    SuperMixCollate,
    TeacherLabeler,
)
from supermix_transforms.training import evaluate
from supermix_transforms.training.loss import Pictured

BATCH, SEED, RESUMED_EPOCH, RESUMED_AT = 4, 3, 1, 1
OTHER_BATCH = 5
CASES = {  # of DataLoaderConfiguration, and of DataLoader
    "generator": ({}, {"shuffle": True, "generator": "of each rank", "num_workers": 2}),
    "seedable": ({"use_seedable_sampler": True, "data_seed": 7}, {"shuffle": True}),
    "split": ({"split_batches": True}, {"shuffle": True}),
    "uneven": ({"even_batches": False}, {"shuffle": True}),
    "dispatched": ({"dispatch_batches": True}, {"shuffle": True}),
    "dispatched and split": ({"dispatch_batches": True, "split_batches": True}, {"shuffle": True}),
}


def facts(batch) -> dict:
    """Which pictures (each has its own shade), how they are drawn, and what comes out."""
    return {
        "shades": batch.images[:, 0, 0, 0].tolist(),
        "labels": batch.labels.tolist(),
        "sources": batch.sources.tolist(),
        "weights": batch.weights.tolist(),
        "mixed": batch.mixed.flatten(1).double().sum(dim=1).tolist(),
    }


def judged() -> nn.Module:
    """A student that is right about some pictures."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, NUM_CLASSES))
    return Pictured(network, None, None)


def make_loader(dataset: ShardDataset, workers: int) -> tuple[SuperMixCollate, DataLoader]:
    collate = SuperMixCollate(colour_teacher(), seed=SEED)
    sampler = ShardSampler(dataset, seed=SEED, window=2)
    return collate, DataLoader(
        dataset, BATCH, sampler=sampler, num_workers=workers, collate_fn=collate
    )


def read_otherwise(dataset: ShardDataset) -> dict[str, list]:
    """Two epochs of the same samples under each setting of CASES."""
    found = {}
    for case, (settings, options) in CASES.items():
        configuration = DataLoaderConfiguration(**settings)
        accelerator = Accelerator(cpu=True, dataloader_config=configuration)
        options = dict(options)
        size = OTHER_BATCH
        if settings.get("split_batches"):
            size *= accelerator.num_processes
        if "generator" in options:
            options["generator"] = torch.Generator().manual_seed(accelerator.process_index)
        if settings.get("dispatch_batches"):
            loader = accelerator.prepare(DataLoader(dataset, size, **options))
            mixing = loader = MixLoader(loader, SuperMix(colour_teacher()), seed=SEED)
        else:
            mixing = SuperMixCollate(colour_teacher(), seed=SEED)
            loader = accelerator.prepare(DataLoader(dataset, size, collate_fn=mixing, **options))
        found[case] = []
        for epoch in range(2):
            mixing.set_epoch(epoch)
            found[case].append([facts(batch) for batch in loader])
    return found


def read(accelerator: Accelerator, folder: Path, workers: int) -> dict:
    dataset = ShardDataset(folder, transform=v2.ToImage())
    collate, loader = make_loader(dataset, workers)
    loader = accelerator.prepare(loader)
    epochs = []
    for epoch in range(2):
        collate.set_epoch(epoch)
        epochs.append([facts(batch) for batch in loader])

    # another process would begin like this, in the middle of an epoch
    collate, loader = make_loader(dataset, workers)
    loader = accelerator.prepare(loader)
    loader.set_epoch(RESUMED_EPOCH)
    collate.set_epoch(RESUMED_EPOCH)
    resumed = [facts(batch) for batch in skip_first_batches(loader, RESUMED_AT)]

    metrics = evaluate(
        judged(),
        accelerator.prepare(DataLoader(dataset, BATCH, num_workers=workers)),
        accelerator,
        TeacherLabeler(colour_teacher()),
    )
    seen = []
    for images, labels in accelerator.prepare(DataLoader(dataset, BATCH, num_workers=workers)):
        shades, labels = accelerator.gather_for_metrics((images[:, 0, 0, 0], labels))
        seen += zip(shades.tolist(), labels.tolist(), strict=True)
    return {"epochs": epochs, "resumed": resumed, "evaluated": seen, "metrics": metrics}


def main(folder: Path) -> None:
    set_seed(0)  # the same global generators on all ranks
    accelerator = Accelerator(cpu=True)
    results = {workers: read(accelerator, folder, workers) for workers in (0, 2)}
    results |= read_otherwise(ShardDataset(folder, transform=v2.ToImage()))
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
