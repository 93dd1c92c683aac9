"""Contact sheet and overview: what is drawn, and that nothing is drawn over something else."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from supermix_transforms.plots import (
    Cell,
    Panel,
    Seen,
    contact_sheet,
    heat_overlay,
    make_panels,
    overview,
    picture_grid,
)
from supermix_transforms.results import Mixed

ROOT = Path(__file__).parents[1]
NAMES = ("cat", "moped", "espresso", "tripod", "missile", "cup")


def panel(k: int, *, names=NAMES, top=True, shape=(3, 9, 7), dtype=torch.uint8) -> Panel:
    pictures = torch.randint(0, 256, (k + 1, *shape), dtype=torch.uint8)
    pictures = pictures if dtype == torch.uint8 else pictures.to(dtype) / 255
    return Panel(
        inputs=pictures[:k],
        masks=torch.rand(k, *shape[1:]),
        mix=pictures[k],
        names=tuple(names[:k]),
        weights=(1 / k,) * k,
        top=tuple(Seen(i, name, 0.5 / 2**i) for i, name in enumerate(names[:5])) if top else (),
        outcome="max steps",
        sparsity=0.0712,
        steps=3,
    )


def texts(figure) -> list[str]:
    axes = [text for axes in figure.axes for text in axes.texts]
    return [text.get_text() for text in [*figure.texts, *axes]]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_contact_sheet_draws_inputs_masks_mix_and_bars_of_each_mix(k):
    figure = contact_sheet([panel(k), panel(k)])
    assert len(figure.axes) == 2 * (2 * k + 1 + 1)
    assert [len(axes.patches) for axes in figure.axes if axes.patches] == [5, 5]
    drawn = texts(figure)
    for name in NAMES[:k]:
        assert drawn.count(name) == 4  # over the input, and beside its bar, in both rows
    assert drawn.count("max steps · L_s 0.071 · 3 steps") == 2
    assert drawn.count("50%") == 2


def test_rows_of_a_contact_sheet_may_differ_in_k():
    assert len(contact_sheet([panel(2), panel(4)]).axes) == (4 + 2) + (8 + 2)


def test_bars_of_the_tuples_classes_have_a_colour_of_their_own():
    (bars,) = (axes for axes in contact_sheet([panel(2)]).axes if axes.patches)
    colours = [bar.get_facecolor() for bar in bars.patches]
    assert colours[0] == colours[1]
    assert colours[2] == colours[3] == colours[4]
    assert colours[1] != colours[2]
    assert [bar.get_width() for bar in bars.patches] == [0.5, 0.25, 0.125, 0.0625, 0.03125]


def test_a_mix_without_a_teacher_has_no_bars():
    figure = contact_sheet([panel(2, top=False)])
    assert not any(axes.patches for axes in figure.axes)


def test_overview_draws_tuples_beside_each_other_with_k_classes_under_the_mix():
    figure = overview([panel(2), panel(3)])
    assert len(figure.axes) == (4 + 1) + (6 + 1)
    assert figure.get_figwidth() > 2 * figure.get_figheight()
    assert texts(figure).count("cat 50%") == 2
    assert texts(figure).count("espresso 12%") == 1


@pytest.mark.parametrize("draw", [contact_sheet, overview])
def test_nothing_is_drawn_over_something_else_or_outside_even_with_long_names(draw):
    long = ("W" * 60, "black-and-tan coonhound, a dog", "i" * 90, "$\\broken{", "ÅÄÖ " * 20)
    figure = draw([panel(k, names=long) for k in (2, 3, 4)])
    renderer = FigureCanvasAgg(figure).get_renderer()
    labels = [text.get_window_extent(renderer) for text in figure.texts]
    boxes = labels + [axes.get_window_extent(renderer) for axes in figure.axes]
    assert len(labels) > 10
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    for one, other in itertools.combinations(boxes, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(width, height) < 1  # pixel
    for axes in figure.axes:  # names and percentages inside a row of bars
        for name, share in zip(axes.texts[::2], axes.texts[1::2], strict=True):
            end = name.get_window_extent(renderer).x1
            assert end < share.get_window_extent(renderer).x0


def test_a_class_name_is_no_formula(tmp_path):
    figure = contact_sheet([panel(2, names=("$x_2", "$\\frac{$", *NAMES))])
    figure.savefig(tmp_path / "sheet.png")
    assert "$x_2" in texts(figure)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 9, 7), torch.float32), ((1, 9, 7), torch.uint8), ((5, 9, 7), torch.float16)],
)
def test_pictures_of_any_channels_and_dtype_are_drawn(shape, dtype, tmp_path):
    contact_sheet([panel(2, shape=shape, dtype=dtype)]).savefig(tmp_path / "sheet.png")


def test_normalised_pictures_are_stretched_to_what_can_be_shown():
    one = panel(2, dtype=torch.float32)
    one.mix.mul_(4).sub_(2)
    mix = contact_sheet([one]).axes[4].images[0].get_array()
    assert mix.min() == 0
    assert mix.max() == 1


def test_masks_are_grey_and_on_a_common_scale():
    mask = contact_sheet([panel(2)]).axes[1].images[0]
    assert mask.get_cmap().name == "gray"
    assert mask.get_clim() == (0, 1)


def mixes(logits: torch.Tensor | None) -> Mixed:
    return Mixed(
        images=torch.zeros(3, 3, 4, 4, dtype=torch.uint8),
        sources=torch.tensor([[0, 1], [1, 2], [2, 0]]),
        weights=torch.tensor([[0.25, 0.75]] * 3),
        outcome=torch.tensor([0, 1, 2]),
        steps=torch.tensor([0, 20, 1]),
        sparsity=torch.tensor([0.0625] * 3),
        logits=logits,
        mask_logits=torch.zeros(3, 2, 2, 2),
        forwards=torch.ones(3),
        backwards=torch.ones(3),
    )


def test_panels_name_the_classes_of_sources_and_mix():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]] * 3)
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    panels = make_panels(images, mixes(logits), torch.tensor([2, 0, 3]), NAMES[:3], count=2)
    assert [each.names for each in panels] == [("espresso", "cat"), ("cat", "class 3")]
    assert [seen.name for seen in panels[0].top] == ["moped", "class 3", "espresso", "cat"]
    assert panels[0].top[0].label == 1
    assert panels[0].top[0].probability == pytest.approx(logits[0].softmax(0)[1].item())
    assert panels[1].inputs[:, 0, 0, 0].tolist() == [1, 2]
    assert [each.outcome for each in panels] == ["converged", "max steps"]


def test_panels_of_mixes_without_logits_name_nothing():
    panels = make_panels(
        torch.zeros(3, 3, 4, 4), mixes(None), torch.tensor([0, 1, 2]), None, count=8
    )
    assert [each.top for each in panels] == [(), (), ()]
    assert panels[0].names == ("class 0", "class 1")


@pytest.mark.parametrize("draw", [contact_sheet, overview])
def test_no_panel_is_an_error(draw):
    with pytest.raises(ValueError, match="panels: expected at least one mix to draw, got none"):
        draw([])


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "supermix-transforms\[plots\]"'):
        contact_sheet([panel(2)])


def test_drawing_leaves_pyplot_alone():
    code = """
