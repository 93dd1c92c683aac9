"""The command ``supermix distill``: its options, and what they name."""

import argparse
import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from supermix_transforms.charts import training_curves
from supermix_transforms.commands.options import search_options
from supermix_transforms.data.policies import load_policy
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.data.views import VIEWS
from supermix_transforms.demo import named_labeler
from supermix_transforms.files import write_atomically
from supermix_transforms.models import load_student, load_teacher
from supermix_transforms.offline.generation import process_state
from supermix_transforms.plots import require_matplotlib
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler
from supermix_transforms.training import MODERN, PAPER, DistillSummary, distill, make_accelerator
from supermix_transforms.training.data import (
    TrainingData,
    mixed_pictures,
    of_recipes,
    online,
    open_source,
    open_validation,
    other_pictures,
)
from supermix_transforms.training.hints import HINTS, HintLoss
from supermix_transforms.transforms import CutMix, MixUp, SuperMix

__all__ = ["DISTILL_EXAMPLE", "distill_options", "run_distill"]

DISTILL_EXAMPLE = """\
examples:
  supermix distill --images photos/ --labels teacher --teacher efficientnet-lite0 \\
      --student timm/mobilenetv3_small_050 --preset modern --epochs 5 --out run/
  supermix distill --shards 'train-{000..127}.tar' --recipes recipes/ \\
      --validation 'val-{00..06}.tar' --student timm/resnet18 --out run/

Mixes are made while training, by the teacher, or read from recipes or mixed shards. Without
--validation a tenth of the samples is held out; not with recipes or mixed shards, which were made
of all. Killed and started again, it goes on."""

VIEW = "random-resized-crop"
# what is asked of mixes that are made while training
SEARCH = ("method", "partners", "mask_size")  # of supermix
MIXING = ("mix", "k", "alpha", *SEARCH, "unconverged")
DESCRIBED = (  # options that make another run
    *("shards", "images", "dataset", "validation", "num_classes", "view", "size", "augment"),
    *("teacher", "weights", *MIXING, "recipes", "mixed_shards", "unlabelled", "window", "target"),
    *("layers", "student", "student_weights", "batch_size"),
)


def distill_options(command: argparse.ArgumentParser) -> None:
    """All but --out, --seed and --json."""
    _data_options(command.add_argument_group("pictures"))
    _mix_options(command.add_argument_group("what is learned from"))
    _training_options(command.add_argument_group("training"))


def _data_options(group: Any) -> None:
    add = group.add_argument
    add("--shards", nargs="+", metavar="TAR|DIR|URL", help="labelled pictures")
    add("--images", metavar="DIR", help="a folder of pictures, or of a subfolder for each class")
    add("--dataset", metavar="NAME", help="of torchvision, CIFAR100 for example; in --root")
    add("--root", metavar="DIR", default=".", help="where the files of --dataset are")
    add("--cache-dir", metavar="DIR", help="for copies of shards from elsewhere")
    add(
        "--validation",
        nargs="+",
        metavar="TAR|DIR|URL|SPLIT",
        help="what is not trained on: shards, a folder, or a part of --dataset, such as test",
    )
    add("--labels", choices=("data", "teacher"), default="data", help="whose, of the originals")
    add("--num-classes", type=int, help="where neither a teacher nor the pictures tell")
    add(
        "--view",
        choices=tuple(VIEWS),
        help="how pictures are cropped; random-resized-crop, if left out",
    )
    add(
        "--size", type=int, metavar="PIXELS", help="side of the pictures; the teacher's own, or 224"
    )
    add(
        "--augment",
        metavar="NAME|FILE.json",
        help="after the view, before mixing: randaugment, autoaugment-cifar10+cutout, ...",
    )
    add("--num-workers", type=int, default=0, help="processes that read pictures")


def _mix_options(group: Any) -> None:
    add = group.add_argument
    add("--teacher", metavar="NAME", help="timm/NAME, torchvision/NAME, FILE.py:FUNCTION, ...")
    add("--weights", metavar="FILE", help="the teacher's, .safetensors, .pt or .pth")
    add("--mean", type=float, nargs="+", help="of each channel in 0..1; the teacher's")
    add("--std", type=float, nargs="+", help="with --mean")
    mixes = ("supermix", "mixup", "cutmix")
    add("--mix", choices=mixes, help="while training; supermix, if left out")
    add("--k", type=int, help="pictures a mix, 2 if left out")
    add("--alpha", type=float, help="of the weights; 3 for supermix, 1 for the others")
    search_options(group, defaults=False)
    add(
        "--unconverged",
        choices=("keep", "drop", "redraw"),
        help="mixes in which the teacher does not see all pictures; keep, if left out",
    )
    other = group.add_mutually_exclusive_group().add_argument
    other("--recipes", metavar="DIR", help="what generate wrote of these shards; needs no teacher")
    other("--mixed-shards", metavar="DIR", help="what generate --as shards wrote; needs no teacher")
    other(
        "--unlabelled",
        nargs="+",
        metavar="TAR|DIR|URL",
        help="other pictures in the place of mixes, which the teacher labels",
    )
    add(
        "--window",
        type=int,
        metavar="GROUPS",
        help="of recipes, shuffled together; 16, if left out",
    )
    add("--learn", choices=("both", "originals"), default="both", help="originals: no mixes")
    targets = ("soft", "hard")
    add("--target", choices=targets, help="label of mixes, soft if left out; the paper's are hard")
    add("--hints", choices=HINTS, help="adds a loss of features, by torchdistill")
    add(
        "--layers",
        nargs="+",
        metavar="PATH|STUDENT:TEACHER",
        help="modules whose maps --hints compares; those of the same name and size",
    )
    add(
        "--kd",
        choices=("none", "originals", "both"),
        default="none",
        help="distillation loss (Eq. 8), on which pictures",
    )
    add("--kd-weight", type=float, help="lambda_KD of Eq. 8; 0.1, if left out")
    add("--temperature", type=float, help="tau of Eq. 8; 4, if left out")


