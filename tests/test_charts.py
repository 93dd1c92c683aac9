"""Charts show the numbers that they are given, and errors where there are none."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from supermix_transforms.charts import (
    Bar,
    Embedding,
    cost_bars,
    embedding_planes,
    histogram,
    setting_curves,
    top_probabilities,
    training_curves,
)

BARS = [
    Bar("fast", 41.0, "41 ms · 100% converged"),
    Bar("authors-same-dtype", 43210.0, "43,210 ms · 100% converged at 50 steps"),
    Bar("mixup", None, "nothing converged"),
    Bar("$\\frac{", 7.0, "$x_2"),
]


def test_bars_are_as_long_as_the_logarithm_of_what_they_cost():
    (axes,) = cost_bars(BARS).axes
    assert axes.get_xscale() == "log"
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == [41, 43210, 7]
    assert all(axes.get_xlim()[0] <= bar.get_x() < 7 for bar in axes.patches)
    assert [label.get_text() for label in axes.get_yticklabels()] == [bar.name for bar in BARS]
    assert [text.get_text() for text in axes.texts] == [bar.text for bar in BARS]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] != colours[1]
    assert colours[1] == colours[2]


@pytest.mark.parametrize("bars", [BARS, BARS[:1], BARS[2:3], [Bar("fast", 0.0003, "short")] * 11])
def test_bars_and_their_texts_are_inside_the_chart(bars):
    figure = cost_bars(bars)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (axes,) = figure.axes
    for text in [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label]:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1


def test_no_bar_is_an_error():
    with pytest.raises(ValueError, match="bars: expected at least one method to draw, got none"):
        cost_bars([])


# -- distributions and curves ----------------------------------------------------------------------


def test_whole_numbers_have_a_bar_each_and_others_share_bins():
    (axes,) = histogram({"mixes": [0, 0, 1, 3]}, label="steps").axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.25, 0, 0.25]
    assert [bar.get_x() + 0.5 for bar in axes.patches] == [0, 1, 2, 3]
    assert axes.get_xlabel() == "steps"
    assert axes.get_legend() is None
    (axes,) = histogram({"a": [0.0, 0.5], "b": [0.25] * 3}, label="share").axes
    heights = [bar.get_height() for bar in axes.patches]
    assert sum(heights) == pytest.approx(2)  # each series is 1 in all
    assert max(heights) == pytest.approx(1)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert len(histogram({"a": [2.5, 2.5]}, label="x").axes[0].patches) > 1
    with pytest.raises(ValueError, match="expected at least one value of steps"):
        histogram({"mixes": []}, label="steps")


def test_curves_are_the_history():
    history = [{"epoch": n, "loss": 3.0 - n, "top1": 0.1 * n, "top5": 0.3 * n} for n in range(3)]
    loss, validation = training_curves(history).axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
    assert validation.lines[0].get_ydata().tolist() == pytest.approx([0, 10, 20])
    assert validation.lines[1].get_ydata().tolist() == pytest.approx([0, 30, 60])
    assert [text.get_text() for text in validation.texts] == ["top-1  20.0 %", "top-5  60.0 %"]
    (alone,) = training_curves([{"epoch": 0, "loss": 2.0}]).axes  # no validation
    assert alone.lines[0].get_marker() == "o"
    with pytest.raises(ValueError, match="expected at least one epoch"):
        training_curves([])


# -- the paper's figures ---------------------------------------------------------------------------

CLOUDS = {
    "originals": Embedding([[(0.0, 1.0), (1.0, 1.0)], [(4.0, 5.0)]], [2.0, 4.0]),
    "mixes": Embedding([[(1.0, 2.0)], []], [1.5, 2.5]),
}


def test_each_kind_of_picture_has_a_plane_with_its_classes_and_their_spread():
    originals, mixes = embedding_planes(CLOUDS, ("road", "wolf")).axes
    assert [cloud.get_offsets().tolist() for cloud in originals.collections] == [
        [[0, 1], [1, 1]],
        [[4, 5]],
    ]
    behind, cloud = mixes.collections  # the originals again; no point of the second class
    assert behind.get_offsets().tolist() == [[0, 1], [1, 1], [4, 5]]
    assert cloud.get_offsets().tolist() == [[1, 2]]
    assert [axes.get_title() for axes in (originals, mixes)] == [
        "originals\nc-std 3.00",
        "mixes\nc-std 2.00",
    ]
    assert originals.get_xlim() == mixes.get_xlim()
    (legend,) = originals.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["road", "wolf"]


def test_the_largest_probabilities_have_a_bar_for_each_kind_of_picture():
    (axes,) = top_probabilities({"originals": [0.9, 0.05], "SuperMix": [0.5, 0.2, 0.1]}).axes
    assert [bar.get_height() for bar in axes.patches] == [0.9, 0.05, 0.5, 0.2, 0.1]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert centres == pytest.approx([-0.2, 0.8, 0.2, 1.2, 2.2])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["top-1", "top-2", "top-3"]


def test_a_settings_curve_shows_means_and_their_standard_errors():
    series = {"cutmix": {3.0: [0.5], 1.0: [0.25]}, "supermix": {1.0: [0.2, 0.4, 0.6]}}
    (axes,) = setting_curves(series, label="alpha", log=True).axes
    cutmix, supermix = axes.containers
    assert cutmix.lines[0].get_xydata().tolist() == [[1, 25], [3, 50]]
    assert supermix.lines[0].get_xydata().tolist() == [[1, pytest.approx(40)]]
    (bar,) = supermix.lines[2][0].get_segments()
    assert bar[1][1] - bar[0][1] == pytest.approx(2 * 20 / 3**0.5)
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "alpha"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: embedding_planes({}, ()),
        lambda: top_probabilities({}),
        lambda: setting_curves({"cutmix": {}}, label="k"),
    ],
)
def test_nothing_to_draw_is_an_error(draw):
    with pytest.raises(ValueError, match=r"expected .*, got none"):
        draw()


def test_a_method_without_a_value_is_left_out():
    (axes,) = setting_curves({"a": {1.0: [0.5]}, "b": {}}, label="k").axes
    assert len(axes.containers) == 1


def test_every_series_of_a_histogram_is_drawn():
    (axes,) = histogram({"a": [1], "b": [2], "c": [3]}, label="steps").axes
    assert len(axes.get_legend().get_texts()) == 3
    with pytest.raises(ValueError, match="expected at least one value of steps, got none"):
        histogram({}, label="steps")


def test_a_bar_of_no_length_has_no_logarithm():
    with pytest.raises(ValueError, match="bars: expected values above 0"):
        cost_bars([Bar("fast", 0.0, "0 ms")])
