"""Mix what webdataset streams, on any number of processes, without Accelerate's wrapping.

    torchrun --nproc-per-node 2 examples/stream_shards.py --shards 'train-{000..127}.tar' --epochs 2

Streaming reads a shard from its first byte to its last, for storage where a read at an offset is
dear. Everywhere else ShardDataset in a plain DataLoader is simpler: it knows its length, shuffles
across shards, gives all ranks equally many batches and resumes in mid-epoch.

Three things are easily got wrong:
- shards are shuffled here, the same on all ranks, before they are split: webdataset's own
  `shardshuffle` repeats one order in every epoch;
- `split_by_node` gives each rank shards of its own, so do not hand this loader to `prepare`, which
  would split once more (or, in dispatch mode, read on one rank only);
- ranks have unequally many samples; `least` batches for each keep DistributedDataParallel from
  waiting for ever. What is left over has its turn in another epoch.
"""

import argparse
import json
import os

import numpy as np
import torch
import webdataset as wds
from torchvision.transforms import v2

from supermix_transforms import MixLoader, SuperMix, TeacherLabeler
from supermix_transforms.data.indexing import index_shards
from supermix_transforms.models import load_teacher


def shards_of(epoch: int, shards: list[str], seed: int) -> list[str]:
    """All shards in an order of this epoch, the same on all ranks."""
    order = np.random.default_rng([seed, epoch]).permutation(len(shards))
    return [shards[i] for i in order]


def stream(shards: list[str], transform, batch_size: int) -> wds.WebLoader:
    dataset = (
        wds.WebDataset(shards, shardshuffle=False, nodesplitter=wds.split_by_node)
        .shuffle(1000)
        .decode("pil", only=["jpg", "png", "cls"])  # nothing else: a pickle would be run
        .to_tuple("jpg;png", "cls", "__key__")
        .map_tuple(transform)
        .batched(batch_size, partial=False)
    )
    # Workers would split the shards once more, and each end with a batch that is cut short.
    return wds.WebLoader(dataset, batch_size=None, num_workers=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    index = index_shards(options.shards)
    samples = {row.shard: row.samples for row in index.shards}
    if len(samples) < ranks:
        parser.error(f"{len(samples)} shards for {ranks} ranks: some would have none.")
    net = load_teacher(options.teacher)
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else "cpu"
    )
    net.model.to(device)
    teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
    size = options.size
    transform = v2.Compose([v2.ToImage(), v2.RandomResizedCrop((size, size), antialias=True)])

    for epoch in range(options.epochs):
        shards = shards_of(epoch, list(samples), options.seed)
        each = [sum(samples[shard] for shard in shards[r::ranks]) for r in range(ranks)]
        least = min(each) // options.batch_size
        loader = stream(shards, transform, options.batch_size)
        mixing = MixLoader(loader, SuperMix(teacher), seed=options.seed)
        mixing.set_epoch(epoch)
        for number, batch in enumerate(mixing):
            if number == least:
                break
            # a training step goes here: batch.images, batch.labels, batch.mixed, batch.targets
            facts = {
                "rank": rank,
                "epoch": epoch,
                "keys": batch.extra[2],
                "converged": int(batch.converged.sum()),
            }
            print(f"{json.dumps(facts)}\n", end="", flush=True)  # a line at once: ranks share this


if __name__ == "__main__":
    main()
