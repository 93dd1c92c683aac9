"""The command ``supermix``: options over the package's public functions."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import shtab

from supermix_transforms.commands.bench import METHODS, BenchReport, bench, print_report
from supermix_transforms.commands.distill import DISTILL_EXAMPLE, distill_options, run_distill
from supermix_transforms.commands.errors import in_words
from supermix_transforms.commands.generate import (
    GENERATE_EXAMPLE,
    generate_options,
    print_generated,
    run_generate,
)
from supermix_transforms.commands.options import (
    Commands,
    VersionAction,
    add_command,
    complete_paths,
    json_option,
    output_options,
    search_options,
    teacher_options,
)
from supermix_transforms.commands.report import report
from supermix_transforms.data.indexing import IndexSummary, index_shards, print_index
from supermix_transforms.data.pictures import PictureFiles
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.demo import (
    MixSummary,
    demo,
    demo_pictures,
    mix_pictures,
    named_labeler,
    print_summary,
)
from supermix_transforms.models import load_teacher
from supermix_transforms.offline.inspection import (
    Inspection,
    ReplaySummary,
    inspect_mixes,
    print_inspection,
    print_replayed,
    replay_pictures,
)
from supermix_transforms.solver import SolverSettings
from supermix_transforms.training.loop import print_distilled

EPILOG = """\
first steps:
  supermix demo                      see it on packaged pictures
  supermix COMMAND --help            options, and an example

completion, for bash; for other shells likewise:
  supermix --print-completion bash > ~/.local/share/bash-completion/completions/supermix

exit codes: 0 done; 1 inspect found something wrong, or index --verify;
2 an error, which is named; 130 interrupted; 143 terminated"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 0; 1 where `inspect` or `index` found something wrong; 2 for an error; 130
        when interrupted, 143 when terminated.
    """
    arguments = _parser().parse_args(argv)
    try:
        # What a teacher's own code prints must not get into the JSON.
        with contextlib.redirect_stdout(sys.stderr), _terminable():
            result = arguments.run(arguments)
        if getattr(result, "process", 0) > 0:
            return 0  # the first one of a launch speaks for all
        if arguments.json:
            print(json.dumps(asdict(result)))
        else:
            arguments.show(result)
        return 1 if getattr(result, "problems", ()) else 0
    except Exception as error:
        words = in_words(error)
        if words is None:
            raise
        print(f"supermix: error: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("supermix: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print("supermix: terminated; what is finished stays, start again to go on", file=sys.stderr)
        return 143


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="supermix",
        description="Mix images under a teacher's supervision (SuperMix).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=VersionAction, help="for a bug report: versions, system, GPU"
    )
    shtab.add_argument_to(parser)  # --print-completion
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_demo,
        _add_mix,
        _add_bench,
        _add_index,
        _add_generate,
        _add_replay,
        _add_report,
        _add_distill,
        _add_inspect,
    ):
        add(commands)
    for command in commands.choices.values():
        complete_paths(command)
    return parser


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


# -- the commands ----------------------------------------------------------------------------------

DEMO_EXAMPLE = "example:\n  supermix demo --out supermix-demo"


def _add_demo(commands: Commands) -> None:
    command = add_command(
        commands,
        "demo",
        "mix pictures inside packages with a teacher inside a package; no download",
        DEMO_EXAMPLE,
    )
    command.set_defaults(run=_demo, show=print_summary)
    output_options(command, out="supermix-demo")


def _demo(arguments: argparse.Namespace) -> MixSummary:
    return demo(arguments.out, seed=arguments.seed)


MIX_EXAMPLE = """\
example:
  supermix mix --images photos/ --teacher timm/resnet50.a1_in1k --k 2 3 --count 64 --out mixes/

The folder gets the mixed pictures (k2-00000.png, ...), labels.json and contact-sheet.png.
A folder of pictures is read in a shuffled order, a tar in its own."""


def _add_mix(commands: Commands) -> None:
    command = add_command(
        commands, "mix", "mix your own pictures with your own teacher", MIX_EXAMPLE
    )
    command.set_defaults(run=_mix, show=print_summary)
    teacher_options(command, required=True)
    add = command.add_argument
    add("--k", type=int, nargs="+", help="pictures a mix, 2 if left out; several are done in turn")
    search_options(command)
    add("--count", type=int, help="mixes for each k; one for each picture, if left out")
    add("--batch-size", type=int, default=32, help="pictures at a time; partners come from these")
    output_options(command, out=None)


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


BENCH_EXAMPLE = """\
example:
  supermix bench --images photos/ --teacher timm/resnet50.a1_in1k --methods fast paper --count 100

