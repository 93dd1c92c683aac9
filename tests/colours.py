"""Teachers that tell colours, and pictures of one colour each: small, exact, fast to mix."""

import os

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

NUM_CLASSES = 4  # red, green, blue, dark


def colour_teacher() -> nn.Module:
    """Logits are 8 times the share of each colour: any mix that shows k colours convinces it."""
    convolution = nn.Conv2d(3, NUM_CLASSES, 1)
    with torch.no_grad():
        rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
        convolution.weight.copy_(8 * rows[:, :, None, None])
        convolution.bias.copy_(torch.tensor([0.0, 0, 0, 8]))
    return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Stubborn(nn.Module):
    """A colour teacher that sees only the colour of which there is most, and then class 3.

    No mix of two of the first three colours convinces it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.colours = colour_teacher()

    def forward(self, images: Tensor) -> Tensor:
        logits = self.colours(images)
        others = logits.detach() < logits.amax(dim=1, keepdim=True)
        damped = torch.where(others, logits - 20, logits)
        third = torch.zeros(NUM_CLASSES).index_fill(0, torch.tensor([3]), 20.0)
        return damped + third


class WatchedTeacher(nn.Module):
    """A colour teacher that appends the process it runs in to a file."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.colours, self.path = colour_teacher(), path

    def forward(self, images: Tensor) -> Tensor:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        return self.colours(images)


def pictures(
    count: int, *, size: tuple[int, int] = (9, 7), dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, H, W) in 0..1 or 0..255, colours in turn, and their classes (count,)."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.rand(count, 3, *size, generator=generator)
    labels = torch.arange(count) % NUM_CLASSES
    for row in range(count):
        if labels[row] < 3:
            images[row, labels[row]] += 0.8
    return (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype), labels


class Pictures(Dataset):
    """Samples ``(image, label)``, or mappings with more fields if `mapping`."""

    def __init__(self, count: int, *, mapping: bool = False, size: tuple[int, int] = (9, 7)):
        self.images, self.labels = pictures(count, size=size)
        self.mapping = mapping

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image, label = self.images[index], int(self.labels[index])
        if not self.mapping:
            return image, label
        return {"__key__": f"key{index}", "image": image, "label": label, "weight": index / 2}


class PictureStream(IterableDataset):
    """The same samples, one after the other."""

    def __init__(self, count: int) -> None:
        self.pictures = Pictures(count)

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self):
        return (self.pictures[index] for index in range(len(self)))
