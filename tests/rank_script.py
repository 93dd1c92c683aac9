"""What each of two ranks does; test_ranks.py starts it under torchrun and judges what it writes.

torchrun --nproc-per-node 2 tests/rank_script.py (train | dispatch) FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import webdataset as wds
from accelerate import Accelerator
from accelerate.utils import set_seed
from colours import NUM_CLASSES, Pictures, PictureStream, colour_teacher
from torch import nn
from torch.utils.data import DataLoader

from supermix_transforms import MixLoader, SuperMix, SuperMixCollate, supermix_loss

COUNT, BATCH, SEED = 22, 4, 3


def make_student() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, NUM_CLASSES))


def read_batches(accelerator: Accelerator) -> list[dict]:
    """What a prepared loader hands to this rank."""
    collate = SuperMixCollate(colour_teacher(), seed=SEED)
    loader = DataLoader(Pictures(COUNT, mapping=True), BATCH, num_workers=2, collate_fn=collate)
    return [facts(batch, batch.extra["__key__"]) for batch in accelerator.prepare(loader)]


def facts(batch, keys) -> dict:
    return {
        "keys": keys,
        "labels": batch.labels.tolist(),
        "sources": batch.sources.tolist(),
        "weights": batch.weights.tolist(),
        "mixed": batch.mixed.flatten(1).double().sum(dim=1).tolist(),
        "targets": batch.targets.tolist(),
    }


def train(accelerator: Accelerator, output: str) -> dict:
    """Eq. 9 under gradient accumulation: in one loss ("concat"), or written out ("batch")."""
    torch.manual_seed(0)  # the same student and order for either form
    student = make_student()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    collate = SuperMixCollate(colour_teacher(), seed=SEED, output=output)
    order = torch.Generator().manual_seed(1)
    loader = DataLoader(Pictures(COUNT), BATCH, shuffle=True, generator=order, collate_fn=collate)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    synced, rows, grads = [], 0, []
    for batch in loader:
        with accelerator.accumulate(student):
            if output == "concat":
                images, targets = batch
                loss = 2 * nn.functional.cross_entropy(student(images), targets)
            else:
                images, targets = torch.cat([batch.images, batch.mixed]), batch.targets
                own, mixed = student(images).split(len(batch))
                loss = supermix_loss(own, batch.labels, mixed, targets)
            accelerator.backward(loss)
            grads.append(next(student.parameters()).grad.sum(dim=0).tolist())
            optimizer.step()
            optimizer.zero_grad()
        synced.append(accelerator.sync_gradients)
        rows += len(accelerator.gather_for_metrics(targets[-len(images) // 2 :]))
    weights = [parameter.flatten().tolist() for parameter in student.parameters()]
    return {"synced": synced, "weights": weights, "gathered": rows, "grads": grads}


def read_shards(folder: Path) -> list[dict]:
    """A webdataset loader that nobody prepared: it splits the shards itself."""
    urls = sorted(map(str, folder.glob("*.tar")))
    dataset = (
        wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node)
        .decode("torchrgb8", only=["png", "cls"])
        .to_tuple("png", "cls", "__key__")
        .batched(3)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=0)
    wrapped = MixLoader(loader, SuperMix(colour_teacher()), seed=SEED)
    return [facts(batch, batch.extra[2]) for batch in wrapped]


def main(case: str, folder: Path) -> None:
    set_seed(0)  # the same global generators on both ranks
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if case == "dispatch":
        loader = DataLoader(PictureStream(16), 4, collate_fn=SuperMixCollate(colour_teacher()))
        next(iter(accelerator.prepare(loader)))
    results = {
        "batches": read_batches(accelerator),
        "concat": train(accelerator, "concat"),
        "batch": train(accelerator, "batch"),
        "shards": read_shards(folder),
    }
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
