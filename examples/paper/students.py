"""Students on CIFAR-100: what do mixes teach? One network makes and labels them, another learns.

    python examples/paper/students.py --data ../shared/data --work students/ --methods ce kd

What the scripts of the tables and figures beside this file share, and the reproduction itself.

A run has --steps steps of 128 originals and 128 mixes; one that learns from originals alone has
twice as many of 128, so that all students see equally many pictures. The rate falls as a cosine.

All methods read recipes of the same views, made once: a crop and a flip of each training picture,
before anything is mixed and before the teacher sees it. There are about 45,000 mixes in any case:
one of each picture if the student has 45,000 (--pictures), 22 of each if it has but 2,000. The last
5,000 training pictures are held out, and are what top-1 is measured on; --test measures students
that were trained so on the test set, once, when all is decided, and trains none. Policies (Table 1)
augment the views of pictures, without recipes.

A run that was stopped goes on; finished ones stand in the JSON and are not run again. Calls with
other --seeds or --methods, one thread each, may share --work if each has an --out of its own, and
--merge puts these together. A table of means, standard errors and paired differences to CutMix goes
to standard error.
"""

import argparse
import json
import math
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from real_data import CIFAR100_STATISTICS, ResNet, cifar_net, cifar_teacher

from supermix_transforms import ShardDataset, SolverSettings, SuperMix, TeacherLabeler, generate
from supermix_transforms.charts import mean_and_error
from supermix_transforms.data.policies import FILES, POLICIES, load_policy
from supermix_transforms.files import write_atomically
from supermix_transforms.offline.replaying import ReplayedMix
from supermix_transforms.training import (
    PAPER,
    DistillSettings,
    distill,
    evaluate,
    make_accelerator,
)
from supermix_transforms.training.data import TrainingData, of_recipes, online, other_pictures
from supermix_transforms.training.hints import HINTS, HintLoss
from supermix_transforms.training.loss import Pictured

BATCH, SHARD, HELD_OUT, MIXES, GROUP, SEED = 128, 1000, 5000, 45_000, 200, 0
VIEW = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
STORED = v2.PILToTensor()  # as it is stored
# The paper's rate, made 100 times shorter, leaves most of the training to rates so low that nothing
# is learned.
TRAINING = replace(PAPER, schedule="cosine")
SETTINGS: dict[str, Any] = {  # chosen on held-out pictures, the same for all methods
    "batch": f"{BATCH} originals and {BATCH} mixes",
    "training": asdict(TRAINING),
    "view": [str(step) for step in VIEW.transforms],
    "labels": "the 20 largest of the teacher's",
}


class Steady(TeacherLabeler):
    """A teacher that looks at four views of each mix: what it sees survives flips and shifts."""

    def logits(self, images: Tensor, *, precise: bool = False) -> Tensor:
        there, back = (pad(images, (by, -by, by, -by)) for by in (2, -2))
        views = (images, images.flip(3), there, back.flip(3))
        return self._mean([super(Steady, self).logits(view, precise=precise) for view in views])


