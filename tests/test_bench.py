"""The benchmark as a whole: its files, its rows, what is null, and what it refuses."""

import json
import math
from dataclasses import asdict, fields

import pytest
import torch
from colours import Stubborn
from colours import pictures as colour_pictures
from picky import picky_labeler, picky_pictures
from PIL import Image

from supermix_transforms import TeacherLabeler
from supermix_transforms.commands.bench import (
    METHODS,
    BenchReport,
    BenchRow,
    bench,
    make_row,
    print_report,
)
from supermix_transforms.commands.measured import Measured, Sample, wilson

pytestmark = pytest.mark.usefixtures("one_thread")

ROW_KEYS = {
    *("name", "tuples", "max_steps", "converged", "converged_interval", "sparsity", "steps"),
    *("forwards_per_image", "backwards_per_image", "ms_per_converged_image", "ms_range"),
    *("ratio_to_fast", "ratio_to_lower_limit", "at_largest_limit", "skipped", "same_as"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> BenchReport:
    """All methods on 12 tuples in two batches; the slow ones on the first."""
    return run(tmp_path_factory.mktemp("bench") / "new" / "out", name="picky")


def run(out, labeler=None, pictures=None, **options) -> BenchReport:
    given = {"count": 12, "slow_count": 5, "batch_size": 6, "repeats": 1} | options
    pictures = picky_pictures() if pictures is None else pictures
    return bench(pictures, labeler or picky_labeler(), out=out, **given)


def row(report, name) -> BenchRow:
    (found,) = (each for each in report.methods if each.name == name)
    return found


def stubborn() -> dict:
    """A teacher without class maps that no mix convinces, and pictures of its colours."""
    images, labels = colour_pictures(16, dtype=torch.uint8)
    pictures = [(str(i), image) for i, image in enumerate(images) if labels[i] < 3]
    net = Stubborn()
    return {"labeler": TeacherLabeler(lambda images: net(images)), "pictures": pictures}


# -- what comes out --------------------------------------------------------------------------------


def test_the_json_is_the_report_with_the_keys_that_others_read(report):
    with open(f"{report.out}/bench.json", encoding="utf-8") as file:
        written = json.load(file)
    assert written == json.loads(json.dumps(asdict(report), allow_nan=False))
    assert [each["name"] for each in written["methods"]] == list(METHODS)
    assert all(set(each) == ROW_KEYS for each in written["methods"])
    assert written["teacher"] == "picky"
    assert written["seed"] == 0
    assert written["threads"] == 1
    assert written["device"].startswith("cpu")
    assert set(written["versions"]) == {"supermix-transforms", "torch", "torchvision"}
    assert written["size"] == [17, 15]
    assert (written["k"], written["alpha"], written["repeats"]) == (2, 3.0, 1)
    assert (written["pictures"], written["batch_size"]) == (12, 6)


def test_the_chart_is_a_picture(report):
    with Image.open(report.chart) as chart:
        assert chart.format == "PNG"
        assert chart.width > 600


def test_slow_methods_have_the_first_batches_only(report):
    quick = {"fast", "fast-matched", "mixup", "cutmix", "lower-limit"}
    assert {each.name: each.tuples for each in report.methods} == {
        name: 12 if name in quick else 6 for name in METHODS
    }


def test_figures_belong_together(report):
    for each in report.methods:
        if each.name == "lower-limit":
            continue
        converged = round(each.converged * each.tuples)
        assert each.converged == pytest.approx(converged / each.tuples, abs=1e-4)
        assert each.converged_interval == wilson(converged, each.tuples)
        assert (each.ms_per_converged_image is None) == (converged == 0)
        if converged:
            least, most = each.ms_range
            assert 0 < least <= each.ms_per_converged_image <= most
            assert 0 <= each.sparsity <= 0.25
    assert row(report, "fast").ratio_to_fast == 1
    assert row(report, "fast").converged > 0.8
    assert row(report, "fast").max_steps == 20
    assert row(report, "fast").at_largest_limit is None
    assert row(report, "mixup").max_steps is None
    assert row(report, "mixup").forwards_per_image == 1


def test_baselines_are_shown_at_a_limit_of_their_own_and_at_the_largest(report):
    for name in ("paper", "authors"):
        each = row(report, name)
        assert 0 < each.steps <= each.max_steps <= each.at_largest_limit.max_steps == 50
        assert each.at_largest_limit.converged >= each.converged
        assert each.at_largest_limit.ms_per_converged_image >= each.ms_per_converged_image


def test_the_lower_limit_mixes_nothing(report):
    lower = row(report, "lower-limit")
    assert (lower.converged, lower.sparsity, lower.max_steps) == (None, None, None)
    assert (lower.forwards_per_image, lower.backwards_per_image) == (3, 1)
    assert lower.ms_per_converged_image > 0
    assert lower.ratio_to_lower_limit == 1


def test_all_but_the_times_is_the_same_in_every_run(report, tmp_path):
    again = run(tmp_path, methods=["mixup", "fast", "fast-matched"])
    assert [each.name for each in again.methods] == ["mixup", "fast", "fast-matched"]
    for each in again.methods:
        for field in fields(each):
            if "ms" not in field.name and "ratio" not in field.name:
                assert getattr(each, field.name) == getattr(row(report, each.name), field.name)


def test_the_authors_loop_is_not_run_twice_where_ours_is_float32(report):
    same, own = row(report, "authors-same-dtype"), row(report, "authors")
    assert same.same_as == "authors"
    assert own.same_as is None
    assert asdict(same) | {"name": "authors", "same_as": None} == asdict(own)


def test_the_authors_loop_is_run_twice_where_ours_is_not(tmp_path):
    names = ["authors", "authors-same-dtype"]
    labeler = picky_labeler(torch.bfloat16)
    for each in run(tmp_path, labeler, methods=names, count=6).methods:
        assert each.same_as is None
        assert each.tuples == 6


def test_nothing_converged_is_null(tmp_path):
    names = ["fast", "paper", "authors", "mixup"]
    done = run(tmp_path, **stubborn(), methods=names)
    for each in done.methods:
        assert each.converged == 0
        assert each.converged_interval[0] == 0
        for name in ("ms_per_converged_image", "ms_range", "ratio_to_fast", "sparsity"):
            assert getattr(each, name) is None
        assert each.ratio_to_lower_limit is None
    for name in ("paper", "authors"):
        each = row(done, name)
        assert each.max_steps == 50
        assert each.at_largest_limit.ms_per_converged_image is None
    assert json.loads((tmp_path / "bench.json").read_text())["methods"][0]["sparsity"] is None


def test_a_teacher_without_class_maps_skips_matched_partners(tmp_path, capsys):
    done = run(tmp_path, **stubborn(), methods=["fast-matched", "mixup"])
    skipped = row(done, "fast-matched")
    assert "no class maps" in skipped.skipped
    assert (skipped.tuples, skipped.converged, skipped.steps) == (0, None, None)
    assert row(done, "mixup").skipped is None
    print_report(done)
    shown = capsys.readouterr().out
    assert "fast-matched skipped: the teacher has no class maps" in shown


def test_a_benchmark_of_skipped_methods_only_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected one that this teacher allows, got fast-matched"):
        run(tmp_path, **stubborn(), methods=["fast-matched"])
    assert not any(tmp_path.iterdir())


def test_the_report_is_a_table_of_80_columns_with_a_row_for_each_method(report, capsys, tmp_path):
    print_report(report)
    shown, errors = capsys.readouterr()
    rows = [line.split() for line in shown.splitlines() if line.split()[:1] and " " in line.strip()]
    names = [words[0] for words in rows if words[0] in METHODS]
    assert names == list(METHODS)
    fast = next(words for words in rows if words[0] == "fast")
    assert fast[1:4] == ["12", "20", f"{row(report, 'fast').converged:.0%}"]
    assert fast[-1] == "1.00"
    assert report.chart in shown
    assert "…" not in shown
    assert errors == ""  # no progress where there is no terminal


# -- rows from numbers that are given --------------------------------------------------------------


def sample(*passed: bool) -> Sample:
    ones = torch.ones(len(passed))
    return Sample(torch.tensor(passed), ones.long(), 3 * ones, ones, 0.1 * ones)


def test_ratios_are_over_the_batches_that_both_have():
    measured = {
        "fast": Measured([sample(True, True), sample(True, False)], [[(1.0,), (9.0,)]]),
        "paper": Measured([sample(True, False)], [[(3.0,)]]),
        "lower-limit": Measured(
            [sample(True, True), sample(True, True)], [[(0.1, 0.3, 0.4), (0.5, 0.7, 0.8)]]
        ),
    }
    paper = make_row("paper", measured, 50)
    assert paper.ms_per_converged_image == 3000
    assert paper.ratio_to_fast == 3000 / 500  # not 3000 / (10000 / 3)
    assert paper.ratio_to_lower_limit == 3000 / 200
    assert make_row("fast", measured, 20).ratio_to_fast == 1


def test_sparsity_is_that_of_converged_mixes_and_calls_are_those_of_all():
    mixed = Sample(
        passed=torch.tensor([True, False]),
        steps=torch.tensor([2, 20]),
        forwards=torch.tensor([4.0, 22.0]),
        backwards=torch.tensor([2.0, 20.0]),
        sparsity=torch.tensor([0.07, 0.2]),
    )
    lower = Measured([sample(True, True)], [[(0.1, 0.3, 0.4)]])
    measured = {"fast": Measured([mixed], [[(1.0,)], [(3.0,)]]), "lower-limit": lower}
    fast = make_row("fast", measured, 20)
    assert fast.sparsity == pytest.approx(0.07)
    assert (fast.steps, fast.forwards_per_image, fast.backwards_per_image) == (11, 13, 11)
    assert (fast.converged, fast.ms_per_converged_image) == (0.5, 2000)
    assert fast.ms_range == (1000, 3000)


def test_without_fast_there_is_no_ratio_to_it():
    measured = {
        "paper": Measured([sample(True, False)], [[(3.0,)]]),
        "lower-limit": Measured([sample(True, True)], [[(0.1, 0.3, 0.4)]]),
    }
    paper = make_row("paper", measured, 50)
    assert paper.ratio_to_fast is None
    assert math.isclose(paper.ratio_to_lower_limit, 15)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["fast", "papper"]}, "got 'papper'. Did you mean paper"),
        ({"methods": ["adam"]}, "methods: expected some of fast, fast-matched, .* got 'adam'"),
        ({"methods": []}, "methods: expected each name once, got none. Name at least one"),
        ({"methods": ["fast", "fast"]}, "methods: expected each name once, got one twice"),
        ({"k": 1}, "k: expected an integer of at least 2"),
        ({"alpha": 0.0}, "alpha: expected a positive number"),
        ({"k": 3, "count": 2}, "count: expected at least k = 3 tuples, got 2"),
        ({"k": 3, "batch_size": 2}, "batch_size: expected at least k = 3 pictures, got 2"),
        ({"slow_count": 0}, "slow_count: expected at least 1, got 0"),
        ({"repeats": 0}, "repeats: expected at least 1, got 0"),
        ({"pictures": picky_pictures(1)}, "images: expected at least k = 2 pictures, got 1"),
        (
            {"pictures": [(name, image / 255) for name, image in picky_pictures()]},
            "expected uint8 pictures",
        ),
    ],
)
def test_bad_input_says_what_was_expected(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_an_output_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out: expected a folder, got the file"):
        run(tmp_path / "file")


def test_pictures_are_read_only_as_far_as_they_are_needed(tmp_path):
    taken = []

    def many():
        for picture in picky_pictures():
            taken.append(picture)
            yield picture

    run(tmp_path, pictures=many(), methods=["mixup"], count=4)
    assert len(taken) == 4


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_measured(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "supermix_transforms.commands.bench.measure", lambda *_: pytest.fail("it was measured")
    )
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "out")
