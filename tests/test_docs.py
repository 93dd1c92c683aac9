"""What is written is run: the examples in docstrings, the blocks of README."""

import doctest
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from supermix_transforms.data.pictures import png

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "supermix_transforms"
README = (ROOT / "README.md").read_text(encoding="utf-8")
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def test_some_modules_have_examples():
    assert WITH_EXAMPLES


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_docstring_examples_print_what_they_say(name):
    module = importlib.import_module(name.removesuffix(".__init__"))
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch})
    assert tried > 0
    assert failed == 0


@pytest.mark.slow
def test_readme_blocks_run_one_after_the_other_as_they_stand(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    script = tmp_path / "pasted.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=400, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([4, 3, 224, 224]) torch.Size([4, 1000])" in done.stdout


def test_messages_of_the_troubleshooting_page_are_those_of_the_package():
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    source = re.sub(r'"\s*f?"', "", source)  # a message's lines in one
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r'^\*\*"(.+?)"\*\*$', page, re.MULTILINE)
    assert len(messages) >= 15
    for message in messages:
        if message.startswith("terminate called"):
            continue  # of C++
        for part in message.split("..."):
            assert part.strip() in source, message


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_a_page_run_one_after_the_other(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "pasted.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_readmes_line_trains_a_student_on_a_folder_of_photos(tmp_path, monkeypatch, capsys):
    from supermix_transforms.cli import main
    from supermix_transforms.demo import demo_pictures

    (line,) = re.findall(r"^    supermix (distill --images photos/.*)$", README, re.MULTILINE)
    (tmp_path / "photos").mkdir()
    photos = demo_pictures()
    for name, picture in photos:
        (tmp_path / "photos" / f"{Path(name).stem}.png").write_bytes(png(picture))
    monkeypatch.chdir(tmp_path)
    assert main([*line.split(), "--json"]) == 0
    captured = capsys.readouterr()
    assert "epoch 5 of 5: loss " in captured.err
    found = json.loads(captured.out)
    assert found["student_samples"] == 5 * 2 * (len(photos) - 1)  # one is held out
    history = json.loads(Path("run/history.json").read_text())
    assert history[-1]["loss"] < history[0]["loss"]
    assert {path.name for path in Path("run").iterdir()} >= {"curve.png", "best.safetensors"}