import sys, torch
from supermix_transforms.plots import Panel, contact_sheet
picture = torch.zeros(2, 3, 4, 4)
mask = torch.ones(2, 4, 4)
contact_sheet([Panel(picture, mask, picture[0], ("a", "b"), (0.5, 0.5), (), "x", 0.1, 1)])
print("matplotlib.pyplot" in sys.modules, "matplotlib.figure" in sys.modules)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["False", "True"]


# -- tables of pictures ----------------------------------------------------------------------------


def test_a_grid_has_a_cell_of_pictures_for_each_row_and_column():
    pictures = torch.randint(0, 256, (6, 3, 9, 7), dtype=torch.uint8)
    cells = [[Cell((picture, picture[0] / 255), f"L_s {n}")] for n, picture in enumerate(pictures)]
    cells = [[*cells[0], *cells[1], *cells[2]], [*cells[3], *cells[4], *cells[5]]]
    figure = picture_grid(cells, rows=("sigma 1", "sigma 2"), columns=("a", "b", "c"))
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 12
    for number, picture in enumerate(pictures):
        assert (shown[2 * number] == picture.movedim(0, -1).numpy()).all()
        assert (shown[2 * number + 1] == (picture[0] / 255).numpy()).all()
    assert {"sigma 1", "sigma 2", "a", "b", "c", "L_s 0", "L_s 5"} <= set(texts(figure))
    left, top = (axes.get_position() for axes in (figure.axes[0], figure.axes[6]))
    assert left.x0 == top.x0  # the second row is under the first
    assert left.y0 > top.y1


@pytest.mark.parametrize("cells", [[], [[]], [[Cell(())], []]])
def test_a_grid_with_a_cell_missing_is_an_error(cells):
    with pytest.raises(ValueError, match="expected 2 rows of 1 cells, one at least, got rows of"):
        picture_grid(cells, rows=("a", "b"), columns=("c",))


def test_heat_colours_the_picture_where_the_class_is_seen():
    picture = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    heat = torch.tensor([[5.0, -1.0], [-1.0, -9.0]])
    shown = heat_overlay(picture, heat)
    assert shown.shape == (3, 8, 8)
    assert shown.dtype == torch.float32
    red, _, blue = shown[:, 0, 0]
    assert red > blue  # hot
    assert (shown[:, -1, -1] == torch.tensor([0.5, 0.5, 0.75])).all()  # white under cold blue
    assert torch.equal(heat_overlay(picture / 255, heat), shown)
    assert heat_overlay(picture, -heat.abs()).isfinite().all()  # seen nowhere
