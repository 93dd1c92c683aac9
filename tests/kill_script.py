"""Processes that generate from CIFAR-10 are killed again and again; test_kills.py judges.

    python kill_script.py DATA SHARDS OUT KILLS

Two processes of one run work on OUT/killed. Each time both have begun a unit, and some random time
later, they get SIGKILL and are started again. After KILLS times they are left alone. OUT/whole is
made by one process that nobody disturbs. OUT/facts.json has, for each life of each process, the
units that were entered when it began and the units that it began itself.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import torch
from real_data import cifar_teacher
from torchvision.transforms import v2

from supermix_transforms import ShardDataset, generate
from supermix_transforms.offline import generation
from supermix_transforms.offline.ledger import Ledger
from supermix_transforms.offline.writing import Run

RANKS = 2
VIEW = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])


def work(teacher, shards: Path, out: Path, rank: int, ranks: int, log: Path) -> None:
    """One process, which writes the names of the units that it begins."""
    state = type("State", (), {"process_index": rank, "num_processes": ranks})
    generation.process_state = state
    batches = Run._batches

    def watched(self, wanted):
        for name, some in batches(self, wanted):
            with log.open("a") as file:
                file.write(f"{name}\n")
            yield name, some

    Run._batches = watched
    dataset = ShardDataset(shards, transform=VIEW)
    generate(dataset, teacher, out, batch_size=10, unit_batches=1, seed=5)


def start(*arguments) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work(*arguments)
        except BaseException as error:
            print(f"a process ended with {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    data, shards, out, kills = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    teacher = cifar_teacher(data, "cifar10")
    random.seed(0)
    begin = time.monotonic()
    pid = start(teacher, shards, out / "whole", 0, 1, out / "whole.log")
    assert os.waitpid(pid, 0)[1] == 0
    each = (time.monotonic() - begin) / len(lines(out / "whole.log"))
    facts = []
    for life in range(int(kills) + 1):
        entered = sorted(Ledger(out / "killed").entries())
        logs = [out / f"{life}-{rank}.log" for rank in range(RANKS)]
        pids = [
            start(teacher, shards, out / "killed", rank, RANKS, log)
            for rank, log in enumerate(logs)
        ]
        if life < int(kills):
            while not all(lines(log) for log in logs):
                time.sleep(0.01)
                if any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids):
                    raise RuntimeError("a process ended before it was killed: too few units")
            time.sleep(each * random.uniform(0, 1.2))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        codes = [os.waitpid(pid, 0)[1] for pid in pids]
        facts.append({"entered": entered, "begun": [lines(log) for log in logs], "codes": codes})
    (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
