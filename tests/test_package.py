"""The package as a whole: light to import, documented, one version."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import supermix_transforms

ROOT = Path(__file__).parents[1]
HEAVY = {
    "accelerate",
    "efficientnet_lite_pytorch",
    "matplotlib",
    "pytorchcv",
    "rich",
    "safetensors",
    "scipy",
    "skimage",
    "timm",
    "webdataset",
}


def loaded_by(statement: str) -> set[str]:
    """Those of HEAVY that a statement loads in a fresh process."""
    code = f"import sys; {statement}; print(*({HEAVY!r} & set(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


@pytest.mark.parametrize("module", ["supermix_transforms", "supermix_transforms.models"])
def test_import_loads_torch_and_torchvision_only(module):
    assert loaded_by(f"import {module}") == set()


def test_the_probe_sees_a_heavy_import():
    assert "rich" in loaded_by("import rich")


def public() -> list[tuple[str, object]]:
    names = supermix_transforms.__all__
    return [(name, getattr(supermix_transforms, name)) for name in names]


def test_public_names_are_there_once():
    names = supermix_transforms.__all__
    assert len(names) == len(set(names))
    assert {"SuperMix", "SuperMixCollate", "MixLoader", "TeacherLabeler"} <= set(names)


@pytest.mark.parametrize(("name", "value"), public())
def test_public_names_have_docstrings(name, value):
    assert inspect.isclass(value) or inspect.isroutine(value)  # a bare value cannot say what it is
    text = value.__doc__ if inspect.isroutine(value) else vars(value).get("__doc__")
    assert text
    assert text.strip()
    # What dataclass and NamedTuple write by themselves is the signature.
    assert not text.startswith(f"{name}(")


def test_version_is_that_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    versions = re.findall(r'^version = "(.+)"$', text, re.MULTILINE)
    assert versions == [supermix_transforms.__version__]


def test_package_says_that_it_is_typed():
    assert (Path(supermix_transforms.__file__).parent / "py.typed").is_file()
