"""Draw docs/images/house.png: the modules of the package, those above importing those below.

    python docs/house.py

Rows are the layers that pyproject.toml has lint-imports check; a box is as wide as its name and
the first words of its docstring need.
"""

import ast
from pathlib import Path
from textwrap import shorten

import tomllib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "supermix_transforms"
WIDTH, ROW, GAP = 13.0, 0.5, 0.08  # inches
COLOURS = {"package": "#e3efe8", "module": "#ffffff", "edge": "#2f8f5b", "text": "#666666"}


def layers() -> dict[str, list[list[str]]]:
    """Of each container, its layers from the top down, each with the names of its modules."""
    settings = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    return {
        contract["containers"][0]: [layer.split(" | ") for layer in contract["layers"]]
        for contract in settings["tool"]["importlinter"]["contracts"]
    }


def about(path: Path) -> tuple[str, int]:
    """The first line of a module's docstring, and how many lines the module has."""
    text = path.read_text(encoding="utf-8")
    summary = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return summary.replace("``", "").replace("`", ""), len(text.splitlines())


def boxes(axes, left: float, top: float, width: float, rows: list[list[str]], folder: Path) -> None:
    """A row a layer; its modules share the width by how much they have to say."""
    for row in rows:
        shares = [len(name) + 8 for name in row]
        x = left
        for name, share in zip(row, shares, strict=True):
            wide = (width + GAP) * share / sum(shares) - GAP
            summary, lines = about(folder / f"{name}.py")
            axes.add_patch(_box((x, top - ROW + GAP), wide, ROW - GAP, COLOURS["module"]))
            axes.text(x + 0.06, top - 0.17, name, fontsize=8, weight="bold")
            axes.text(x + wide - 0.06, top - 0.17, str(lines), fontsize=6.5, ha="right")
            shown = shorten(summary, int(wide * 16), placeholder="…")
            axes.text(x + 0.06, top - 0.36, shown, fontsize=6.5, color=COLOURS["text"])
            x += wide + GAP
        top -= ROW


def _box(place: tuple[float, float], width: float, height: float, colour: str):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        place,
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.04",
        facecolor=colour,
        edgecolor=COLOURS["edge"],
        linewidth=0.7,
    )


def draw() -> Figure:
    every = layers()
    inside = {name.partition(".")[2]: rows for name, rows in every.items() if "." in name}
    root = every["supermix_transforms"]
    heights = [ROW * (len(inside[row[0]]) + 0.9) if row[0] in inside else ROW for row in root]
    figure = Figure(figsize=(WIDTH + 0.4, sum(heights) + 0.4), dpi=80, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.2, WIDTH + 0.2), ylim=(-0.2, sum(heights) + 0.2))
    axes.set_axis_off()
    top = sum(heights)
    for row, height in zip(root, heights, strict=True):
        name = row[0]
        if name in inside:
            summary, _ = about(PACKAGE / name / "__init__.py")
            place = (0, top - height + GAP)
            axes.add_patch(_box(place, WIDTH, height - GAP, COLOURS["package"]))
            axes.text(0.1, top - 0.24, f"{name}/", fontsize=9, weight="bold")
            axes.text(1.2, top - 0.24, summary, fontsize=7.5, color=COLOURS["text"])
            boxes(axes, 0.1, top - 0.7 * ROW, WIDTH - 0.2, inside[name], PACKAGE / name)
        else:
            boxes(axes, 0, top, WIDTH, [row], PACKAGE)
        top -= height
    return figure


if __name__ == "__main__":
    path = HERE / "images" / "house.png"
    draw().savefig(path)
    print(path)
