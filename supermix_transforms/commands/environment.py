"""What a bug report needs to know of a machine."""

import platform
from importlib.metadata import version

import torch

__all__ = ["environment"]

PACKAGES = (
    *("supermix-transforms", "torch", "torchvision", "accelerate", "webdataset"),
    *("numpy", "pillow", "scipy"),
)


def environment() -> dict[str, str]:
    """Versions of this library, Python and the packages it stands on; the system and its GPUs."""
    found = {package: version(package) for package in PACKAGES}
    found["python"] = platform.python_version()
    found["system"] = platform.platform()
    found["CPU"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    count = torch.cuda.device_count()
    names = {torch.cuda.get_device_name(number) for number in range(count)}
    gpus = f"{count} × {', '.join(sorted(names))}, CUDA {torch.version.cuda}"
    found["GPU"] = gpus if count else "none"
    return found
