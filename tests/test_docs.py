"""What is written is run: the examples in docstrings."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[1] / "supermix_transforms"
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
