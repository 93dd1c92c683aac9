"""Online mixing and training under torchrun, whole and killed; train_script.py is judged here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tars import write_colours
from test_shard_ranks import TESTS, launch, torchrun
from train_script import BATCH, EPOCHS

SCRIPT = TESTS / "train_script.py"
RANKS, COUNT = 2, 22
EACH = -(-COUNT // (BATCH * RANKS))  # batches of a rank in an epoch
KILLED_AT = EACH + 2
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def seen(out: Path) -> list[list[list[float]]]:
    """Of each rank and step, the pictures that the student was shown: originals, then mixes."""
    logs = [out / f"seen{rank}.jsonl" for rank in range(RANKS)]
    return [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]


def step_of(out: Path) -> int:
    with safe_open(out / "last.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["progress"])["step"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a whole run, and of one that is killed and started again."""
    folder = tmp_path_factory.mktemp("train")
    write_colours(folder, COUNT)
    torchrun(RANKS, SCRIPT, folder, folder / "whole", 0)
    killed = launch(RANKS, SCRIPT, folder, folder / "killed", 2, KILLED_AT)
    assert "Signal 9 (SIGKILL)" in killed.stderr
    before, step = seen(folder / "killed"), step_of(folder / "killed")
    torchrun(RANKS, SCRIPT, folder, folder / "killed", 2)
    return folder / "whole", folder / "killed", before, step


def test_ranks_train_on_all_pictures_and_only_accelerates_own_padding(runs):
    ranks = seen(runs[0])
    assert [len(rank) for rank in ranks] == [EPOCHS * EACH] * RANKS
    orders = []
    for epoch in range(EPOCHS):
        steps = range(epoch * EACH, (epoch + 1) * EACH)
        order = [row for step in steps for rank in ranks for row in rank[step][:BATCH]]
        assert len(set(order)) == COUNT
        assert order[COUNT:] == order[: len(order) - COUNT]
        orders.append(order)
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1])


def test_mixes_are_new_in_each_epoch_and_on_each_rank(runs):
    mixes = [[row for step in rank for row in step[BATCH:]] for rank in seen(runs[0])]
    every = [row for rank in mixes for row in rank]
    assert len(every) == RANKS * EPOCHS * EACH * BATCH
    assert len(set(every)) == len(every)


def test_a_run_goes_on_with_the_very_next_batch_and_the_same_draws(runs):
    whole, killed, before, step = runs
    assert KILLED_AT - 1 <= step <= KILLED_AT  # the last checkpoint may not have been written
    assert EACH < step < EPOCHS * EACH  # in mid-epoch
    for rank in range(RANKS):
        count = len(before[rank])
        assert before[rank] == seen(whole)[rank][:count]
        assert seen(killed)[rank][count:] == seen(whole)[rank][step:]


def test_it_ends_with_equal_weights_and_figures(runs):
    one, two = (load_file(out / "last.safetensors") for out in runs[:2])
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    histories = [(out / "history.json").read_text() for out in runs[:2]]
    assert histories[0] == histories[1]
    assert all("top1" in entry for entry in json.loads(histories[0]))
