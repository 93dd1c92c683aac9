"""Options that several commands share, and how their help looks."""

import argparse
from collections.abc import Sequence
from typing import Any, TypeAlias, get_args, get_type_hints

import shtab

from supermix_transforms.commands.environment import environment
from supermix_transforms.solver import SolverSettings

__all__ = [
    "Commands",
    "VersionAction",
    "add_command",
    "complete_paths",
    "json_option",
    "output_options",
    "search_options",
    "teacher_options",
]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands,
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


def teacher_options(
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


def search_options(command: Any, *, defaults: bool = True) -> None:
    """Of SuperMix: of a command, or of a group of its options; None without `defaults`."""
    add = command.add_argument
    methods = get_args(get_type_hints(SolverSettings)["method"])
    method, partners = ("fast", "random") if defaults else (None, None)
    end = "" if defaults else "; {}, if left out"
    add(
        "--method",
        choices=methods,
        default=method,
        help="how masks are searched for" + end.format("fast"),
    )
    add(
        "--partners",
        choices=("random", "matched"),
        default=partners,
        help="matched: pictures that the teacher's class maps say mix well" + end.format("random"),
    )
    add(
        "--mask-size",
        type=int,
        metavar="CELLS",
        help="a side; if left out 16, and 8 for the paper's methods on pictures of up to 64 px",
    )


def output_options(command: argparse.ArgumentParser, out: str | None) -> None:
    add = command.add_argument
    add("--out", required=out is None, default=out, metavar="DIR", help="made if it is not there")
    add("--seed", type=int, default=0, help="of all random choices")
    json_option(command)


def json_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Lines of the example stay as they are; defaults are shown where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class VersionAction(argparse.Action):
    """Prints all versions and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for name, value in environment().items():
            print(f"{name:20} {value}")
        parser.exit()


def complete_paths(command: argparse.ArgumentParser) -> None:
    """Tell shtab which options are files or folders: their placeholders do."""
    for action in command._actions:
        placeholder = str(action.metavar)
        if "TAR" in placeholder or "FILE" in placeholder:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif placeholder in ("DIR", "RUN"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
