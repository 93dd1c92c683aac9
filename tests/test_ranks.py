"""Two ranks under torchrun on the CPU: rank_script.py is run, what it wrote is judged here."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from colours import Pictures, colour_teacher, pictures
from rank_script import BATCH, COUNT, SEED
from torch.testing import assert_close
from torchvision.transforms.v2.functional import to_pil_image

from supermix_transforms import SuperMixCollate

TESTS = Path(__file__).parent
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def torchrun(case, folder):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launch, str(TESTS / "rank_script.py"), case, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_shards(folder):
    """Four shards of three samples."""
    images, labels = pictures(12, dtype=torch.uint8)
    for shard in range(4):
        with tarfile.open(folder / f"shard{shard}.tar", "w") as tar:
            for row in range(3 * shard, 3 * shard + 3):
                png = io.BytesIO()
                to_pil_image(images[row]).save(png, "png")
                for suffix, data in (("cls", str(labels[row].item()).encode()), ("png", None)):
                    data = data or png.getvalue()
                    member = tarfile.TarInfo(f"key{row}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What either rank saw, from one launch for all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    write_shards(folder)
    process = torchrun("train", folder)
    assert process.returncode == 0, process.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_ranks_take_turns_in_one_order_of_the_samples(ranks):
    keys = [[batch["keys"] for batch in rank["batches"]] for rank in ranks]
    assert [len(batches) for batches in keys] == [3, 3]
    turns = [batch for pair in zip(*keys, strict=True) for batch in pair]
    order = [key for batch in turns for key in batch]
    assert order[:COUNT] == [f"key{i}" for i in range(COUNT)]
    assert len(order) == 24  # filled up with the first ones


def test_distinct_samples_draw_distinct_weights_on_the_two_ranks(ranks):
    drawn = {}
    for rank in ranks:
        for batch in rank["batches"]:
            for sources, weights in zip(batch["sources"], batch["weights"], strict=True):
                drawn[tuple(batch["keys"][source] for source in sources)] = tuple(weights)
    assert len(drawn) >= COUNT
    assert len(set(drawn.values())) == len(drawn)


def test_a_rank_draws_and_mixes_what_one_process_does_of_the_same_samples(ranks):
    dataset = Pictures(COUNT, mapping=True)
    collate = SuperMixCollate(colour_teacher(), seed=SEED)
    for rank in ranks:
        for seen in rank["batches"]:
            assert len(seen["keys"]) == BATCH
            batch = collate([dataset[int(key.removeprefix("key"))] for key in seen["keys"]])
            assert batch.labels.tolist() == seen["labels"]
            assert batch.sources.tolist() == seen["sources"]
            assert batch.weights.tolist() == seen["weights"]
            sums = batch.mixed.flatten(1).double().sum(dim=1)
            assert_close(torch.tensor(seen["mixed"], dtype=torch.float64), sums)
            assert_close(torch.tensor(seen["targets"]), batch.targets)


@pytest.mark.parametrize("output", ["concat", "batch"])
def test_students_of_both_ranks_stay_equal_and_sync_on_the_last_batch(ranks, output):
    first, second = (rank[output] for rank in ranks)
    assert first["synced"] == second["synced"] == [False, True, True]
    assert first["weights"] == second["weights"]
    assert first["gathered"] == second["gathered"] == COUNT
    # gradients differ while they accumulate, and are averaged at a sync
    assert first["grads"][0] != second["grads"][0]
    assert first["grads"][1:] == second["grads"][1:]


def test_one_loss_of_the_concatenated_form_trains_as_eq_9_does(ranks):
    """Twice the mean over originals and mixes is the sum of their two means."""
    one, other = ranks[0]["concat"], ranks[0]["batch"]
    assert_close(torch.tensor(one["grads"]), torch.tensor(other["grads"]))
    for weights, others in zip(one["weights"], other["weights"], strict=True):
        assert_close(torch.tensor(weights), torch.tensor(others))


def test_shards_split_by_node_reach_each_rank_once_and_are_mixed(ranks):
    keys = [[key for batch in rank["shards"] for key in batch["keys"]] for rank in ranks]
    assert [len(each) for each in keys] == [6, 6]
    assert sorted(keys[0] + keys[1]) == sorted(f"key{i}" for i in range(12))
    weights = [
        w for rank in ranks for batch in rank["shards"] for row in batch["weights"] for w in row
    ]
    assert len(set(weights)) == 24


def test_dispatch_mode_ends_both_ranks_with_the_cure(tmp_path):
    process = torchrun("dispatch", tmp_path)
    assert process.returncode != 0
    assert "RuntimeError: Accelerate's dispatch mode cannot carry a MixBatch" in process.stderr
    assert "dispatch_batches=False" in process.stderr
