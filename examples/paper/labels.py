"""What the labels of mixed sets say: is the teacher's class one of the pictures', and which?

    python examples/paper/labels.py --work students/ --sets supermix-2000 cutmix-2000

Reads recipes that students.py has made; no picture is decoded, no network runs.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from supermix_transforms import Outcome, ShardDataset
from supermix_transforms.data.picturesets import labels_of
from supermix_transforms.offline.replaying import open_unit


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="that of students.py")
    parser.add_argument("--sets", nargs="+", required=True, help="folders of recipes in it")
    options = parser.parse_args()
    result = {}
    for name in options.sets:
        shards = sorted((options.work / "shards-1000").glob("train-*.tar"))
        dataset = ShardDataset(shards[: int(name.split("-")[1]) // 1000])
        classes = labels_of(dataset, range(len(dataset))).numpy()
        result[name] = figures_of(options.work / name, classes)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