def _training_options(group: Any) -> None:
    add = group.add_argument
    add("--student", required=True, metavar="NAME", help="timm/NAME, ..., as for --teacher")
    add("--student-weights", metavar="FILE", help="to begin with, as --weights")
    add("--preset", choices=("paper", "modern"), default="paper", help="settings of the training")
    add("--epochs", type=int, help="passes over the training data; the preset's")
    add("--lr", type=float, help="learning rate; the preset's, if left out")
    add("--batch-size", type=int, default=128, help="originals a step, and as many mixes")
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="STEPS",
        help="that are averaged into one update",
    )
    add("--mixed-precision", choices=("no", "fp16", "bf16"), default="no", help="of the student")
    add(
        "--tracker",
        metavar="NAME",
        help="of Accelerate, to log epochs to: tensorboard, ...",
    )


def run_distill(arguments: argparse.Namespace) -> DistillSummary:
    """Train a student as the options say, and draw ``curve.png`` into its folder.

    Raises:
        ValueError, ImportError: as what is asked for does.
    """
    require_matplotlib()  # now, not after the last epoch
    if arguments.accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1 step, got {arguments.accumulate}.")
    if arguments.kd == "none":
        _refuse(arguments, "--kd none", ("kd_weight", "temperature"))
    preset = {"paper": PAPER, "modern": MODERN}[arguments.preset]
    settings = replace(
        preset,
        epochs=_given(arguments.epochs, preset.epochs),
        lr=_given(arguments.lr, preset.lr),
        learn=arguments.learn,
        labels=arguments.labels,
        kd=arguments.kd,
        kd_weight=_given(arguments.kd_weight, preset.kd_weight),
        temperature=_given(arguments.temperature, preset.temperature),
        seed=arguments.seed,
    )
    state = process_state()
    try:
        with _bar(state.process_index) as (show, advance):
            teacher = _teacher_of(arguments, state.device)
            data = _training_data(arguments, teacher.labeler, teacher.size, settings.epochs)
            weights = arguments.student_weights
            torch.manual_seed(arguments.seed)  # of the student's first weights, and those of hints
            student = load_student(arguments.student, data.num_classes, weights=weights)
            summary = distill(
                student,
                data.train,
                data.validation,
                arguments.out,
                settings=settings,
                teacher=teacher.labeler,
                hints=_hints_of(arguments, student, teacher, data),
                mean=teacher.mean,
                std=teacher.std,
                accelerator=make_accelerator(
                    settings,
                    mixed_precision=arguments.mixed_precision,
                    gradient_accumulation_steps=arguments.accumulate,
                    log_with=arguments.tracker,
                    project_dir=arguments.out,
                ),
                described={name: _plain(name, getattr(arguments, name)) for name in DESCRIBED},
                show=show,
                advance=advance,
            )
        if summary.process == 0:
            history = json.loads((Path(arguments.out) / "history.json").read_text())
            content = io.BytesIO()
            training_curves(history).savefig(content, format="png")
            write_atomically(Path(arguments.out) / "curve.png", content.getvalue())
        return summary
    finally:
        state.destroy_process_group()


def _plain(name: str, value: Any) -> Any:
    """A path in one way of writing it, ``run`` of ``run/``."""
    paths = ("images", "weights", "recipes", "mixed_shards", "student_weights")
    return os.path.normpath(value) if name in paths and value is not None else value


class _Teacher(NamedTuple):
    """The teacher, if there is one, and the pictures that the networks are given."""

    labeler: TeacherLabeler | None
    model: Any
    mean: Sequence[float] | None
    std: Sequence[float] | None
    size: int


def _teacher_of(arguments: argparse.Namespace, device: torch.device) -> _Teacher:
    mean, std = arguments.mean, arguments.std
    if arguments.teacher is None:
        _refuse(arguments, "no --teacher", ("weights",))
        return _Teacher(None, None, mean, std, arguments.size or 224)
    teacher = load_teacher(arguments.teacher, weights=arguments.weights)
    labeler = named_labeler(teacher, mean=mean, std=std, device=str(device))
    size = arguments.size or teacher.size or 224
    return _Teacher(labeler, teacher.model, mean or teacher.mean, std or teacher.std, size)


