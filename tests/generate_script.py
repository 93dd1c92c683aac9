"""A rank of a launch generates; or reads recipes under Accelerate. test_generate_ranks.py judges.

torchrun --nproc-per-node N generate_script.py recipes|shards SHARDS OUT WORKERS
torchrun --nproc-per-node N generate_script.py read SHARDS RECIPES FACTS
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator, skip_first_batches
from accelerate.utils import gather_object
from colours import colour_teacher
from test_generation import SMALL, VIEW
from torch.utils.data import DataLoader

from supermix_transforms import ShardDataset, ShardSampler, generate, replay
from supermix_transforms.offline.generation import process_state

BATCH, EPOCHS, RESUMED_EPOCH, RESUMED_AT = 4, 2, 1, 2


def write(form: str, shards: Path, out: Path, workers: int) -> None:
    dataset = ShardDataset(shards, transform=VIEW)
    options = {**SMALL, "passes": 2, "num_workers": workers, "form": form}
    summary = generate(dataset, colour_teacher(), out, **options)
    state = process_state()
    assert (summary.process, summary.processes) == (state.process_index, state.num_processes)
    state.wait_for_everyone()
    state.destroy_process_group()


def read(shards: Path, recipes: Path, facts: Path) -> None:
    accelerator = Accelerator(cpu=True)
    found = {}
    for workers in (0, 2):
        mixes = replay(recipes, ShardDataset(shards))
        loader = accelerator.prepare(
            DataLoader(
                mixes,
                BATCH,
                sampler=ShardSampler(mixes, window=0),
                num_workers=workers,
                collate_fn=mixes.collate,
            )
        )

        def seen(batch):
            return [batch.extra["index"].tolist(), batch.mixed.long().sum(dim=(1, 2, 3)).tolist()]

        epochs = []
        for epoch in range(EPOCHS):
            loader.set_epoch(epoch)
            epochs.append([seen(batch) for batch in loader])
        loader.set_epoch(RESUMED_EPOCH)
        resumed = [seen(batch) for batch in skip_first_batches(loader, RESUMED_AT)]
        found[workers] = {"epochs": epochs, "resumed": resumed}
    everyone = gather_object([found])
    if accelerator.is_main_process:
        facts.write_text(json.dumps(everyone))
    accelerator.end_training()
    process_state().destroy_process_group()


if __name__ == "__main__":
    what, shards, folder, last = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    if what == "read":
        read(shards, folder, Path(last))
    else:
        write(what, shards, folder, int(last))
