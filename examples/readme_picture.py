"""Draw docs/images/overview.png, the README's picture: inputs, masks and mixes for k = 2 and k = 3.

    python examples/readme_picture.py

Pictures and teacher are those of `supermix demo`, the solver has its default settings, and the
weights are equal. Takes about ten seconds on two cores.
"""

import argparse
from pathlib import Path

import torch

from supermix_transforms.demo import demo_pictures, named_labeler
from supermix_transforms.mixing import supermix
from supermix_transforms.models import load_teacher
from supermix_transforms.plots import make_panels, overview

TUPLES = (("chelsea.png", "camera.png"), ("motorcycle_left.png", "rocket.jpg", "coffee.png"))
DEFAULT_OUT = Path(__file__).parents[1] / "docs" / "images" / "overview.png"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the PNG file")
arguments = parser.parse_args()

teacher = load_teacher("efficientnet-lite0")
labeler = named_labeler(teacher, device="cpu")
names, pictures = zip(*demo_pictures(), strict=True)
images = torch.stack(pictures)
originals, maps = labeler.examine(images)

panels = []
for chosen in TUPLES:
    sources = torch.tensor([[names.index(name) for name in chosen]])
    weights = torch.full(sources.shape, 1 / len(chosen))
    mixed = supermix(
        images, labeler, sources=sources, weights=weights, originals=originals, maps=maps
    )
    panels += make_panels(images, mixed, originals.argmax(dim=1), teacher.class_names)

arguments.out.parent.mkdir(parents=True, exist_ok=True)
# 90 dots an inch keep the file small; the README shows it narrower still.
overview(panels).savefig(arguments.out, dpi=90)
for panel in panels:
    seen = ", ".join(f"{top.name} {top.probability:.0%}" for top in panel.top[: len(panel.names)])
    print(f"{panel.outcome}, {panel.steps} steps, L_s {panel.sparsity:.3f}: {seen}")
