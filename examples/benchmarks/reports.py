"""What the benchmarks beside this file share: options, and a report that grows case by case.

A report that is there already is gone on with, so that a script can be stopped and called again.
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def options_of(doc: str, name: str) -> argparse.ArgumentParser:
    """A parser with --data, --out (docs/results/NAME.json) and --threads."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path(f"docs/results/{name}.json"))
    parser.add_argument("--threads", type=int, default=2)
    return parser


class Report:
    """Results under the conditions in which they were found."""

    def __init__(self, options: argparse.Namespace, name: str, **conditions: Any) -> None:
        torch.set_num_threads(options.threads)
        self.out: Path = options.out
        self.content: dict[str, Any] = {}
        if self.out.exists():
            self.content = json.loads(self.out.read_text())
        self.content |= {
            "command": f"python examples/benchmarks/{name}.py",
            **conditions,
            "threads": options.threads,
            "device": f"CPU, {platform.machine()}",
            "versions": {package: version(package) for package in ("torch", "torchvision")},
        }

    def has(self, **case: Any) -> bool:
        """Whether there is a result of this case."""
        results = self.content.get("results", [])
        return any(case.items() <= result.items() for result in results)

    def add(self, result: dict[str, Any]) -> None:
        self.content.setdefault("results", []).append(result)
        self.write()
        print(json.dumps(result), file=sys.stderr, flush=True)

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.content, indent=1) + "\n")