Without --images and --teacher it takes the demo's. --out gets bench.json and bench.png."""


def _add_bench(commands: Commands) -> None:
    command = add_command(
        commands,
        "bench",
        "compare methods of mixing: how many mixes converge, and what one costs",
        BENCH_EXAMPLE,
    )
    command.set_defaults(run=_bench, show=print_report)
    teacher_options(command, required=False)
    add = command.add_argument
    add("--k", type=int, default=2, help="pictures a mix")
    add("--methods", nargs="+", default=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    add("--count", type=int, default=30, help="tuples, made up to whole batches")
    add("--slow-count", type=int, default=10, help="the same for methods that search long")
    add("--batch-size", type=int, default=10, help="tuples at most that are mixed at a time")
    add("--repeats", type=int, default=3, help="how often each method is timed")
    output_options(command, out="supermix-bench")


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


INDEX_EXAMPLE = """\
example:
  supermix index --shards 'imagenet/train-{0000..1281}.tar'

Each tar gets a file NAME.tar.index beside it, which ShardDataset would else make at first use.
--verify lists indices that are not what their tars hold; exit code 1 if there are any."""


def _add_index(commands: Commands) -> None:
    command = add_command(
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
    command.add_argument(
        "--verify", action="store_true", help="read the tars and compare; write nothing"
    )
    json_option(command)


def _index(arguments: argparse.Namespace) -> IndexSummary:
    return index_shards(arguments.shards, verify=arguments.verify)


def _add_generate(commands: Commands) -> None:
    command = add_command(
        commands,
        "generate",
        "write the mixed set once, as recipes or as mixed shards, on any number of processes",
        GENERATE_EXAMPLE,
    )
    command.set_defaults(run=run_generate, show=print_generated)
    generate_options(command)


REPLAY_EXAMPLE = """\
example:
  supermix replay recipes/ --shards 'imagenet/train-{0000..1281}.tar' --count 16 --out seen/

To train on all mixes: supermix_transforms.replay in a DataLoader."""


def _add_replay(commands: Commands) -> None:
    command = add_command(
        commands, "replay", "make mixes of recipes again, to look at them", REPLAY_EXAMPLE
    )
    command.set_defaults(run=_replay, show=print_replayed)
    add = command.add_argument
    add("folder", metavar="DIR", help="what generate wrote")
    add("--shards", nargs="+", required=True, metavar="TAR|DIR|URL", help="those it was made of")
    add("--cache-dir", metavar="DIR", help="for copies of shards from elsewhere")
    add("--count", type=int, default=16, help="mixes")
    add("--out", required=True, metavar="DIR", help="made if it is not there")
    json_option(command)


def _replay(arguments: argparse.Namespace) -> ReplaySummary:
    dataset = ShardDataset(arguments.shards, cache_dir=arguments.cache_dir)
    return replay_pictures(arguments.folder, dataset, arguments.out, count=arguments.count)


REPORT_EXAMPLE = """\
example:
  supermix report run/

One HTML page, report.html in that folder, of what demo, mix, replay, generate or distill made."""


def _add_report(commands: Commands) -> None:
    command = add_command(commands, "report", "one HTML page of a run", REPORT_EXAMPLE)
    command.set_defaults(run=_report, show=lambda summary: print(summary.report))
    command.add_argument("run_folder", metavar="RUN", help="its folder")
    command.add_argument("--out", metavar="FILE", help="the page; RUN/report.html, if left out")
    json_option(command)


@dataclass(frozen=True)
class ReportSummary:
    """Where the page is."""

    report: str


def _report(arguments: argparse.Namespace) -> ReportSummary:
    return ReportSummary(str(report(arguments.run_folder, arguments.out)))


def _add_distill(commands: Commands) -> None:
    command = add_command(
        commands, "distill", "train a student on originals and mixes", DISTILL_EXAMPLE
    )
    command.set_defaults(run=run_distill, show=print_distilled)
    distill_options(command)
    output_options(command, out=None)


INSPECT_EXAMPLE = """\
example:
  supermix inspect recipes/ --verify

Exit code 1 if something is wrong or not finished."""


def _add_inspect(commands: Commands) -> None:
    command = add_command(
        commands, "inspect", "say what is in a folder that generate wrote", INSPECT_EXAMPLE
    )
    command.set_defaults(run=_inspect, show=print_inspection)
    command.add_argument("folder", metavar="DIR")
    command.add_argument("--verify", action="store_true", help="read and check every byte")
    json_option(command)


def _inspect(arguments: argparse.Namespace) -> Inspection:
    return inspect_mixes(arguments.folder, verify=arguments.verify)


if __name__ == "__main__":
    sys.exit(main())
