"""The command line: what it prints where, its exit codes, and its errors."""

import inspect
import io
import json
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from colours import pictures
from PIL import Image
from safetensors.torch import load_file
from tars import picture, write_colours, write_shards, write_tar
from torchvision.transforms.v2.functional import to_pil_image

from supermix_transforms import SolverSettings, SuperMix, __version__
from supermix_transforms.cli import main
from supermix_transforms.commands.bench import bench as bench_function
from supermix_transforms.data.tarindex import index_path
from supermix_transforms.demo import DEMO_FILES
from supermix_transforms.models import load_teacher

ROOT = Path(__file__).parents[1]
TEACHER = """
import torch

print("a chatty teacher")


class MeanColour(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.Linear(3, 3, bias=False)
        self.classifier.weight.data = 20 * torch.eye(3)

    def forward(self, images):
        return self.classifier(images.mean(dim=(2, 3)))


def colour():
    return MeanColour()


def function():
    return lambda images: 20 * images.mean(dim=(2, 3))


def number():
    return 7


def interrupted():
    raise KeyboardInterrupt
"""


@pytest.fixture(autouse=True)
def _one_thread():
    """Pictures are tiny here: a second thread would cost more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def colour(number: int) -> Image.Image:
    return Image.new("RGB", (24, 24), tuple(220 if c == number % 3 else 20 for c in range(3)))


@pytest.fixture
def folder(tmp_path):
    """A folder with red, green and blue pictures in `photos`, and teachers in `teacher.py`."""
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    for number in range(5):
        colour(number).save(tmp_path / "photos" / ("inner" if number > 2 else "") / f"{number}.png")
    (tmp_path / "teacher.py").write_text(TEACHER)
    return tmp_path


def mix(folder, *options, teacher="colour", images="photos", out="out") -> int:
    named = f"{folder / 'teacher.py'}:{teacher}" if "/" not in teacher else teacher
    places = ["--images", str(folder / images), "--out", str(folder / out)]
    return main(["mix", *places, "--teacher", named, "--size", "24", *options])


def error_of(capsys) -> str:
    """The one line on standard error, where nothing is on standard output."""
    shown, errors = capsys.readouterr()
    assert shown == ""
    line = errors.splitlines()[-1]
    assert line.startswith("supermix: error: ")
    assert "Traceback" not in errors
    return line.removeprefix("supermix: error: ")


def files_in(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_mix_writes_mixes_labels_and_contact_sheet(folder, capsys):
    assert mix(folder, "--k", "2", "3") == 0
    names = sorted(files_in(folder / "out"))
    mixes = [f"k{k}-0000{i}.png" for k in (2, 3) for i in range(5)]
    assert names == ["contact-sheet.png", *mixes, "labels.json"]
    shown, errors = capsys.readouterr()
    assert "converged" in shown
    assert str(folder / "out" / "labels.json") in shown
    assert errors == "a chatty teacher\n"


def test_json_is_one_object_and_nothing_else(folder, capsys):
    assert mix(folder, "--json", "--count", "3", "--seed", "4") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["out"] == str(folder / "out")
    assert summary["seed"] == 4
    (row,) = summary["rows"]
    assert (row["k"], row["mixes"]) == (2, 3)
    assert set(row) == {
        *("k", "mixes", "converged", "sparsity", "steps", "forwards", "backwards"),
        "ms_per_picture",
    }
    assert Path(summary["labels"]).is_file()
    assert Path(summary["contact_sheet"]).is_file()


def test_options_reach_the_solver_and_the_draws(folder):
    options = ["--method", "paper", "--mask-size", "4", "--alpha", "7", "--partners", "matched"]
    assert mix(folder, *options, "--batch-size", "4", "--seed", "2") == 0
    labels = json.loads((folder / "out" / "labels.json").read_text())
    assert labels["solver"]["method"] == "paper"
    assert labels["solver"]["mask_size"] == 4
    assert labels["alpha"] == 7
    assert labels["partners"] == "matched"
    assert labels["batch_size"] == 4
    assert labels["seed"] == 2


def test_same_seed_same_bytes_wherever_the_pictures_are(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for path in [*(folder / "photos").rglob("*.png"), folder / "teacher.py"]:
        copy = elsewhere / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    for place in (folder, elsewhere):
        assert mix(place) == 0
    one, two = files_in(folder / "out"), files_in(elsewhere / "out")
    assert one.pop("labels.json") != b""  # it names the teacher, by its path
    two.pop("labels.json")
    assert one == two


def test_pictures_come_from_a_tar(folder):
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for number in range(4):
            for suffix, content in (("png", png(colour(number))), ("cls", b"1")):
                member = tarfile.TarInfo(f"n{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert mix(folder, images="photos.tar") == 0
    mixes = json.loads((folder / "out" / "labels.json").read_text())["mixes"]
    assert [entry["sources"][0]["name"] for entry in mixes] == [f"n{i}.png" for i in range(4)]


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_mean_and_std_replace_the_teachers(folder):
    for out, options in (("a", []), ("b", ["--mean", "0.5", "--std", "0.1"])):
        assert mix(folder, "--count", "1", *options, out=out) == 0
    a, b = (json.loads((folder / out / "labels.json").read_text())["mixes"] for out in "ab")
    assert a[0]["teacher"] != b[0]["teacher"]


def test_mixes_inside_the_folder_of_pictures_are_not_mixed_again(folder):
    for _ in range(2):
        assert mix(folder, out="photos/out") == 0
    mixes = json.loads((folder / "photos" / "out" / "labels.json").read_text())["mixes"]
    assert len(mixes) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "1"], "k: expected an integer of at least 2 images a mix, got 1."),
        (["--k", "6"], "images: expected at least k = 6 pictures, got 5. Pass more pictures"),
        (["--alpha", "-1"], "alpha: expected a positive number"),
        (["--mask-size", "40"], "mask_size: expected at most 24 cells"),
        (["--mask-size", "0"], "mask_size: expected an integer of at least 1, got 0"),
        (["--count", "0"], "count: expected at least 1 mix"),
        (["--batch-size", "1"], "batch_size: expected at least k = 2 pictures, got 1"),
        (["--size", "-3"], "size: expected at least 1 pixel, got -3"),
        (["--mean", "0.5"], "expected mean and std together"),
        (["--weights", "nowhere.pt"], "weights: expected"),
    ],
)
def test_a_bad_option_is_one_line_on_standard_error(folder, capsys, options, message):
    assert mix(folder, *options) == 2
    assert error_of(capsys).startswith(message)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("missing", "no 'missing' in it"),
        ("number", "teacher: expected a module or a callable, got int"),
        ("nowhere/net", "teacher: expected timm/NAME"),
    ],
)
def test_a_bad_teacher_is_one_line_on_standard_error(folder, capsys, teacher, message):
    assert mix(folder, teacher=teacher) == 2
    assert message in error_of(capsys)


def test_matched_partners_of_a_plain_function_are_an_error(folder, capsys):
    assert mix(folder, "--partners", "matched", teacher="function") == 2
    assert error_of(capsys).startswith('partners="matched": expected a teacher whose')


def test_a_torn_picture_is_named(folder, capsys):
    path = folder / "photos" / "inner" / "torn.jpg"
    colour(1).resize((64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert mix(folder) == 2
    assert "got 'inner/torn.jpg', which Pillow cannot read: " in error_of(capsys)


def test_an_empty_folder_is_an_error(folder, capsys):
    (folder / "empty").mkdir()
    assert mix(folder, images="empty") == 2
    assert error_of(capsys).startswith("images: expected pictures (.jpg, .jpeg, .png, .webp) in")


def test_a_folder_that_is_not_there_is_an_error(folder, capsys):
    assert mix(folder, images="nowhere") == 2
    assert "which is not there. Check the path" in error_of(capsys)


def test_an_output_that_is_a_file_is_an_error(folder, capsys):
    assert mix(folder, out="teacher.py") == 2
    assert error_of(capsys).startswith("out: expected a folder, got the file")


def test_a_missing_extra_names_the_pip_line(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert mix(folder) == 2
    assert 'pip install "supermix-transforms[plots]"' in error_of(capsys)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    assert main(["demo", "--out", str(folder / "demo")]) == 2
    assert 'pip install "supermix-transforms[demo]"' in error_of(capsys)


def test_an_interrupt_ends_quietly_with_130(folder, capsys):
    assert mix(folder, teacher="interrupted") == 130
    shown, errors = capsys.readouterr()
    assert shown == ""
    assert errors.splitlines()[-1] == "supermix: interrupted"


def bench(folder, *options, teacher="colour") -> int:
    named = f"{folder / 'teacher.py'}:{teacher}"
    places = ["--images", str(folder / "photos"), "--out", str(folder / "out")]
    small = ["--size", "24", "--count", "5", "--repeats", "1"]
    return main(["bench", *places, "--teacher", named, *small, *options])


def test_bench_writes_figures_and_chart_and_prints_a_table(folder, capsys):
    assert bench(folder, "--methods", "fast", "mixup") == 0
    assert sorted(files_in(folder / "out")) == ["bench.json", "bench.png"]
    shown, errors = capsys.readouterr()
    assert "converged" in shown
    assert "mixup" in shown
    assert str(folder / "out" / "bench.json") in shown
    assert errors == "a chatty teacher\n"


def test_json_of_bench_is_what_is_in_the_file(folder, capsys):
    options = ["--methods", "fast-matched", "paper", "authors-70", "--seed", "4", "--k", "3"]
    options += ["--alpha", "2", "--batch-size", "4", "--slow-count", "2"]
    assert bench(folder, *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((folder / "out" / "bench.json").read_text())
    assert [row["name"] for row in report["methods"]] == ["fast-matched", "paper", "authors-70"]
    assert [row["tuples"] for row in report["methods"]] == [6, 3, 3]
    assert [report[key] for key in ("seed", "k", "alpha", "batch_size")] == [4, 3, 2, 3]
    assert report["teacher"] == f"{folder / 'teacher.py'}:colour"


def test_mean_and_std_of_bench_replace_the_teachers(folder, capsys):
    shares = []
    for options in ([], ["--mean", "0.5", "--std", "50"]):
        # with logits that hardly differ, the margin that fast asks for is out of reach
        assert bench(folder, "--methods", "fast", "--json", *options) == 0
        shares.append(json.loads(capsys.readouterr().out)["methods"][0]["steps"])
    assert shares[0] < shares[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "fats"], "methods: expected some of fast, "),
        (["--methods", "fast", "--k", "6"], "count: expected at least k = 6 tuples, got 5"),
        (["--methods", "fast", "--repeats", "0"], "repeats: expected at least 1, got 0"),
    ],
)
def test_a_bad_option_of_bench_is_one_line_on_standard_error(folder, capsys, options, message):
    assert bench(folder, *options) == 2
    assert error_of(capsys).startswith(message)
    assert not (folder / "out").exists()


def test_bench_takes_the_demos_teacher_and_pictures_unless_told_otherwise(monkeypatch, tmp_path):
    called = []

    def noted(pictures, labeler, **options):
        called.append((list(pictures), labeler, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("supermix_transforms.cli.bench", noted)
    assert main(["bench", "--out", str(tmp_path)]) == 130
    ((pictures, labeler, options),) = called
    assert [name for name, _ in pictures] == list(DEMO_FILES)
    assert pictures[0][1].shape == (3, 224, 224)
    assert "EfficientNet" in repr(labeler)
    assert options["name"] == "efficientnet-lite0"
    defaults = inspect.signature(bench_function).parameters
    for name in ("k", "alpha", "methods", "count", "slow_count", "batch_size", "repeats", "seed"):
        assert options[name] == defaults[name].default


@pytest.mark.parametrize("command", ["demo", "mix", "bench"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  supermix {command} " in shown
    assert "--json" in shown


def test_the_example_of_mix_is_a_command_line_that_parses(folder, capsys):
    with pytest.raises(SystemExit):
        main(["mix", "--help"])
    (line,) = (each for each in capsys.readouterr().out.splitlines() if "supermix mix --i" in each)
    words = line.split()[1:]
    assert main([*words[:-1], str(folder)]) == 2  # photos/ is not here
    assert "error: " in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["supermix-transforms"] == __version__
    assert shown["torch"] == torch.__version__.partition("+")[0]
    assert shown["python"] == platform.python_version()
    assert {"torchvision", "accelerate", "webdataset", "system", "CPU", "GPU"} <= set(shown)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_commands_and_options(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    script = tmp_path / "supermix"
    script.write_text(capsys.readouterr().out)
    ask = f"""source {script}
