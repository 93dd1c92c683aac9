"""Charts of what was measured: times, distributions, training, and the paper's Figures 6 and 7.

Like those of `plots`, figures are plain `matplotlib.figure.Figure` objects.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from supermix_transforms.plots import ASKED, FAINT, FONT, OTHER, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Bar",
    "Embedding",
    "cost_bars",
    "embedding_planes",
    "histogram",
    "setting_curves",
    "top_probabilities",
    "training_curves",
]

BARS_AT_MOST = 31
CURVE = "#2f8f5b"
# told apart by the colour-blind, too (Okabe and Ito); the first ones are ours
SERIES = (CURVE, "#d55e00", "#0072b2", "#666666", "#cc79a7", "#e69f00", "#56b4e9")


class Bar(NamedTuple):
    """A method in a bar chart."""

    name: str
    value: float | None  # None: no bar, only the text
    text: str  # beside the bar


def cost_bars(bars: Sequence[Bar], *, unit: str = "ms per converged image") -> "Figure":
    """What each method costs, on a logarithmic axis, as in the paper's Fig. 7c.

    Bars whose name starts with "fast" are green.

    Raises:
        ValueError: if there is no bar.
        ImportError: if matplotlib is not installed.
    """
    _expect(bars, "bars: expected at least one method to draw")
    figure = _figure(8, 1 + 0.36 * len(bars))
    axes = figure.add_subplot()
    values = [bar.value for bar in bars if bar.value is not None] or [1.0]
    if min(values) <= 0:
        raise ValueError(f"bars: expected values above 0, for their logarithm, got {min(values)}.")
    least = 10 ** math.floor(math.log10(min(values)) - 0.3)  # every bar is seen
    axes.set_xscale("log")
    axes.set_xlim(least, 1.1 * max(values))  # the layout makes room for the texts
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=FONT)
    for place, (name, value, text) in enumerate(bars):
        color = ASKED if name.startswith("fast") else OTHER
        if value is not None:
            axes.barh(place, value - least, left=least, height=0.72, color=color)
        # a few points to the right of the bar's end
        axes.annotate(
            text,
            (least if value is None else value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=FONT,
            parse_math=False,
        )
    axes.set_xlabel(f"{unit}, logarithmic", fontsize=FONT)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def histogram(series: Mapping[str, Sequence[float]], *, label: str) -> "Figure":
    """How often values occur, as shares of each series; whole numbers have a bar each.

    Args:
        series: values by name; drawn over one another.
        label: of the values.

    Raises:
        ValueError: if there is no value.
        ImportError: if matplotlib is not installed.
    """
    _expect(any(map(len, series.values())), f"series: expected at least one value of {label}")
    every = np.concatenate([np.asarray(values, dtype=float) for values in series.values()])
    low, high = float(every.min()), float(every.max())
    if (every == every.round()).all() and high - low < BARS_AT_MOST:
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, BARS_AT_MOST)
    figure = _figure(4.5, 3.0)
    axes = figure.add_subplot()
    for (name, values), color in zip(
        series.items(), itertools.cycle((CURVE, FAINT, *SERIES[1:])), strict=False
    ):
        weights = np.full(len(values), 1 / max(1, len(values)))
        axes.hist(values, edges.tolist(), weights=weights, color=color, alpha=0.7, label=name)
    if len(series) > 1:
        axes.legend(fontsize=FONT, frameon=False)
    axes.set_xlabel(label, fontsize=FONT)
    axes.set_ylabel("share", fontsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def training_curves(history: Sequence[Mapping[str, float]]) -> "Figure":
    """Loss and validation of a run of `distill`, by epoch.

    Args:
        history: what ``history.json`` holds: "epoch", "loss", and "top1", "top5" in 0..1 where
            there was a validation.

    Raises:
        ValueError: if there is no epoch.
        ImportError: if matplotlib is not installed.
    """
    _expect(history, "history: expected at least one epoch to draw")
    names = [name for name in ("top1", "top5") if all(name in entry for entry in history)]
    figure = _figure(9 if names else 4.5, 3.2)
    panels = figure.subplots(1, 2 if names else 1, squeeze=False)[0]
    epochs = [entry["epoch"] + 1 for entry in history]
    marker = "o" if len(history) == 1 else ""  # a line of one point is not seen
    panels[0].plot(epochs, [entry["loss"] for entry in history], color=FAINT, marker=marker)
    panels[0].set_ylabel("training loss", fontsize=FONT)
    for name, color in zip(names, (CURVE, FAINT), strict=False):
        values = [100 * entry[name] for entry in history]
        panels[1].plot(epochs, values, color=color, marker=marker)
        label = f"top-{name[3:]}  {values[-1]:.1f} %"
        panels[1].annotate(
            label,
            (epochs[-1], values[-1]),
            xytext=(0, -4 if name == "top1" else 4),
            textcoords="offset points",
            ha="right",
            va="top" if name == "top1" else "bottom",
            color=color,
            fontsize=FONT,
        )
        panels[1].set_ylabel("validation, %", fontsize=FONT)
    for axes in panels:
        axes.set_xlabel("epoch", fontsize=FONT)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


class Embedding(NamedTuple):
    """Pictures of one kind in the plane of two principal components."""

    points: Sequence[Sequence[Sequence[float]]]  # of each class, of each picture: two coordinates
    c_std: Sequence[float]  # of each class, in all dimensions


def embedding_planes(kinds: Mapping[str, Embedding], class_names: Sequence[str]) -> "Figure":
    """Features of some classes, a panel for each kind of picture, as in the paper's Fig. 7a.

    Over each panel stands the mean of c_std over its classes. All panels show the same part of the
    plane; lighter points of the later panels are those of the first, the originals.

    Raises:
        ValueError: if there is no kind of picture.
        ImportError: if matplotlib is not installed.
    """
    _expect(kinds, "kinds: expected at least one kind of picture")
    figure = _figure(2.6 * len(kinds), 3.1)
    every = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    _, *others = every
    for axes, (name, kind) in zip(every, kinds.items(), strict=True):
        if axes in others:
            first = next(iter(kinds.values()))
            _points(axes, [point for cloud in first.points for point in cloud], OTHER)
        for cloud, color, label in zip(
            kind.points, itertools.cycle(SERIES), class_names, strict=False
        ):
            _points(axes, cloud, color, label)
        mean = sum(kind.c_std) / len(kind.c_std)
        axes.set_title(f"{name}\nc-std {mean:.2f}", fontsize=FONT)
        axes.set(xticks=[], yticks=[])
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=FONT, frameon=False
    )
    return figure


def top_probabilities(kinds: Mapping[str, Sequence[float]]) -> "Figure":
    """Means of the sorted largest probabilities of each kind of picture: the paper's Fig. 7b.

    Raises:
        ValueError: if there is no kind of picture.
        ImportError: if matplotlib is not installed.
    """
    _expect(kinds, "kinds: expected at least one kind of picture")
    figure = _figure(6.5, 3.2)
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for number, (name, values) in enumerate(kinds.items()):
        places = np.arange(len(values)) + (number - (len(kinds) - 1) / 2) * width
        color = SERIES[number % len(SERIES)]
        axes.bar(places, values, width, color=color, label=name)
    longest = max(len(values) for values in kinds.values())
    axes.set_xticks(range(longest), [f"top-{place + 1}" for place in range(longest)])
    axes.set_ylabel("mean probability", fontsize=FONT)
    axes.legend(fontsize=FONT, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def setting_curves(
    series: Mapping[str, Mapping[float, Sequence[float]]],
    *,
    label: str,
    log: bool = False,
) -> "Figure":
    """Top-1 against the values of a setting, a curve a method, as in the paper's Fig. 6.

    Args:
        series: of each method, of each value, top-1 in 0..1 of each seed. Points are means; where
            there are several seeds, bars show the standard error of the mean.
        label: the setting's name.
        log: its axis is logarithmic.

    Raises:
        ValueError: if there is no method, or none has a value.
        ImportError: if matplotlib is not installed.
    """
    _expect(any(series.values()), "series: expected top-1 of at least one method and value")
    figure = _figure(4.5, 3.2)
    axes = figure.subplots()
    for number, (name, values) in enumerate(series.items()):
        if not values:
            continue
        found = [(value, *mean_and_error(values[value])) for value in sorted(values)]
        places, means, errors = (np.array(column) for column in zip(*found, strict=True))
        color = SERIES[number % len(SERIES)]
        axes.errorbar(places, 100 * means, 100 * errors, color=color, marker="o", label=name)
    if log:
        axes.set_xscale("log")
    ticks = sorted({value for values in series.values() for value in values})
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label, fontsize=FONT)
    axes.set_ylabel("top-1, %", fontsize=FONT)
    axes.legend(fontsize=FONT, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which is 0 for one value, of which nothing is known."""
    if len(values) < 2:
        return float(np.mean(values)), 0.0
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _figure(width: float, height: float) -> "Figure":
    figure = require_matplotlib()(figsize=(width, height), dpi=110, facecolor="white")
    figure.set_layout_engine("constrained")
    return figure


def _points(
    axes: "Axes", points: Sequence[Sequence[float]], color: str, label: str | None = None
) -> None:
    if points:
        across, along = zip(*points, strict=True)
        axes.scatter(across, along, s=7, color=color, label=label, linewidths=0)


def _expect(found: object, message: str) -> None:
    if not found:
        raise ValueError(f"{message}, got none.")
