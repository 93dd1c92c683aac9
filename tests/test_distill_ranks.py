"""Training and judging on two ranks, and training after a SIGKILL, by scripts beside this file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from colours import colour_teacher
from safetensors import safe_open
from safetensors.torch import load_file
from tars import write_colours
from test_shard_ranks import TESTS, torchrun
from torchvision.transforms import v2

from supermix_transforms import ShardDataset, SolverSettings, generate

SCRIPT = TESTS / "distill_script.py"
COUNT, EPOCHS = 32, 4
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards, and recipes of them without augmentation."""
    folder = tmp_path_factory.mktemp("colours")
    write_colours(folder, COUNT)
    dataset = ShardDataset(folder, transform=v2.CenterCrop(16))
    settings = SolverSettings(mask_size=4)
    generate(dataset, colour_teacher(), folder / "recipes", batch_size=8, settings=settings)
    return folder, folder / "recipes"


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((out / "history.json").read_text())]


def test_two_ranks_of_half_the_batch_have_the_same_curve(data, tmp_path):
    torchrun(1, SCRIPT, *data, tmp_path / "one", 8, EPOCHS)
    torchrun(2, SCRIPT, *data, tmp_path / "two", 4, EPOCHS)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == EPOCHS
    assert one[-1] < one[0]
    assert one == pytest.approx(two, abs=1e-4)
    weights = [load_file(tmp_path / name / "last.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-4), name
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two")]
    assert results[0]["student_samples"] == results[1]["student_samples"] == EPOCHS * 2 * COUNT


def test_all_ranks_judge_the_network_that_is_saved(tmp_path):
    torchrun(2, TESTS / "evaluate_script.py", tmp_path)
    one, two = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert one == two
    assert one["mean"] == 0  # the first rank's


def test_a_run_that_is_killed_in_mid_epoch_ends_with_the_same_weights(data, tmp_path):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(SCRIPT), *map(str, data)]
    subprocess.run([*command, str(tmp_path / "whole"), "8", str(EPOCHS)], env=env, check=True)
    last = tmp_path / "killed" / "last.safetensors"
    for place in (2, 5, 11):  # steps; an epoch has four
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed"), "8", str(EPOCHS), "0.3"], env=env
        )
        deadline = time.monotonic() + 120
        while step_of(last) < place:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed"), "8", str(EPOCHS)], env=env, check=True)
    one, two = load_file(tmp_path / "whole" / "last.safetensors"), load_file(last)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def step_of(checkpoint: Path) -> int:
    if not checkpoint.exists():
        return 0
    with safe_open(checkpoint, framework="pt") as file:
        return json.loads(file.metadata()["progress"])["step"]