COMP_WORDS=(supermix $1); COMP_CWORD=$2; COMP_LINE="supermix $1"; COMP_POINT=${{#COMP_LINE}}
_shtab_supermix supermix; printf '%s\\n' "${{COMPREPLY[@]}}"
"""

    def complete(words: str, place: int) -> list[str]:
        command = ["bash", "-c", ask, "bash", words, str(place)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert complete("rep", 1) == ["replay", "report"]
    assert "--partner-cap" in complete("generate --par", 2)
    (tmp_path / "recipes").mkdir()
    assert complete(f"inspect {tmp_path}/rec", 2) == [f"{tmp_path}/recipes"]


def test_the_help_of_supermix_says_what_exit_codes_mean(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for words in ("0 done", "1 inspect found", "2 an error", "130 interrupted", "143 terminated"):
        assert words in " ".join(shown.split())


@pytest.mark.parametrize("line", [[], ["nonsense"], ["mix"], ["demo", "--seed", "x"]])
def test_a_line_that_does_not_parse_ends_with_2(line, capsys):
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    assert "usage: supermix" in capsys.readouterr().err


def test_as_a_process(folder):
    command = [sys.executable, "-m", "supermix_transforms.cli", "mix", "--json", "--size", "24"]
    command += ["--images", str(folder / "photos"), "--out", str(folder / "out")]
    command += ["--teacher", f"{folder / 'teacher.py'}:colour"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["mixes"] == 5
    assert done.stderr == "a chatty teacher\n"


def test_index_says_what_shards_hold(tmp_path, capsys):
    shards = write_shards(tmp_path, [3, 5])
    assert main(["index", "--shards", f"{tmp_path}/part-{{0,1}}.tar", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 8
    assert found["bytes"] == sum(shard.stat().st_size for shard in shards)
    assert [row["members"] for row in found["shards"]] == [{"cls": n, "png": n} for n in (3, 5)]
    assert all(index_path(shard).is_file() for shard in shards)

    assert main(["index", "--shards", str(tmp_path)]) == 0
    assert "2 shards" in capsys.readouterr().out
    shards[1].write_bytes(shards[1].read_bytes()[:3000])
    assert main(["index", "--shards", str(tmp_path)]) == 2
    assert "expected a whole uncompressed tar file" in capsys.readouterr().err


# -- generate and inspect --------------------------------------------------------------------------


@pytest.fixture
def generating(tmp_path):
    """A command line that generates from shards of colours."""
    write_colours(tmp_path)
    line = ["generate", "--shards", str(tmp_path), "--out", str(tmp_path / "out"), "--size", "16"]
    line += ["--teacher", f"{ROOT / 'tests' / 'colours.py'}:colour_teacher", "--device", "cpu"]
    return [*line, "--view", "random-crop", "--batch-size", "6", "--unit-batches", "2"]


def test_generate_writes_and_inspect_looks(generating, capsys):
    assert main([*generating, "--dry-run"]) == 0
    assert "left: 22 mixes in 2 units, about " in capsys.readouterr().out
    assert main([*generating, "--passes", "2", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["finished"], written["mixes"], written["process"]) == (4, 44, 0)

    out = generating[4]
    assert main(["inspect", out, "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["mixes"], found["problems"]) == (44, [])
    assert sum(found["bytes_by_field"].values()) * 44 == pytest.approx(found["bytes"])
    assert sum(found["outcomes"].values()) == 44
    assert found["settings"]["view"]["size"] == [16, 16]
    assert main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert "44 mixes (recipes) in 4 of 4 units" in shown
    assert "grid" in shown
    assert "all of it" not in shown  # not every byte was looked at
    assert main(["inspect", out, "--verify"]) == 0
    assert "all of it is as it was written" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["recipes", "shards"])
def test_inspect_finds_a_changed_byte_only_where_it_reads_all(generating, capsys, form):
    assert main([*generating, "--as", form]) == 0
    out = Path(generating[4])
    unit = next(path for path in sorted(out.glob("000-*")))
    content = bytearray(unit.read_bytes())
    content[-2000 if form == "shards" else -1] ^= 1
    unit.write_bytes(content)
    assert main(["inspect", str(out)]) == 0
    assert main(["inspect", str(out), "--verify"]) == 1
    assert f"WRONG: {unit.name}: its sha256 is not the one" in capsys.readouterr().out
    unit.unlink()
    assert main(["inspect", str(out)]) == 1
    assert "WRONG: 1 of 2 units are there: start generate again" in capsys.readouterr().out


def test_generate_as_shards_with_the_other_mixes(generating, capsys):
    options = ["--as", "shards", "--picture-format", "webp", "--mix", "cutmix", "--k", "3"]
    assert main([*generating, *options, "--top", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "shards"
    assert main(["inspect", generating[4], "--verify"]) == 0
    assert "mix cutmix  k 3  alpha 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "1"], "k: expected an integer of at least 2"),
        (["--passes", "0"], "passes: expected an integer in 1..999"),
        (["--teacher", "nobody"], "teacher: expected timm/NAME"),
        (["--shards", "nowhere.tar"], "shards: expected a tar file"),
        (["--out", "/proc/out"], "out: expected a folder with room to write to"),
    ],
)
def test_generate_says_what_is_wrong(generating, capsys, options, message):
    assert main([*generating, *options]) == 2
    assert f"supermix: error: {message}" in capsys.readouterr().err


def test_generate_says_what_is_wrong_with_options_before_it_reads(generating, capsys, monkeypatch):
    def opened(*_, **__):
        pytest.fail("shards were opened")

    monkeypatch.setattr("supermix_transforms.commands.generate.ShardDataset", opened)
    assert main([*generating, "--quality", "200"]) == 2
    assert "quality: expected an integer in 1..100, got 200" in capsys.readouterr().err


def test_what_a_worker_could_not_read_is_said_in_a_line(generating, tmp_path, capsys):
    # the first picture is read by the main process, too
    broken = [("a.png", picture(9)), ("a.cls", b"0"), ("b.png", b"no picture"), ("b.cls", b"1")]
    options = ["--shards", str(write_tar(tmp_path / "broken.tar", broken)), "--num-workers", "1"]
    assert main([*generating, *options, "--view", "random-crop"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("supermix: error: images: expected a picture, got")
    assert not any("Traceback" in line for line in said)


def test_inspect_of_anything_else_is_an_error(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "expected a folder that `supermix generate` wrote" in capsys.readouterr().err


def test_replay_writes_pictures(generating, capsys, tmp_path):
    assert main(generating) == 0
    line = ["replay", generating[4], "--shards", generating[2], "--out", str(tmp_path / "seen")]
    assert main([*line, "--count", "3", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(out)["mixes"] == 3
    assert len(list((tmp_path / "seen").glob("mix-*.png"))) == 3
    assert main([*line[:-2], "--out", str(tmp_path / "seen"), "--shards", "/nowhere.tar"]) == 2


@pytest.mark.parametrize("command", ["index", "generate", "replay", "inspect"])
def test_help_of_the_offline_commands_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"\n  supermix {command} " in shown
    assert "--json" in shown


# -- distill ---------------------------------------------------------------------------------------


@pytest.fixture
def distilling(generating, tmp_path):
    """A command line that trains on shards of colours."""
    net = tmp_path / "net.py"
    net.write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    line = ["distill", "--shards", generating[2], "--student", f"{net}:build", "--epochs", "2"]
    return [*line, "--batch-size", "5", "--out", str(tmp_path / "run")]


ONLINE = ["--size", "16", "--view", "random-crop"]


def test_distill_mixes_while_it_trains_and_holds_a_tenth_out(distilling, generating, capsys):
    teacher = ["--teacher", generating[generating.index("--teacher") + 1]]
    assert main([*distilling, *teacher, *ONLINE, "--kd", "both", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["student_samples"] == 2 * 2 * 19  # of 22, three are held out
    assert found["teacher_calls"] > 0
    assert 0 <= found["top1"] <= 1
    assert found["agreement"] is not None
    assert "epoch 2 of 2: loss " in captured.err
    folder = Path(distilling[-1])
    assert {path.name for path in folder.iterdir()} == {
        "best.safetensors",
        "curve.png",
        "history.json",
        "last.safetensors",
        "results.json",
    }
    assert main([*distilling, *teacher, *ONLINE, "--kd", "both"]) == 0  # finished: nothing is done
    assert "top1 " in capsys.readouterr().out


def test_distill_begins_with_weights_and_keeps_to_its_options(distilling, generating, capsys):
    teacher = ["--teacher", generating[generating.index("--teacher") + 1], *ONLINE]
    first, second = [*distilling], [*distilling]
    second[-1] += "-2"
    normal = ["--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.2"]
    assert main([*first, *teacher, *normal]) == 0
    best = f"{first[-1]}/best.safetensors"
    options = ["--kd", "both", "--kd-weight", "0.3", "--temperature", "2", "--lr", "0"]
    options += ["--unconverged", "drop", "--student-weights", best, "--json"]
    capsys.readouterr()
    assert main([*second, *teacher, *options]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["kd_weight"], settings["temperature"]) == (0.3, 2.0)
    assert settings["unconverged"] == "drop"
    one, two = load_file(best), load_file(f"{second[-1]}/best.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)  # nothing was learned
    learned = load_teacher(distilling[distilling.index("--student") + 1], weights=best)
    assert learned.mean == (0.5, 0.4, 0.3)
    assert learned.std == (0.2, 0.2, 0.2)


def test_distill_begins_with_the_weights_of_its_seed(distilling, generating):
    teacher = ["--teacher", generating[generating.index("--teacher") + 1], *ONLINE]
    begun = []
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        torch.rand(1)  # whatever was drawn before
        out = f"{distilling[-1]}-{name}"
        options = ["--learn", "originals", "--lr", "0", "--seed", seed]
        assert main([*distilling[:-1], out, *teacher, *options]) == 0
        begun.append(load_file(f"{out}/best.safetensors")["0.weight"])
    assert torch.equal(begun[0], begun[1])
    assert not torch.equal(begun[0], begun[2])


def test_distill_searches_as_it_is_told(distilling, generating, monkeypatch, capsys):
    made = []

    class Noted(SuperMix):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(options)

    monkeypatch.setattr("supermix_transforms.commands.distill.SuperMix", Noted)
    teacher = ["--teacher", generating[generating.index("--teacher") + 1], *ONLINE]
    assert main([*distilling, *teacher, "--method", "sgd", "--mask-size", "4", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["method"], settings["mask_size"]) == ("sgd", 4)
    assert made[0]["settings"] == SolverSettings(method="sgd", mask_size=4)
    assert made[0]["partners"] == "random"


def test_distill_from_recipes_needs_no_teacher(distilling, generating, capsys):
    assert main(generating) == 0
    recipes = ["--recipes", generating[4]]
    assert main([*distilling, *recipes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["top1"], found["teacher_calls"], found["student_samples"]) == (None, 0, 2 * 44)
    distilling[-1] += "-2"
    validation = ["--validation", generating[2]]
    assert main([*distilling, *recipes, *validation, "--learn", "originals", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["student_samples"] == 2 * 22
    assert found["top1"] is not None


@pytest.fixture
def photos(generating, tmp_path):
    """A folder with a subfolder for each of three colours, and the options that name it."""
    images, labels = pictures(24, size=(20, 24), dtype=torch.uint8)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "photos" / f"colour{int(label)}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(to_pil_image(image)))
    teacher = generating[generating.index("--teacher") + 1]
    return ["--images", str(tmp_path / "photos"), "--teacher", teacher, *ONLINE]


def run_of(distilling, name: str, *options: str) -> list[str]:
    """The command line without its shards, into a folder of its own."""
    return [*distilling[:1], *distilling[3:-1], f"{distilling[-1]}-{name}", *options, "--json"]


@pytest.mark.usefixtures("own_precision")
@pytest.mark.parametrize(
    "options",
    [
        ["--labels", "teacher", "--preset", "modern"],
        ["--mix", "cutmix", "--k", "3", "--augment", "cutout", "--accumulate", "2"],
        ["--learn", "originals", "--kd", "originals", "--mixed-precision", "bf16"],
        ["--partners", "matched", "--batch-size", "8"],
        ["--mix", "mixup", "--alpha", "0.5", "--target", "hard", "--num-workers", "1"],
        ["--unlabelled", "photos", "--num-workers", "1"],
    ],
)
def test_distill_reads_a_folder(distilling, photos, capsys, options):
    name = options[1]
    options = [photos[1] if option == "photos" else option for option in options]
    assert main(run_of(distilling, name, *photos, *options)) == 0
    found = json.loads(capsys.readouterr().out)
    pictures = 21 if "originals" in options else 42  # of 24, three are held out
    assert found["student_samples"] == 2 * pictures
    assert found["settings"]["images"].endswith("photos")
    assert found["agreement"] is not None
    if "teacher" in options:
        assert found["top1"] == found["agreement"]
    same = [*photos[:1], f"{photos[1]}/", *photos[2:]]
    assert main(run_of(distilling, name, *same, *options)) == 0  # finished, and not another run
    assert json.loads(capsys.readouterr().out) == found
    changed = run_of(distilling, name, *photos, *options, "--size", "12")
    assert main(changed) == 2
    assert "size 16, now 12" in capsys.readouterr().err


@pytest.mark.parametrize("hints", ["fitnet", "at", "vid", "crd"])
def test_distill_with_losses_of_features(distilling, photos, tmp_path, capsys, hints):
    net = tmp_path / "staged.py"
    net.write_text(
        "from torch import nn\n\n\nclass Staged(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())\n"
        "        self.layer2 = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())\n"
        "        self.fc = nn.Linear(6, 4)\n\n"
        "    def forward(self, images):\n"
        "        return self.fc(self.layer2(self.layer1(images)).mean(dim=(2, 3)))\n"
    )
    words = [*photos[:2], "--teacher", f"{net}:Staged", *ONLINE, "--hints", hints]
    line = run_of(distilling, hints, *words, "--student", f"{net}:Staged")
    assert main([*line, "--learn", "originals"]) == 0
    assert json.loads(capsys.readouterr().out)["student_samples"] == 2 * 21
    best = load_file(Path(f"{distilling[-1]}-{hints}") / "best.safetensors")
    assert {name.partition(".")[0] for name in best} == {"layer1", "layer2", "fc"}


def test_distill_tells_a_tracker(distilling, photos, capsys):
    assert main(run_of(distilling, "tracked", *photos, "--tracker", "tensorboard")) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(f"{distilling[-1]}-tracked") / "supermix"
    events = EventAccumulator(str(folder))
    events.Reload()
    assert len(events.Scalars("loss")) == 2
    assert {"loss", "top1", "top5", "ece"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "distill: expected --teacher, --recipes or --mixed-shards, got none of them"),
        (["--learn", "originals"], "distill: expected a number of classes, got no teacher"),
        (["--recipes", "x", "--augment", "cutout"], "distill: expected no --augment with --rec"),
        (["--recipes", "x", "--num-classes", "9", "--k", "3"], "distill: expected no --num-cl"),
        (["--learn", "originals", "--mix", "mixup"], "distill: expected no --mix with --learn"),
        (["--recipes", "x", "--method", "paper"], "distill: expected no --method with --recipes"),
        (["--recipes", "x", "--weights", "w.pt"], "distill: expected no --weights with no --teach"),
        (["--images", "photos"], "pictures: expected one of --shards, --images, --dataset, got"),
        (["--learn", "originals", "--num-classes", "4", "--hints", "at"], "hints: at expected a"),
        (["--recipes", "x", "--accumulate", "0"], "accumulate: expected at least 1 step, got 0"),
        (["--recipes", "x", "--temperature", "2"], "distill: expected no --temperature with --kd"),
        (
            ["--learn", "originals", "--target", "hard"],
            "distill: expected no --target with --learn",
        ),
        (["--recipes", "nowhere"], "recipes: expected a folder that `supermix generate` wrote"),
        (["--teacher", "timm/nothing"], "teacher: expected a classifier of timm"),
        (
            ["--learn", "originals", "--num-classes", "4", "--student", "timm/nothing"],
            "student: expected a classifier of timm",
        ),
    ],
)
def test_distill_says_what_is_wrong(distilling, capsys, options, message):
    assert main([*distilling, *options]) == 2
    assert f"supermix: error: {message}" in capsys.readouterr().err
