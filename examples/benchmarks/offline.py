"""Recipes and shards: bytes, exactness, and how fast they are written and read.

    python examples/benchmarks/offline.py --data ../shared/data --out docs/results/offline.json

The ImageNet sample (1,000 pictures, copied to a folder of its own) with EfficientNet-Lite0, k 2,
masks of 16 cells, views by RandomResizedCrop and flip. Parts that stand in the file already are not
run again. Prints the JSON.

- `recipes`: teacher calls and bytes a mix, these by field too; the share of converged mixes with
  masks rounded for the recipe, and without (mixed shards of the same views and tuples); mean bytes
  of the mixes as PNG and JPEG; how many replayed pictures and labels, in batches of another size,
  differ from the generated ones.
- `codecs`: bytes a mix of these recipes, and of their masks, by compressor, with masks as residuals
  (as they are stored) and without; seconds to unpack 1,000 mixes.
- `replay`, `reading`: pictures a second, medians over passes that take turns, with 0 and 2 workers:
  replay against torchvision's CutMix over the same data set and view; ShardDataset against a
  `wds.WebDataset` pipeline.
- `processes`: mixes a second of `generate` on two processes of one thread, against two processes
  that each run nothing but the mixing of the same pictures, held in memory; they take turns.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from reports import Report, options_of
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from supermix_transforms import ShardDataset, ShardSampler, TeacherLabeler, generate, replay
from supermix_transforms.models import load_teacher
from supermix_transforms.offline.inspection import inspect_mixes
from supermix_transforms.offline.mixedshards import encode_pictures

BATCH, SIZE, PASSES, SEED = 64, 224, 7, 0
PARTS = ("recipes", "codecs", "replay", "reading", "processes")
TURNS = 3  # of the two kinds of processes


def view() -> v2.Transform:
    return v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()])


def teacher() -> TeacherLabeler:
    net = load_teacher("efficientnet-lite0")
    return TeacherLabeler(net.model, mean=net.mean, std=net.std)


# -- recipes ---------------------------------------------------------------------------------------


def recipes(shards: Path, folder: Path) -> dict[str, Any]:
    """Write them, look at them, and make the mixes again."""
    from supermix_transforms.offline import forms

    dataset = ShardDataset(shards, transform=view())
    made: list[Any] = []
    make = forms.RecipeForm.make

    def watch(self: Any, batch: Any) -> Any:
        made.append((batch.result.mixed, batch.result.mixed_teacher, batch.samples))
        return make(self, batch)

    forms.RecipeForm.make = watch  # type: ignore[method-assign]
    written = generate(dataset, teacher(), folder / "recipes", seed=SEED)
    forms.RecipeForm.make = make  # type: ignore[method-assign]
    plain = generate(dataset, teacher(), folder / "shards", form="shards", seed=SEED)

    images, probs = {}, {}  # of each mix, by pass and own sample
    for mixed, labels, samples in made:
        for row, own in enumerate(mixed.sources[:, 0]):
            images[int(samples[own])] = mixed.images[row]
            probs[int(samples[own])] = labels.probs[row]
    jpeg = {
        quality: statistics.mean(
            len(file)
            for some in torch.stack(list(images.values())).split(100)
            for file in encode_pictures(some, "jpg", quality)
        )
        for quality in (75, 95)
    }
    again = replay(folder / "recipes", ShardDataset(shards))
    other_pictures, worst = 0, 0.0
    for batch in DataLoader(again, 37, collate_fn=again.collate, num_workers=2):
        own = batch.extra["sources"][:, 0].tolist()
        other_pictures += sum(
            not torch.equal(picture, images[sample])
            for picture, sample in zip(batch.mixed, own, strict=True)
        )
        known = torch.stack([probs[sample] for sample in own])
        worst = max(worst, _kept(batch.mixed_teacher, known))
    fields = inspect_mixes(folder / "recipes").bytes_by_field
    calls = {
        name: round(float(torch.cat([vars(mixed)[name] for mixed, _, _ in made]).mean()), 2)
        for name in ("forwards", "backwards")
    }
    return {
        "mixes": written.mixes,
        **calls,
        "bytes_a_mix": round(written.bytes / written.mixes, 1),
        "bytes_by_field": {name: round(each, 1) for name, each in fields.items()},
        "png_bytes": round(plain.bytes / plain.mixes),
        "jpeg_bytes": {f"q{quality}": round(each) for quality, each in jpeg.items()},
        "converged_rounded": written.converged / written.mixes,
        "converged_not_rounded": plain.converged / plain.mixes,
        "other_pictures": other_pictures,
        "largest_label_error": worst,
    }


def _kept(labels: Any, probs: torch.Tensor) -> float:
    """The largest difference of a probability that is stored."""
    stored = labels.probs.gather(1, labels.indices)
    return float((stored - probs.gather(1, labels.indices)).abs().max())


# -- codecs ----------------------------------------------------------------------------------------


def codecs(folder: Path) -> dict[str, Any]:
    """What the recipes would take, were their fields compressed otherwise."""
    import bz2
    import lzma
    import zlib

    import numpy as np

    from supermix_transforms.offline import recipes
    from supermix_transforms.offline.reading import open_unit

    raw = {"format": lzma.FORMAT_RAW, "filters": recipes.FILTERS}
    compressors: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
        "lzma": (recipes._compress, lambda content: lzma.decompress(content, **raw)),
        "zlib": (lambda content: zlib.compress(content, 9), zlib.decompress),
        "bz2": (lambda content: bz2.compress(content, 9), bz2.decompress),
    }
    units = [open_unit(path) for path in sorted((folder / "recipes").glob("*.recipe"))]
    groups = [unit.group(i) for unit in units for i in range(len(unit))]
    mixes = sum(len(group.kind) for group in groups)
    fields = [
        (name, recipes._planes(name, getattr(group, name)))
        for group in groups
        for name in recipes.FIELDS
    ]
    grids = [np.ascontiguousarray(group.grid).tobytes() for group in groups]
    found = {}
    for name, (pack, unpack) in compressors.items():
        packed = [(field, pack(content)) for field, content in fields]
        start = time.perf_counter()
        for _, content in packed:
            unpack(content)
        seconds = time.perf_counter() - start
        every = sum(len(content) for _, content in packed)
        masks = sum(len(content) for field, content in packed if field == "grid")
        plain = sum(len(pack(grid)) for grid in grids)
        found[name] = {
            "bytes_a_mix": round(every / mixes, 1),
            "masks": round(masks / mixes, 1),
            "masks_without_residuals": round(plain / mixes, 1),
            "unpack_1000_s": round(1000 * seconds / mixes, 4),
        }
    return found


# -- reading ---------------------------------------------------------------------------------------


def in_turns(count: int, loaders: dict[str, Callable[[], Iterable[Any]]]) -> dict[str, Any]:
    """Pictures a second of each, medians over passes that take turns; the first is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(PASSES + 1):
        for name, loader in loaders.items():
            start = time.perf_counter()
            for _ in loader():
                pass
            seconds[name].append(time.perf_counter() - start)
    rates = {name: count / statistics.median(times[1:]) for name, times in seconds.items()}
    first = next(iter(rates.values()))
    return {
        "pictures_a_second": {name: round(rate) for name, rate in rates.items()},
        "by_the_first": {name: round(rate / first, 3) for name, rate in rates.items()},
    }


