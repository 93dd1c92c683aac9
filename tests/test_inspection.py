"""A folder of mixes looked at."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import pytest
from colours import colour_teacher
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tars import write_colours
from test_generation import SMALL, VIEW

from supermix_transforms import ShardDataset, generate, replay
from supermix_transforms.cli import main
from supermix_transforms.files import sha256_of
from supermix_transforms.offline.inspection import inspect_mixes, replay_pictures
from supermix_transforms.offline.ledger import Ledger
from supermix_transforms.offline.reading import open_unit

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 22
FORMS = ("recipes", "shards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures and, in "recipes" and "shards", their mixes."""
    folder = tmp_path_factory.mktemp("folder")
    write_colours(folder, COUNT)
    dataset = ShardDataset(folder, transform=VIEW)
    for form in FORMS:
        generate(dataset, colour_teacher(), folder / form, **SMALL, form=form)
    return folder


@pytest.fixture(params=FORMS)
def copy(request, folder, tmp_path):
    """Mixes that a test may change."""
    return shutil.copytree(folder / request.param, tmp_path / request.param)


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


def test_figures_of_mixed_shards_are_those_of_the_recipes(folder):
    recipes, shards = (inspect_mixes(folder / form, verify=True) for form in FORMS)
    for name in ("units", "finished", "mixes", "converged", "outcomes", "steps"):
        assert getattr(shards, name) == getattr(recipes, name), name
    assert shards.bytes_by_field == {}


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


# -- what is wrong ---------------------------------------------------------------------------------


def found(folder) -> tuple[str, ...]:
    return inspect_mixes(folder, verify=True).problems


def enter(folder, place: int = 0, **values) -> None:
    """Change a line of the manifest, as if it had been written so."""
    manifest = folder / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[place] |= values
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))


def begin_with(folder, **values) -> None:
    """Change the settings, as if the folder had been begun with them."""
    path = folder / "settings.json"
    content = json.loads(path.read_text())
    content["settings"] |= values
    path.write_text(json.dumps(content, indent=1) + "\n")
    for place in range(len(Ledger(folder).entries())):
        enter(folder, place, settings=sha256_of(path))


def test_nothing_is_wrong_with_what_was_written(copy):
    assert found(copy) == ()
    enter(copy)
    begin_with(copy)
    (copy / "report.html").write_text("")  # of supermix report
    if copy.name == "shards":
        ShardDataset(copy)  # writes indices
    assert found(copy) == ()


def test_another_count_than_entered_is_told(copy):
    enter(copy, mixes=11)
    counted, settled, *listed = found(copy)
    assert counted.split(": ")[1].startswith("expected 11 ")
    assert counted.endswith(" got 10")
    assert settled.endswith("expected at most 10 mixes, got 11")
    assert len(listed) == (copy.name == "shards")  # in _info.json


def test_another_count_of_converged_mixes_than_entered_is_told(copy):
    entered = next(iter(Ledger(copy).entries().values()))
    enter(copy, converged=entered.converged - 1)
    (problem,) = found(copy)
    assert problem == (
        f"{entered.file}: expected {entered.converged - 1} converged mixes, got {entered.converged}"
    )
    assert inspect_mixes(copy).problems == ()


def test_settings_that_units_were_not_made_with_are_told(copy):
    path = copy / "settings.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    *units, problem = found(copy)
    assert problem == "settings.json is not the file that 3 of 3 units were made with"
    assert len(units) == (3 if copy.name == "recipes" else 0)
    for each in units:
        assert each.endswith("it was made with other settings than settings.json has")


def test_versions_that_units_were_not_made_with_are_told(copy):
    path = copy / "settings.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "9'))
    assert found(copy) == ("settings.json is not the file that 3 of 3 units were made with",)


def test_units_of_other_settings_are_told(folder, tmp_path):
    """A unit of another folder, entered here."""
    dataset = ShardDataset(folder, transform=VIEW)
    generate(dataset, colour_teacher(), tmp_path / "other", **SMALL, seed=1)
    copy = shutil.copytree(folder / "recipes", tmp_path / "recipes")
    shutil.copy2(tmp_path / "other" / "000-000000.recipe", copy)
    other = vars(Ledger(tmp_path / "other").entries()["000-000000"])
    enter(copy, **{**other, "settings": sha256_of(copy / "settings.json")})
    assert found(copy) == (
        "000-000000.recipe: it was made with other settings than settings.json has",
    )


def test_units_that_the_settings_do_not_have_are_told(copy):
    suffix = {"recipes": "recipe", "shards": "tar"}[copy.name]
    for place, unit in enumerate(["001-000000", "000-000003", "000-1000000"]):
        old = json.loads((copy / "manifest.jsonl").read_text().splitlines()[place])["file"]
        (copy / old).rename(copy / f"{unit}.{suffix}")
        enter(copy, place, unit=unit, file=f"{unit}.{suffix}")
    assert sum("1 passes of 3 units, got another unit" in problem for problem in found(copy)) == 3


def test_more_mixes_than_the_settings_allow_are_told(folder, tmp_path):
    copy = shutil.copytree(folder / "recipes", tmp_path / "recipes")
    shutil.copy2(copy / "000-000000.recipe", copy / "000-000002.recipe")
    lines = (json.loads(line) for line in (copy / "manifest.jsonl").read_text().splitlines())
    first = next(line for line in lines if line["unit"] == "000-000000")
    enter(copy, 2, **{**first, "unit": "000-000002", "file": "000-000002.recipe"})
    assert found(copy) == ("000-000002.recipe: expected at most 2 mixes, got 10",)


