"""Recipes written and replayed by 1, 2 and 3 ranks under torchrun; generate_script.py is run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from colours import colour_teacher
from generate_script import BATCH, EPOCHS, RESUMED_AT, RESUMED_EPOCH
from tars import write_colours
from test_generation import COUNT, SMALL, VIEW, contents
from test_shard_ranks import TESTS, torchrun

from supermix_transforms import ShardDataset, generate, replay
from supermix_transforms.cli import main
from supermix_transforms.offline.inspection import inspect_mixes
from supermix_transforms.offline.ledger import Ledger

SCRIPT = TESTS / "generate_script.py"
UNITS = 15  # of `command`
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    write_colours(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """Recipes of one process without workers."""
    out = tmp_path_factory.mktemp("alone") / "out"
    torchrun(1, SCRIPT, "recipes", shards, out, 0)
    return out


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 2), (3, 0), (3, 2)])
def test_any_number_of_processes_writes_the_same_bytes(alone, shards, tmp_path, ranks, workers):
    out = tmp_path / "out"
    torchrun(ranks, SCRIPT, "recipes", shards, out, workers)
    assert contents(out) == contents(alone)
    assert inspect_mixes(out, verify=True).problems == ()


def test_any_number_of_processes_writes_the_same_mixed_shards(shards, tmp_path):
    for ranks in (1, 2, 3):
        torchrun(ranks, SCRIPT, "shards", shards, tmp_path / str(ranks), 0)
        assert inspect_mixes(tmp_path / str(ranks), verify=True).problems == ()
    one = contents(tmp_path / "1")
    assert len([name for name in one if name.endswith(".tar")]) == 6
    assert "_info.json" in one
    assert contents(tmp_path / "2") == one
    assert contents(tmp_path / "3") == one


def test_two_machines_with_one_folder_write_the_same_bytes(alone, shards, tmp_path):
    """Two launches of one process each, both of local rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    launch += ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    script = [str(SCRIPT), "recipes", str(shards), str(out), "0"]
    nodes = [
        subprocess.Popen(
            [*launch, "--node-rank", str(node), *script],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        errors = [node.communicate(timeout=240)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert contents(out) == contents(alone)
    # both were at work in that folder
    assert {path.name for path in out.glob(".manifest.?.lock")} == {
        ".manifest.0.lock",
        ".manifest.1.lock",
    }


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, alone, shards, tmp_path_factory):
    """What each rank replayed: [{"0": without workers, "2": with two}]."""
    facts = tmp_path_factory.mktemp("facts") / "facts.json"
    torchrun(request.param, SCRIPT, "read", shards, alone, facts)
    return json.loads(facts.read_text())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_epoch_has_each_mix_once_but_for_accelerates_padding(ranks, workers, alone, shards):
    mixes = replay(alone, ShardDataset(shards))
    sums = {mix.number: int(mix.mixed.long().sum()) for mix in map(mixes.__getitem__, range(44))}
    orders = []
    for epoch in range(EPOCHS):
        parts = [rank[workers]["epochs"][epoch] for rank in ranks]
        assert len({len(part) for part in parts}) == 1
        turns = [batch for turn in zip(*parts, strict=True) for batch in turn]
        order = [index for indices, _ in turns for index in indices]
        assert sorted(order[: len(sums)]) == sorted(sums)
        assert order[len(sums) :] == order[: len(order) - len(sums)]
        assert len(order) < len(sums) + BATCH * len(ranks)
        for indices, found in turns:
            assert found == [sums[index] for index in indices]  # the same pixels everywhere
        orders.append(order)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_resumed_epoch_goes_on_with_the_next_batch(ranks, workers):
    for rank in ranks:
        whole = rank[workers]["epochs"][RESUMED_EPOCH]
        assert len(whole) > RESUMED_AT
        assert rank[workers]["resumed"] == whole[RESUMED_AT:]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def command(folder: Path, out: Path) -> list[str]:
    words = [sys.executable, "-m", "supermix_transforms.cli", "generate", "--shards", str(folder)]
    words += ["--teacher", f"{TESTS / 'colours.py'}:Stubborn", "--out", str(out), "--size", "16"]
    words += ["--view", "random-crop", "--batch-size", "5", "--unit-batches", "1"]
    return [*words, "--passes", "3", "--device", "cpu"]


@pytest.mark.usefixtures("one_thread")
def test_sigterm_ends_cleanly_and_the_next_run_goes_on(shards, tmp_path):
    out = tmp_path / "out"
    # most mixes do not converge, so that each unit takes its time
    words = [*command(shards, out), "--num-workers", "2"]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(Ledger(out).entries() if out.exists() else ()) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "supermix: terminated; what is finished stays, start again to go on\n"
    entries = Ledger(out).entries()
    assert 2 <= len(entries) < UNITS
    found = inspect_mixes(out, verify=True)
    assert found.problems == (
        f"{len(entries)} of {UNITS} units are there: start generate again to go on",
    )
    kept = contents(out)
    assert main(command(shards, out)[3:]) == 0
    assert main(command(shards, tmp_path / "whole")[3:]) == 0
    assert inspect_mixes(out, verify=True).problems == ()
    assert kept.items() < contents(out).items()  # none of these was made again, nor left behind
    assert contents(out) == contents(tmp_path / "whole")


def test_a_second_run_in_the_same_folder_is_refused(shards, tmp_path):
    dataset = ShardDataset(shards, transform=VIEW)
    ledger = Ledger(tmp_path)
    generate(dataset, colour_teacher(), tmp_path, **SMALL)
    with (
        ledger.writing(ledger.settings(), {}, 0),
        pytest.raises(ValueError, match="another run is at work"),
    ):
        generate(dataset, colour_teacher(), tmp_path, **SMALL)
