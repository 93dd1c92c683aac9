"""The command ``supermix``: options over the package's public functions."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args, get_type_hints

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
from supermix_transforms.models import load_teacher
from supermix_transforms.pictures import PictureFiles
from supermix_transforms.shards import IndexSummary, index_shards, print_index
from supermix_transforms.solver import SolverSettings

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 2 for an error, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        # What a teacher's own code prints must not get into the JSON.
        with contextlib.redirect_stdout(sys.stderr):
            result = arguments.run(arguments)
        if arguments.json:
            print(json.dumps(asdict(result)))
        else:
            arguments.show(result)
    except (ValueError, ImportError, OSError) as error:
        print(f"supermix: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("supermix: interrupted", file=sys.stderr)
        return 130
    return 0


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
    return parser


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


def _teacher_options(command: argparse.ArgumentParser, required: bool) -> None:
    add = command.add_argument
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
    add("--alpha", type=float, default=3.0, help="of the weights' Dirichlet distribution")
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