def _hints_of(
    arguments: argparse.Namespace, student: nn.Module, teacher: _Teacher, data: TrainingData
) -> HintLoss | None:
    if arguments.hints is None:
        _refuse(arguments, "no --hints", ("layers",))
        return None
    if teacher.labeler is None or not isinstance(teacher.model, nn.Module):
        raise ValueError(
            f"hints: {arguments.hints} expected a teacher that is a network, got none. Pass "
            "--teacher."
        )
    labels = data.labels() if arguments.hints == "crd" else None
    images = torch.zeros(2, 3, teacher.size, teacher.size, device=teacher.labeler.device)
    student.to(images.device)
    return HintLoss(
        arguments.hints, student, teacher.model, images, layers=arguments.layers, labels=labels
    )


def _training_data(
    arguments: argparse.Namespace, labeler: Any, size: int, epochs: int
) -> TrainingData:
    source = {
        name: getattr(arguments, name) for name in ("shards", "images", "dataset", "root")
    } | {"cache_dir": arguments.cache_dir}
    labelled = arguments.labels == "data"
    # crd contrasts the data's own classes, whoever labels the pictures
    pictures = open_source(**source, labelled=labelled or arguments.hints == "crd")
    validation = None
    if arguments.validation is not None:
        validation = open_validation(arguments.validation, **source, labelled=labelled)
    options: dict[str, Any] = {
        "target": _given(arguments.target, "soft"),
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "num_workers": arguments.num_workers,
    }
    if arguments.recipes is not None:
        if not isinstance(pictures, ShardDataset):
            raise ValueError("recipes: expected --shards, those that the recipes were made of.")
        _refuse(arguments, "--recipes", ("augment", "view", "size", "num_classes", *MIXING))
        window = _given(arguments.window, 16)
        return of_recipes(arguments.recipes, pictures, validation, window=window, **options)
    _refuse(arguments, "no --recipes", ("window",))
    augment = None
    if arguments.augment is not None:
        augment = load_policy(arguments.augment, epochs=epochs)
    mix, num_classes = _mix_of(arguments, labeler, size)
    return online(
        pictures,
        validation,
        labeler=labeler,
        view=VIEWS[arguments.view or VIEW],
        size=size,
        mix=mix,
        augment=augment,
        labelled=labelled,
        num_classes=arguments.num_classes or num_classes,
        hold_out=arguments.mixed_shards is None,
        unconverged=arguments.unconverged or "keep",
        **options,
    )


def _mix_of(
    arguments: argparse.Namespace, labeler: Any, size: int
) -> tuple[Callable[..., Any] | None, int | None]:
    """What is learned beside the originals, and its number of classes, where that tells it."""
    if arguments.learn == "originals":
        _refuse(arguments, "--learn originals", ("mixed_shards", "unlabelled", "target", *MIXING))
        return None, None
    if arguments.mixed_shards is not None:
        _refuse(arguments, "--mixed-shards", MIXING)
        return mixed_pictures(arguments.mixed_shards, size)
    if labeler is None:
        raise ValueError(
            "distill: expected --teacher, --recipes or --mixed-shards, got none of them. Name a "
            "teacher that mixes while training, or mixes that one has made; or learn from the "
            "originals alone: --learn originals."
        )
    if arguments.unlabelled is not None:
        _refuse(arguments, "--unlabelled", MIXING)
        view = VIEWS[arguments.view or VIEW](size)
        options = {"seed": arguments.seed, "cache_dir": arguments.cache_dir}
        return other_pictures(arguments.unlabelled, view, **options), None
    k = _given(arguments.k, 2)
    if arguments.mix in (None, "supermix"):
        options = {
            "partners": arguments.partners or "random",
            "alpha": _given(arguments.alpha, 3.0),
            "settings": SolverSettings(
                method=arguments.method or "fast", mask_size=arguments.mask_size
            ),
        }
        return SuperMix(labeler, k=k, **options), None
    _refuse(arguments, f"--mix {arguments.mix}", SEARCH)
    kind = {"mixup": MixUp, "cutmix": CutMix}[arguments.mix]
    return kind(k=k, alpha=_given(arguments.alpha, 1.0), teacher=labeler), None


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _refuse(arguments: argparse.Namespace, cause: str, names: Sequence[str]) -> None:
    """Options that would do nothing."""
    given = [
        f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None
    ]
    if given:
        raise ValueError(
            f"distill: expected no {' or '.join(given)} with {cause}, where nothing is left for "
            f"{'it' if len(given) == 1 else 'them'} to say. Leave one or the other out."
        )


@contextlib.contextmanager
def _bar(rank: int) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Lines and a bar with the time left, on standard error; the bar on a terminal only."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    quiet = rank > 0 or not console.is_terminal
    with Progress(*columns, console=console, disable=quiet) as progress:
        task = progress.add_task("steps", total=None)
        yield (
            lambda line: console.print(line, soft_wrap=True),
            lambda done, steps: progress.update(task, completed=done, total=steps),
        )
