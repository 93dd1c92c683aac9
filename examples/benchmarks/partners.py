"""Are matched partners varied, and what do they cost and save beside random ones?

    python examples/benchmarks/partners.py --data ../shared/data --out docs/results/partners.json

CIFAR-100's test pictures with ResNet-56; shards 0-1 of the ImageNet sample with EfficientNet-Lite0.
Partners are drawn for three epochs of batches that are shuffled anew; one batch of 256 is mixed.
Cases that stand in the file already are not run again. Prints the JSON.

- `superclass_share`: tuples whose two classes are of one superclass (CIFAR-100).
- `class_pairs`: different pairs of classes in three epochs; `partners_a_picture`: different ones.
- `without_a_turn`: share of the pictures that were no one's partner in three epochs.
- `label_entropy`: of the teacher's answer for the 256 mixes, in nats.
- `matching_share`: the time to find the partners of 256 pictures, by the time to mix them.
"""

import json
import time

import torch
from real_data import load
from reports import Report, options_of
from torch import Tensor

from supermix_transforms import TeacherLabeler
from supermix_transforms.draws import Draw, draw_ring, draw_weights
from supermix_transforms.inputs import identities
from supermix_transforms.mixing import supermix
from supermix_transforms.partners import match_partners
from supermix_transforms.results import ClassMaps

EPOCHS, MIXED, SEED, K = 3, 256, 0, 2
BATCHES = {"cifar100": 200, "imagenet": 250}
CASES = [(name, partners) for name in BATCHES for partners in ("random", "matched")]


def tuples(partners: str, maps: ClassMaps, classes: Tensor, draw: Draw) -> Tensor:
    if partners == "matched":
        return match_partners(maps, classes, K, draw)
    return draw_ring(draw, classes, K)


def variety(
    partners: str, logits: Tensor, maps: ClassMaps, ids: Tensor, batch: int, coarse: Tensor | None
) -> dict:
    """What three epochs of batches give."""
    classes, count = logits.argmax(dim=1), len(logits)
    parts = []
    for epoch in range(EPOCHS):
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        for rows in shuffled.split(batch):
            part = ClassMaps(maps.features[rows], maps.weight, maps.bias)
            sources = tuples(partners, part, classes[rows], Draw(SEED, epoch, ids[rows]))
            parts.append(rows[sources])
    pairs = torch.cat(parts)  # (EPOCHS * count, 2)
    seen = classes[pairs]
    uses = pairs[:, 1].bincount(minlength=count)
    figures = {
        "class_pairs": len(seen.sort(dim=1).values.unique(dim=0)),
        "partners_a_picture": round(len(pairs.unique(dim=0)) / count, 3),
        "without_a_turn": round((uses == 0).double().mean().item(), 4),
        "most_turns": int(uses.max()),
    }
    if coarse is not None:
        same = coarse[seen[:, 0]] == coarse[seen[:, 1]]
        figures = {"superclass_share": round(same.double().mean().item(), 4)} | figures
    return figures


def mix(partners: str, images: Tensor, teacher: TeacherLabeler) -> dict:
    """What one batch gives, and how long it takes."""
    draw = Draw(SEED, 0, identities(images))
    start = time.perf_counter()
    logits, maps = teacher.examine(images)
    assert maps is not None
    examined = time.perf_counter()
    sources = tuples(partners, maps, logits.argmax(dim=1), draw)
    matched = time.perf_counter()
    weights = draw_weights(draw, sources, 3.0)
    mixed = supermix(images, teacher, sources=sources, weights=weights, originals=logits, maps=maps)
    end = time.perf_counter()
    assert mixed.logits is not None
    log_probs = mixed.logits.double().log_softmax(dim=1)
    members = torch.zeros_like(log_probs).scatter(1, logits.argmax(dim=1)[sources], 1.0)
    return {
        "mixed": len(images),
        "converged": round(mixed.converged.double().mean().item(), 4),
        "pairs_per_image": round((mixed.forwards + mixed.backwards).mean().item() / 2, 3),
        "label_entropy": round(-(log_probs.exp() * log_probs).sum(dim=1).mean().item(), 3),
        "teacher_share": round((log_probs.exp() * members).sum(dim=1).mean().item(), 3),
        "matching_ms": round(1000 * (matched - examined)),
        "matching_share": round((matched - examined) / (end - start), 4),
        "ms_per_image": round(1000 * (end - start) / len(images), 1),
    }


def main() -> None:
    parser = options_of(__doc__, "partners")
    parser.add_argument("--pictures", type=int, help="at most so many of each data set")
    options = parser.parse_args()
    report = Report(options, "partners", seed=SEED, k=K, epochs=EPOCHS)
    for name, partners in CASES:
        if report.has(data=name, partners=partners):
            continue
        images, teacher = load(options.data, name, tuning=True)
        coarse = None
        if name == "cifar100":
            meta = json.loads((options.data / "cifar100/meta.json").read_text())
            coarse = torch.tensor(meta["fine_to_coarse"])
        images = images[: options.pictures]
        seen = [teacher.examine(part) for part in images.split(100)]
        logits = torch.cat([answer for answer, _ in seen])
        features = torch.cat([maps.features for _, maps in seen])
        maps = ClassMaps(features, *seen[0][1][1:])
        case = {"data": name, "partners": partners, "pictures": len(images)}
        case |= {"batch": BATCHES[name]}
        case |= variety(partners, logits, maps, identities(images), BATCHES[name], coarse)
        case |= mix(partners, images[:MIXED], teacher)
        report.add(case)
    print(json.dumps(report.content))


if __name__ == "__main__":
    main()
