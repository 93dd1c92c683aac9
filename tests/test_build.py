"""What a release holds, built as an installer builds it, and tried away from the tree."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from supermix_transforms import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = {
    f"supermix_transforms/{path.relative_to(ROOT / 'supermix_transforms').as_posix()}"
    for path in (ROOT / "supermix_transforms").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def build(kind: str, tree: Path, out: Path) -> Path:
    """A wheel or an sdist, by the build backend that pyproject.toml names."""
    code = f"import sys, hatchling.build as b; print(b.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, as where there is no wheel to download."""
    tree = tmp_path_factory.mktemp("tree")
    with tarfile.open(sdist) as tar:
        tar.extractall(tree, filter="data")
    (unpacked,) = tree.iterdir()
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def test_the_sdist_holds_the_package_and_what_describes_it(sdist):
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    about = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert names == PACKAGE | about


def test_the_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = f"supermix_transforms-{__version__}.dist-info"
    assert {name for name in names if not name.startswith(f"{about}/")} == PACKAGE
    assert {"supermix_transforms/py.typed", f"{about}/entry_points.txt"} <= names
    assert f"{about}/licenses/LICENSE" in names


def test_the_wheel_works_away_from_the_tree(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(tmp_path / "site"), str(wheel)], check=True)
    code = """if True:
        import supermix_transforms, supermix_transforms.cli
        from supermix_transforms.data.policies import FILES, load_policy
        print(supermix_transforms.__file__, load_policy(FILES[0], epochs=1) is not None)
    """
    away = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=away, capture_output=True, text=True)
    assert done.stdout.split() == [
        str(tmp_path / "site" / "supermix_transforms" / "__init__.py"),
        "True",
    ], done.stderr
