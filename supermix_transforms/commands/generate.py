"""The command ``supermix generate``: its options, and what they name."""

import argparse

from supermix_transforms.commands.options import output_options, search_options, teacher_options
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.data.views import VIEWS
from supermix_transforms.demo import named_labeler
from supermix_transforms.models import load_teacher
from supermix_transforms.offline.generation import (
    GenerateSummary,
    check_choices,
    generate,
    process_state,
)
from supermix_transforms.solver import SolverSettings

__all__ = ["GENERATE_EXAMPLE", "generate_options", "print_generated", "run_generate"]

GENERATE_EXAMPLE = """\
examples:
  supermix generate --shards 'imagenet/train-{0000..1281}.tar' --teacher torchvision/resnet50 \\
      --out recipes/ --dry-run
  accelerate launch --multi_gpu --num_processes 8 -m supermix_transforms.cli generate \\
      --shards 'imagenet/train-{0000..1281}.tar' --teacher torchvision/resnet50 --out recipes/

Started again with the same options, it goes on where it was stopped."""


def generate_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--shards", nargs="+", required=True, metavar="TAR|DIR|URL", help="labelled pictures")
    add("--cache-dir", metavar="DIR", help="for copies of shards from elsewhere")
    add(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="at pictures that cannot be read: stop, or leave them out and count",
    )
    teacher_options(command, required=True, images=False, alpha=None)
    add(
        "--view",
        choices=tuple(VIEWS),
        default="random-resized-crop",
        help="how pictures are cropped",
    )
    add(
        "--as",
        dest="form",
        choices=("recipes", "shards"),
        default="recipes",
        help="recipes: some 150 bytes a mix, for replay; shards: tars of mixed pictures",
    )
    add("--picture-format", choices=("png", "webp", "jpg"), default="png", help="in shards")
    add("--quality", type=int, default=95, help="of webp and jpg")
    add("--mix", choices=("supermix", "mixup", "cutmix"), default="supermix", help="what is made")
    add("--k", type=int, default=2, help="pictures a mix")
    search_options(command)
    add("--partner-cap", type=int, default=2, help="uses of a picture as a partner (matched)")
    add(
        "--unconverged",
        choices=("keep", "drop", "redraw"),
        default="keep",
        help="mixes in which the teacher does not see all classes",
    )
    add("--passes", type=int, default=1, help="mixes made of each picture")
    add("--top", type=int, default=10, help="classes kept of the teacher's labels; 0: all")
    add("--batch-size", type=int, default=256, help="pictures mixed together")
    add("--unit-batches", type=int, default=8, help="batches a file")
    add("--window", type=int, default=16, help="shards that are shuffled together")
    add("--num-workers", type=int, default=0, help="processes that read pictures")
    add("--dry-run", action="store_true", help="mix a few, write nothing, say what it would take")
    output_options(command, out=None)


def run_generate(arguments: argparse.Namespace) -> GenerateSummary:
    """Write recipes or mixed shards as the options say.

    Raises:
        ValueError, ImportError, OSError: as `generate` and what is asked for do.
    """
    settings = SolverSettings(method=arguments.method, mask_size=arguments.mask_size)
    names = ("mix", "form", "picture_format", "quality")
    numbers = ("passes", "k", "batch_size", "unit_batches")
    choices = {name: getattr(arguments, name) for name in (*names, *numbers)}
    choices["top"] = arguments.top or None
    check_choices(**choices)  # now, not after shards were indexed or copied
    state = process_state()
    teacher = load_teacher(arguments.teacher, weights=arguments.weights)
    size = arguments.size or teacher.size or 224
    dataset = ShardDataset(
        arguments.shards,
        transform=VIEWS[arguments.view](size),
        cache_dir=arguments.cache_dir,
        on_error=arguments.on_error,
    )
    device = arguments.device or str(state.device)
    try:
        return generate(
            dataset,
            named_labeler(teacher, mean=arguments.mean, std=arguments.std, device=device),
            arguments.out,
            alpha=arguments.alpha,
            partners=arguments.partners,
            partner_cap=arguments.partner_cap,
            settings=settings,
            unconverged=arguments.unconverged,
            window=arguments.window,
            seed=arguments.seed,
            num_workers=arguments.num_workers,
            dry_run=arguments.dry_run,
            **choices,
        )
    finally:
        state.destroy_process_group()


def print_generated(summary: GenerateSummary) -> None:
    """What is there and what is left, on standard output."""
    from rich.console import Console
    from rich.filesize import decimal

    console = Console(highlight=False)
    converged = summary.converged / max(1, summary.mixes)
    what = f"{summary.mixes:,} mixes ({summary.form}) in {summary.finished:,} of {summary.units:,}"
    console.print(f"{summary.out}: {what} units, {decimal(summary.bytes)}", soft_wrap=True)
    if summary.mixes > 0:
        each = summary.bytes / summary.mixes
        console.print(f"converged {converged:.1%}, {each:,.0f} bytes a mix")
    if summary.made > 0:
        rate, waiting = summary.made / summary.seconds, summary.waiting / summary.seconds
        console.print(
            f"{rate:.1f} mixes a second by this process of {summary.processes}, {waiting:.0%} of "
            "the time spent waiting for pictures"
        )
    if summary.skipped:
        console.print(f"{summary.skipped:,} pictures could not be read and were skipped")
    if summary.left_mixes > 0:
        console.print(
            f"left: {summary.left_mixes:,} mixes in {summary.units - summary.finished:,} units, "
            f"about {decimal(summary.left_bytes)} and {_duration(summary.left_hours)} on "
            f"{summary.processes} process{'es' if summary.processes > 1 else ''} like this one"
        )


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.0f} seconds"
