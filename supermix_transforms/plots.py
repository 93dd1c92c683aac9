"""Pictures of mixes: what went in, the masks, the mix, and what the teacher says of it.

Figures are plain `matplotlib.figure.Figure` objects: no window, no pyplot state. All places are
given in inches, so nothing overlaps, whatever k is.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from supermix_transforms.results import Mixed, Outcome, TeacherLabels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "TOP",
    "Bar",
    "Panel",
    "Seen",
    "class_name",
    "contact_sheet",
    "cost_bars",
    "histogram",
    "make_panels",
    "overview",
    "training_curves",
]

TOP = 5  # classes whose probability is shown
CELL, GAP, EDGE = 1.3, 0.08, 0.15  # inches: a picture's side, between two, around all
TITLE, CAPTION, ARROW, BARS = 0.44, 0.34, 0.34, 2.6  # above and below pictures, before mix and bars
MIX = 2 * CELL + GAP  # a mix is as high as an input over its mask
ROW = TITLE + MIX + CAPTION
FONT, LINE = 9, 0.18  # points; inches
BARS_AT_MOST = 31
CURVE = "#2f8f5b"
ASKED, OTHER, FAINT = "#8fd0a8", "#d4d4d4", "#666666"  # bars of the tuple's classes, others; text


class Seen(NamedTuple):
    """A class and how probable the teacher finds it."""

    label: int
    name: str
    probability: float


class Bar(NamedTuple):
    """A method in a bar chart."""

    name: str
    value: float | None  # None: no bar, only the text
    text: str  # beside the bar


@dataclass(frozen=True, eq=False)
class Panel:
    """One mix and what is drawn of it."""

    inputs: Tensor  # (k, C, H, W), uint8 or floating
    masks: Tensor  # (k, H, W) in [0, 1]
    mix: Tensor  # (C, H, W)
    names: tuple[str, ...]  # the teacher's class of each input
    weights: tuple[float, ...]  # r of Eq. 2
    top: tuple[Seen, ...]  # the likeliest classes of the mix, first first; () without a teacher
    outcome: str
    sparsity: float  # L_s
    steps: int


def make_panels(
    images: Tensor,
    mixed: Mixed,
    classes: Tensor,
    class_names: Sequence[str] | None = None,
    *,
    count: int = 8,
) -> list[Panel]:
    """Panels of the first mixes of a batch.

    Args:
        images: the pictures that were mixed, (P, C, H, W).
        mixed: their mixes, as `supermix` returns them.
        classes: the teacher's class of each picture, (P,) int64.
        class_names: in label order; None writes numbers.
        count: mixes at most.
    """
    mixed = mixed[torch.arange(min(count, len(mixed)), device=mixed.sources.device)]
    top: list[tuple[Seen, ...]] = [()] * len(mixed)
    if mixed.logits is not None:
        labels = TeacherLabels.from_logits(mixed.logits)
        indices, log_probs, _ = labels.top(min(TOP, labels.num_classes))
        top = [
            tuple(Seen(i, class_name(i, class_names), p) for i, p in zip(*row, strict=True))
            for row in zip(indices.tolist(), log_probs.exp().tolist(), strict=True)
        ]
    masks = mixed.masks
    return [
        Panel(
            inputs=images[sources],
            masks=masks[row],
            mix=mixed.images[row],
            names=tuple(class_name(int(i), class_names) for i in classes[sources]),
            weights=tuple(mixed.weights[row].tolist()),
            top=top[row],
            outcome=Outcome(int(mixed.outcome[row])).name.lower().replace("_", " "),
            sparsity=float(mixed.sparsity[row]),
            steps=int(mixed.steps[row]),
        )
        for row, sources in enumerate(mixed.sources)
    ]


def class_name(index: int, class_names: Sequence[str] | None) -> str:
    """The name of a class, or its number where it has none."""
    if class_names is None or index >= len(class_names):
        return f"class {index}"
    return class_names[index]


def contact_sheet(panels: Sequence[Panel]) -> "Figure":
    """A row a mix: each input over its mask, the mix, and the teacher's five likeliest classes.

    Bars of the classes that were asked for are green. Rows may differ in k.

    Raises:
        ValueError: if there is no panel.
        ImportError: if matplotlib is not installed.
    """
    width = max((_width(panel) for panel in panels), default=0) + GAP + BARS
    canvas = _Canvas(panels, width, ROW * len(panels))
    for number, panel in enumerate(panels):
        top = number * ROW
        right = canvas.draw(panel, 0, top) + 2 * GAP
        canvas.text(right, top + TITLE, "teacher's top classes of the mix", FAINT, "left")
        canvas.bars(panel, right, top + TITLE, width - right)
        steps = f"{panel.steps} step{'' if panel.steps == 1 else 's'}"
        verdict = f"{panel.outcome} · L_s {panel.sparsity:.3f} · {steps}"
        canvas.text(right - 2 * GAP - MIX / 2, top + ROW - GAP, verdict)
    return canvas.figure


def overview(panels: Sequence[Panel]) -> "Figure":
    """Tuples side by side in one wide picture, as in the README.

    Under each mix stand the k likeliest classes.

    Raises:
        ValueError: if there is no panel.
        ImportError: if matplotlib is not installed.
    """
    space = 1.5 * ARROW
    width = sum(_width(panel) + space for panel in panels) - space
    lines = max((len(panel.names) for panel in panels), default=0)
    canvas = _Canvas(panels, width, TITLE + MIX + (lines + 0.5) * LINE)
    right = -space
    for panel in panels:
        right = canvas.draw(panel, right + space, 0)
        for line, (_, name, share) in enumerate(panel.top[: len(panel.names)], start=1):
            below = TITLE + MIX + (line + 0.5) * LINE
            canvas.text(right - MIX / 2, below, f"{name} {share:.0%}", width=MIX)
    return canvas.figure


def cost_bars(bars: Sequence[Bar], *, unit: str = "ms per converged image") -> "Figure":
    """What each method costs, on a logarithmic axis, as in the paper's Fig. 7c.

    Bars whose name starts with "fast" are green.

    Raises:
        ValueError: if there is no bar.
        ImportError: if matplotlib is not installed.
    """
    if not bars:
        raise ValueError("bars: expected at least one method to draw, got none.")
    figure = require_matplotlib()(figsize=(8, 1 + 0.36 * len(bars)), dpi=110, facecolor="white")
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    values = [bar.value for bar in bars if bar.value is not None] or [1.0]
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
    every = np.concatenate([np.asarray(values, dtype=float) for values in series.values()])
    if len(every) == 0:
        raise ValueError(f"series: expected at least one value of {label}, got none.")
    low, high = float(every.min()), float(every.max())
    if (every == every.round()).all() and high - low < BARS_AT_MOST:
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, BARS_AT_MOST)
    figure = require_matplotlib()(figsize=(4.5, 3.0), dpi=110, facecolor="white")
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    for (name, values), color in zip(series.items(), (CURVE, FAINT), strict=False):
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
    if not history:
        raise ValueError("history: expected at least one epoch to draw, got none.")
    names = [name for name in ("top1", "top5") if all(name in entry for entry in history)]
    size = (9 if names else 4.5, 3.2)
    figure = require_matplotlib()(figsize=size, dpi=110, facecolor="white")
    figure.set_layout_engine("constrained")
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


def require_matplotlib() -> "type[Figure]":
    """Matplotlib's `Figure`.

    Raises:
        ImportError: if matplotlib is not installed; it names the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"plots: expected matplotlib, got {error}. Install it: "
            'pip install "supermix-transforms[plots]"'
        ) from error
    return Figure


