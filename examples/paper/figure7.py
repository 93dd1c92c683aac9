"""Figure 7: how the teacher sees the mixes, and what methods of mixing cost.

    python examples/paper/figure7.py --data ../shared/data --out docs/results/figure7.json

CIFAR-100 and its ResNet-56 (the paper: VGG13), 2,000 pictures, k 2; of the training set, which this
teacher knows by heart, and of the test set.

- a: the features before the classifier of three classes, in the plane of the originals' first two
  principal components, and how far they are from their class's mean in all dimensions, on average
  (c-std). The paper draws both and says that SuperMix's lie near the centre.
- b: the mean of the sorted top-5 probabilities, and the mean entropy in nats. The paper: smoother
  on mixes, smoothest on SuperMix's.
- c, times: `supermix bench`, or python examples/benchmarks/solver.py. The paper's figures: PAPER.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from real_data import cifar_teacher, pictures

from supermix_transforms import CutMix, MixUp, SuperMix, SuperMixCollate, TeacherLabeler

COUNT, BATCH, SEED, CLASSES = 2000, 200, 0, 3
PAPER = {  # panel c: seconds of SGD, Newton without and with smooth projection
    "ImageNet, VGG16": (15.41, 6.59, 0.23),
    "ImageNet, ResNet-34": (4.25, 1.98, 0.06),
    "CIFAR, VGG13": (0.482, 0.097, 0.005),
    "CIFAR, WRN": (0.509, 0.122, 0.006),
}


def kinds(images: Tensor, teacher: TeacherLabeler) -> dict[str, Tensor]:
    """Pictures of each kind."""
    view = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    torch.manual_seed(SEED)
    views = torch.stack([view(image) for image in images])
    seen = {"originals": images, "originals, cropped and flipped": views}
    loader = DataLoader(TensorDataset(views, torch.zeros(len(views)).long()), BATCH)
    for mix in (MixUp(teacher=teacher), CutMix(teacher=teacher), SuperMix(teacher)):
        collate = SuperMixCollate(teacher, mix=mix, seed=SEED)
        batches = [collate([(image, 0) for image in batch]).mix() for batch, _ in loader]
        seen[type(mix).__name__] = torch.cat([batch.mixed for batch in batches])
    return seen


def smoothness(images: Tensor, teacher: TeacherLabeler) -> dict[str, Any]:
    """Panel b."""
    log_probs = torch.cat([teacher(part).log_probs for part in images.split(BATCH)])
    probs = log_probs.exp()
    top = probs.topk(5, dim=1).values.mean(dim=0)
    entropy = -(probs * log_probs).sum(dim=1)
    return {
        "top5": [round(float(value), 4) for value in top],
        "entropy": round(float(entropy.mean()), 4),
    }


def embedded(seen: dict[str, Tensor], teacher: TeacherLabeler) -> dict[str, Any]:
    """Panel a: points of three classes in the plane of the originals, and c-std of each class.

    A mix belongs to the class that the teacher sees first in it.
    """
    features: dict[str, Tensor] = {}
    classes: dict[str, Tensor] = {}
    for name, images in seen.items():
        maps = [teacher.class_maps(part) for part in images.split(BATCH)]
        features[name] = torch.cat([each.features.mean(dim=(2, 3)) for each in maps if each])
        classes[name] = torch.cat([teacher(part).hard for part in images.split(BATCH)])
    chosen = classes["originals"].bincount().topk(CLASSES).indices
    of_chosen = torch.isin(classes["originals"], chosen)
    plane = features["originals"][of_chosen]
    centre = plane.mean(dim=0)
    _, _, axes = torch.pca_lowrank(plane, q=2, niter=8)
    found = {}
    for name, values in features.items():
        of_class = [values[classes[name] == each] for each in chosen]
        deviations = [float((v - v.mean(dim=0)).norm(dim=1).mean()) for v in of_class]
        found[name] = {
            "classes": chosen.tolist(),
            "c_std": [round(value, 3) for value in deviations],
            "points": [((v - centre) @ axes).round(decimals=2).tolist() for v in of_class],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/figure7.json"))
    parser.add_argument("--count", type=int, default=COUNT, help="pictures")
    options = parser.parse_args()
    teacher = cifar_teacher(options.data, "cifar100")
    content: dict[str, Any] = {
        "command": "python examples/paper/figure7.py",
        "pictures": options.count,
        "seed": SEED,
        "paper_seconds": PAPER,
    }
    for split in ("train", "test"):
        images = pictures(options.data, "cifar100", split)[: options.count]
        seen = kinds(images, teacher)
        content[f"b, {split}"] = {name: smoothness(mixed, teacher) for name, mixed in seen.items()}
        if split == "test":
            content["a, test"] = embedded(seen, teacher)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    for split in ("train", "test"):
        for name, values in content[f"b, {split}"].items():
            print(f"{split:6} {name:32} {values['entropy']:.3f}  {values['top5']}")


if __name__ == "__main__":
    main()
