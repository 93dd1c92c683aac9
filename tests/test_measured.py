"""Figures of a benchmark from numbers that are given, not measured."""

import math

import pytest
import torch
from scipy.stats import binomtest

from supermix_transforms.commands.measured import Measured, Sample, backward_weight, wilson


def search(steps, passed, *, largest) -> Sample:
    """A search whose rows leave the batch: a check more than steps, and the original."""
    steps = torch.tensor(steps)
    return Sample(
        passed=torch.tensor(passed),
        steps=steps,
        forwards=steps + 2.0,
        backwards=torch.where(steps < largest, steps + 1.0, steps.float()),
        sparsity=torch.full((len(passed),), 0.1),
    )


def loop(finished, passed) -> Sample:
    finished = torch.tensor(finished)
    steps = torch.full((finished.shape[1],), len(finished))
    return Sample(torch.tensor(passed), steps, 2.0 * steps, steps.float(), steps * 0.1, finished)


def test_a_lower_limit_takes_rows_that_needed_more_steps_away():
    at = search([0, 2, 5, 10], [True, True, True, False], largest=10).at(2)
    assert at.passed.tolist() == [True, True, False, False]
    assert at.steps.tolist() == [0, 2, 2, 2]
    assert at.forwards.tolist() == [2, 4, 4, 4]
    assert at.backwards.tolist() == [1, 2, 2, 2]


def test_a_sample_at_its_own_limit_is_itself():
    sample = search([0, 2, 10, 10], [True, False, True, False], largest=10)
    assert vars(sample.at(None)) == vars(sample)
    for name, value in vars(sample.at(10)).items():
        assert value is None or torch.equal(value, getattr(sample, name))


def test_a_row_of_the_authors_loop_counts_only_while_it_is_finished():
    sample = loop([[True, False], [False, False], [True, True]], [True, False])
    assert [sample.at(limit).passed.tolist() for limit in (1, 2, 3, 9)] == [
        [True, False],
        [False, False],
        [True, False],
        [True, False],
    ]
    assert sample.at(2).forwards.tolist() == [4, 4]
    assert sample.at(9).backwards.tolist() == [3, 3]


def test_time_of_a_search_is_shared_out_by_teacher_calls():
    sample = search([2, 8], [True, False], largest=8)
    measured = Measured([sample], [[(10.0,)]])
    # forwards 4 + 10 and backwards 3 + 8, of which a limit of 2 leaves 4 + 4 and 2 + 2
    assert measured.seconds(2, 1.5) == [pytest.approx(10 * (8 + 1.5 * 4) / (14 + 1.5 * 11))]
    assert measured.seconds(None, 1.5) == [10]
    assert measured.seconds(8, 1.5) == [10]


def test_time_of_the_authors_loop_is_read_from_its_clock():
    samples = [loop([[False], [True]], [True]), loop([[True]], [True])]
    measured = Measured(samples, [[(1.0, 3.0), (0.5,)], [(2.0, 4.0), (1.5,)]])
    assert measured.seconds(1, 2.0) == [1.5, 3.5]
    assert measured.seconds(2, 2.0) == [3.5, 5.5]
    assert measured.seconds(None, 2.0) == [3.5, 5.5]
    assert measured.seconds(None, 2.0, batches=1) == [3.0, 4.0]


def test_ms_are_the_median_over_repeats_for_each_mix_that_passed():
    sample = search([1, 1, 4], [True, True, False], largest=4)
    measured = Measured([sample, sample], [[(1.0,), (2.0,)], [(1.5,), (2.0,)], [(90.0,), (2.0,)]])
    assert measured.ms(None, 1.0) == 1000 * 3.5 / 4
    assert measured.ms(None, 1.0, batches=1) == 1000 * 1.5 / 2


def test_ms_are_none_where_nothing_passed():
    measured = Measured([search([4, 4], [False, False], largest=4)], [[(1.0,)]])
    assert measured.ms(None, 1.0) is None
    assert measured.best_limit(1.0) == 4


def test_the_best_limit_is_the_one_of_least_time_for_each_mix():
    stamps = (1.0, 1.5, 3.0)
    sample = loop([[False, False, False], [True, True, False], [True, True, True]], [True] * 3)
    assert Measured([sample], [[stamps]]).best_limit(1.0) == 2  # 0.75 s a mix, then 1
    assert Measured([sample], [[(1.0, 1.5, 2.0)]]).best_limit(1.0) == 3


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_best_limit_of_a_search_is_that_of_trying_all(weight):
    generator = torch.Generator().manual_seed(5)
    steps = torch.randint(0, 12, (40,), generator=generator)
    passed = (steps < 11) & (torch.rand(40, generator=generator) < 0.8)
    measured = Measured([search(steps.tolist(), passed.tolist(), largest=11)], [[(7.0,)]])
    costs = {limit: measured.ms(limit, weight) or math.inf for limit in range(1, 12)}
    assert costs[measured.best_limit(weight)] == min(costs.values())


def test_a_limit_is_at_least_one_step():
    assert Measured([search([0, 0], [True, True], largest=9)], [[(1.0,)]]).best_limit(2.0) == 1


def test_a_backward_weighs_what_a_pair_costs_beyond_a_check():
    lower = Measured([], [[(1.0, 5.0, 6.0), (1.0, 3.0, 4.0)], [(1.0, 5.0, 6.0), (1.0, 5.0, 6.0)]])
    # pairs 6 and 8, checks 2 and 2
    assert backward_weight(lower) == 7 / 2 - 1
    assert backward_weight(Measured([], [[(1.0, 1.5, 2.5)]])) == 0


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 3), (9, 10), (15, 15), (60, 100)])
def test_wilson_is_scipys(successes, trials):
    theirs = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-4)