def _width(panel: Panel) -> float:
    """Of inputs, arrow and mix, in inches."""
    return len(panel.names) * (CELL + GAP) - GAP + ARROW + MIX


class _Canvas:
    """A figure on which things are placed in inches from its upper left corner."""

    def __init__(self, panels: Sequence[Panel], width: float, height: float) -> None:
        if not panels:
            raise ValueError("panels: expected at least one mix to draw, got none.")
        figure = require_matplotlib()
        self.width, self.height = width + 2 * EDGE, height + 2 * EDGE
        self.figure = figure(figsize=(self.width, self.height), dpi=110, facecolor="white")

    def axes(self, x: float, y: float, width: float, height: float) -> "Axes":
        left, below = (x + EDGE) / self.width, 1 - (y + EDGE + height) / self.height
        axes = self.figure.add_axes((left, below, width / self.width, height / self.height))
        axes.set_axis_off()
        return axes

    def picture(self, picture: Tensor, x: float, y: float, side: float) -> None:
        """A picture (C, H, W), or a mask (H, W), in a square."""
        values = picture.detach().cpu()
        if values.ndim == 3:
            values = (values[:3] if len(values) >= 3 else values[:1]).movedim(0, -1).squeeze(-1)
        if values.is_floating_point() and (values.min() < -1e-3 or values.max() > 1 + 1e-3):
            values = (values - values.min()) / (values.max() - values.min())  # was normalised
        axes = self.axes(x, y, side, side)
        brightest = 1 if values.is_floating_point() else 255
        axes.imshow(values.numpy(), cmap="gray", vmin=0, vmax=brightest)  # RGB ignores these three

    def text(
        self,
        x: float,
        y: float,
        text: str,
        color: str = "black",
        align: str = "center",
        size: float = FONT,
        width: float = math.inf,
    ) -> None:
        """One line that stands on y, cut where it is wider than `width` inches."""
        text = fit_text(text, width, size)
        place = ((x + EDGE) / self.width, 1 - (y + EDGE - 0.06) / self.height)
        self.figure.text(*place, text, ha=align, color=color, fontsize=size, parse_math=False)

    def draw(self, panel: Panel, x: float, y: float) -> float:
        """Inputs over masks, an arrow, and the mix; returns where the mix ends."""
        for image, mask, name, weight in zip(
            panel.inputs, panel.masks, panel.names, panel.weights, strict=True
        ):
            self.text(x + CELL / 2, y + TITLE - LINE, name, width=CELL)
            self.text(x + CELL / 2, y + TITLE, f"weight {weight:.2f}", FAINT)
            self.picture(image, x, y + TITLE, CELL)
            self.picture(mask, x, y + TITLE + CELL + GAP, CELL)
            x += CELL + GAP
        self.text(x + (ARROW - GAP) / 2, y + TITLE + MIX / 2 + 0.08, "→", size=16)
        x += ARROW - GAP
        self.text(x + MIX / 2, y + TITLE, "mix", FAINT)
        self.picture(panel.mix, x, y + TITLE, MIX)
        return x + MIX

    def bars(self, panel: Panel, x: float, y: float, width: float) -> None:
        axes = self.axes(x, y, width, MIX)
        axes.set_xlim(0, 1)
        axes.set_ylim(TOP - 0.5, -0.5)
        for place, (_, name, share) in enumerate(panel.top):
            color = ASKED if name in panel.names else OTHER
            axes.barh(place, share, height=0.72, color=color)
            name = fit_text(name, width - 0.5, FONT)
            axes.text(0.02, place, name, va="center", fontsize=FONT, parse_math=False)
            axes.text(1, place, f"{share:.0%}", va="center", ha="right", fontsize=FONT)


def fit_text(text: str, width: float, size: float) -> str:
    """The text, or its beginning and an ellipsis where it is wider than `width` inches."""
    from matplotlib.textpath import TextPath

    def fits(line: str) -> bool:
        path = TextPath((0, 0), line.replace("$", r"\$"), size=size)  # a dollar is no formula
        return bool(path.get_extents().width / 72 <= width)

    if width == math.inf or fits(text):
        return text
    lengths = range(1, len(text))
    kept = bisect.bisect_left(lengths, True, key=lambda length: not fits(text[:length] + "…"))
    return text[:kept].rstrip() + "…"
