"""Draws: the same for the same samples, in any batch; tuples whose classes are apart."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from supermix_transforms import draws
from supermix_transforms.draws import Draw, Purpose, draw_ring, draw_weights, generator

pytestmark = pytest.mark.usefixtures("one_thread")


def identities(count: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (count,), generator=source)


def by_identity(ids: Tensor, sources: Tensor) -> dict[int, list[int]]:
    return {row[0]: row for row in ids[sources].tolist()}


# -- tuples and weights ----------------------------------------------------------------------------


@given(
    count=st.integers(2, 12),
    k=st.integers(2, 4),
    classes=st.none() | st.integers(1, 6),
    seed=st.integers(0, 2**40),
)
def test_a_tuple_starts_with_its_own_row_and_holds_k_pictures(count, k, classes, seed):
    k = min(k, count)
    labels = None if classes is None else torch.randint(classes, (count,))
    sources = draw_ring(Draw(seed, 0, identities(count)), labels, k)
    assert (sources.shape, sources.dtype) == ((count, k), torch.int64)
    assert_close(sources[:, 0], torch.arange(count))
    assert all(len(set(row)) == k for row in sources.tolist())
    # a ring: every picture is used once in each place
    for place in range(k):
        assert_close(sources[:, place].sort().values, torch.arange(count))


@pytest.mark.parametrize("labelled", [False, True])
def test_the_same_samples_draw_the_same_and_another_epoch_or_seed_does_not(labelled):
    ids = identities(9)
    classes = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4]) if labelled else None

    def draw(*what, **more):
        sources = draw_ring(Draw(*what, ids, **more), classes, 3)
        return sources, draw_weights(Draw(*what, ids, **more), sources, 3.0)

    first = draw(1, 2)
    assert_close(draw(1, 2), first, rtol=0, atol=0)
    for other in (draw(1, 3), draw(2, 2), draw(1, 2, attempt=1)):
        assert not torch.equal(other[0], first[0])
        assert (other[1] != first[1]).any(dim=1).all()


@given(
    order=st.permutations(range(9)),
    classes=st.none() | st.lists(st.integers(0, 3), min_size=9, max_size=9),
)
def test_the_draw_does_not_depend_on_the_batchs_order(order, classes):
    ids, order = identities(9), torch.tensor(order)
    labels = None if classes is None else torch.tensor(classes)
    draw = Draw(5, 1, ids)
    sources = draw_ring(draw, labels, 3)
    turned = Draw(5, 1, ids[order])
    other = draw_ring(turned, None if labels is None else labels[order], 3)
    assert by_identity(ids[order], other) == by_identity(ids, sources)
    weights = draw_weights(draw, sources, 3.0)
    assert_close(draw_weights(turned, other, 3.0), weights[order], rtol=0, atol=0)


def test_distinct_samples_have_distinct_weights():
    draw = Draw(0, 0, identities(500))
    sources = draw_ring(draw, None, 2)
    weights = draw_weights(draw, sources, 3.0)
    assert len(weights[:, 0].unique()) > 495
    again = draw_weights(draw, sources[:3], 3.0)  # whatever else is drawn
    assert_close(again, weights[:3], rtol=0, atol=0)


@pytest.mark.parametrize(("k", "alpha"), [(2, 3.0), (3, 3.0), (2, 0.5), (4, 20.0)])
def test_weights_are_dirichlet(k, alpha):
    draw = Draw(0, 0, identities(4000))
    weights = draw_weights(draw, draw_ring(draw, None, k), alpha)
    assert (weights.shape, weights.dtype) == ((4000, k), torch.float32)
    assert (weights >= 0).all()
    assert_close(weights.sum(dim=1), torch.ones(4000))
    variance = (1 / k) * (1 - 1 / k) / (k * alpha + 1)
    assert_close(weights.mean(dim=0), torch.full((k,), 1 / k), atol=0.02, rtol=0)
    assert_close(weights.var(dim=0), torch.full((k,), variance), rtol=0.1, atol=0)
    assert draw_weights(draw, torch.zeros(0, k, dtype=torch.int64), alpha).shape == (0, k)


def test_purposes_have_streams_of_their_own():
    draw = Draw(0, 0, identities(2))
    values = {generator(draw, ids, p).random() for ids in ([1, 2], [2, 1], [-1]) for p in Purpose}
    assert len(values) == 3 * len(Purpose)


# -- classes apart ---------------------------------------------------------------------------------


def clashes(sources: Tensor, classes: Tensor) -> int:
    """Tuples that hold a class twice."""
    return sum(len(set(row)) < len(row) for row in classes[sources].tolist())


@st.composite
def balanced(draw) -> tuple[int, list[int]]:
    """k and classes of a batch: k divides its size, no class has more than its k-th part."""
    k = draw(st.integers(2, 4))
    share = draw(st.integers(1, 7))
    counts: list[int] = []
    while sum(counts) < k * share:
        most = min(share, k * share - sum(counts))
        counts.append(draw(st.integers(1, most)))
    classes = [c for c, count in enumerate(counts) for _ in range(count)]
    return k, draw(st.permutations(classes))


@settings(max_examples=300)
@given(case=balanced(), seed=st.integers(0, 1000))
def test_classes_are_apart_wherever_the_batch_allows_it(case, seed):
    k, classes = case[0], torch.tensor(case[1])
    sources = draw_ring(Draw(seed, 0, identities(len(classes), seed)), classes, k)
    assert clashes(sources, classes) == 0


@example(k=4, seed=0, count=33)  # one pass of swaps leaves a clash here
@given(k=st.integers(2, 4), seed=st.integers(0, 50), count=st.integers(12, 40))
def test_ordinary_batches_have_no_clash(k, seed, count):
    classes = torch.arange(count) % 10  # k may not divide the count
    sources = draw_ring(Draw(seed, 0, identities(count, seed)), classes, k)
    assert clashes(sources, classes) == 0


def test_a_batch_without_clashes_keeps_its_random_ring():
    ids = identities(9)
    draw = Draw(0, 0, ids)
    assert_close(draw_ring(draw, torch.arange(9), 3), draw_ring(draw, None, 3))


def test_separating_helps_even_where_it_can_not_cure():
    ids, classes = identities(10), torch.tensor([0] * 7 + [1, 2, 3])
    draw = Draw(0, 0, ids)
    assert clashes(draw_ring(draw, classes, 2), classes) == 4  # the least there can be
    assert clashes(draw_ring(draw, None, 2), classes) >= 4


def test_a_large_batch_that_no_ring_can_separate_is_dealt_at_once():
    compared = 0

    class Label(int):
        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return int(self) == int(other)

        __hash__ = int.__hash__

    count = 256
    classes = [0] * 160 + list(range(1, 97))
    ring = torch.tensor(draws._separate(list(range(count)), list(map(Label, classes)), 2))
    assert 0 < compared < 20 * count
    pairs = torch.stack([ring, ring.roll(-1)], dim=1)
    assert clashes(pairs, torch.tensor(classes)) == 64  # 160 and 96: the least there can be


def test_one_class_is_no_error():
    sources = draw_ring(Draw(0, 0, identities(5)), torch.zeros(5, dtype=torch.int64), 3)
    assert all(len(set(row)) == 3 for row in sources.tolist())
