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

# settings, for each of three units its file and its entry, and of shards their list
STEPS = {"recipes": {"fsync": 7, "replace": 4}, "shards": {"fsync": 8, "replace": 5}}


def work(form: str, folder: Path, out: Path, call: str, deadly: int) -> None:
    original, calls = getattr(os, call), []

    def counting(*arguments):
        calls.append(arguments)
        if len(calls) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, call, counting)
    dataset = ShardDataset(folder, transform=VIEW)
    generate(dataset, colour_teacher(), out, **SMALL, form=form)


def run(*arguments) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    form, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    run(form, folder, folder / "whole", "fsync", 0)
    codes = {}
    for call, steps in STEPS[form].items():
        for number in range(1, steps + 1):
            out = folder / f"{call}-{number}"
            codes[out.name] = run(form, folder, out, call, number)
            run(form, folder, out, call, 0)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
