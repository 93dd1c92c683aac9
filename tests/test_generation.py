"""D' written in units: the same bytes whatever happens on the way, and clear errors."""

import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import threading
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from colours import NUM_CLASSES, Stubborn, colour_teacher
from rich.progress import Progress
from tars import picture, write_colours, write_tar
from torchvision.transforms import v2

from supermix_transforms import ShardDataset, SolverSettings, TeacherLabeler, generate
from supermix_transforms.cli import main
from supermix_transforms.commands.generate import print_generated
from supermix_transforms.data.tarindex import read_members
from supermix_transforms.offline.inspection import inspect_mixes
from supermix_transforms.offline.ledger import Ledger
from supermix_transforms.offline.writing import Run, _progress

pytestmark = pytest.mark.usefixtures("one_thread")
VIEW = v2.Compose([v2.RandomCrop(16, padding=2), v2.RandomHorizontalFlip()])
SMALL = {"batch_size": 5, "unit_batches": 2, "settings": SolverSettings(mask_size=4)}
COUNT = 22


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    write_colours(folder, COUNT)
    return folder


@pytest.fixture
def dataset(shards):
    return ShardDataset(shards, transform=VIEW)


def run(dataset, out, teacher=None, **options):
    return generate(dataset, teacher or colour_teacher(), out, **{**SMALL, **options})