SETS: dict[str, dict[str, Any]] = {  # the mixed sets, by what `generate` is asked for
    "supermix": {},
    "matched": {"partners": "matched"},
    "polish": {"settings": SolverSettings(polish=4)},
    "cutmix": {"mix": "cutmix"},
    "mixup": {"mix": "mixup"},
    "paper": {},  # the paper's solver
    "paper-drop": {"unconverged": "drop"},  # those of its mixes that converged
    # one thing of "supermix" each, to see what makes a mix teach
    "start": {"settings": SolverSettings(max_steps=0)},  # no step after the surrogate's masks
    "coarse": {"settings": SolverSettings(mask_size=8)},  # cells of 4 pixels instead of 2
    "coarser": {"settings": SolverSettings(mask_size=4)},
    "share": {"settings": SolverSettings(min_share=0.8)},
    "margin": {"settings": SolverSettings(margin=1.0)},
    "uneven": {"alpha": 0.5},
    "three": {"k": 3},
    "drop": {"unconverged": "drop"},
    "steady": {"teacher": Steady},
    "cutmix-steady": {"mix": "cutmix", "teacher": Steady},
}
METHODS: dict[str, dict[str, Any]] = {  # the set that is read, and what is learned from it
    "ce": {"set": "cutmix", "learn": "originals"},
    "kd": {"set": "cutmix", "learn": "originals", "kd": "originals"},
    **{name: {"set": "cutmix", "learn": "originals", "hints": name} for name in HINTS},
    "crd-kd": {"set": "cutmix", "learn": "originals", "hints": "crd", "kd": "originals"},
    **{
        f"{name}-{target}{'-kd' if kd == 'both' else ''}": {"set": name, "target": target, "kd": kd}
        for name in SETS
        for target in ("hard", "soft")
        for kd in ("none", "both")
    },
    **{
        f"unlabelled-hard{'-kd' if kd == 'both' else ''}": {"unlabelled": True, "kd": kd}
        for kd in ("none", "both")
    },
    # SuperMix, mixed while training
    **{f"online-{target}": {"online": True, "target": target} for target in ("hard", "soft")},
    # cropped and flipped once more, and labelled as they are then
    "after-soft": {"online": True, "after": VIEW, "target": "soft"},
    **{
        name + end: {"augment": name + end, "learn": "originals"}
        for name in (*POLICIES, *FILES)
        for end in ("", "+cutout")
    },
}
STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: ResNet(3, classes=100, project=True),
    "resnet8": lambda: ResNet(1, classes=100, project=True),
    "shufflenet_v2_x0_5": lambda: _torchvision("shufflenet_v2_x0_5"),
    "mobilenet_v3_small": lambda: _torchvision("mobilenet_v3_small"),
}
# whose maps stand beside those of the teacher's three, where names differ
STAGES = {"shufflenet_v2_x0_5": ("stage2:layer1", "stage3:layer2", "stage4:layer3")}
# what runs of one table have in common
SETTING = (
    *("pictures", "steps", "mixes", "teacher", "student"),
    *("window", "fixed", "lag", "float32", "test"),
)


@dataclass(frozen=True)
class Case:
    """A student that is trained."""

    method: str  # of METHODS
    seed: int = 0
    steps: int = 2112
    pictures: int = 45_000
    teacher: str = "resnet56"
    student: str = "resnet20"
    k: int = 2
    alpha: float | None = None  # the method's own
    mixes: int = MIXES  # in all
    lambda_s: float = 25.0  # of the paper's solver
    window: int = 16  # groups of recipes that are shuffled together
    # what else may be done to their order, to see what in it matters
    fixed: bool | None = None  # that of the first epoch in every epoch
    lag: int | None = None  # mixes beside the originals of so many batches later
    float32: bool | None = None  # instead of bf16, for CPUs that have no fast one
    test: bool = False  # measured on the test set, without training

    @property
    def name(self) -> str:
        """Of the run, which is the same whatever it is measured on."""
        parts = asdict(self)
        del parts["test"]
        for part in ("fixed", "lag", "float32"):
            parts[part] = None if parts[part] is None else f"{part}{parts[part]}"
        return "-".join(str(value) for value in parts.values() if value is not None)


def _torchvision(name: str) -> nn.Module:
    """Made for larger pictures: its first layer keeps the size of one of 32 pixels."""
    import torchvision.models

    network: nn.Module = torchvision.models.get_model(name, num_classes=100)
    next(part for part in network.modules() if isinstance(part, nn.Conv2d)).stride = (1, 1)
    return network


# -- data ------------------------------------------------------------------------------------------


