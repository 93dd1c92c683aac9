"""The benchmark script on real pictures with a real teacher, a few of them."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import solver

    yield solver
    del sys.modules["solver"], sys.modules["real_data"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "partners", "least", "most_sparsity", "most_pairs"),
    [
        ("fast", "random", 0.98, 0.075, 3.0),
        ("fast", "matched", 0.98, 0.075, 2.0),
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