def contents(folder) -> dict[str, bytes]:
    """All files but those that may differ between runs."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if "manifest" not in path.name
    }


@pytest.mark.parametrize("form", ["recipes", "shards"])
def test_every_sample_of_every_pass_becomes_a_mix(dataset, tmp_path, form):
    summary = run(dataset, tmp_path, passes=2, form=form)
    assert (summary.units, summary.finished, summary.mixes) == (6, 6, 2 * COUNT)
    assert summary.made == 2 * COUNT
    assert summary.converged >= 0.9 * summary.mixes
    assert (summary.left_mixes, summary.left_hours) == (0, 0)
    suffix = {"recipes": "recipe", "shards": "tar"}[form]
    names = [f"{epoch:03}-{unit:06}.{suffix}" for epoch in range(2) for unit in range(3)]
    assert [name for name in contents(tmp_path) if not name.endswith(".json")] == names
    found = inspect_mixes(tmp_path, verify=True)
    assert found.problems == ()
    assert summary.bytes == found.bytes == sum((tmp_path / name).stat().st_size for name in names)


@pytest.mark.parametrize("form", ["recipes", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_settings_give_the_same_bytes(dataset, tmp_path, form, workers):
    run(dataset, tmp_path / "a", form=form)
    run(dataset, tmp_path / "b", form=form, num_workers=workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    run(dataset, tmp_path / "c", form=form, seed=1)
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_passes_differ_and_more_of_them_change_none(dataset, tmp_path):
    run(dataset, tmp_path / "a", passes=1)
    run(dataset, tmp_path / "b", passes=2)
    once, twice = (Ledger(tmp_path / name).entries() for name in "ab")
    assert [twice[unit].mixes for unit in once] == [once[unit].mixes for unit in once]
    recipes = contents(tmp_path / "b")
    assert recipes["000-000000.recipe"] != recipes["001-000000.recipe"]


def test_passes_differ_where_views_do_not(shards, tmp_path):
    dataset = ShardDataset(shards, transform=v2.CenterCrop(16))
    run(dataset, tmp_path, passes=2, batch_size=COUNT, form="shards", window=3)
    mixes = ShardDataset([tmp_path / "000-000000.tar", tmp_path / "001-000000.tar"])
    pairs = [set(), set()]
    for index in range(2 * COUNT):
        source = json.loads(read_members(*mixes._place(index), ["json"])["json"])
        pairs[source["pass"]].add(tuple(source["sources"]))
    assert len(pairs[0]) == len(pairs[1]) == COUNT
    assert len(pairs[0] & pairs[1]) < COUNT / 2


def test_it_goes_on_where_it_was_stopped(dataset, tmp_path):
    run(dataset, tmp_path / "whole")
    run(dataset, tmp_path / "parts")
    folder = tmp_path / "parts"
    (folder / "000-000001.recipe").unlink()  # lost
    (folder / ".000-000001.recipe.0f").write_bytes(b"begun")
    manifest = folder / "manifest.jsonl"
    kept = [line for line in manifest.read_text().splitlines(True) if "000-000002" not in line]
    manifest.write_text("".join(kept))  # whole, but not entered
    before = (folder / "000-000000.recipe").stat().st_mtime_ns
    summary = run(dataset, folder)
    assert summary.made == COUNT - 10
    assert (folder / "000-000000.recipe").stat().st_mtime_ns == before
    assert contents(folder) == contents(tmp_path / "whole")
    assert run(dataset, folder).made == 0


def test_a_dry_run_writes_nothing_and_says_what_is_left(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    summary = run(dataset, out, dry_run=True, passes=3)
    assert not out.exists()
    assert (summary.units, summary.finished, summary.left_mixes) == (9, 0, 3 * COUNT)
    assert summary.left_hours > 0
    assert summary.left_bytes == pytest.approx(summary.bytes_per_mix * 3 * COUNT, abs=1)
    print_generated(summary)
    assert "left: 66 mixes in 9 units" in capsys.readouterr().out
    run(dataset, out, passes=3)
    assert run(dataset, out, dry_run=True, passes=3).left_mixes == 0
    with pytest.raises(ValueError, match="got others: passes 3, now 2; units 9, now 6"):
        run(dataset, out, dry_run=True, passes=2)


def test_a_teacher_of_other_weights_is_another_setting(dataset, tmp_path):
    run(dataset, tmp_path)
    other = colour_teacher()
    with torch.no_grad():
        other[0].weight.mul_(1.001)
    with pytest.raises(ValueError, match="got others: teacher "):
        run(dataset, tmp_path, other)


def test_shards_that_changed_are_another_setting(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    run(ShardDataset(copy, transform=VIEW), tmp_path / "out")
    tar = copy / "colours-0.tar"
    content = bytearray(tar.read_bytes())
    content[512] = ord("3")  # the first label
    tar.write_bytes(content)
    with pytest.raises(ValueError, match="got others: shards "):
        run(ShardDataset(copy, transform=VIEW), tmp_path / "out")


def test_a_shard_that_vanishes_on_the_way_is_an_error_and_units_stay(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    dataset = ShardDataset(copy, transform=VIEW)
    (copy / "colours-2.tar").unlink()
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="The file has changed since it was opened"):
        run(dataset, out, window=1)
    assert len(Ledger(out).entries()) < 3
    shutil.copy2(shards / "colours-2.tar", copy)
    assert run(dataset, out, window=1).finished == 3


def test_a_full_disk_is_an_error_and_nothing_half_written_stays(dataset, tmp_path, monkeypatch):
    run(dataset, tmp_path / "whole")
    out = tmp_path / "out"
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # settings, unit 0, its entry, unit 1
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(ValueError, match=r"with room to write to.*No space left on device"):
            run(dataset, out)
    assert sorted(contents(out)) == ["000-000000.recipe", "settings.json"]
    run(dataset, out)
    assert contents(out) == contents(tmp_path / "whole")


@contextlib.contextmanager
def largest_file(size: int):
    """To write beyond `size` bytes is an OSError, as on a full disk: what fits is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, action)


