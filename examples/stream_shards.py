"""Mix what webdataset streams, on any number of processes, without Accelerate's wrapping.

    torchrun --nproc-per-node 2 examples/stream_shards.py --shards 'train-{000..127}.tar' --epochs 2

Streaming reads a shard from its first byte to its last, for storage where a read at an offset is
dear. Everywhere else ShardDataset in a plain DataLoader is simpler: it knows its length, shuffles
across shards, gives all ranks equally many batches and resumes in mid-epoch.

Five things are easily got wrong:
- shards are shuffled here, the same on all ranks, before they are split: webdataset's own
  `shardshuffle` repeats one order in every epoch, and `shuffle` without a seed repeats none;
- `split_by_node` gives each rank shards of its own, so do not hand this loader to `prepare`, which
  would split once more (or, in dispatch mode, read on one rank only);
- workers split the shards once more, and each ends with a short batch: batches are cut anew;
- ranks have unequally many samples; `least` batches for each keep DistributedDataParallel from
  waiting for ever, and what is left over has its turn in another epoch. With --all each sample is
  there once in each epoch; then train inside of `with student.join():`;
- `decode` without `only=` runs the pickles that are in a shard.
"""

import argparse
import json
import os
from collections.abc import Sequence
from itertools import islice

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


def stream(
    shards: list[str], transform, batch_size: int, *, workers: int = 0, seed: int = 0
) -> wds.WebLoader:
    """This rank's share of the shards, each sample once; only the last batch may be short."""
    dataset = (
        wds.WebDataset(shards, shardshuffle=False, nodesplitter=wds.split_by_node)
        .shuffle(1000, seed=seed)
        .decode("pil", only=["jpg", "png", "cls"])
        .to_tuple("jpg;png", "cls", "__key__")
        .map_tuple(transform)
        .batched(batch_size)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers)
    return loader.unbatched().batched(batch_size)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="of each rank")
    parser.add_argument("--all", action="store_true", help="even if ranks have unequally many")
    options = parser.parse_args(words)

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    index = index_shards(options.shards)
    samples = {row.shard: row.samples for row in index.shards if row.samples}
    readers = ranks * max(1, options.workers)
    if len(samples) < readers:
        parser.error(
            f"expected a shard for each of {readers} readers ({ranks} ranks, {options.workers} "
            f"workers), got {len(samples)} with samples. Use fewer workers or ranks, or write more "
            "and smaller shards."
        )
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
        least = None if options.all else min(each) // options.batch_size
        seed = int(np.random.default_rng([options.seed, epoch, rank]).integers(1 << 62))
        torch.manual_seed(seed)  # the crops, here and in workers
        loader = stream(shards, transform, options.batch_size, workers=options.workers, seed=seed)
        mixing = MixLoader(loader, SuperMix(teacher), seed=options.seed)
        mixing.set_epoch(epoch)
        for batch in islice(mixing, least):
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
