"""A small net that is hard to convince of two classes at once, and pictures of many classes."""

import torch
from torch import Tensor, nn

from supermix_transforms import TeacherLabeler

CLASSES = 30


def picky_pictures(count: int = 12, size: tuple[int, int] = (17, 15)) -> list[tuple[str, Tensor]]:
    """Names, and pictures (3, 17, 15) uint8 of nine colours each."""
    generator = torch.Generator().manual_seed(1)
    patches = nn.functional.interpolate(torch.rand(count, 3, 3, 3, generator=generator), size)
    images = (255 * patches).round().to(torch.uint8)
    return [(f"picture {i}", image) for i, image in enumerate(images)]


def picky_net() -> nn.Module:
    """Logits (B, 30); has class maps.

    Of 12 tuples of `picky_pictures` fast mixes nearly all, the paper's method about half.
    """
    net = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in net.parameters():
            scale = values[0].numel() ** 0.5 if values.ndim > 1 else 10
            values.copy_(torch.randn(values.shape, generator=generator) / scale)
        net[-1].weight.mul_(20)
        images = torch.stack([image for _, image in picky_pictures()])
        net[-1].bias.sub_(net((images / 255 - 0.5) / 0.25).mean(dim=0))  # no class is everywhere
    return net


def picky_labeler(dtype: torch.dtype | None = None) -> TeacherLabeler:
    return TeacherLabeler(picky_net(), mean=(0.5,) * 3, std=(0.25,) * 3, dtype=dtype)
