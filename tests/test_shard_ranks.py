"""Shards read by 1, 2 and 3 ranks under torchrun; shard_script.py is run and judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colours import NUM_CLASSES
from shard_script import BATCH, RESUMED_AT, RESUMED_EPOCH
from tars import picture, write_tar

TESTS = Path(__file__).parent
LENGTHS = [4, 7, 3, 6, 2]
COUNT = sum(LENGTHS)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def write(folder: Path) -> None:
    number = 0
    for i, length in enumerate(LENGTHS):
        members = []
        for _ in range(length):
            label = str(number % NUM_CLASSES).encode()
            members += [(f"{number}.png", picture(11 * number)), (f"{number}.cls", label)]
            number += 1
        write_tar(folder / f"part-{i}.tar", members)


def torchrun(ranks: int, *arguments: object) -> str:
    """What the ranks print."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.run(
        [*launch, f"--nproc-per-node={ranks}", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, tmp_path_factory):
    """What each of some ranks saw: [{"0": without workers, "2": with two}]."""
    folder = tmp_path_factory.mktemp("ranks")
    write(folder)
    torchrun(request.param, TESTS / "shard_script.py", folder)
    return [json.loads((folder / f"rank{i}.json").read_text()) for i in range(request.param)]


def shades(batches) -> list[int]:
    return [shade for batch in batches for shade in batch["shades"]]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_evaluation_sees_each_sample_once(ranks, workers):
    expected = [[11 * number, number % NUM_CLASSES] for number in range(COUNT)]
    for rank in ranks:
        assert rank[workers]["evaluated"] == expected


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_epoch_has_all_samples_and_only_accelerates_own_padding(ranks, workers):
    for epoch in range(2):
        parts = [rank[workers]["epochs"][epoch] for rank in ranks]
        assert len({len(part) for part in parts}) == 1  # as many batches on each rank
        turns = [batch for turn in zip(*parts, strict=True) for batch in turn]
        order = shades(turns)
        assert sorted(order[:COUNT]) == [11 * number for number in range(COUNT)]
        assert order[COUNT:] == order[: len(order) - COUNT]  # filled up with the first ones
        padded = -(-COUNT // (BATCH * len(ranks))) * BATCH * len(ranks)
        assert len(order) == (COUNT if len(ranks) == 1 else padded)
        for batch in turns:
            assert batch["labels"] == [shade // 11 % NUM_CLASSES for shade in batch["shades"]]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_order_changes_with_the_epoch(ranks, workers):
    first, second = ranks[0][workers]["epochs"]
    assert shades(first) != shades(second)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_resumed_epoch_goes_on_with_the_next_batch_and_the_same_draws(ranks, workers):
    for rank in ranks:
        whole = rank[workers]["epochs"][RESUMED_EPOCH]
        assert len(whole) > RESUMED_AT
        assert rank[workers]["resumed"] == whole[RESUMED_AT:]


def test_workers_change_nothing(ranks):
    for rank in ranks:
        assert rank["0"] == rank["2"]