@pytest.mark.parametrize("form", ["recipes", "shards"])
def test_a_unit_that_does_not_fit_on_the_disk_is_an_error_and_the_others_stay(
    dataset, tmp_path, form
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(dataset, whole, form=form)
    shutil.copytree(whole, out)
    second = next(out.glob("000-000001.*"))
    size = second.stat().st_size
    second.unlink()
    others = contents(out)
    with (
        largest_file(size - 1),
        pytest.raises(ValueError, match=r"with room to write to.*File too large.*again to go on"),
    ):
        run(dataset, out, form=form)
    assert contents(out) == others  # and nothing half written
    assert run(dataset, out, form=form).made == 10
    assert contents(out) == contents(whole)
    assert inspect_mixes(out, verify=True).problems == ()


def test_a_line_of_the_manifest_that_does_not_fit_costs_its_unit_only(dataset, tmp_path):
    many = {"passes": 4, "mix": "mixup"}
    run(dataset, tmp_path / "whole", **many)
    out = tmp_path / "out"
    lines = (tmp_path / "whole" / "manifest.jsonl").read_bytes().splitlines(True)
    size = len(b"".join(lines[:9])) + 100
    assert size > max(map(len, contents(tmp_path / "whole").values()))
    with (
        largest_file(size),
        pytest.raises(ValueError, match=r"with room to write to.*File too large"),
    ):
        run(dataset, out, **many)
    assert (out / "manifest.jsonl").stat().st_size == size  # a part of the line is there
    assert len(Ledger(out).entries()) == 9
    assert run(dataset, out, **many).made == 10 + 10 + 2
    assert contents(out) == contents(tmp_path / "whole")
    assert inspect_mixes(out, verify=True).problems == ()


def test_settings_that_do_not_fit_on_the_disk_are_an_error(dataset, tmp_path):
    with (
        largest_file(1000),
        pytest.raises(ValueError, match=r"with room to write to.*File too large"),
    ):
        run(dataset, tmp_path)
    assert contents(tmp_path) == {}
    assert run(dataset, tmp_path).finished == 3


def test_a_read_only_folder_is_an_error(dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    if os.access(out, os.W_OK):  # by root; it can not write where a file is
        out.rmdir()
        out.write_bytes(b"")
    with pytest.raises(ValueError, match=r"with room to write to.*(Permission denied|File exists)"):
        run(dataset, out)
    if out.is_file():
        out.unlink()
    else:
        out.chmod(0o755)
    assert run(dataset, out).finished == 3


@pytest.mark.parametrize("name", ["000-000001.recipe", ".000-000001.recipe.0f", "manifest.jsonl"])
def test_a_place_that_is_taken_is_an_error_and_units_stay(dataset, tmp_path, name):
    run(dataset, tmp_path / "whole")
    out = shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (out / "000-000001.recipe").unlink()
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir()
    with pytest.raises(ValueError, match=r"expected a f.*(Is a directory|Operation not permitted)"):
        run(dataset, out)
    (out / name).rmdir()
    assert run(dataset, out).made == (COUNT if name == "manifest.jsonl" else 10)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_picture_that_can_not_be_read(shards, tmp_path, on_error):
    copy = shutil.copytree(shards, tmp_path / "copy")
    tar = copy / "colours-1.tar"
    content = tar.read_bytes()
    at = content.index(b"\x89PNG")
    tar.write_bytes(content[:at] + bytes(8) + content[at + 8 :])
    dataset = ShardDataset(copy, transform=VIEW, on_error=on_error)
    if on_error == "raise":
        with pytest.raises(ValueError, match="which Pillow cannot read"):
            run(dataset, tmp_path / "out")
        return
    with pytest.warns(UserWarning, match="1 samples skipped"):
        summary = run(dataset, tmp_path / "out")
    assert (summary.mixes, summary.skipped) == (COUNT - 1, 1)


@pytest.mark.parametrize("form", ["recipes", "shards"])
def test_a_batch_of_which_nothing_can_be_read_makes_no_mixes(shards, tmp_path, form):
    copy = shutil.copytree(shards, tmp_path / "copy")
    for tar in copy.glob("*.tar"):  # all pictures but the first one's
        content = bytearray(tar.read_bytes())
        at = content.index(b"\x89PNG") + 1
        while (at := content.find(b"\x89PNG", at)) >= 0:
            content[at : at + 8] = bytes(8)
        tar.write_bytes(content)
        (copy / f"{tar.name}.index").unlink(missing_ok=True)
    dataset = ShardDataset(copy, transform=VIEW, on_error="skip")
    with pytest.warns(UserWarning, match="skipped"):
        summary = run(dataset, tmp_path / "out", form=form, batch_size=2, unit_batches=2)
    assert summary.finished == summary.units
    assert summary.mixes == len(list(copy.glob("*.tar"))) < COUNT
    assert inspect_mixes(tmp_path / "out", verify=True).problems == ()


def test_pictures_that_are_lost_in_jpeg_have_not_converged(dataset, tmp_path, monkeypatch):
    noise = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(
        "supermix_transforms.offline.forms.decoded",
        lambda files: noise.expand(len(files), -1, -1, -1),
    )
    options = {"form": "shards", "picture_format": "jpg"}
    assert run(dataset, tmp_path, **options).converged < COUNT / 2


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
@pytest.mark.parametrize("k", [2, 3])
def test_other_mixes(dataset, tmp_path, mix, k):
    summary = run(dataset, tmp_path, mix=mix, k=k)
    unmixed = COUNT % SMALL["batch_size"] if k == 3 else 0  # the last batch has two pictures
    assert (summary.mixes, summary.converged) == (COUNT, COUNT - unmixed)
    assert Ledger(tmp_path).settings()["alpha"] == 1
    verified = inspect_mixes(tmp_path, verify=True)
    assert verified.problems == ()
    field = {"mixup": "share", "cutmix": "box"}[mix]
    assert verified.bytes_by_field[field] > 1 > verified.bytes_by_field["grid"]


def test_unconverged_mixes_are_kept_or_dropped(dataset, tmp_path):
    settings = SolverSettings(mask_size=4, max_steps=2)
    kept = run(dataset, tmp_path / "a", Stubborn(), settings=settings)
    dropped = run(dataset, tmp_path / "b", Stubborn(), settings=settings, unconverged="drop")
    assert kept.mixes == COUNT
    assert kept.converged == dropped.converged == dropped.mixes < COUNT
    assert inspect_mixes(tmp_path / "b", verify=True).outcomes.keys() <= {"CONVERGED"}


def test_a_last_batch_of_fewer_than_k_stays_unmixed(dataset, tmp_path):
    summary = run(dataset, tmp_path, batch_size=7, k=3)  # 7, 7, 7, 1
    assert summary.mixes == COUNT
    assert inspect_mixes(tmp_path, verify=True).outcomes["UNMIXED"] == 1


def test_a_run_that_has_only_the_short_batch_to_make(dataset, tmp_path):
    options = {"batch_size": 7, "unit_batches": 1, "k": 3}
    run(dataset, tmp_path, **options)
    last = tmp_path / "000-000003.recipe"
    before = last.read_bytes()
    last.unlink()
    assert run(dataset, tmp_path, **options).made == 1
    assert last.read_bytes() == before


def test_the_temperature_is_that_of_the_labels(dataset, tmp_path):
    labeler = TeacherLabeler(colour_teacher(), temperature=4.0, top=2)
    run(dataset, tmp_path, labeler)
    settings = Ledger(tmp_path).settings()
    assert (settings["temperature"], settings["top"]) == (4.0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "none"}, "mix: expected one of"),
        ({"form": "tar"}, "form: expected one of"),
        ({"picture_format": "gif"}, "picture_format: expected one of"),
        ({"quality": 101}, "quality: expected an integer in 1..100"),
        ({"top": 0}, "top: expected an integer"),
        ({"passes": 0}, "passes: expected an integer in 1..999"),
        ({"batch_size": 0}, "batch_size: expected an integer"),
        ({"unit_batches": 1.5}, "unit_batches: expected an integer"),
        ({"k": 1}, "k: expected an integer of at least 2"),
        ({"k": 8}, "batch_size: expected at least k = 8 pictures, got 5"),
        ({"alpha": -1.0}, "alpha: expected a positive number"),
        ({"window": -1}, "window: expected at least 0"),
        ({"partners": "near"}, "partners: expected"),
        ({"unconverged": "burn"}, "unconverged: expected one of"),
        ({"settings": SolverSettings(mask_size=17)}, "mask_size: expected at most 16 cells"),
    ],
)
def test_settings_out_of_range_are_errors_and_nothing_is_entered(
    dataset, tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        run(dataset, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/*.recipe"))


def test_a_transform_that_is_no_view_is_an_error(shards, tmp_path):
    dataset = ShardDataset(shards, transform=v2.Compose([v2.CenterCrop(8), v2.RandomGrayscale()]))
    with pytest.raises(ValueError, match="Recipes store rectangles and flips only"):
        run(dataset, tmp_path)


def test_a_process_that_ended_before_its_units_is_noticed(dataset, tmp_path, monkeypatch):
    """The first of two processes, whose other one never came."""
    state = type("State", (), {"process_index": 0, "num_processes": 2})
    monkeypatch.setattr("supermix_transforms.offline.generation.process_state", state)
    monkeypatch.setattr("supermix_transforms.offline.writing.START_SECONDS", 0.2)
    monkeypatch.setattr("supermix_transforms.offline.writing.POLL_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"expected processes \[1\] to finish their units"):
        run(dataset, tmp_path)
    assert sorted(Ledger(tmp_path).entries()) == ["000-000000", "000-000002"]
    monkeypatch.undo()
    assert run(dataset, tmp_path).made == 10


@contextlib.contextmanager
def terminal():
    """Standard error is a terminal inside; what it has got is in the list afterwards."""
    master, slave = os.openpty()
    chunks: list[bytes] = []
    shown: list[str] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(master, 1 << 16):
                chunks.append(chunk)

    update = Progress.update

    def at_once(progress, *arguments, **options) -> None:  # and not ten times a second
        update(progress, *arguments, **options)
        progress.refresh()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with pytest.MonkeyPatch.context() as patch, os.fdopen(slave, "w") as file:
            patch.setattr(Progress, "update", at_once)
            patch.setattr("sys.stderr", file)
            patch.setenv("TERM", "xterm")
            patch.setenv("COLUMNS", "120")
            yield shown
    finally:
        reader.join()
        os.close(master)
    shown.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(chunks).decode()))


FRAME = re.compile(r"(\d)/3 units  (\d+) mixes, ([\d.]+) a second ([-\d]:[-\d:]{5})")


def test_a_terminal_shows_rate_and_time_left(dataset, tmp_path):
    with terminal() as shown:
        run(dataset, tmp_path)
    frames = FRAME.findall(*shown)
    first = next(frame for frame in frames if frame[0] == "0")
    assert first[1:] == ("0", "0.0", "-:--:--")
    third = next(frame for frame in frames if frame[0] == "2")
    assert third[1] == "20"
    assert float(third[2]) > 0
    assert re.fullmatch(r"\d:\d\d:\d\d", third[3])  # what the last unit will take
    assert frames[-1][:2] == ("3", "22")


def test_a_log_gets_lines_now_and_then(dataset, tmp_path, monkeypatch, capsys):
    run(dataset, tmp_path / "soon over")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("supermix_transforms.offline.writing.LOG_SECONDS", 0.0)
    run(dataset, tmp_path / "long")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    line = r"(\d) of 3 units, (\d+) mixes, [\d.]+ a second, \d:\d\d:\d\d left"
    found = [re.fullmatch(line, each).groups() for each in lines]
    assert found[:3] == [("1", "10"), ("2", "20"), ("3", "22")]
    assert lines[-1].endswith("0:00:00 left")


def test_a_log_of_a_run_that_waits_for_others_does_not_guess(
    dataset, tmp_path, monkeypatch, capsys
):
    run(dataset, tmp_path)
    monkeypatch.setattr("supermix_transforms.offline.writing.LOG_SECONDS", 0.0)
    with _progress(5, rank=0) as show:
        for _ in range(2):
            show(Ledger(tmp_path).entries)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "3 of 5 units, 22 mixes, 0.0 a second, time left unknown"


def test_the_rate_that_is_shown_is_of_what_this_run_makes(dataset, tmp_path):
    run(dataset, tmp_path)
    (tmp_path / "000-000002.recipe").unlink()
    with terminal() as shown:
        run(dataset, tmp_path)
    frames = FRAME.findall(*shown)
    assert frames[0][:3] == ("2", "20", "0.0")
    assert frames[-1][:2] == ("3", "22")
    assert float(frames[-1][2]) > 0


def test_other_processes_than_the_first_show_nothing(dataset, tmp_path, monkeypatch):
    state = type("State", (), {"process_index": 1, "num_processes": 2})
    monkeypatch.setattr("supermix_transforms.offline.generation.process_state", state)
    with terminal() as shown:
        assert run(dataset, tmp_path).made == 10
    assert shown == [""]


def test_without_a_terminal_nothing_is_shown_before_the_summary(shards, dataset, tmp_path, capfd):
    run(dataset, tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    teacher = f"{Path(__file__).with_name('colours.py')}:colour_teacher"
    words = ["generate", "--shards", str(shards), "--teacher", teacher, "--size", "16"]
    words += ["--out", str(tmp_path / "b"), "--batch-size", "5", "--device", "cpu"]
    assert main([*words, "--view", "random-crop"]) == 0
    lines, errors = capfd.readouterr()
    assert errors == ""
    assert lines.startswith(f"{tmp_path / 'b'}: 22 mixes (recipes) in 1 of 1 units")


def test_the_summary_is_json(dataset, tmp_path, capsys):
    with warnings.catch_warnings():
        summary = run(dataset, tmp_path)
    assert json.loads(json.dumps(asdict(summary)))["mixes"] == COUNT
    print_generated(summary)
    shown = capsys.readouterr().out
    assert "22 mixes (recipes) in 3 of 3 units" in shown
    assert "left:" not in shown


def test_num_classes_may_be_few(dataset, tmp_path):
    run(dataset, tmp_path, top=None)
    assert Ledger(tmp_path).settings()["top"] == NUM_CLASSES


def test_a_picture_that_does_not_fit_its_view_is_named_or_left_out(tmp_path):
    sizes = [(20, 20)] * 4 + [(8, 8)]
    members = [
        (f"{number}.{suffix}", content)
        for number, size in enumerate(sizes)
        for suffix, content in (("png", picture(40 * number, size=size)), ("cls", b"0"))
    ]
    write_tar(tmp_path / "a.tar", members)
    view = v2.RandomCrop(16)
    with pytest.raises(ValueError, match=r"Required crop size .* It is 'a\.tar/4'\."):
        run(ShardDataset(tmp_path, transform=view), tmp_path / "out")
    dataset = ShardDataset(tmp_path, transform=view, on_error="skip")
    with pytest.warns(UserWarning, match=r"1 samples skipped: .* It is 'a\.tar/4'\."):
        summary = run(dataset, tmp_path / "skipped")
    assert (summary.mixes, summary.skipped) == (4, 1)


@pytest.mark.parametrize(("workers", "waiting", "seconds"), [(0, 8.0, 10.0), (2, 2.0, 4.0)])
def test_a_dry_run_reckons_with_workers_that_read_meanwhile(
    dataset, tmp_path, monkeypatch, workers, waiting, seconds
):
    """Pictures that take 8 seconds to read and 2 to mix."""
    clock = itertools.cycle([0.0, 8.0, 10.0])
    monkeypatch.setattr(
        "supermix_transforms.offline.writing.time", SimpleNamespace(perf_counter=clock.__next__)
    )
    summary = run(dataset, tmp_path, dry_run=True, num_workers=workers)
    assert (summary.waiting, summary.seconds) == (waiting, seconds)


@pytest.mark.parametrize("seen", [True, False])
def test_a_process_that_had_begun_is_missed_sooner(dataset, tmp_path, monkeypatch, seen):
    """It was at work while the first one waited, or has only left a unit that it made."""
    if not seen:
        mine = Run.write

        def write(whole, asked, versions):
            made = whole._finish

            def finish(unit, *parts):
                made(unit, *parts)
                if unit == "000-000000":  # meanwhile the other process makes its own first one
                    made("000-000001", *parts)

            whole._finish = finish
            return mine(whole, asked, versions)

        monkeypatch.setattr(Run, "write", write)
    state = type("State", (), {"process_index": 0, "num_processes": 2})
    monkeypatch.setattr("supermix_transforms.offline.generation.process_state", state)
    monkeypatch.setattr("supermix_transforms.offline.writing.GRACE_SECONDS", 0.1)
    monkeypatch.setattr("supermix_transforms.offline.writing.POLL_SECONDS", 0.05)
    alive = iter([seen, seen])
    monkeypatch.setattr(Ledger, "is_alive", lambda ledger, rank: next(alive, False))
    with pytest.raises(ValueError, match=r"expected processes \[1\] to finish their units"):
        run(dataset, tmp_path, passes=2)
