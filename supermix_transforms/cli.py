"""The command ``supermix``: options over the package's public functions."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args, get_type_hints

import supermix_transforms
from supermix_transforms.bench import METHODS, BenchReport, bench, print_report
from supermix_transforms.demo import (
    MixSummary,
    demo,
    demo_pictures,
    mix_pictures,
    named_labeler,
    print_summary,
)
from supermix_transforms.distill import DistillSummary, print_distilled
from supermix_transforms.distillcommand import DISTILL_EXAMPLE, distill_options, run_distill
from supermix_transforms.generation import (
    GenerateSummary,
    generate,
    print_generated,
    process_state,
)
from supermix_transforms.inspection import (
    Inspection,
    ReplaySummary,
    inspect_mixes,
    print_inspection,
    print_replayed,
    replay_pictures,
)
from supermix_transforms.models import load_teacher
from supermix_transforms.pictures import PictureFiles
from supermix_transforms.report import report
from supermix_transforms.shards import (
    IndexSummary,
    ShardDataset,
    index_shards,
    print_index,
)
from supermix_transforms.solver import SolverSettings
from supermix_transforms.views import VIEWS

DEMO_EXAMPLE = "example:\n  supermix demo --out supermix-demo"
MIX_EXAMPLE = """\
example:
  supermix mix --images photos/ --teacher timm/resnet50.a1_in1k --k 2 3 --count 64 --out mixes/

The folder gets the mixed pictures (k2-00000.png, ...), labels.json and contact-sheet.png.
A folder of pictures is read in a shuffled order, a tar in its own."""
BENCH_EXAMPLE = """\
example:
  supermix bench --images photos/ --teacher timm/resnet50.a1_in1k --methods fast paper --count 100

Without --images and --teacher it takes the demo's. --out gets bench.json and bench.png."""

INDEX_EXAMPLE = """\
example:
  supermix index --shards 'imagenet/train-{0000..1281}.tar'

Each tar gets a file NAME.tar.index beside it, which ShardDataset would else make at first use."""

