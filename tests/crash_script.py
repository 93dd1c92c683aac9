"""A process that generates is killed before its n-th sync or rename, then another goes on.

Run by test_kills.py, in a process of its own: forks of one that has threads may hang.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from colours import colour_teacher
from test_generation import SMALL, VIEW

from supermix_transforms import ShardDataset, generate

STEPS = {"fsync": 7, "replace": 4}  # settings, and for each of three units its file and its entry


def work(folder: Path, out: Path, call: str, deadly: int) -> None:
    original, calls = getattr(os, call), []

    def counting(*arguments):
        calls.append(arguments)
        if len(calls) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, call, counting)
    generate(ShardDataset(folder, transform=VIEW), colour_teacher(), out, **SMALL)


def run(*arguments) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    run(folder, folder / "whole", "fsync", 0)
    codes = {}
    for call, steps in STEPS.items():
        for number in range(1, steps + 1):
            out = folder / f"{call}-{number}"
            codes[out.name] = run(folder, out, call, number)
            run(folder, out, call, 0)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
