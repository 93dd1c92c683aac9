"""The order of all passes, cut into units."""

import pytest

from supermix_transforms import ShardSampler
from supermix_transforms.offline.units import Order, Places


class Lengths:
    lengths = (7, 5, 9)


def order(passes: int = 2) -> Order:
    return Order(ShardSampler(Lengths(), seed=3, window=2), passes, 4, 2)


def test_each_pass_has_each_sample_once():
    units = list(order().units(set(order().names)))
    assert len(units) == len(order()) == 6
    assert [unit.name for unit in units] == order().names
    for epoch in range(2):
        samples = [i for u in units if u.epoch == epoch for batch in u.batches for i in batch]
        assert sorted(samples) == list(range(21))
    assert units[0].batches != units[3].batches
    assert [len(batch) for batch in units[2].batches] == [4, 1]


def test_wanted_units_are_as_in_the_whole():
    whole = {unit.name: unit for unit in order().units(set(order().names))}
    some = {"000-000001", "001-000002"}
    assert {unit.name: unit for unit in order().units(some)} == {n: whole[n] for n in some}
    places = [place for batch in Places(order(), some) for place in batch]
    units = [whole[name] for name in sorted(some)]
    assert places == [(u.epoch, i) for u in units for batch in u.batches for i in batch]


@pytest.mark.parametrize("passes", [1, 3])
def test_more_passes_change_no_earlier_one(passes):
    names = set(order(1).names)
    assert list(order(passes).units(names)) == list(order(1).units(names))
