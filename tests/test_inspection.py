"""A folder of mixes looked at."""

import json

import pytest
from colours import colour_teacher
from PIL import Image
from tars import write_colours
from test_generation import SMALL, VIEW

from supermix_transforms import ShardDataset, generate
from supermix_transforms.offline.inspection import inspect_mixes, replay_pictures
from supermix_transforms.offline.replaying import open_unit

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards and, in "recipes", their mixes."""
    folder = tmp_path_factory.mktemp("folder")
    write_colours(folder, COUNT)
    dataset = ShardDataset(folder, transform=VIEW)
    generate(dataset, colour_teacher(), folder / "recipes", **SMALL)
    return folder


def test_figures_are_those_of_the_recipes(folder):
    found = inspect_mixes(folder / "recipes", verify=True)
    assert (found.units, found.finished, found.mixes) == (3, 3, COUNT)
    assert sum(found.outcomes.values()) == COUNT
    assert found.outcomes["CONVERGED"] == found.converged
    units = sorted((folder / "recipes").glob("*.recipe"))
    readers = [open_unit(unit) for unit in units]
    steps = [step for r in readers for number in range(len(r)) for step in r.group(number).steps]
    assert len(steps) == COUNT
    assert found.steps == pytest.approx(sum(map(int, steps)) / COUNT)
    assert sum(found.bytes_by_field.values()) * COUNT == pytest.approx(found.bytes)
    quick = inspect_mixes(folder / "recipes")
    assert (quick.outcomes, quick.steps, quick.verified) == ({}, None, False)


def test_a_unit_with_another_count_than_entered_is_told(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder / "recipes", tmp_path / "recipes")
    manifest = copy / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"mixes": 10', '"mixes": 11', 1))
    (problem,) = inspect_mixes(copy).problems
    assert problem.endswith("expected 11 mixes, got 10")


def test_pictures_are_those_that_are_replayed(folder, tmp_path):
    summary = replay_pictures(folder / "recipes", ShardDataset(folder), tmp_path, count=6)
    assert summary.mixes == 6
    entries = json.loads((tmp_path / "labels.json").read_text())["mixes"]
    assert len(entries) == 6
    for entry in entries:
        with Image.open(tmp_path / entry["file"]) as picture:
            assert picture.size == (16, 16)
        assert len(entry["sources"]) == 2
        assert entry["sources"][0]["name"].startswith("colours-")
        seen = {each["class"] for each in entry["teacher"][:2]}
        if entry["outcome"] == "converged":
            assert seen == {source["class"] for source in entry["sources"]}
        assert sum(entry["weights"]) == pytest.approx(1, abs=1e-5)
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert min(sheet.size) > 300
    with pytest.raises(ValueError, match="count: expected at least 1"):
        replay_pictures(folder / "recipes", ShardDataset(folder), tmp_path, count=0)
