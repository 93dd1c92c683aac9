"""Draws and tuples: the same for the same samples, apart in class; and `supermix` itself."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from supermix_transforms import mixing
from supermix_transforms.mixing import (
    Draw,
    check_k,
    draw_ring,
    draw_weights,
    generator,
    soft_targets,
    supermix,
    unmixed,
)
from supermix_transforms.results import ClassMaps, Outcome
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler

pytestmark = pytest.mark.usefixtures("one_thread")


def identities(count: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (count,), generator=source)


def by_identity(ids: Tensor, sources: Tensor) -> dict[int, list[int]]:
    return {row[0]: row for row in ids[sources].tolist()}


# -- draws -----------------------------------------------------------------------------------------


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
    values = {generator(draw, ids, p).random() for ids in ([1, 2], [2, 1], [-1]) for p in (1, 2)}
    assert len(values) == 6


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
    ring = torch.tensor(mixing._separate(list(range(count)), list(map(Label, classes)), 2))
    assert 0 < compared < 20 * count
    pairs = torch.stack([ring, ring.roll(-1)], dim=1)
    assert clashes(pairs, torch.tensor(classes)) == 64  # 160 and 96: the least there can be


def test_one_class_is_no_error():
    sources = draw_ring(Draw(0, 0, identities(5)), torch.zeros(5, dtype=torch.int64), 3)
    assert all(len(set(row)) == 3 for row in sources.tolist())


# -- soft targets (Eq. 2) --------------------------------------------------------------------------


def test_soft_targets_are_the_weighted_labels():
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    labels = torch.tensor([[0, 2, 3], [1, 1, 0]])
    expected = torch.tensor([[0.2, 0, 0.3, 0.5], [0.1, 0.9, 0, 0]])  # equal classes are added
    assert_close(soft_targets(weights, labels, 4), expected)
    one_hot = nn.functional.one_hot(labels, 4)
    assert_close(soft_targets(weights, one_hot, 4), expected)
    probs = torch.rand(2, 3, 4).softmax(dim=2)
    expected = sum(weights[:, i, None] * probs[:, i] for i in range(3))
    assert_close(soft_targets(weights, probs, 4), expected)
    assert_close(expected.sum(dim=1), torch.ones(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(soft_targets(weights, probs, 4), expected)
    assert soft_targets(weights.half(), labels, 4).dtype == torch.float32


# -- supermix --------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    layers[4].weight.data *= 8
    return layers.eval()


def even(rows: int, k: int) -> Tensor:
    return torch.full((rows, k), 1 / k)


@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("method", ["fast", "paper"])
def test_any_number_of_tuples_of_any_pictures(rows, method):
    images, teacher = torch.rand(5, 3, 9, 7), net()
    sources = torch.randint(5, (rows, 3))
    mixed = supermix(
        images,
        teacher,
        sources=sources,
        weights=even(rows, 3),
        settings=SolverSettings(method=method, max_steps=2),
    )
    assert len(mixed) == rows
    assert mixed.images.shape == (rows, 3, 9, 7)
    assert mixed.masks.shape == (rows, 3, 9, 7)
    assert mixed.mask_logits.shape == (rows, 3, 7, 7)
    assert mixed.logits.shape == (rows, 5)
    for value in (mixed.outcome, mixed.steps, mixed.sparsity, mixed.converged):
        assert value.shape == (rows,)
    assert torch.equal(mixed.sources, sources)
    # a forward for each original, shared by the mixes, and at least one check each
    assert (mixed.forwards >= 1 + 5 / rows - 1e-5).all()


def test_index_types_and_lists_of_teachers():
    images = torch.rand(5, 3, 9, 7)
    settings = SolverSettings(max_steps=1)
    given = {"sources": torch.tensor([[0, 1], [2, 3]]), "weights": even(2, 2)}
    expected = supermix(images, net(), **given, settings=settings)
    given["sources"] = given["sources"].to(torch.int32)
    given["weights"] = given["weights"].double()
    mixed = supermix(images, TeacherLabeler(net()), **given, settings=settings)
    assert_close(mixed.images, expected.images)
    several = supermix(images, [net(), net()], **given, settings=settings)
    assert several.logits.shape == (2, 5)


def test_known_originals_give_the_same_mixes():
    images, labeler = torch.rand(6, 3, 9, 7), TeacherLabeler(net())
    given = {"sources": torch.tensor([[0, 1], [2, 3], [4, 5]]), "weights": even(3, 2)}
    expected = supermix(images, labeler, **given)
    originals, maps = labeler.examine(images)
    assert maps is not None
    mixed = supermix(images, labeler, **given, originals=originals, maps=maps)
    assert_close(mixed.images, expected.images)
    assert_close(mixed.logits, expected.logits)
    assert torch.equal(mixed.steps, expected.steps)
    with torch.inference_mode():
        made = [originals.clone(), ClassMaps(*(t.clone() for t in maps))]
    mixed = supermix(images, labeler, **given, originals=made[0], maps=made[1])
    assert_close(mixed.images, expected.images)


def test_unmixed_pictures_are_the_originals():
    images = torch.rand(2, 3, 9, 7)
    mixed = unmixed(images, 3)
    assert torch.equal(mixed.images, images)
    assert (mixed.outcome == Outcome.UNMIXED).all()
    assert_close(mixed.weights, torch.tensor([[1.0, 0, 0]] * 2))
    assert mixed.sources.tolist() == [[0] * 3, [1] * 3]
    assert (mixed.sparsity == 0).all()


def good() -> dict[str, object]:
    return {
        "images": torch.rand(5, 3, 9, 7),
        "sources": torch.tensor([[0, 1], [2, 3]]),
        "weights": even(2, 2),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [1, 2]}, r"images: expected a tensor \(B, C, H, W\), got list. Convert"),
        ({"images": torch.rand(3, 9, 7)}, r"images: expected a batch .*got shape \(3, 9, 7\)"),
        ({"images": torch.rand(0, 3, 9, 7)}, r"images: expected at least one picture.*Skip empty"),
        ({"images": torch.zeros(5, 3, 9, 7, dtype=torch.int32)}, r"images: expected uint8 or a"),
        (
            {"images": torch.rand(5, 3, 9, 7, device="meta")},
            r"images: expected pictures on the teacher's device cpu, got meta. Move them",
        ),
        ({"sources": [[0, 1]]}, r"sources: expected a tensor \(M, k\), got list. Pass"),
        ({"sources": torch.tensor([0, 1])}, r"sources: expected indices \(M, k\).*\(2,\)"),
        ({"sources": torch.tensor([[0], [1]])}, r"sources: .* k of at least 2, got .*\(2, 1\)"),
        ({"sources": torch.rand(2, 2)}, r"sources: expected indices .*float32"),
        ({"sources": torch.ones(2, 2, dtype=torch.bool)}, r"sources: expected indices .*bool"),
        ({"sources": torch.tensor([[0, 5]])}, r"sources: expected rows of 5 .*0..4, got 0..5. I"),
        ({"sources": torch.tensor([[-1, 2]])}, r"sources: expected rows of 5 .*got -1..2. Index"),
        ({"sources": torch.zeros(0, 2, dtype=torch.int64)}, r"sources: expected .*got no row"),
        ({"weights": [0.5, 0.5]}, r"weights: expected a tensor \(M, k\), got list. Pass"),
        ({"weights": even(2, 3)}, r"weights: expected one for each source, \(2, 2\), got \(2, 3\)"),
        ({"weights": torch.ones(2, 2)}, r"weights: .* rows sum to 1, got .*2.0.*Divide each row"),
        ({"weights": torch.tensor([[1.5, -0.5]] * 2)}, r"weights: expected numbers of at least 0"),
        ({"weights": torch.full((2, 2), torch.nan)}, r"weights: expected numbers of at least 0"),
        ({"originals": torch.rand(4, 5)}, r"originals: expected logits \(5, N\).*got \(4, 5\)"),
        ({"originals": torch.rand(5)}, r"originals: expected logits \(5, N\).*got \(5,\). Pass"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = good() | change
    with pytest.raises(ValueError, match=message):
        supermix(given.pop("images"), net(), **given)


def test_a_labelers_own_device_is_asked_too():
    labeler = TeacherLabeler(lambda x: x.mean(dim=(2, 3)), device="meta")
    given = good()
    with pytest.raises(ValueError, match=r"on the teacher's device meta, got cpu. Move them"):
        supermix(given.pop("images"), labeler, **given)


@pytest.mark.parametrize("k", [1, 0, -2, 2.0, True, "2", None])
def test_k_is_an_integer_of_at_least_2(k):
    with pytest.raises(ValueError, match=r"k: expected an integer of at least 2 images a mix, got"):
        check_k(k, 3.0)


@pytest.mark.parametrize("alpha", [0, -1.0, float("inf"), float("nan"), "3", None])
def test_alpha_is_a_positive_number(alpha):
    with pytest.raises(ValueError, match=r"alpha: expected a positive number, .*, got"):
        check_k(2, alpha)


def test_inputs_are_unchanged():
    given = good()
    originals, maps = TeacherLabeler(net()).examine(given["images"])
    given |= {"originals": originals, "maps": maps}
    values = [given["images"], given["sources"], given["weights"], originals, *maps]
    before = [value._version for value in values]
    copies = [value.clone() for value in values]
    supermix(given.pop("images"), net(), **given, settings=SolverSettings(max_steps=2))
    assert [value._version for value in values] == before
    assert all(torch.equal(value, copy) for value, copy in zip(values, copies, strict=True))
