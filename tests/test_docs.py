"""What is written is run: the examples in docstrings, the blocks of README."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "supermix_transforms"
WITH_EXAMPLES = sorted(
    path.stem for path in PACKAGE.glob("*.py") if ">>>" in path.read_text(encoding="utf-8")
)


def test_some_modules_have_examples():
    assert WITH_EXAMPLES


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples_print_what_they_say(name):
    module = importlib.import_module(f"supermix_transforms.{name}".removesuffix(".__init__"))
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert tried > 0
    assert failed == 0


@pytest.mark.slow
def test_readme_blocks_run_one_after_the_other_as_they_stand(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    script = tmp_path / "pasted.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=400, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([4, 3, 224, 224]) torch.Size([4, 1000])" in done.stdout
