"""The folder of mixes: what is entered, what is not, and who may write."""

import json

import pytest

from supermix_transforms.offline.ledger import Ledger, UnitEntry, fingerprint

LONG = "000-" + 300 * "0"  # more than a file's name can have
SETTINGS = {"k": 2, "shards": [{"name": "a.tar"}]}


def entry(folder, name: str, content: bytes = b"content") -> UnitEntry:
    (folder / name).write_bytes(content)
    return UnitEntry(name.split(".")[0], name, 5, 4, len(content), "0" * 64)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "out")


def begin(ledger: Ledger, settings=SETTINGS) -> None:
    with ledger.writing(settings, {"torch": "1"}, 0):
        pass


def test_entries_are_read_back(ledger):
    with ledger.writing(SETTINGS, {"torch": "1"}, 0):
        first = entry(ledger.folder, "000-000000.recipe")
        second = entry(ledger.folder, "000-000001.recipe")
        ledger.enter(first)
        ledger.enter(second)
    assert Ledger(ledger.folder).entries() == {first.unit: first, second.unit: second}
    assert ledger.settings() == SETTINGS
    assert ledger.versions() == {"torch": "1"}


def test_a_line_that_was_cut_is_overwritten(ledger):
    begin(ledger)
    first, second = (entry(ledger.folder, f"000-00000{i}.recipe") for i in range(2))
    ledger.enter(first)
    manifest = ledger.folder / "manifest.jsonl"
    with manifest.open("ab") as file:
        file.write(b'{"unit": "000-0000')
    assert list(ledger.entries()) == [first.unit]
    ledger.enter(second)
    assert list(ledger.entries()) == [first.unit, second.unit]
    assert len(manifest.read_text().splitlines()) == 2


def test_of_two_lines_of_a_unit_the_last_one_holds(ledger):
    begin(ledger)
    first = entry(ledger.folder, "000-000000.recipe", b"long ago")
    second = entry(ledger.folder, "000-000000.recipe")
    ledger.enter(first)
    assert ledger.entries() == {}  # another size is there
    ledger.enter(second)
    assert ledger.entries() == {second.unit: second}


def test_a_unit_whose_file_is_gone_or_short_is_not_finished(ledger):
    begin(ledger)
    first, second = (entry(ledger.folder, f"000-00000{i}.recipe") for i in range(2))
    ledger.enter(first)
    ledger.enter(second)
    ledger.path(first).unlink()
    ledger.path(second).write_bytes(b"con")
    assert ledger.entries() == {}


@pytest.mark.parametrize(
    "line", ["nonsense", "{}", "[1]", '{"unit": "a", "file": "../b", "mixes": 1}', "[" * 9999]
)
def test_a_line_that_is_none_is_an_error(ledger, line):
    begin(ledger)
    (ledger.folder / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="expected a unit in each line"):
        ledger.entries()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../000-000000.recipe"}, "is no name of a unit's file"),
        ({"file": "/000-000000.recipe"}, "is no name of a unit's file"),
        ({"file": "000-000001.recipe"}, "is no name of a unit's file"),
        ({"file": "000-000000.exe"}, "is no name of a unit's file"),
        ({"unit": "a", "file": "a.recipe"}, "is no name of a unit's file"),
        ({"unit": LONG, "file": f"{LONG}.recipe"}, "is no name of a unit's file"),
        ({"unit": ["000-000000"]}, "names that are no texts"),
        ({"file": 5}, "names that are no texts"),
        ({"settings": None}, "names that are no texts"),
        ({"sha256": "0"}, "what is no sha256"),
        ({"mixes": 5.0}, "counts that are no integers"),
        ({"converged": True}, "counts that are no integers"),
        ({"converged": 6}, "counts out of range"),
        ({"converged": -1}, "counts out of range"),
        ({"mixes": 10**400}, "counts out of range"),
        ({"bytes": -7}, "counts out of range"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_a_line_of_other_values_is_an_error(ledger, change, message):
    begin(ledger)
    right = vars(entry(ledger.folder, "000-000000.recipe"))
    manifest = ledger.folder / "manifest.jsonl"
    manifest.write_text(json.dumps(right) + "\n")
    assert len(ledger.entries()) == 1
    manifest.write_text(json.dumps({**right, **change}) + "\n")
    with pytest.raises(ValueError, match=message):
        ledger.entries()


def test_a_manifest_that_is_a_folder_is_an_error(ledger):
    begin(ledger)
    (ledger.folder / "manifest.jsonl").mkdir()
    with pytest.raises(ValueError, match="expected a file"):
        ledger.entries()


def test_other_settings_than_those_begun_with_are_named(ledger):
    begin(ledger)
    begin(ledger)  # the same
    with pytest.raises(ValueError, match=r"got others: k 2, now 3\. Use those"):
        begin(ledger, {**SETTINGS, "k": 3})
    with pytest.raises(ValueError, match="got others: seed null, now 1"):
        begin(ledger, {**SETTINGS, "seed": 1})


def test_of_long_settings_that_differ_what_differs_is_named(tmp_path):
    shards = [{"name": f"part-{n}.tar", "sha256": 32 * "a"} for n in range(20)]
    ledger = Ledger(tmp_path / "mixes")
    begin(ledger, {"shards": shards})
    with pytest.raises(
        ValueError, match=r'others: shards \{"name": "part-7.tar"\}, now .*other.tar'
    ):
        begin(ledger, {"shards": [*shards[:7], {**shards[7], "name": "other.tar"}, *shards[8:]]})
    with pytest.raises(ValueError, match="others: shards 20 of them, now 19"):
        begin(ledger, {"shards": shards[1:]})


def test_two_at_once_are_one_too_many(ledger):
    other = Ledger(ledger.folder)
    with ledger.writing(SETTINGS, {}, 0):
        with (
            pytest.raises(ValueError, match="where another run is at work"),
            other.writing(SETTINGS, {}, 0),
        ):
            pass
        with other.writing(SETTINGS, {}, 1):  # another process of the same run
            assert ledger.is_alive(1)
        assert not ledger.is_alive(1)
    begin(other)


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"{}", b'{"format": "supermix-mixes", "version": 9}', b"[" * 99999],
)
def test_settings_that_are_damaged_are_an_error(ledger, content):
    ledger.folder.mkdir()
    (ledger.folder / "settings.json").write_bytes(content)
    with pytest.raises(ValueError, match="expected a folder that `supermix generate` wrote"):
        ledger.settings()


def test_a_manifest_without_settings_is_not_taken_over(ledger):
    begin(ledger)
    ledger.enter(entry(ledger.folder, "000-000000.recipe"))
    (ledger.folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"expected settings\.json beside manifest\.jsonl"):
        begin(ledger)


def test_a_folder_that_can_not_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: expected a folder with room to write to"):
        begin(Ledger(tmp_path / "file" / "out"))


def test_what_killed_processes_left_is_swept(ledger):
    begin(ledger)
    names = [".000-000000.recipe.ab12", "._info.json.ef56"]
    others = [".000-000001.recipe.cd34", "000-000000.recipe", ".manifest.lock", ".manifest.1.lock"]
    for name in [*names, *others, ".settings.json.0123"]:
        (ledger.folder / name).write_text("")
    ledger.sweep({"000-000000", "_info"})
    begin(ledger)  # sweeps what was begun of the settings
    left = {path.name for path in ledger.folder.iterdir()}
    assert left == {*others, ".manifest.0.lock", "settings.json"}


def test_the_fingerprint_is_of_the_content():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
