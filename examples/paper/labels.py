"""What the labels of mixed sets say, and whether another network says so too.

    python examples/paper/labels.py --data ../shared/data --work students/ \
        --sets supermix-2000 cutmix-2000

Reads recipes of the ResNet-56 that students.py has made. The ResNet-20 beside the pictures, which
had no part in them and was trained on the same pictures, looks at 2,000 mixes of each set; for sets
of the ResNet-20, call it with --judge resnet56.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from real_data import cifar_teacher

from supermix_transforms import Outcome, ShardDataset, ShardSampler, TeacherLabeler, replay
from supermix_transforms.data.picturesets import class_indices
from supermix_transforms.offline.reading import open_unit


def figures_of(folder: Path, classes: np.ndarray) -> dict[str, float]:
    """Means over all mixes of a folder of recipes; `classes` (P,) are those of the samples."""
    found = []
    for path in sorted(folder.glob("*.recipe")):
        reader = open_unit(path)
        for group in map(reader.group, range(len(reader))):
            sources = classes[group.sample[group.source]]  # (M, k)
            hard, probs = group.index[:, 0], np.exp(group.log_prob.astype(float))
            share = np.append(
                group.weight / 65535, 1 - group.weight.sum(1, keepdims=True) / 65535, 1
            )
            heavier = sources[np.arange(len(sources)), share.argmax(axis=1)]
            asked = (group.index[:, :, None] == sources[:, None]).any(axis=2)  # (M, n)
            found.append(
                {
                    "converged": (group.outcome == Outcome.CONVERGED).mean(),
                    "hard label is a source's class": (hard[:, None] == sources).any(axis=1).mean(),
                    "hard label is the heavier source's": (hard == heavier).mean(),
                    "largest probability": probs[:, 0].mean(),
                    "second": probs[:, 1].mean(),
                    "of the sources' classes together": (probs * asked).sum(axis=1).mean(),
                }
            )
    return {name: round(float(np.mean([each[name] for each in found])), 3) for name in found[0]}


def judged(folder: Path, dataset: ShardDataset, judge: TeacherLabeler) -> dict[str, float]:
    """How far another network's answers to mixes are from the stored ones."""
    mixes = replay(folder, dataset)
    sampler = ShardSampler(mixes, seed=0, window=0)
    loader = DataLoader(mixes, 250, sampler=sampler, collate_fn=mixes.collate)
    same, gap, count = 0, 0.0, 0
    for batch in loader:
        theirs, ours = batch.mixed_teacher, judge(batch.mixed)
        same += int((theirs.hard == ours.hard).sum())
        gap += float(kl_div(ours.log_probs, theirs.probs, reduction="sum"))
        count += len(batch.mixed)
        if count >= 2000:
            break
    return {"another's class is the label": round(same / count, 3), "KL": round(gap / count, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="that of students.py")
    parser.add_argument("--sets", nargs="+", required=True, help="folders of recipes in it")
    parser.add_argument("--judge", choices=("resnet20", "resnet56"), default="resnet20")
    options = parser.parse_args()
    judge = cifar_teacher(options.data, "cifar100", net=options.judge)
    result = {}
    for name in options.sets:
        shards = sorted((options.work / "shards-1000").glob("train-*.tar"))
        count = next(int(part) for part in name.split("-") if part.isdigit())
        dataset = ShardDataset(shards[: count // 1000])
        classes = class_indices(dataset, range(len(dataset))).numpy()
        folder = options.work / name
        result[name] = figures_of(folder, classes) | judged(folder, dataset, judge)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
