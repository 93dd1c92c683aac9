"""WebDataset tars of tiny pictures, made for tests."""

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import torch
from colours import pictures
from PIL import Image

from supermix_transforms.data.pictures import png


def picture(shade: int, kind: str = "PNG", size: tuple[int, int] = (6, 5)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(content, kind)
    return content.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    """Members of samples whose shade and label are their number."""
    parts = []
    for number in range(first, first + count):
        parts += [(f"{number:04}.cls", str(number).encode()), (f"{number:04}.png", picture(number))]
    return parts


def write_colours(folder: Path, count: int = 22, size: tuple[int, int] = (20, 24)) -> list[Path]:
    """Three shards of pictures of one colour each, for the teachers of `colours`."""
    images, labels = pictures(count, size=size, dtype=torch.uint8)
    starts = [0, count // 3, count // 2, count]
    shards = []
    for number, (first, last) in enumerate(pairwise(starts)):
        members = []
        for row in range(first, last):
            members += [
                (f"{row:04}.cls", str(int(labels[row])).encode()),
                (f"{row:04}.png", png(images[row])),
            ]
        shards.append(write_tar(folder / f"colours-{number}.tar", members))
    return shards


def write_shards(folder: Path, lengths: list[int]) -> list[Path]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        write_tar(folder / f"part-{i}.tar", samples(start, length))
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
