"""Mixes as records: their order, and masks that are boxes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supermix_transforms.offline.stored import _box, _by_first_use, _walk, labels_of

pytestmark = pytest.mark.usefixtures("one_thread")


def ring(count: int, k: int) -> torch.Tensor:
    order = torch.randperm(count)
    tuples = torch.stack([order.roll(-i) for i in range(k)], dim=1)
    return tuples[order.argsort()]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_ring_is_walked_round(k):
    sources = ring(20, k)
    walked = sources[_walk(sources)]
    assert torch.equal(walked[1:, 0], walked[:-1, 1])
    assert sorted(walked[:, 0].tolist()) == list(range(20))
    originals, places = _by_first_use(walked, 20)
    assert (places[:-1] == np.arange(19)[:, None] + np.arange(k))[: 20 - k].all()
    assert torch.equal(originals[places], walked)


@given(st.lists(st.integers(0, 11), min_size=12, max_size=12), st.sets(st.integers(0, 11)))
def test_any_partners_are_walked_once_each(partners, dropped):
    sources = torch.stack([torch.arange(12), torch.tensor(partners)], dim=1)
    sources = sources[[row for row in range(12) if row not in dropped]]
    assert sorted(_walk(sources)) == list(range(len(sources)))
    originals, places = _by_first_use(sources, 12)
    assert sorted(originals.tolist()) == list(range(12))
    assert torch.equal(originals[places], sources)


def test_boxes_pasted_in_turn_show_what_was_seen():
    """A box is what is left of a picture; what covers it comes later."""
    random = np.random.default_rng(0)
    for _ in range(50):
        owner = np.zeros((9, 7), dtype=np.int64)
        for number in (1, 2, 3):
            top, bottom = sorted(random.integers(0, 10, 2))
            left, right = sorted(random.integers(0, 8, 2))
            owner[top:bottom, left:right] = number
        again = np.zeros_like(owner)
        for number in (1, 2, 3):
            top, left, bottom, right = _box((owner == number).astype(np.float32))
            again[top:bottom, left:right] = number
        assert np.array_equal(again, owner)


def test_whole_labels_are_dense_and_few_classes_sparse():
    index = np.array([[2, 0, 1]], dtype="<u2")
    log_prob = np.log([[0.5, 0.3, 0.2]]).astype("<f2")
    dense = labels_of(3, index, log_prob, np.zeros(1, dtype="<f2"))
    assert dense.indices is None
    assert torch.allclose(dense.probs, torch.tensor([[0.3, 0.2, 0.5]]), atol=1e-3)
    sparse = labels_of(5, index[:, :2], log_prob[:, :2], np.array([0.2], dtype="<f2"))
    expected = torch.tensor([[0.3, 0.2 / 3, 0.5, 0.2 / 3, 0.2 / 3]])
    assert torch.allclose(sparse.probs, expected, atol=1e-3)
