"""WebDataset tars of tiny pictures, made for tests."""

import io
import tarfile
from pathlib import Path

from PIL import Image


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


def write_shards(folder: Path, lengths: list[int]) -> list[Path]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        write_tar(folder / f"part-{i}.tar", samples(start, length))
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
