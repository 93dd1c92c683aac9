"""Generation survives SIGKILL wherever it strikes: nothing lost, little done twice."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from crash_script import STEPS
from tars import write_colours
from test_generation import contents

from supermix_transforms.offline.inspection import inspect_mixes
from supermix_transforms.offline.ledger import Ledger

TESTS = Path(__file__).parent
KILLS = 50


@pytest.mark.slow
def test_fifty_kills_on_cifar_change_no_byte_and_cost_a_unit_each(data, tmp_path):
    shards = tmp_path / "cifar10"
    unpack = [sys.executable, data / "unpack.py", "cifar10", shards, "--format", "shards"]
    subprocess.run([*unpack, "--split", "test"], check=True, capture_output=True, timeout=60)
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    script = [sys.executable, TESTS / "kill_script.py", data, shards, tmp_path, KILLS]
    subprocess.run(
        list(map(str, script)),
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=600,
    )
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    verified = inspect_mixes(tmp_path / "killed", verify=True)
    assert verified.problems == ()
    assert verified.mixes == 1000

    facts = json.loads((tmp_path / "facts.json").read_text())
    assert [fact["codes"] for fact in facts] == [[signal.SIGKILL] * 2] * KILLS + [[0, 0]]
    later = [fact["entered"] for fact in facts[1:]] + [
        sorted(Ledger(tmp_path / "killed").entries())
    ]
    for fact, entered in zip(facts, later, strict=True):
        assert set(fact["entered"]) <= set(entered)  # what is entered stays
        for begun in fact["begun"]:
            assert not set(begun) & set(fact["entered"])  # and is not made again
            assert len(set(begun) - set(entered)) <= 1  # the one that was killed
    begun = sum(len(part) for fact in facts for part in fact["begun"])
    assert begun <= verified.units + 2 * KILLS


@pytest.mark.parametrize("form", ["recipes", pytest.param("shards", marks=pytest.mark.slow)])
def test_a_kill_at_any_step_of_writing_leaves_a_folder_to_go_on_with(tmp_path, form):
    """Killed before the n-th sync or rename: of the settings, a unit, its entry, ..."""
    write_colours(tmp_path)
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, str(TESTS / "crash_script.py"), form, str(tmp_path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        timeout=120,
    )
    codes = json.loads((tmp_path / "codes.json").read_text())
    assert codes == {
        f"{call}-{number}": signal.SIGKILL
        for call, steps in STEPS[form].items()
        for number in range(1, steps + 1)
    }
    for name in codes:
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
        assert inspect_mixes(tmp_path / name, verify=True).problems == ()
