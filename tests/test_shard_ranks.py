"""Shards read by 1, 2 and 3 ranks under torchrun; shard_script.py is run and judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colours import NUM_CLASSES, colour_teacher
from shard_script import BATCH, RESUMED_AT, RESUMED_EPOCH, judged
from tars import picture, write_tar
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

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


def launch(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, f"--nproc-per-node={ranks}", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )


def torchrun(ranks: int, *arguments: object) -> str:
    """What the ranks print."""
    process = launch(ranks, *arguments)
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
def test_the_figures_of_an_evaluation_are_those_of_one_process(ranks, workers):
    shade = 11.0 * torch.arange(COUNT)
    colours = torch.stack([shade, 255 - shade, torch.full((COUNT,), 7.0)], dim=1) / 255
    probs = judged()(colours[:, :, None, None]).detach().softmax(dim=1)
    labels = torch.arange(COUNT) % NUM_CLASSES
    seen = colour_teacher()(colours[:, :, None, None]).argmax(dim=1)
    expected = {
        "top1": multiclass_accuracy(probs, labels, NUM_CLASSES, average="micro"),
        "top5": 1.0,
        "ece": multiclass_calibration_error(probs, labels, NUM_CLASSES),
        "agreement": multiclass_accuracy(probs, seen, NUM_CLASSES, average="micro"),
    }
    assert 0 < expected["top1"] < expected["agreement"] < 1
    for rank in ranks:
        found = rank[workers]["metrics"]
        assert found == pytest.approx({name: float(value) for name, value in expected.items()})


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
