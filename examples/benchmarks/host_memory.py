"""How a process grows that mixes on the CPU, and what the C library's setting changes.

    python examples/benchmarks/host_memory.py --data ../shared/data \\
        --out docs/results/host_memory.json

A ResNet-20 mixes batches of 200 CIFAR-100 pictures. A search asks the teacher for as many pictures
as are not finished yet, so the sizes of what PyTorch takes and frees change all the time; glibc
keeps the pieces. `in_use` is what PyTorch holds between two batches, `resident` what the process
occupies, both in MiB, after each ten batches.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from real_data import cifar_teacher, pictures
from reports import Report, options_of

from supermix_transforms import SuperMix

BATCH = 200
FIELDS = ("arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks")
SETTINGS = ({}, {"MALLOC_MMAP_THRESHOLD_": "1048576"})


class _Usage(ctypes.Structure):
    """glibc's `struct mallinfo2`; only two of its fields are looked at."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (*FIELDS, "in_use", "free", "top"))


def grow(data: Path) -> dict[str, list[int]]:
    """Mix, and note how large the process is."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Usage
    images = pictures(data, "cifar100")
    mix = SuperMix(cifar_teacher(data, "cifar100", net="resnet20"), seed=0)
    in_use, resident = [], []
    for number, batch in enumerate(images.split(BATCH)):
        mix(batch, torch.zeros(len(batch), dtype=torch.int64))
        if number % 10 == 9:
            usage = libc.mallinfo2()
            in_use.append((usage.in_use + usage.mapped) >> 20)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE") >> 20)
    return {"in_use": in_use, "resident": resident}


def main() -> None:
    parser = options_of(__doc__, "host_memory")
    parser.add_argument("--once", action="store_true", help="in this process, as it was started")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(grow(options.data)))
        return
    report = Report(options, "host_memory", net="resnet20", batch=BATCH)
    for setting in SETTINGS:
        if report.has(setting=setting):
            continue
        command = [sys.executable, __file__, "--data", str(options.data), "--once"]
        output = subprocess.run(
            command, env=os.environ | setting, check=True, capture_output=True, text=True
        ).stdout
        report.add({"setting": setting, **json.loads(output)})
    print(json.dumps(report.content, indent=1))


if __name__ == "__main__":
    main()
