"""Pictures of mixes: what went in, the masks, the mix, and what the teacher says of it.

Figures are plain `matplotlib.figure.Figure` objects: no window, no pyplot state. All places are
given in inches, so nothing overlaps, whatever k is.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supermix_transforms.results import Mixed, Outcome, TeacherLabels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "TOP",
    "Cell",
    "Panel",
    "Seen",
    "class_name",
    "contact_sheet",
    "heat_overlay",
    "make_panels",
    "overview",
    "picture_grid",
]

TOP = 5  # classes whose probability is shown
CELL, GAP, EDGE = 1.3, 0.08, 0.15  # inches: a picture's side, between two, around all
TITLE, CAPTION, ARROW, BARS = 0.44, 0.34, 0.34, 2.6  # above and below pictures, before mix and bars
MIX = 2 * CELL + GAP  # a mix is as high as an input over its mask
ROW = TITLE + MIX + CAPTION
NAMES = 1.1  # left of a grid's rows
FONT, LINE = 9, 0.18  # points; inches
ASKED, OTHER, FAINT = "#8fd0a8", "#d4d4d4", "#666666"  # bars of the tuple's classes, others; text


class Seen(NamedTuple):
    """A class and how probable the teacher finds it."""

    label: int
    name: str
    probability: float


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
    _check_panels(panels)
    width = max(_width(panel) for panel in panels) + GAP + BARS
    canvas = _Canvas(width, ROW * len(panels))
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
    _check_panels(panels)
    space = 1.5 * ARROW
    width = sum(_width(panel) + space for panel in panels) - space
    lines = max(len(panel.names) for panel in panels)
    canvas = _Canvas(width, TITLE + MIX + (lines + 0.5) * LINE)
    right = -space
    for panel in panels:
        right = canvas.draw(panel, right + space, 0)
        for line, (_, name, share) in enumerate(panel.top[: len(panel.names)], start=1):
            below = TITLE + MIX + (line + 0.5) * LINE
            canvas.text(right - MIX / 2, below, f"{name} {share:.0%}", width=MIX)
    return canvas.figure


class Cell(NamedTuple):
    """Pictures beside each other, and a line under them."""

    pictures: Sequence[Tensor]  # (C, H, W), or masks (H, W)
    caption: str = ""


def picture_grid(
    cells: Sequence[Sequence[Cell]], *, rows: Sequence[str], columns: Sequence[str]
) -> "Figure":
    """A table of pictures: mixes by two settings, or methods by k, as in the paper's Fig. 4 and 5.

    Args:
        cells: of each row, of each column; all have equally many pictures.
        rows: names, on the left.
        columns: names, on top.

    Raises:
        ValueError: if there is no cell, or not one for each row and column.
        ImportError: if matplotlib is not installed.
    """
    lengths = [len(row) for row in cells]
    if not lengths or lengths != [len(columns)] * len(rows) or not columns:
        raise ValueError(
            f"cells: expected {len(rows)} rows of {len(columns)} cells, one at least, got rows of "
            f"{lengths}."
        )
    wide = max(len(cell.pictures) for row in cells for cell in row)
    step_x, step_y = wide * (CELL + GAP) + GAP, CELL + (LINE + GAP if _captioned(cells) else GAP)
    canvas = _Canvas(NAMES + len(columns) * step_x, LINE + len(rows) * step_y)
    for place, name in enumerate(columns):
        middle = NAMES + place * step_x + (wide * (CELL + GAP) - GAP) / 2
        canvas.text(middle, LINE, name, width=step_x)
    for down, (name, row) in enumerate(zip(rows, cells, strict=True)):
        top = LINE + down * step_y
        canvas.text(NAMES - 2 * GAP, top + CELL / 2 + LINE / 2, name, align="right", width=NAMES)
        for across, cell in enumerate(row):
            left = NAMES + across * step_x
            for number, picture in enumerate(cell.pictures):
                canvas.picture(picture, left + number * (CELL + GAP), top, CELL)
            middle = left + (wide * (CELL + GAP) - GAP) / 2
            canvas.text(middle, top + CELL + LINE, cell.caption, FAINT, width=step_x)
    return canvas.figure


def heat_overlay(image: Tensor, heat: Tensor) -> Tensor:
    """A picture under the colours of a class activation map (Zhou et al., CVPR 2016).

    Args:
        image: (3, H, W) uint8, or floating in [0, 1].
        heat: (h, w) of any range, such as ``teacher.class_maps(images).maps()[0, c]``; stretched to
            the picture's size. What is below 0 speaks against the class and has the lowest colour.

    Returns:
        (3, H, W) float32 in [0, 1].

    Raises:
        ImportError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import colormaps

    share = heat.detach().float().cpu().clamp(min=0)
    size = tuple(image.shape[-2:])
    share = F.interpolate(share[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    share = share / share.max().clamp(min=1e-12)
    colours = torch.from_numpy(colormaps["jet"](share.numpy())[..., :3]).float().movedim(-1, 0)
    picture = image.detach().cpu()
    picture = picture if picture.is_floating_point() else picture / 255
    return 0.5 * picture.float() + 0.5 * colours


def _captioned(cells: Sequence[Sequence[Cell]]) -> bool:
    return any(cell.caption for row in cells for cell in row)


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


def _check_panels(panels: Sequence[Panel]) -> None:
    if not panels:
        raise ValueError("panels: expected at least one mix to draw, got none.")


def _width(panel: Panel) -> float:
    """Of inputs, arrow and mix, in inches."""
    return len(panel.names) * (CELL + GAP) - GAP + ARROW + MIX


class _Canvas:
    """A figure on which things are placed in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
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

    if width == math.inf or not text or fits(text):  # no text has no path
        return text
    lengths = range(1, len(text))
    kept = bisect.bisect_left(lengths, True, key=lambda length: not fits(text[:length] + "…"))
    return text[:kept].rstrip() + "…"