def replaying(shards: Path, folder: Path, workers: int) -> dict[str, Any]:
    transform = v2.Compose([view(), v2.PILToTensor()])
    dataset = ShardDataset(shards, transform=transform)
    cutmix = v2.CutMix(num_classes=1000)
    options = {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0}
    loaders = {
        "CutMix": DataLoader(
            dataset,
            sampler=ShardSampler(dataset),
            collate_fn=lambda samples: cutmix(*default_collate(samples)),
            **options,
        )
    }
    for output in ("tuple", "concat", "batch"):
        for order, window in (("", 16), (", by groups", 0)):
            mixes = replay(folder / "recipes", ShardDataset(shards), output=output)
            sampler = ShardSampler(mixes, window=window)
            loaders[f"replay, {output}{order}"] = DataLoader(
                mixes, sampler=sampler, collate_fn=mixes.collate, **options
            )
    return in_turns(
        len(dataset), {name: (lambda loader=loader: loader) for name, loader in loaders.items()}
    )


def reading(shards: Path, workers: int) -> dict[str, Any]:
    transform = v2.Compose([view(), v2.PILToTensor()])
    dataset = ShardDataset(shards, transform=transform)
    ours = DataLoader(
        dataset,
        BATCH,
        sampler=ShardSampler(dataset),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    stream = (
        wds.WebDataset(urls, shardshuffle=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg;png", "cls")
        .map_tuple(transform)
        .batched(BATCH)
    )
    theirs = wds.WebLoader(
        stream, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )
    return in_turns(len(dataset), {"WebDataset": lambda: theirs, "ShardDataset": lambda: ours})


# -- processes -------------------------------------------------------------------------------------


def child(shards: Path, folder: Path, what: str) -> None:
    """One of two processes: writes recipes, or mixes pictures that it holds."""
    from supermix_transforms import SolverSettings, SuperMixCollate
    from supermix_transforms.inputs import identities

    torch.set_num_threads(1)
    dataset = ShardDataset(shards, transform=v2.Compose([view(), v2.PILToTensor()]))
    rank = int(os.environ["RANK"])
    if what == "generate":
        dataset.transform = view()
        summary = generate(dataset, teacher(), folder, batch_size=BATCH, unit_batches=1, seed=SEED)
        made, seconds = summary.made, summary.seconds
    else:
        sampler = list(ShardSampler(dataset, seed=SEED))
        chunks = [sampler[i : i + BATCH] for i in range(0, len(sampler), BATCH)][rank::2]
        torch.manual_seed(rank)
        batches = [torch.stack([dataset[i][0] for i in chunk]) for chunk in chunks]
        mixer = SuperMixCollate(teacher(), settings=SolverSettings(quantised=True))
        start = time.perf_counter()
        for images in batches:
            mixer.mix(images, None, identities(images))
        made, seconds = sum(map(len, batches)), time.perf_counter() - start
    (folder.parent / f"{folder.name}-{rank}.json").write_text(json.dumps([made, seconds]))


def processes(shards: Path, folder: Path) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"loop": [], "generate": []}
    for turn in range(TURNS):
        for what, found in rates.items():
            out = folder / f"{what}-{turn}"
            command = ["torchrun", "--nproc-per-node", "2", __file__, "--child", what]
            subprocess.run(
                [*command, "--shards", str(shards), "--folder", str(out)],
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            parts = [json.loads((folder / f"{out.name}-{r}.json").read_text()) for r in (0, 1)]
            found.append(sum(made / seconds for made, seconds in parts))
    each = {what: statistics.median(found) for what, found in rates.items()}
    return {
        "mixes_a_second": {what: round(rate, 2) for what, rate in each.items()},
        "all": {what: [round(rate, 2) for rate in found] for what, found in rates.items()},
        "generate_by_loop": round(each["generate"] / each["loop"], 3),
    }


def main() -> None:
    parser = options_of(__doc__, "offline")
    parser.add_argument("--parts", nargs="+", default=PARTS)
    parser.add_argument("--work", type=Path, help="a folder that is kept, for a second call")
    parser.add_argument("--child")
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.shards, options.folder, options.child)
        return
    report = Report(options, "offline", batch=BATCH, size=SIZE, seed=SEED)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        shards = work / "sample"
        shards.mkdir(parents=True, exist_ok=True)
        for tar in (options.data / "imagenet-sample").glob("*.tar"):
            if not (shards / tar.name).exists():
                shutil.copy(tar, shards)
        for part in options.parts:
            if report.has(part=part):
                continue
            if part == "recipes":
                report.add({"part": part, **recipes(shards, work)})
            elif part == "codecs":
                report.add({"part": part, **codecs(work)})
            elif part == "processes":
                report.add({"part": part, **processes(shards, work)})
            else:
                torch.set_num_threads(1)
                of = (lambda n: replaying(shards, work, n)) if part == "replay" else None
                of = of or (lambda n: reading(shards, n))
                report.add({"part": part, "workers": {n: of(n) for n in (0, 2)}})
    print(json.dumps(report.content, indent=1))


if __name__ == "__main__":
    sys.exit(main())
