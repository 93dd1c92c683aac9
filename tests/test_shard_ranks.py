"""Shards read by 1, 2 and 3 ranks under torchrun; shard_script.py is run and judged here."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colours import NUM_CLASSES, colour_teacher
from shard_script import (
    BATCH,
    CASES,
    OTHER_BATCH,
    RESUMED_AT,
    RESUMED_EPOCH,
    SEED,
    facts,
    judged,
)
from tars import picture, write_tar
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)
from torchvision.transforms import v2

from supermix_transforms import ShardDataset, SuperMixCollate

TESTS = Path(__file__).parent
LENGTHS = [4, 7, 3, 6, 2]
COUNT = sum(LENGTHS)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
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


# -- other settings of Accelerate and of the loader -----------------------------------------------


def turns(ranks, case, epoch) -> list[dict]:
    """Batches in the order in which the ranks take turns."""
    parts = [rank[case][epoch] for rank in ranks]
    return [batch for turn in itertools.zip_longest(*parts) for batch in turn if batch]


@pytest.mark.parametrize("epoch", range(2))
@pytest.mark.parametrize("case", CASES)
def test_any_setting_hands_out_all_samples_and_only_accelerates_own_padding(ranks, case, epoch):
    order = shades(turns(ranks, case, epoch))
    assert sorted(order[:COUNT]) == [11 * number for number in range(COUNT)]
    assert order[COUNT:] == order[: len(order) - COUNT]
    if case == "uneven":
        assert len(order) == COUNT
    else:
        assert len({len(rank[case][epoch]) for rank in ranks}) == 1
        assert len({len(shades(rank[case][epoch])) for rank in ranks}) == 1
        assert len(order) - COUNT < OTHER_BATCH * len(ranks)


@pytest.mark.parametrize("case", CASES)
def test_any_setting_has_another_order_in_each_epoch(ranks, case):
    assert shades(turns(ranks, case, 0)) != shades(turns(ranks, case, 1))


@pytest.mark.parametrize("case", CASES)
def test_under_any_setting_a_batch_is_mixed_as_in_one_process(ranks, case, tmp_path):
    write(tmp_path)
    dataset = ShardDataset(tmp_path, transform=v2.ToImage())
    collate = SuperMixCollate(colour_teacher(), seed=SEED)
    collate.take_short()
    for epoch in range(2):
        collate.set_epoch(epoch)
        for seen in turns(ranks, case, epoch):
            batch = collate([dataset[int(shade) // 11] for shade in seen["shades"]])
            assert facts(batch) == seen