GENERATE_EXAMPLE = """\
examples:
  supermix generate --shards 'imagenet/train-{0000..1281}.tar' --teacher torchvision/resnet50 \\
      --out recipes/ --dry-run
  accelerate launch --multi_gpu --num_processes 8 -m supermix_transforms.cli generate \\
      --shards 'imagenet/train-{0000..1281}.tar' --teacher torchvision/resnet50 --out recipes/

Started again with the same options, it goes on where it was stopped."""
REPLAY_EXAMPLE = """\
example:
  supermix replay recipes/ --shards 'imagenet/train-{0000..1281}.tar' --count 16 --out seen/

To train on all mixes: supermix_transforms.replay in a DataLoader."""
REPORT_EXAMPLE = """\
example:
  supermix report run/

One HTML page, report.html in that folder, of what demo, mix, replay, generate or distill made."""
INSPECT_EXAMPLE = """\
example:
  supermix inspect recipes/ --verify

Exit code 1 if something is wrong or not finished."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0; 1 where `inspect` found something wrong; 2 for an error; 130 when
        interrupted, 143 when terminated.
    """
    arguments = _parser().parse_args(argv)
    try:
        # What a teacher's own code prints must not get into the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            result = arguments.run(arguments)
        if getattr(result, "process", 0) > 0:
            return 0  # the first one of a launch speaks for all
        if arguments.json:
            print(json.dumps(asdict(result)))
        else:
            arguments.show(result)
        return 1 if getattr(result, "problems", ()) else 0
    except (ValueError, ImportError, OSError) as error:
        print(f"supermix: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("supermix: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print("supermix: terminated; what is finished stays, start again to go on", file=sys.stderr)
        return 143


def _demo(arguments: argparse.Namespace) -> MixSummary:
    return demo(arguments.out, seed=arguments.seed)


def _mix(arguments: argparse.Namespace) -> MixSummary:
    settings = SolverSettings(method=arguments.method, mask_size=arguments.mask_size)
    teacher = load_teacher(arguments.teacher, weights=arguments.weights)
    pictures = PictureFiles(
        arguments.images,
        size=arguments.size or teacher.size or 224,
        seed=arguments.seed,
        skip=arguments.out,
    )
    return mix_pictures(
        pictures,
        named_labeler(teacher, mean=arguments.mean, std=arguments.std, device=arguments.device),
        out=arguments.out,
        k=arguments.k or 2,
        alpha=arguments.alpha,
        partners=arguments.partners,
        settings=settings,
        seed=arguments.seed,
        count=arguments.count,
        batch_size=arguments.batch_size,
        name=arguments.teacher,
        class_names=teacher.class_names,
    )


def _bench(arguments: argparse.Namespace) -> BenchReport:
    teacher = load_teacher(arguments.teacher, weights=arguments.weights)
    size = arguments.size or teacher.size or 224
    if arguments.images is None:
        pictures = iter(demo_pictures(size))
    else:
        pictures = iter(
            PictureFiles(arguments.images, size=size, seed=arguments.seed, skip=arguments.out)
        )
    return bench(
        pictures,
        named_labeler(teacher, mean=arguments.mean, std=arguments.std, device=arguments.device),
        out=arguments.out,
        k=arguments.k,
        alpha=arguments.alpha,
        methods=arguments.methods,
        count=arguments.count,
        slow_count=arguments.slow_count,
        batch_size=arguments.batch_size,
        repeats=arguments.repeats,
        seed=arguments.seed,
        name=arguments.teacher,
    )


def _index(arguments: argparse.Namespace) -> IndexSummary:
    return index_shards(arguments.shards)


def _generate(arguments: argparse.Namespace) -> GenerateSummary:
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
        with _terminable():
            return generate(
                dataset,
                named_labeler(teacher, mean=arguments.mean, std=arguments.std, device=device),
                arguments.out,
                mix=arguments.mix,
                k=arguments.k,
                alpha=arguments.alpha,
                partners=arguments.partners,
                partner_cap=arguments.partner_cap,
                settings=SolverSettings(method=arguments.method, mask_size=arguments.mask_size),
                unconverged=arguments.unconverged,
                passes=arguments.passes,
                form=arguments.form,
                picture_format=arguments.picture_format,
                quality=arguments.quality,
                top=arguments.top or None,
                batch_size=arguments.batch_size,
                unit_batches=arguments.unit_batches,
                window=arguments.window,
                seed=arguments.seed,
                num_workers=arguments.num_workers,
                dry_run=arguments.dry_run,
            )
    finally:
        state.destroy_process_group()


class _Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises inside, so that files are closed and workers ended."""

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _distill(arguments: argparse.Namespace) -> DistillSummary:
    with _terminable():
        return run_distill(arguments)


def _replay(arguments: argparse.Namespace) -> ReplaySummary:
    dataset = ShardDataset(arguments.shards, cache_dir=arguments.cache_dir)
    return replay_pictures(arguments.folder, dataset, arguments.out, count=arguments.count)


@dataclass(frozen=True)
class ReportSummary:
    """Where the page is."""

    report: str


def _report(arguments: argparse.Namespace) -> ReportSummary:
    return ReportSummary(str(report(arguments.run_folder, arguments.out)))


def _inspect(arguments: argparse.Namespace) -> Inspection:
    return inspect_mixes(arguments.folder, verify=arguments.verify)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="supermix", description="Mix images under a teacher's supervision (SuperMix)."
    )
    version = f"%(prog)s {supermix_transforms.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _command(
        commands,
        "demo",
        "mix pictures inside packages with a teacher inside a package; no download",
        DEMO_EXAMPLE,
    )
    command.set_defaults(run=_demo, show=print_summary)
    _output_options(command, out="supermix-demo")

    command = _command(commands, "mix", "mix your own pictures with your own teacher", MIX_EXAMPLE)
    command.set_defaults(run=_mix, show=print_summary)
    _teacher_options(command, required=True)
    add = command.add_argument
    add("--k", type=int, nargs="+", help="pictures a mix, 2 if left out; several are done in turn")
    _search_options(command)
    add("--count", type=int, help="mixes for each k; one for each picture, if left out")
    add("--batch-size", type=int, default=32, help="pictures at a time; partners come from these")
    _output_options(command, out=None)

    command = _command(
        commands,
        "bench",
        "compare methods of mixing: how many mixes converge, and what one costs",
        BENCH_EXAMPLE,
    )
    command.set_defaults(run=_bench, show=print_report)
    _teacher_options(command, required=False)
    add = command.add_argument
    add("--k", type=int, default=2, help="pictures a mix")
    add("--methods", nargs="+", default=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    add("--count", type=int, default=30, help="tuples, made up to whole batches")
    add("--slow-count", type=int, default=10, help="the same for methods that search long")
    add("--batch-size", type=int, default=10, help="tuples at most that are mixed at a time")
    add("--repeats", type=int, default=3, help="how often each method is timed")
    _output_options(command, out="supermix-bench")

    command = _command(
        commands, "index", "note where each sample of WebDataset tars lies", INDEX_EXAMPLE
    )
    command.set_defaults(run=_index, show=print_index)
    command.add_argument(
        "--shards",
        nargs="+",
        required=True,
        metavar="TAR|DIR",
        help="tars, folders of them, or patterns such as train-{000..127}.tar",
    )
    _json_option(command)

    command = _command(
        commands,
        "generate",
        "write the mixed set once, as recipes or as mixed shards, on any number of processes",
        GENERATE_EXAMPLE,
    )
    command.set_defaults(run=_generate, show=print_generated)
    _generate_options(command)

    command = _command(
        commands, "replay", "make mixes of recipes again, to look at them", REPLAY_EXAMPLE
    )
    command.set_defaults(run=_replay, show=print_replayed)
    add = command.add_argument
    add("folder", metavar="DIR", help="what generate wrote")
    add("--shards", nargs="+", required=True, metavar="TAR|DIR|URL", help="those it was made of")
    add("--cache-dir", metavar="DIR", help="for copies of shards from elsewhere")
    add("--count", type=int, default=16, help="mixes")
    add("--out", required=True, metavar="DIR", help="made if it is not there")
    _json_option(command)

    command = _command(commands, "report", "one HTML page of a run", REPORT_EXAMPLE)
    command.set_defaults(run=_report, show=lambda summary: print(summary.report))
    command.add_argument("run_folder", metavar="RUN", help="its folder")
    command.add_argument("--out", metavar="FILE", help="the page; RUN/report.html, if left out")
    _json_option(command)

    command = _command(
        commands, "distill", "train a student on originals and mixes", DISTILL_EXAMPLE
    )
    command.set_defaults(run=_distill, show=print_distilled)
    distill_options(command)
    _output_options(command, out=None)

    command = _command(
        commands, "inspect", "say what is in a folder that generate wrote", INSPECT_EXAMPLE
    )
    command.set_defaults(run=_inspect, show=print_inspection)
    command.add_argument("folder", metavar="DIR")
    command.add_argument("--verify", action="store_true", help="read and check every byte")
    _json_option(command)
    return parser


def _generate_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--shards", nargs="+", required=True, metavar="TAR|DIR|URL", help="labelled pictures")
    add("--cache-dir", metavar="DIR", help="for copies of shards from elsewhere")
    add("--on-error", choices=("raise", "skip"), default="raise", help="samples not readable")
    _teacher_options(command, required=True, images=False, alpha=None)
    add("--view", choices=tuple(VIEWS), default="random-resized-crop", help="of each picture")
    add(
        "--as",
        dest="form",
        choices=("recipes", "shards"),
        default="recipes",
        help="recipes: some 200 bytes a mix, for replay; shards: tars of mixed pictures",
    )
    add("--picture-format", choices=("png", "webp", "jpg"), default="png", help="in shards")
    add("--quality", type=int, default=95, help="of webp and jpg")
    add("--mix", choices=("supermix", "mixup", "cutmix"), default="supermix", help="what is made")
    add("--k", type=int, default=2, help="pictures a mix")
    _search_options(command)
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
    _output_options(command, out=None)


def _search_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    methods = get_args(get_type_hints(SolverSettings)["method"])
    add("--method", choices=methods, default="fast", help="how masks are searched for")
    add(
        "--partners",
        choices=("random", "matched"),
        default="random",
        help="matched: pictures that the teacher's class maps say mix well",
    )
    add(
        "--mask-size",
        type=int,
        metavar="CELLS",
        help="a side; 16, or 8 for small pictures and the paper's methods, if left out",
    )


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=example,
        formatter_class=_Formatter,
    )


def _teacher_options(
    command: argparse.ArgumentParser,
    required: bool,
    *,
    images: bool = True,
    alpha: float | None = 3.0,
) -> None:
    add = command.add_argument
    if images:
        add(
            "--images",
            required=required,
            metavar="DIR|TAR",
            help="folder of pictures, or WebDataset tar",
        )
    add(
        "--teacher",
        required=required,
        default=None if required else "efficientnet-lite0",
        metavar="NAME",
        help="timm/NAME, torchvision/NAME, pytorchcv/NAME, efficientnet-lite0, or FILE.py:FUNCTION "
        "(a function without arguments; that file is run)",
    )
    add("--weights", metavar="FILE", help="the teacher's, .safetensors, .pt or .pth")
    known = "" if alpha is not None else "; 3 for supermix, 1 for the others, if left out"
    add("--alpha", type=float, default=alpha, help=f"of the weights' Dirichlet distribution{known}")
    add("--size", type=int, metavar="PIXELS", help="side of the mixes; the teacher's own, or 224")
    add("--mean", type=float, nargs="+", help="of each channel in 0..1, instead of the teacher's")
    add("--std", type=float, nargs="+", help="with --mean")
    add("--device", help="cpu, cuda, ...; a GPU, if there is one")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Lines of the example stay as they are; defaults are shown where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _output_options(command: argparse.ArgumentParser, out: str | None) -> None:
    add = command.add_argument
    add("--out", required=out is None, default=out, metavar="DIR", help="made if it is not there")
    add("--seed", type=int, default=0, help="of all random choices")
    _json_option(command)


def _json_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )


if __name__ == "__main__":
    sys.exit(main())
