"""The benchmark script on real pictures with a real teacher, a few of them."""

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import solver

    yield solver
    del sys.modules["solver"], sys.modules["real_data"], sys.modules["reports"]


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import quality

    yield quality
    del sys.modules["quality"], sys.modules["real_data"], sys.modules["reports"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "partners", "least", "most_sparsity", "most_pairs"),
    [
        ("fast", "random", 0.98, 0.075, 2.5),
        ("fast", "matched", 0.98, 0.075, 1.8),
        ("paper", "random", 0.96, 0.25, 8.0),
    ],
)
def test_cifar10_pictures_are_mixed(
    benchmark, data, method, partners, least, most_sparsity, most_pairs
):
    images, teacher = benchmark.load(data, "cifar10")
    figures = benchmark.run(images[:100], teacher, 2, method, partners, 100)
    assert figures["converged"] >= least
    assert figures["sparsity"] <= most_sparsity
    assert figures["pairs_per_image"] <= most_pairs


def test_a_report_goes_on_where_it_was(quality, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    options = quality.options_of("Title.", "some").parse_args(["--out", str(tmp_path / "a.json")])
    first = quality.Report(options, "some", seed=1)
    assert not first.has(data="x")
    first.add({"data": "x", "k": 2})
    again = quality.Report(options, "some", seed=1)
    assert again.has(data="x", k=2)
    assert not again.has(data="x", k=3)
    assert again.content == first.content


def test_regions_are_the_connected_areas_of_one_owner(quality):
    owner = torch.zeros(20, 20, dtype=torch.long)
    assert quality.count_regions(owner) == 1
    owner[:, 10:] = 1
    assert quality.count_regions(owner) == 2
    owner[3:6, 3:6] = 1  # an island
    owner[12, 12] = 0  # too small to count
    assert quality.count_regions(owner) == 3


@pytest.mark.slow
def test_searched_mixes_show_a_second_network_more_than_blind_ones(quality, data):
    images, teacher, judge = quality.load_case(data, "cifar100 train, augmented")
    measured = quality.measure(images[:100], teacher, judge, variants=False)
    rows = {row["contender"]: row for row in quality.summary(measured)}
    for blind in ("random smooth masks", "MixUp", "CutMix"):
        assert rows[blind]["judged_less_fast"][2] < 0  # the upper end of the interval
        assert rows[blind]["kl"] > 2 * rows["fast"]["kl"]
    assert rows["fast"]["judged_less_fast"] == [0, 0, 0]
    assert rows["MixUp"]["edge_length"] == 0 < rows["fast"]["edge_length"]