def shards_of(data: Path, work: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Tars of the training, the held-out and the test pictures."""
    folder = work / f"shards-{SHARD}"
    if not (folder / "classes.json").exists():
        unpack = [sys.executable, str(data / "unpack.py"), "cifar100", str(folder)]
        subprocess.run([*unpack, "--format", "shards", "--shard-size", str(SHARD)], check=True)
    train = sorted(folder.glob("train-*.tar"))
    kept = HELD_OUT // SHARD
    return train[:-kept], train[-kept:], sorted(folder.glob("test-*.tar"))


def recipes_of(case: Case, data: Path, work: Path, shards: list[Path]) -> Path:
    """The folder of a mixed set; made, or gone on with, if it is not whole."""
    name = METHODS[case.method]["set"]
    options = {"k": case.k, "alpha": case.alpha} | SETS[name]
    if name.startswith("paper"):
        options["settings"] = SolverSettings(method="paper", lambda_s=case.lambda_s)
    plain = asdict(Case(case.method, pictures=case.pictures))
    others = {  # what is not as ever
        part: getattr(case, part)
        for part in ("teacher", "k", "alpha", "mixes", "lambda_s")
        if getattr(case, part) != plain[part]
    }
    parts = [name, case.pictures, *(f"{part}{value}" for part, value in others.items())]
    out = work / "-".join(map(str, parts))
    look = options.pop("teacher", TeacherLabeler)
    generate(
        ShardDataset(shards, transform=VIEW),
        look(cifar_teacher(data, "cifar100", net=case.teacher)),
        out,
        passes=max(1, case.mixes // case.pictures),
        top=20,
        batch_size=GROUP,
        unit_batches=5,
        seed=SEED,
        **options,
    )
    return out


def reordered(loaders: TrainingData, case: Case) -> TrainingData:
    """With what else is done to the order of recipes."""
    collate: Any = loaders.train.collate_fn
    past: deque[list[ReplayedMix]] = deque(maxlen=1 + (case.lag or 0))

    def lagging(mixes: list[ReplayedMix]) -> Any:
        past.append(mixes)
        then = past[0] if len(past[0]) == len(mixes) else mixes
        pairs = zip(then, mixes, strict=True)
        return collate([old._replace(image=new.image, label=new.label) for old, new in pairs])

    if case.fixed:
        vars(loaders.train.sampler)["set_epoch"] = lambda epoch: None
    if case.lag:
        loaders.train.collate_fn = lagging
    return loaders


def unlabelled_of(data: Path, work: Path) -> list[str]:
    """ImageNet pictures, of 32 pixels when they are read: the paper's ImgNet32, in small."""
    folder = work / "imagenet"
    if not any(folder.glob("*.tar")):
        unpack = [sys.executable, str(data / "unpack.py"), "imagenet-sample", str(folder)]
        subprocess.run([*unpack, "--format", "shards"], check=True)
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def data_of(case: Case, data: Path, work: Path) -> TrainingData:
    method = METHODS[case.method]
    train, held_out, _ = shards_of(data, work)
    train = train[: case.pictures // SHARD]
    judged = ShardDataset(held_out)
    target = method.get("target", "hard")
    options: dict[str, Any] = {"seed": case.seed, "batch_size": BATCH, "target": target}
    if "set" in method:
        folder = recipes_of(case, data, work, train)
        loaders = of_recipes(folder, ShardDataset(train), judged, window=case.window, **options)
        return reordered(loaders, case)
    teacher = cifar_teacher(data, "cifar100", net=case.teacher)
    mix: Any = SuperMix(teacher) if "online" in method else None
    if "unlabelled" in method:
        view = v2.Compose([v2.Resize(32), *VIEW.transforms])
        mix = other_pictures(unlabelled_of(data, work), view, seed=case.seed)
    augment = None
    if "augment" in method:
        epochs = settings_of(case, math.ceil(case.pictures / BATCH)).epochs
        augment = load_policy(method["augment"], epochs=epochs)
    options["after"] = method.get("after")
    view = {"labeler": teacher, "view": lambda _: VIEW, "size": 32}
    return online(ShardDataset(train), judged, mix=mix, augment=augment, **view, **options)


# -- training --------------------------------------------------------------------------------------


def settings_of(case: Case, steps_per_epoch: int) -> DistillSettings:
    """`steps` steps of mixes, or twice as many of originals alone; about as many in whole epochs.

    Raises:
        ValueError: if that is an eighth more or less than was asked for.
    """
    method = METHODS[case.method]
    learn = method.get("learn", "both")
    steps = case.steps * (2 if learn == "originals" else 1)
    epochs = max(1, round(steps / steps_per_epoch))
    if abs(epochs * steps_per_epoch - steps) > steps / 8:
        raise ValueError(
            f"--steps: expected a multiple of the {steps_per_epoch} steps of an epoch of "
            f"{case.method}, got {steps}. Methods are compared at equal steps."
        )
    return replace(
        TRAINING,
        epochs=epochs,
        learn=learn,
        kd=method.get("kd", "none"),
        seed=case.seed,
    )


def figures_of(case: Case, data: Path, work: Path, compiled: bool) -> dict[str, Any]:
    """Train a student, or go on with it; its figures.

    Raises:
        ValueError: if it is to be tested and is not trained yet.
    """
    out = work / "runs" / case.name
    if case.test and not (out / "results.json").exists():
        raise ValueError(
            f"--test: expected a student that was trained, got {case.name!r}, which is not in "
            f"{str(out.parent)!r}. Make the same call without --test first."
        )
    loaders = data_of(case, data, work)
    settings = settings_of(case, len(loaders.train))
    torch.manual_seed(case.seed)
    student = STUDENTS[case.student]()
    if compiled:
        student.compile()
    mean, std = CIFAR100_STATISTICS
    teacher = cifar_teacher(data, "cifar100", net=case.teacher)
    accelerator = make_accelerator(settings, mixed_precision="no" if case.float32 else "bf16")
    hints = None
    if method := METHODS[case.method].get("hints"):
        labels = loaders.labels() if method == "crd" else None
        network = cifar_net(data, "cifar100", case.teacher)
        layers = None if method == "crd" else STAGES.get(case.student)
        hints = HintLoss(
            method, student, network, torch.zeros(2, 3, 32, 32), layers=layers, labels=labels
        )
    summary = distill(
        student,
        loaders.train,
        loaders.validation,
        out,
        settings=settings,
        teacher=teacher,
        hints=hints,
        mean=mean,
        std=std,
        accelerator=accelerator,
        show=lambda line: print(f"{case.method} {case.seed}: {line}", file=sys.stderr, flush=True),
    )
    found = {name: getattr(summary, name) for name in ("top1", "top5", "ece", "agreement")}
    if case.test:  # by weights that are as they were after the last step
        pictures = DataLoader(ShardDataset(shards_of(data, work)[2], transform=STORED), BATCH)
        judged, pictures = accelerator.prepare(Pictured(student, mean, std), pictures)
        found = evaluate(judged, pictures, accelerator, teacher)
    return {
        **{name: value for name, value in asdict(case).items() if value is not None},
        **found,
        "student_samples": summary.student_samples,
        "seconds": {part: round(each) for part, each in summary.seconds.items()},
        "compiled": compiled,
    }


def run_all(cases: Iterable[Case], options: argparse.Namespace, **content: Any) -> list[Any]:
    """The figures of all cases; those that stand in --out are not run again."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"results": []}
    if options.out.exists():
        found = json.loads(options.out.read_text())
    found |= {
        "device": "CPU, one thread; bf16, where a result does not say float32",
        "versions": {package: version(package) for package in ("torch", "torchvision")},
        "settings": SETTINGS,
        **content,
    }
    for case in cases:
        asked = asdict(case).items()
        if any(all(each.get(name) == value for name, value in asked) for each in found["results"]):
            continue
        found["results"].append(figures_of(case, options.data, options.work, options.compile))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))
    return found["results"]


def table(
    results: list[dict[str, Any]],
    paper: Mapping[str, Any] | None = None,
    base: str = "cutmix-hard",
) -> Iterator[str]:
    """A line for each method of a setting: top-1 in per cent, less the base's, and the paper's."""
    settings: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for result in results:
        setting = tuple(map(result.get, SETTING))
        methods = settings.setdefault(setting, {})
        methods.setdefault(result["method"], {})[result["seed"]] = 100 * result["top1"]
    for setting, methods in settings.items():
        pictures, steps, mixes, teacher, student, window, fixed, lag, float32, test = setting
        of = f"{pictures:,} pictures, {mixes:,} mixes, {steps:,} steps, {teacher} to {student}"
        of += f", window {window}{', fixed' if fixed else ''}{f', lag {lag}' if lag else ''}"
        yield f"{of}{', float32' if float32 else ''}{', test set' if test else ''}"
        others = methods.get(base, {})
        for method, found in methods.items():
            line = f"  {method:20} {_with_error([*found.values()])}"
            pairs = [top - others[seed] for seed, top in found.items() if seed in others]
            if pairs and method != base:
                line += f"   {_with_error(pairs, sign='+')}"
            line += f"   {len(found)} seed{'s' if len(found) > 1 else ''}"
            yield f"{line}   paper: {paper[method]}" if paper and method in paper else line


def _with_error(values: Sequence[float], sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}6.2f}" + (f" ± {error:.2f}" if len(values) > 1 else " " * 7)


def parser_of(doc: str, name: str, methods: Sequence[str]) -> argparse.ArgumentParser:
    """The options that the scripts share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="shards, recipes, checkpoints")
    parser.add_argument("--out", type=Path, default=Path(f"docs/results/{name}.json"))
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2112)
    parser.add_argument("--pictures", type=int, default=45_000, help="that the student learns from")
    parser.add_argument("--mixes", type=int, default=MIXES, help="in all, of these pictures")
    parser.add_argument("--window", type=int, default=16, help="groups shuffled together, or 0")
    parser.add_argument("--fixed", action="store_true", default=None, help="one order of recipes")
    parser.add_argument("--lag", type=int, help="batches between originals and mixes of recipes")
    parser.add_argument("--float32", action="store_true", default=None, help="instead of bf16")
    parser.add_argument("--teacher", choices=("resnet56", "resnet20"), default="resnet56")
    parser.add_argument("--test", action="store_true", help="measure trained ones on the test set")
    parser.add_argument("--compile", action="store_true", help="the student, by torch.compile")
    return parser


def cases_of(options: argparse.Namespace, **fields: Any) -> list[Case]:
    """A case for each seed and method: one of each method first, so that what is there is paired"""
    return [
        Case(
            name,
            seed,
            options.steps,
            options.pictures,
            mixes=options.mixes,
            window=options.window,
            fixed=options.fixed,
            lag=options.lag,
            float32=options.float32,
            test=options.test,
            **{"teacher": options.teacher, **fields},
        )
        for seed in options.seeds
        for name in options.methods
    ]


def main() -> None:
    parser = parser_of(__doc__, "students", tuple(METHODS))
    parser.add_argument("--student", choices=tuple(STUDENTS), default="resnet20")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="JSON of other calls")
    options = parser.parse_args()
    if options.merge:
        every = [json.loads(path.read_text()) for path in options.merge]
        results = [result for each in every for result in each["results"]]
        content = {name: value for each in every for name, value in each.items()}
        content["results"] = results
        write_atomically(options.out, (json.dumps(content, indent=1) + "\n").encode())
        options.seeds = []  # nothing is run
    cases = cases_of(options, student=options.student)
    results = run_all(cases, options, command="python examples/paper/students.py")
    print("\n".join(table(results)), file=sys.stderr)


if __name__ == "__main__":
    main()
