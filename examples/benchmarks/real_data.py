"""Pictures and teachers of ../shared/data, for the benchmarks beside this file.

images, teacher = load(Path("../shared/data"), "cifar10")

The weights for CIFAR are of two families of ResNets (He et al. 2016): those for CIFAR-10 have
option A's shortcuts, those for CIFAR-100 a 1 x 1 convolution.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from supermix_transforms import TeacherLabeler
from supermix_transforms.models import load_teacher

SEED = 0
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the CIFAR-10 weights want them
CIFAR100_STATISTICS = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.added = stride, width - width_in
        if project and stride != 1:
            conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()

    def shortcut(self, x: Tensor) -> Tensor:
        if hasattr(self, "downsample"):
            return self.downsample(x)
        half = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))


class ResNet(nn.Module):
    def __init__(self, blocks: int, classes: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width_in = 16
        for stage, (width, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
            layers = []
            for i in range(blocks):
                layers.append(Block(width_in, width, stride if i == 0 else 1, project))
                width_in = width
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def cifar_net(data: Path, name: str, net: str = "resnet56") -> nn.Module:
    """`name` is cifar10 or cifar100, `net` one of the weight files beside its pictures."""
    blocks = {"resnet56": 9, "resnet20": 3}[net]
    model = ResNet(blocks, classes=int(name[5:]), project=name == "cifar100")
    weights = load_file(data / name / f"{net}.safetensors")
    model.load_state_dict({key.replace("fc.", "linear."): value for key, value in weights.items()})
    return model.eval()


def cifar_teacher(data: Path, name: str, net: str = "resnet56") -> TeacherLabeler:
    """`cifar_net` as a teacher."""
    mean, std = CIFAR100_STATISTICS if name == "cifar100" else IMAGENET_STATISTICS
    return TeacherLabeler(cifar_net(data, name, net), mean=mean, std=std)


def imagenet_teacher() -> TeacherLabeler:
    lite0 = load_teacher("efficientnet-lite0")
    return TeacherLabeler(lite0.model, mean=lite0.mean, std=lite0.std)


def pictures(data: Path, name: str, split: str = "test", *, tuning: bool = False) -> Tensor:
    """uint8 (P, 3, H, W), shuffled; of ImageNet shards 2-3 (0-1 for tuning)."""
    folder_name = "imagenet-sample" if name == "imagenet" else name
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, data / "unpack.py", folder_name, folder, "--format", "npz"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        file = "sample" if name == "imagenet" else split
        arrays = np.load(Path(folder, f"{file}.npz"))
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    if name == "imagenet":  # shard s holds the classes s, s + 4, s + 8, ...
        images = images[(labels % 4 < 2) == tuning]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    return images[order].permute(0, 3, 1, 2).contiguous()


def load(data: Path, name: str, *, tuning: bool = False) -> tuple[Tensor, TeacherLabeler]:
    """Pictures and their teacher: imagenet, cifar10 or cifar100 (test pictures)."""
    teacher = imagenet_teacher() if name == "imagenet" else cifar_teacher(data, name)
    return pictures(data, name, tuning=tuning), teacher
