"""Draw the paper's Figures 4 to 7 from our own runs.

    python examples/paper/figures.py

Figures 4 and 5 are mixed while you wait (a minute on two cores), with the packaged pictures and
teacher of `supermix demo`. Figures 6 and 7 are drawn of what figure6.py, figure7.py and
`supermix bench` wrote into docs/results; Figure 2 is examples/readme_picture.py.

- 4, 4-paper: one tuple by sigma and sparsity, and by sigma and lambda_s with the paper's solver.
  The fast solver needs a step at most for this tuple: sigma only shows where it goes on (polish).
- 5: SuperMix, MixUp and CutMix of 2, 3 and 4 pictures, each with the teacher's class activation
  maps of the first two pictures' classes.
- 6: top-1 against a setting, one picture for each panel that was run.
- 7a: features in the plane of two principal components; 7b: the sorted largest probabilities; 7c:
  times of this library's methods and the authors' loop, on ImageNet pictures.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from supermix_transforms import CutMix, MixUp, SolverSettings, SuperMix, TeacherLabeler, supermix
from supermix_transforms.charts import (
    Bar,
    Embedding,
    cost_bars,
    embedding_planes,
    setting_curves,
    top_probabilities,
)
from supermix_transforms.demo import demo_pictures
from supermix_transforms.draws import Draw
from supermix_transforms.models import load_teacher
from supermix_transforms.plots import Cell, heat_overlay, picture_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
SIGMAS, SPARSITIES, LAMBDAS = (0.5, 1.0, 2.0), (0.02, 0.074, 0.15), (1.0, 25.0, 100.0)
PICTURES = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
POLISH = 8  # steps after the mix has converged
EVEN = 1000.0  # alpha of near even weights


def figure4(images: Tensor, teacher: TeacherLabeler, method: str) -> "Figure":
    """The mix and the first picture's mask, and how surely the teacher sees both classes."""
    classes = teacher(images).hard
    rows = []
    for strength in LAMBDAS if method == "paper" else SPARSITIES:
        row = []
        for sigma in SIGMAS:
            if method == "paper":
                settings = SolverSettings(method="paper", lambda_s=strength, sigma=sigma)
            else:
                settings = SolverSettings(sparsity=strength, sigma=sigma, polish=POLISH)
            mixed = supermix(
                images,
                teacher,
                sources=torch.tensor([[0, 1]]),
                weights=torch.tensor([[0.5, 0.5]]),
                settings=settings,
            )
            assert mixed.logits is not None
            seen = float(mixed.logits.softmax(dim=1)[0, classes].sum())
            caption = f"L_s {float(mixed.sparsity[0]):.3f}, both seen {seen:.0%}"
            row.append(Cell((mixed.images[0], mixed.masks[0, 0]), caption))
        rows.append(row)
    names = [f"λ_s {value:g}" for value in LAMBDAS]
    if method != "paper":
        names = [f"sparsity {value:g}" for value in SPARSITIES]
    return picture_grid(rows, rows=names, columns=[f"σ {sigma:g} cells" for sigma in SIGMAS])


def figure5(images: Tensor, teacher: TeacherLabeler, names: list[str]) -> "Figure":
    """Each mix beside the maps of its first two classes; near even weights."""
    classes = teacher(images).hard
    rows = []
    for mixer in (SuperMix, MixUp, CutMix):
        row = []
        for k in (2, 3, 4):
            draw = Draw(seed=0, epoch=0, ids=torch.arange(k))
            mix = mixer(teacher=teacher, k=k, alpha=EVEN).mix(images[:k], classes[:k], draw)
            mixed = mix.mixed.images[:1]  # that of the first picture; all k are in it
            maps = teacher.class_maps(mixed)
            assert maps is not None
            heat = maps.maps()[0]
            shown = [heat_overlay(mixed[0], heat[label]) for label in classes[:2]]
            row.append(Cell((mixed[0], *shown)))
        rows.append(row)
    columns = [f"k {k}: mix, {names[0]}, {names[1]}" for k in (2, 3, 4)]
    return picture_grid(rows, rows=("SuperMix", "MixUp", "CutMix"), columns=columns)


def figure6(results: dict[str, Any], panel: str) -> "Figure":
    """Top-1 of the student against the values of a panel of figure6.py."""
    field = "mixes" if panel == "size" else panel
    series: dict[str, dict[float, list[float]]] = {}
    for result in results["results"]:
        values = series.setdefault(result["method"], {})
        values.setdefault(result[field], []).append(result["top1"])
    labels = {"size": "mixes", "alpha": "α", "lambda_s": "λ_s"}
    return setting_curves(series, label=labels.get(panel, panel), log=panel != "k")


def figure7(results: dict[str, Any]) -> Iterator[tuple[str, "Figure"]]:
    """Both panels that figure7.py measures on the test pictures."""
    kinds = {
        name: Embedding(kind["points"], kind["c_std"])
        for name, kind in results["a, test"].items()
        if name != "originals, cropped and flipped"
    }
    classes = [f"class {label}" for label in results["a, test"]["originals"]["classes"]]
    yield "figure7a", embedding_planes(kinds, classes)
    yield "figure7b", top_probabilities({n: k["top5"] for n, k in results["b, test"].items()})


def figure7c(results: dict[str, Any]) -> "Figure":
    """Times of methods that converge, as `supermix bench` wrote them."""
    bars = []
    for row in results["methods"]:
        ms = row["ms_per_converged_image"]
        if ms is not None and row["converged"] is not None and row["same_as"] is None:
            bars.append(Bar(row["name"], ms, f"{ms:,.0f} ms, {row['converged']:.0%} converged"))
    return cost_bars(bars)


def drawn() -> Iterator[tuple[str, "Figure"]]:
    """All figures, and their names."""
    net = load_teacher("efficientnet-lite0")
    teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
    pictures = dict(demo_pictures())
    images = torch.stack([pictures[name] for name in PICTURES])
    assert net.class_names is not None
    names = [net.class_names[label] for label in teacher(images).hard]
    yield "figure4", figure4(images[:2], teacher, "fast")
    yield "figure4-paper", figure4(images[:2], teacher, "paper")
    yield "figure5", figure5(images, teacher, names)
    for path in sorted(RESULTS.glob("figure6-*.json")):
        yield path.stem, figure6(json.loads(path.read_text()), path.stem.partition("-")[2])
    yield "figure7c", figure7c(json.loads((RESULTS / "bench-imagenet.json").read_text()))
    yield from figure7(json.loads((RESULTS / "figure7.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="a folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn():
        photographs = name.startswith(("figure4", "figure5"))
        path = options.out / f"{name}.{'jpg' if photographs else 'png'}"
        figure.savefig(path, dpi=80)  # keeps the files small
        print(path)


if __name__ == "__main__":
    main()
