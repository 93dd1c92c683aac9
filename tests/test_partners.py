"""Matched partners: easy to mix, varied, and the same for the same samples."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from supermix_transforms import partners
from supermix_transforms.draws import Draw, draw_ring
from supermix_transforms.partners import TURNS, has_turn, match_partners
from supermix_transforms.results import ClassMaps

pytestmark = pytest.mark.usefixtures("one_thread")


def identities(count: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (count,), generator=source)


def drawn(count: int, seed: int = 0, epoch: int = 0) -> Draw:
    return Draw(seed, epoch, identities(count))


def structured_maps(count: int = 24, classes: int = 8) -> tuple[ClassMaps, Tensor]:
    """Pictures that show their class in one quarter of a 4 x 4 map."""
    source = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % classes
    features = 0.3 * torch.rand(count, classes, 4, 4, generator=source)
    for row, label in enumerate(labels):
        quarter = int(torch.randint(4, (), generator=source))
        y, x = 2 * (quarter // 2), 2 * (quarter % 2)
        features[row, label, y : y + 2, x : x + 2] += 4
    return ClassMaps(features, torch.eye(classes), torch.zeros(classes)), labels


def noisy_maps(count: int, classes: int, seed: int = 0) -> tuple[ClassMaps, Tensor]:
    """Pictures of no structure, and the classes that the teacher sees in them."""
    source = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 9, 3, 2, generator=source)
    weight = torch.randn(classes, 9, generator=source)
    maps = ClassMaps(features, weight, torch.randn(classes, generator=source))
    return maps, (maps.maps().mean(dim=(2, 3)) + maps.bias).argmax(dim=1)


def pair_score(maps: ClassMaps, classes: Tensor, i: int, j: int) -> float:
    """What `match_partners` scores a pair by, cell by cell, and over all classes."""
    first, second = (m.flatten(1) for m in (maps.maps()[i], maps.maps()[j]))  # (N, hw)
    a, b = int(classes[i]), int(classes[j])
    leads = [float(first[a, u] + first[b, u] - second[a, u] - second[b, u]) for u in range(16)]
    mean = sum(leads) / 16
    spread = (sum((lead - mean) ** 2 for lead in leads) / 16) ** 0.5
    margins = []
    for balance in (-1, -0.5, 0, 0.5, 1):
        owned = [lead >= balance * spread for lead in leads]
        cells = [first[:, u] if mine else second[:, u] for u, mine in enumerate(owned)]
        logits = sum(cells) / 16 + maps.bias
        others = [float(logits[c]) for c in range(len(logits)) if c not in (a, b)]
        margins.append(float(min(logits[a], logits[b])) - max(others))
    logits = maps.maps().mean(dim=(2, 3)) + maps.bias
    cross = float(logits[i, b] + logits[j, a])
    sure = 0.0
    for picture, own in ((i, a), (j, b)):
        sure += float(logits[picture, own]) - max(
            float(logit) for c, logit in enumerate(logits[picture]) if c != own
        )
    return max(margins) + 0.5 * cross + 0.25 * sure


def clashes(sources: Tensor, classes: Tensor) -> int:
    """Tuples that hold a class twice."""
    return sum(len(set(row)) < len(row) for row in classes[sources].tolist())


def by_identity(ids: Tensor, sources: Tensor) -> dict[int, list[int]]:
    return {row[0]: row for row in ids[sources].tolist()}


# -- tuples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("cap", [1, 2, 3])
def test_partners_are_distinct_and_used_at_most_cap_times(k, cap):
    maps, classes = structured_maps()
    sources = match_partners(maps, classes, k, drawn(24), cap=cap)
    assert (sources.shape, sources.dtype) == ((24, k), torch.int64)
    assert_close(sources[:, 0], torch.arange(24))
    assert all(len(set(row)) == k for row in sources.tolist())
    assert clashes(sources, classes) == 0
    for place in range(1, k):
        assert sources[:, place].bincount(minlength=24).max() <= cap


@given(count=st.integers(2, 6), cap=st.integers(1, 3), seed=st.integers(0, 300))
def test_a_tuple_as_large_as_the_batch_holds_no_picture_twice(count, cap, seed):
    maps, classes = noisy_maps(count, 7, seed)
    sources = match_partners(maps, classes, count, drawn(count, seed), cap=cap)
    assert all(len(set(row)) == count for row in sources.tolist())


def test_another_class_is_preferred_and_one_class_is_no_error():
    maps, _ = structured_maps(6, 8)
    classes = torch.tensor([0, 0, 0, 1, 1, 1])
    sources = match_partners(maps, classes, 2, drawn(6), cap=1)
    assert clashes(sources, classes) == 0
    one = match_partners(maps, torch.zeros(6, dtype=torch.int64), 3, drawn(6))
    assert all(len(set(row)) == 3 for row in one.tolist())


def test_pairs_that_hold_all_classes_and_maps_that_are_not_finite_can_be_matched():
    maps, _ = structured_maps(6, 2)
    sources = match_partners(maps, torch.arange(6) % 2, 2, drawn(6))
    assert clashes(sources, torch.arange(6) % 2) == 0
    maps, classes = structured_maps(6, 6)
    maps.features[2] = torch.nan
    maps.features[4] = torch.inf
    sources = match_partners(maps, classes, 2, drawn(6))
    assert all(len(set(row)) == 2 for row in sources.tolist())


# -- easy to mix -----------------------------------------------------------------------------------


def test_the_score_is_the_obvious_one(monkeypatch):
    monkeypatch.setattr(partners, "RIVALS", 5)  # all classes; by default those that may matter
    maps, classes = structured_maps(7, 5)
    table = partners._pair_scores(*maps, classes)
    expected = [
        [0.0 if i == j else pair_score(maps, classes, min(i, j), max(i, j)) for j in range(7)]
        for i in range(7)
    ]
    off = ~torch.eye(7, dtype=torch.bool) & (classes[:, None] != classes[None, :])
    assert_close(table[off], torch.tensor(expected)[off])


def test_the_score_finds_the_balance():
    """Where one picture says more everywhere, the other still gets the cells that cost least."""
    features = torch.zeros(2, 3, 1, 4)
    features[0, 0] = torch.tensor([9.0, 3.0, 3.0, 3.0])
    features[1, 1] = torch.tensor([0.0, 2.0, 2.0, 2.0])
    maps = ClassMaps(features, torch.eye(3), torch.zeros(3))
    score = partners._pair_scores(*maps, torch.tensor([0, 1]))[0, 1]
    sure = 18 / 4 + 6 / 4
    assert score - 0.25 * sure == pytest.approx(1.5)  # 9 / 4, 6 / 4; without a balance 18 / 4, 0


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_the_assignment_is_the_best_there_is_but_for_chance(monkeypatch, chance):
    monkeypatch.setattr(partners, "RIVALS", 5)
    monkeypatch.setattr(partners, "CHANCE", chance)
    maps, classes = structured_maps(5, 5)
    table = [
        [pair_score(maps, classes, min(i, j), max(i, j)) if i != j else 0 for j in range(5)]
        for i in range(5)
    ]
    best = max(
        sum(table[i][j] for i, j in enumerate(order))
        for order in permutations(range(5))
        if all(i != j for i, j in enumerate(order))
    )
    pairs = match_partners(maps, classes, 2, drawn(5), cap=1).tolist()
    assert best - 5 * chance - 1e-4 <= sum(table[i][j] for i, j in pairs) <= best + 1e-4


def test_partners_mix_better_than_random_ones(monkeypatch):
    monkeypatch.setattr(partners, "CHANCE", 0.0)
    maps, classes = structured_maps()
    scores = {}
    for cap in (1, 2, 3):
        pairs = match_partners(maps, classes, 2, drawn(24), cap=cap).tolist()
        scores[cap] = sum(pair_score(maps, classes, *pair) for pair in pairs)
    pairs = draw_ring(drawn(24), classes, 2).tolist()
    random = sum(pair_score(maps, classes, *pair) for pair in pairs)
    assert random + 1 < scores[1] <= scores[2] + 1e-3
    assert scores[2] <= scores[3] + 1e-3


# -- varied ----------------------------------------------------------------------------------------


@given(
    count=st.integers(4, 24),
    k=st.integers(2, 4),
    cap=st.integers(1, 3),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_whose_turn_it_is_is_a_partner_and_nobody_more_than_cap_times(count, k, cap, epoch, seed):
    k = min(k, count)
    maps, classes = noisy_maps(count, 60, seed)
    draw = drawn(count, seed, epoch)
    sources = match_partners(maps, classes, k, draw, cap=cap)
    assert all(len(set(row)) == k for row in sources.tolist())
    if clashes(sources, classes) == 0:  # else a class of its own comes first
        assert set(has_turn(draw).nonzero().flatten().tolist()) <= set(
            sources[:, 1:].unique().tolist()
        )
    if k <= 2:
        assert sources[:, 1].bincount(minlength=count).max() <= cap


def test_a_turn_is_not_worth_a_class_of_its_own():
    classes, everybody = torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.bool)
    same = classes[:, None] == classes[None, :]
    sources = partners._assign(torch.zeros(3, 3).double(), same, everybody, 2, 2)
    assert clashes(sources, classes) == 0


def test_one_turn_in_a_tuple_is_enough():
    scores = torch.zeros(6, 6).double()
    scores[:, :3] = 1.0  # three pictures that everybody mixes well with
    nothing, everybody = torch.zeros(6, 6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    sources = partners._assign(scores, nothing, everybody, 3, 2)
    assert_close(sources[:, 1].sort().values, torch.arange(6))
    assert (sources[:, 2] < 3).double().mean() > 0.7


def test_everybody_is_a_partner_in_three_epochs_of_any_batches():
    count = 60
    maps, classes = noisy_maps(count, 40)
    ids = identities(count)
    used = set()
    for epoch in range(5, 5 + TURNS):
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        for rows in shuffled.split(20):
            part = ClassMaps(maps.features[rows], maps.weight, maps.bias)
            sources = match_partners(part, classes[rows], 2, Draw(1, epoch, ids[rows]))
            used.update(ids[rows][sources[:, 1]].tolist())
    assert used == set(ids.tolist())


def test_a_third_has_its_turn_in_each_epoch_and_another_third_for_another_seed():
    ids = identities(3000)
    turns = torch.stack([has_turn(Draw(7, epoch, ids)) for epoch in range(TURNS)])
    assert (turns.sum(dim=0) == 1).all()
    assert all(900 < int(turn.sum()) < 1100 for turn in turns)
    assert torch.equal(has_turn(Draw(7, TURNS, ids)), turns[0])
    assert torch.equal(has_turn(Draw(7, 0, ids, attempt=1)), turns[0])
    assert not torch.equal(has_turn(Draw(8, 0, ids)), turns[0])


def similar_pairs(count: int = 40) -> tuple[ClassMaps, Tensor]:
    """Twenty classes in ten twins: a picture of one says much for the other."""
    source = torch.Generator().manual_seed(5)
    common = torch.eye(10).repeat_interleave(2, dim=0)
    weight = torch.cat([0.8 * common, 0.4 * torch.eye(20)], dim=1)  # (20, 30)
    classes = torch.arange(count) % 20
    features = weight[classes][:, :, None, None] * 20 * torch.rand(count, 1, 2, 2, generator=source)
    return ClassMaps(features, weight, torch.zeros(20)), classes


def twins(sources: Tensor, classes: Tensor) -> float:
    kinds = classes[sources] // 2
    return (kinds[:, 0] == kinds[:, 1]).double().mean().item()


def test_similar_classes_are_avoided(monkeypatch):
    maps, classes = similar_pairs()
    assert twins(match_partners(maps, classes, 2, drawn(40)), classes) == 0
    monkeypatch.setattr(partners, "SIMILAR_COSINE", 1.0)  # what the score alone would choose
    assert twins(match_partners(maps, classes, 2, drawn(40)), classes) > 0.5


def test_similar_partners_are_better_than_none():
    maps, classes = similar_pairs(4)
    maps, classes = ClassMaps(maps.features[:2], *maps[1:]), classes[:2]
    assert match_partners(maps, classes, 2, drawn(2)).tolist() == [[0, 1], [1, 0]]


def test_what_tells_no_classes_apart_makes_none_similar():
    nothing = (torch.eye(9), torch.zeros(9, 4), torch.ones(9, 4), torch.full((9, 4), torch.nan))
    for weight in nothing:
        assert not (partners._similar(weight, torch.arange(9)) & ~torch.eye(9).bool()).any()


# -- the same for the same samples -----------------------------------------------------------------


@given(order=st.permutations(range(12)), k=st.integers(2, 3), cap=st.integers(1, 2))
def test_partners_do_not_depend_on_the_batchs_order(order, k, cap):
    maps, classes = noisy_maps(12, 8)
    ids, order = identities(12), torch.tensor(order)
    sources = match_partners(maps, classes, k, Draw(5, 1, ids), cap=cap)
    turned = ClassMaps(maps.features[order], maps.weight, maps.bias)
    other = match_partners(turned, classes[order], k, Draw(5, 1, ids[order]), cap=cap)
    assert by_identity(ids[order], other) == by_identity(ids, sources)


def test_ties_are_broken_by_identity_and_seed():
    maps = ClassMaps(torch.ones(12, 4, 2, 2), torch.eye(4), torch.zeros(4))
    classes, ids = torch.arange(12) % 4, identities(12)
    order = torch.arange(12).flip(0)
    first = match_partners(maps, classes, 2, Draw(0, 0, ids))
    turned = match_partners(maps, classes[order], 2, Draw(0, 0, ids[order]))
    assert by_identity(ids[order], turned) == by_identity(ids, first)
    assert not torch.equal(match_partners(maps, classes, 2, Draw(1, 0, ids)), first)


@pytest.mark.parametrize(("scale", "low", "high"), [(0.1, 0.0, 0.3), (10.0, 0.4, 1.0)])
def test_another_epoch_gives_others_where_scores_are_close(scale, low, high):
    maps, classes = noisy_maps(24, 24)
    maps = ClassMaps(scale * maps.features, maps.weight, scale * maps.bias)
    first, second = (match_partners(maps, classes, 2, drawn(24, epoch=e), cap=1) for e in (0, 1))
    assert low <= (first[:, 1] == second[:, 1]).double().mean() <= high


@pytest.mark.parametrize("k", [2, 3])
def test_the_same_draw_gives_the_same_partners(k):
    maps, classes = noisy_maps(24, 12)
    before = [tensor._version for tensor in (*maps, classes)]
    first = match_partners(maps, classes, k, drawn(24))
    assert torch.equal(match_partners(maps, classes, k, drawn(24)), first)
    assert [tensor._version for tensor in (*maps, classes)] == before


def test_autocast_around_does_not_change_partners():
    maps, classes = noisy_maps(90, 60)
    expected = match_partners(maps, classes, 3, drawn(90))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(match_partners(maps, classes, 3, drawn(90)), expected)


@pytest.mark.parametrize(
    ("k", "cap", "known", "message"),
    [
        (7, 2, 6, r"k: expected at most 6, a batch's pictures, got 7. Pass a larger batch"),
        (2, 0, 6, r"cap: expected at least 1 use of each picture, got 0"),
        (2, 2, 5, r"draw: expected the identities of 6 pictures, got 5. Pass those of the batch"),
    ],
)
def test_tuples_that_can_not_be_matched_are_named(k, cap, known, message):
    maps, classes = structured_maps(6, 6)
    with pytest.raises(ValueError, match=message):
        match_partners(maps, classes, k, drawn(known), cap=cap)
