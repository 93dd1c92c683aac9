"""Mixes of any tuples of any pictures, and their labels."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from supermix_transforms.mixing import (
    check_k,
    soft_targets,
    supermix,
    unmixed,
)
from supermix_transforms.results import ClassMaps, Outcome
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler

pytestmark = pytest.mark.usefixtures("one_thread")


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
