"""The formula for a search's memory, against what the profiler counts."""

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from supermix_transforms import SolverSettings, TeacherLabeler, solver, supermix
from supermix_transforms.memory import Footprint, activation_bytes, footprint

SIDE, COUNT = 64, 12


@pytest.fixture(scope="module")
def labeler():
    torch.manual_seed(0)
    return TeacherLabeler(torchvision.models.mobilenet_v3_small(num_classes=50))


def search(labeler, images, **settings):
    """A search in which no row ends before its last step."""
    originals, maps = labeler.examine(images)
    rows = torch.arange(len(images))
    return lambda: supermix(
        images,
        labeler,
        sources=torch.stack([rows, rows.roll(1)], dim=1),
        weights=torch.full((len(images), 2), 0.5),
        originals=originals,
        maps=maps,
        settings=SolverSettings(max_steps=2, max_kl=0.0, **settings),
    )


def peak_bytes(function) -> int:
    """The most that was allocated at a time while a function ran."""
    function()  # what is made once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    allocated = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            most = max(most, allocated)
    return most


def expected(labeler, images, map_cells) -> Footprint:
    return footprint(
        images,
        k=2,
        num_classes=50,
        mask_size=16,
        coarse=(SIDE, SIDE),
        map_cells=map_cells,
        activations=activation_bytes(labeler.logits, images[0] / 255),
    )


@pytest.fixture
def images():
    noise = torch.Generator().manual_seed(0)
    return torch.randint(256, (COUNT, 3, SIDE, SIDE), generator=noise, dtype=torch.uint8)


@pytest.mark.parametrize("group", [None, 4], ids=["one graph", "graphs of 4"])
@pytest.mark.parametrize(("method", "map_cells"), [("fast", 4), ("paper", 0)])
def test_a_search_allocates_what_the_formula_says(
    labeler, images, monkeypatch, method, map_cells, group
):
    monkeypatch.setattr(solver, "group_size", lambda images: group)
    counted = peak_bytes(search(labeler, images, method=method, mask_size=16))
    formula = expected(labeler, images, map_cells).peak(COUNT, group)
    assert formula == pytest.approx(counted, rel=0.1)


def test_a_search_stays_within_its_budget(labeler, images, monkeypatch):
    monkeypatch.setattr(solver, "group_size", lambda images: None)
    whole = expected(labeler, images, 4).peak(COUNT)
    counted = peak_bytes(search(labeler, images, memory=whole // 2))
    assert 0.3 * whole < counted < 1.1 * whole / 2
    tight = peak_bytes(search(labeler, images, memory=1))  # one at a time, not none
    assert tight < counted / 2


def test_activations_grow_with_pictures_and_weights_do_not_count():
    image = torch.rand(3, 8, 8)
    assert activation_bytes(lambda images: images.exp().mean(dim=(2, 3)), image) == 4 * 3 * 8 * 8

    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 1000), nn.ReLU())
    # the input, for the weight's gradient, and what is positive
    assert activation_bytes(net, image) == 4 * (192 + 1000)


def test_a_teacher_is_measured_only_where_that_may_matter(images):
    counts = []

    def teacher(x: Tensor) -> Tensor:
        counts.append(len(x))
        return x.mean(dim=3).flatten(1)

    labeler = TeacherLabeler(teacher)
    search(labeler, images)()
    assert counts.count(1) == 0
    search(labeler, images, memory=100_000_000)()
    assert counts.count(1) == 1


SIZES = st.integers(1, 10_000)


@given(
    one=st.builds(Footprint, st.integers(0, 1000), SIZES, SIZES, SIZES, SIZES),
    memory=st.integers(1, 10**7),
    graph_rows=st.none() | st.integers(1, 50),
)
def test_as_many_tuples_as_fit(one, memory, graph_rows):
    rows = one.rows_within(memory, graph_rows)
    assert rows == 1 or one.peak(rows, graph_rows) <= memory
    assert one.peak(rows + 1, graph_rows) > memory
