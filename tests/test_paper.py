"""The scripts of the paper's tables and figures, in small, on real pictures with a real teacher."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from supermix_transforms import ShardSampler
from supermix_transforms.offline.replaying import ReplayedMix
from supermix_transforms.training import PAPER, make_accelerator

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "own_precision")]


@pytest.fixture
def script(monkeypatch):
    """A script of examples/paper, imported anew, whose runs judge on 1,000 pictures."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    monkeypatch.syspath_prepend(EXAMPLES / "paper")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def load(name: str):
        monkeypatch.setattr(importlib.import_module("students"), "HELD_OUT", 1000)
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if EXAMPLES in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("students")


def run(module, monkeypatch, data, work, *options: str) -> list[dict]:
    out = work / f"{module.__name__}.json"
    words = ["--data", str(data), "--work", str(work), "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    module.main()
    return json.loads(out.read_text())["results"]


# bf16 takes ten times as long on a CPU that has no instructions for it
SMALL = ("--pictures", "1000", "--mixes", "1000", "--steps", "8", "--float32")


def test_table_2_trains_each_kind_of_student(script, monkeypatch, data, work, capsys):
    methods = ["kd", "at", "crd-kd", "unlabelled-hard", "supermix-hard-kd"]
    table = script("table2")
    found = run(table, monkeypatch, data, work, *SMALL, "--methods", *methods)
    assert [result["method"] for result in found] == methods
    for result in found:
        assert 0 <= result["top1"] <= result["top5"] <= 1
        # an epoch of 128 originals and 128 mixes a step, or two of 128 originals
        assert result["student_samples"] == 2000
    assert table.PAPER["supermix-hard-kd"] == 73.19
    shown = json.loads(capsys.readouterr().out)
    assert shown["paper_top1"]["kd"] == 70.66
    again = run(table, monkeypatch, data, work, *SMALL, "--methods", *methods, "ce")
    assert again[: len(found)] == found  # nothing is run again
    assert again[-1]["method"] == "ce"


def test_tables_1_and_3_train_their_students(script, monkeypatch, data, work, capsys):
    (policy,) = run(
        script("table1"), monkeypatch, data, work, *SMALL, "--methods", "pba-cifar10+cutout"
    )
    assert (policy["teacher"], policy["student"]) == ("resnet20", "resnet20")
    assert policy["student_samples"] == 2000
    table3 = script("table3")
    methods = ["at", "vid", "cutmix-hard"]
    *others, _ = run(table3, monkeypatch, data, work, *SMALL, "--methods", *methods)
    assert {other["student"] for other in others} == {"shufflenet_v2_x0_5"}
    assert {other["student_samples"] for other in others} == {2000}
    assert "paper: 73.4" in capsys.readouterr().err


def test_the_same_students_are_measured_on_the_test_set_and_none_is_trained(
    script, monkeypatch, data, work
):
    students = script("students")
    train, held_out, test = students.shards_of(data, work)
    some = train, held_out, test[:1]  # 1,000 pictures
    monkeypatch.setattr(students, "shards_of", lambda *_: some)
    asked = [*SMALL, "--methods", "cutmix-hard"]
    with pytest.raises(ValueError, match="--test: expected a student that was trained"):
        run(students, monkeypatch, data, work, *asked, "--test")
    (held_out,) = run(students, monkeypatch, data, work, *asked)
    runs = {path: path.read_bytes() for path in work.glob("runs/cutmix-hard-0-8*/*.safetensors")}
    assert runs
    *_, tested = run(students, monkeypatch, data, work, *asked, "--test")
    assert {path: path.read_bytes() for path in runs} == runs
    assert tested["test"]
    assert not held_out["test"]
    assert tested["student_samples"] == held_out["student_samples"]
    assert 0 < tested["ece"] != held_out["ece"]  # of other pictures


def test_the_set_s_own_teacher_finds_its_labels_right_and_another_network_less(
    script, monkeypatch, data, work, capsys
):
    students, labels = script("students"), script("labels")
    train, *_ = students.shards_of(data, work)
    case = students.Case("cutmix-hard", pictures=1000, mixes=1000)
    folder = students.recipes_of(case, data, work, train[:1])
    monkeypatch.setattr(
        sys, "argv", ["labels", "--data", str(data), "--work", str(work), "--sets", folder.name]
    )
    found = []
    for judge in ("resnet56", "resnet20"):
        net = students.cifar_teacher(data, "cifar100", net=judge)
        monkeypatch.setattr(labels, "cifar_teacher", lambda *_, net, known=net: known)
        labels.main()
        (figures,) = json.loads(capsys.readouterr().out).values()
        found.append(figures)
    own, other = found
    assert own["another's class is the label"] > 0.99
    assert own["KL"] < 0.05
    assert other["another's class is the label"] < 0.7
    assert other["KL"] > 0.5
    assert 0.4 < other["hard label is the heavier source's"] < other["largest probability"] < 0.9


@pytest.mark.parametrize(("float32", "precision"), [(None, "bf16"), (True, "no")])
def test_students_are_trained_in_bf16_unless_float32_is_asked(
    script, monkeypatch, data, tmp_path, float32, precision
):
    class Asked(Exception):
        pass

    def asked(settings, mixed_precision):
        raise Asked(mixed_precision)

    students = script("students")
    loaders = SimpleNamespace(train=range(8))
    monkeypatch.setattr(students, "data_of", lambda *_: loaders)
    monkeypatch.setattr(students, "make_accelerator", asked)
    case = students.Case("kd", float32=float32)
    with pytest.raises(Asked, match=f"^{precision}$"):
        students.figures_of(case, data, tmp_path, compiled=False)


def test_steps_are_whole_epochs(script):
    students = script("students")
    assert students.settings_of(students.Case("cutmix-hard", steps=792), 47).epochs == 17
    assert students.settings_of(students.Case("kd", steps=792), 47).epochs == 34
    with pytest.raises(ValueError, match=r"expected a multiple of the 157 steps .* got 32"):
        students.settings_of(students.Case("cutmix-hard", steps=32), 157)


def test_a_case_with_another_alpha_is_another_case(script, tmp_path, monkeypatch):
    students = script("students")
    asked = []
    monkeypatch.setattr(
        students, "figures_of", lambda case, *_: asked.append(case) or students.asdict(case)
    )
    case = students.Case("cutmix-hard")
    options = argparse.Namespace(out=tmp_path / "a.json", data=None, work=None, compile=False)
    for alpha in (3.0, None, 3.0, None):
        students.run_all([students.replace(case, alpha=alpha)], options)
    assert [each.alpha for each in asked] == [3.0, None]


def test_figure_6_varies_one_thing(script):
    figure = script("figure6")
    case = script("students").Case("cutmix-hard", pictures=2000, mixes=2000)
    assert [new.k for new in figure.varied(case, "k")] == [2, 3, 4]
    assert [new.mixes for new in figure.varied(case, "size")] == [2000, 4000, 10_000, 20_000]
    assert {new.alpha for new in figure.varied(case, "size")} == {1.0}
    assert [new.lambda_s for new in figure.varied(case, "lambda_s")][2] == 25.0


def test_mixes_lag_behind_their_originals(script):
    students = script("students")
    made = [[ReplayedMix(f"mix {n}", f"image {n}", n, n, None, 0)] for n in range(5)]
    train = SimpleNamespace(collate_fn=lambda mixes: mixes[0], sampler=None)
    case = students.Case("supermix-soft", lag=2)
    loaders = students.reordered(SimpleNamespace(train=train), case)
    found = [loaders.train.collate_fn(batch) for batch in made]
    assert [mix.image for mix in found] == [f"image {n}" for n in range(5)]
    assert [mix.label for mix in found] == list(range(5))
    assert [mix.mixed for mix in found] == [f"mix {n}" for n in (0, 0, 0, 1, 2)]


@pytest.mark.parametrize("fixed", [True, None])
def test_a_fixed_order_is_that_of_the_first_epoch_in_every_epoch(script, fixed):
    students = script("students")

    class Numbers(list):
        lengths = (20, 20)

    numbers = Numbers(range(40))
    train = DataLoader(numbers, 40, sampler=ShardSampler(numbers))
    loaders = students.reordered(SimpleNamespace(train=train), students.Case("x", fixed=fixed))
    prepared = make_accelerator(PAPER).prepare(loaders.train)
    orders = []
    for epoch in range(2):
        prepared.set_epoch(epoch)
        orders.append(next(iter(prepared)).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert (orders[0] == orders[1]) == bool(fixed)


@pytest.mark.parametrize(
    ("words", "method", "student"),
    [
        ([], "mixup-hard", "resnet20"),
        (["--methods", "cutmix-soft", "--student", "resnet8"], "cutmix-soft", "resnet8"),
    ],
)
def test_figure_6_is_of_the_papers_labels_unless_asked(
    script, monkeypatch, tmp_path, words, method, student
):
    figure = script("figure6")
    found = []
    monkeypatch.setattr(figure, "run_all", lambda cases, options, **content: found.extend(cases))
    words = ["figure6", "--panel", "k", "--work", str(tmp_path), *words]
    monkeypatch.setattr(sys, "argv", words)
    figure.main()
    assert [(case.method, case.student, case.k) for case in found[:3]] == [
        (method, student, k) for k in (2, 3, 4)
    ]
    assert {case.method for case in found} <= {method, "cutmix-hard", "supermix-hard"}


def test_figure_7_finds_the_order_of_the_paper(script, monkeypatch, data, tmp_path, capsys):
    out = tmp_path / "figure7.json"
    words = ["figure7", "--data", str(data), "--out", str(out), "--count", "200"]
    monkeypatch.setattr(sys, "argv", words)
    script("figure7").main()
    content = json.loads(out.read_text())
    for split in ("train", "test"):
        entropy = [values["entropy"] for values in content[f"b, {split}"].values()]
        assert entropy == sorted(entropy)  # originals, MixUp, CutMix, SuperMix
    points = content["a, test"]["SuperMix"]["points"]
    assert len(points) == 3
    assert "SuperMix" in capsys.readouterr().out


def test_every_figure_is_drawn_of_committed_results_and_packaged_pictures(
    script, monkeypatch, tmp_path
):
    figures = script("figures")
    for name in ("SIGMAS", "SPARSITIES", "LAMBDAS"):
        monkeypatch.setattr(figures, name, getattr(figures, name)[1:2])
    monkeypatch.setattr(sys, "argv", ["figures", "--out", str(tmp_path)])
    figures.main()
    wanted = {"figure4.jpg", "figure4-paper.jpg", "figure5.jpg"}
    wanted |= {f"figure7{panel}.png" for panel in "abc"}
    assert {path.name for path in tmp_path.iterdir()} >= wanted
    drawn = Path(figures.ROOT, "docs", "images")
    assert wanted <= {path.name for path in drawn.iterdir()}  # and are in the docs


def test_figure_6_has_a_curve_a_method_over_the_values_of_the_setting(script):
    rows = [
        {"method": method, "k": k, "mixes": 1000, "top1": 0.1 * k, "seed": seed}
        for method in ("cutmix-hard", "supermix-hard")
        for k in (2, 3)
        for seed in (0, 1)
    ]
    (axes,) = script("figures").figure6({"results": rows}, "k").axes
    assert axes.get_xlabel() == "k"
    assert [box.lines[0].get_xydata().tolist() for box in axes.containers] == [
        [[2, pytest.approx(20)], [3, pytest.approx(30)]]
    ] * 2


def test_a_table_has_means_standard_errors_and_paired_differences(script):
    plain = {
        "pictures": 2000,
        "mixes": 4000,
        "steps": 9,
        "teacher": "a",
        "student": "b",
        "window": 16,
        "test": False,
    }
    tops = {"cutmix-hard": {0: 0.2, 1: 0.4}, "supermix-hard": {1: 0.45, 0: 0.21}, "ce": {2: 0.1}}
    rows = [
        plain | {"method": method, "seed": seed, "top1": top}
        for method, found in tops.items()
        for seed, top in found.items()
    ]
    table = script("students").table
    assert sum("window 0" in line for line in table([*rows, rows[0] | {"window": 0}])) == 1
    title, *lines = table(rows)
    assert title == "2,000 pictures, 4,000 mixes, 9 steps, a to b, window 16"
    assert [" ".join(line.split()) for line in lines] == [
        "cutmix-hard 30.00 ± 10.00 2 seeds",
        "supermix-hard 33.00 ± 12.00 +3.00 ± 2.00 2 seeds",
        "ce 10.00 1 seed",
    ]