@pytest.mark.parametrize(
    "change",
    [
        {"units": 4},
        {"units": "3"},
        {"passes": 0},
        {"batch_size": 5.0},
        {"unit_batches": 1 << 60},
        {"form": "tars"},
        {"form": []},
        {"shards": None},
        {"shards": [{"name": "a"}]},
        {"shards": [{"name": "a", "samples": "5"}]},
        {"shards": []},
    ],
)
def test_settings_that_no_mixes_can_have_are_an_error(folder, tmp_path, change):
    copy = shutil.copytree(folder / "recipes", tmp_path / "recipes")
    begin_with(copy, **change)
    with pytest.raises(ValueError, match="expected settings that `supermix generate` wrote"):
        inspect_mixes(copy)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (".000-000000.recipe.0123abcd", "is being written, or was left by a process"),
        (".settings.json.0123abcd", "is being written, or was left by a process"),
        ("000-000007.recipe", "is not in the manifest"),
        ("000-000007.tar", "is not in the manifest"),
        ("000-000000.recipe.orig", "is none of the files that generate writes"),
        ("notes.txt", "is none of the files that generate writes"),
        (".hidden", "is none of the files that generate writes"),
    ],
)
def test_files_that_do_not_belong_there_are_told(copy, name, what):
    (copy / name).write_text("")
    (problem,) = found(copy)
    assert problem.startswith(f"{name!r} {what}")
    assert inspect_mixes(copy).problems == ()


def test_a_list_of_shards_belongs_to_shards_only(folder, tmp_path):
    copy = shutil.copytree(folder / "recipes", tmp_path / "recipes")
    shutil.copy2(folder / "shards" / "_info.json", copy)
    (problem,) = found(copy)
    assert problem.startswith("'_info.json' is none of the files")


def test_a_list_of_other_shards_is_told(folder, tmp_path):
    copy = shutil.copytree(folder / "shards", tmp_path / "shards")
    info = copy / "_info.json"
    info.write_text(info.read_text().replace('"num_samples": 22', '"num_samples": 23'))
    (problem,) = found(copy)
    assert problem.startswith("_info.json does not list the shards that are there")
    info.unlink()
    assert found(copy) == ()


def test_what_is_told_is_mended_by_generating_again(copy, folder):
    (copy / ".000-000001.recipe.0f").write_text("begun")
    unit = next(copy.glob("000-000001.*"))
    unit.write_bytes(unit.read_bytes()[:-1])
    problems = 3  # a unit is missing, one is not as it was entered, one was begun
    if copy.name == "shards":
        (copy / "._info.json.0f").write_text("begun")
        (copy / "_info.json").write_text("{}")
        problems = 5
    assert len(found(copy)) == problems
    dataset = ShardDataset(folder, transform=VIEW)
    generate(dataset, colour_teacher(), copy, **SMALL, form=copy.name)
    assert found(copy) == ()


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_manifest_whose_end_is_lost_is_told(copy, lines):
    manifest = copy / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(True)[:-lines]))
    problem, *files = found(copy)
    assert problem.startswith(f"{3 - lines} of 3 units are there")
    assert len([each for each in files if "is not in the manifest" in each]) == lines


# Any change of settings.json or manifest.jsonl is told, or is an error that names the file.
files = st.sampled_from(["settings.json", "manifest.jsonl"])
forms = st.sampled_from(FORMS)


@pytest.fixture(scope="module")
def changing(folder, tmp_path_factory):
    """Mixes that are changed and mended again and again."""
    path = tmp_path_factory.mktemp("changing")
    return {form: shutil.copytree(folder / form, path / form) for form in FORMS}


def said(function, *arguments) -> list[str]:
    """Problems that are found, or the message of a ValueError."""
    try:
        return list(getattr(function(*arguments), "problems", ()))
    except ValueError as error:
        return [f"error: {error}"]


def check_told(folder, pictures, name: str, content: bytes) -> None:
    path = folder / name
    before = path.read_bytes()
    settings = Ledger(folder).settings()
    path.write_bytes(content)
    try:
        first, *_ = said(partial(inspect_mixes, verify=True), folder)
        refused = first.startswith("error: ")
        assert not refused or ("expected" in first and str(folder) in first)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
            assert main(["inspect", str(folder), "--verify"]) == (2 if refused else 1)
        assert ("supermix: error: recipes: expected" in errors.getvalue()) == refused
        others = said(Ledger(folder).compare, settings)  # as generate does, to go on
        if folder.name == "recipes":
            others += said(replay, folder, ShardDataset(pictures))
        assert all("expected" in message for message in others)
    finally:
        path.write_bytes(before)


@given(name=files, form=forms, data=st.data())
def test_any_byte_changed_is_told(changing, folder, name, form, data):
    content = bytearray((changing[form] / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    check_told(changing[form], folder, name, bytes(content))


@given(name=files, form=forms, data=st.data())
def test_any_cut_is_told(changing, folder, name, form, data):
    content = (changing[form] / name).read_bytes()
    first = data.draw(st.integers(0, len(content) - 1))
    last = data.draw(st.one_of(st.just(len(content)), st.integers(first + 1, len(content))))
    check_told(changing[form], folder, name, content[:first] + content[last:])
