"""Pictures from disk: a folder or a WebDataset tar, decoded by Pillow, as uint8 tensors."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from supermix_transforms.data.tarheaders import tar_members
from supermix_transforms.draws import Draw, Purpose, generator

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["SUFFIXES", "PictureFiles", "png", "read_picture", "to_tensor"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")  # nobody asked for Pillow's other decoders, such as Ghostscript


class PictureFiles:
    """The pictures of a folder or a WebDataset tar: pairs of a name and a (3, S, S) uint8 tensor.

    One picture is decoded at a time, turned as its EXIF says, and made RGB. Its middle is cut out,
    7/8 of the short side, as ImageNet's nets are tested; one of S x S pixels stays as it is. A
    folder is read in an order shuffled by the seed, since its subfolders often are classes; a tar
    in its own order. Nothing in a tar but pictures is decoded, so no pickle in it is ever opened.

    Args:
        path: a folder, searched for jpg, jpeg, png and webp files at any depth; or a tar, not
            compressed.
        size: S, in pixels.
        seed: of the order.
        skip: a folder inside of `path` whose files are left out: earlier mixes.

    Raises:
        ValueError: if `path` is not there, holds no picture, or one that cannot be read, or is no
            whole tar. All but the first are found while iterating.
    """

    def __init__(
        self, path: str | Path, *, size: int = 224, seed: int = 0, skip: str | Path | None = None
    ) -> None:
        self.path: Path = Path(path)
        self.size = size
        if size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {size}.")
        if not self.path.exists():
            raise ValueError(
                f"images: expected a folder or a tar file, got {str(path)!r}, which is not there. "
                "Check the path."
            )
        self._files: list[Path] | None = None
        if self.path.is_dir():
            files = sorted(
                file for file in self.path.rglob("*") if _is_picture(file.name) and file.is_file()
            )
            inner = None if skip is None else Path(skip).resolve()
            if inner is not None and self.path.resolve() in inner.parents:
                files = [file for file in files if inner not in file.resolve().parents]
            draw = Draw(seed, 0, torch.empty(0))
            order = generator(draw, [], Purpose.FILES).permutation(len(files))
            self._files = [files[place] for place in order]

    def __length_hint__(self) -> int:
        return 0 if self._files is None else len(self._files)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        empty = True
        for name, content in self._contents():
            yield name, to_tensor(read_picture(name, content), self.size)
            empty = False
        if empty:
            kinds = ", ".join(SUFFIXES)
            raise ValueError(
                f"images: expected pictures ({kinds}) in {str(self.path)!r}, got none. "
                "Pass the folder that holds them, or one tar of a WebDataset."
            )

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        if self._files is not None:
            for file in self._files:
                yield file.relative_to(self.path).as_posix(), file.read_bytes()
            return
        with self.path.open("rb") as tar:
            try:
                for member in tar_members(self.path, tar):
                    if _is_picture(member.name):
                        tar.seek(member.offset_data)
                        yield member.name, tar.read(member.size)
            except ValueError as error:
                raise ValueError(f"images: {str(error).removeprefix('shards: ')}") from error


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def read_picture(name: str, content: bytes) -> "Image":
    """Decode a JPEG, PNG or WebP, whatever its name, with Pillow, as RGB and upright.

    Raises:
        ValueError: if Pillow cannot, or it has more than `PIL.Image.MAX_IMAGE_PIXELS`; it names the
            picture and says what Pillow said.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if most is not None and pixels > most:  # for less than twice as many Pillow only warns
            raise Image.DecompressionBombError(
                f"{image.width} x {image.height} pixels are more than "
                f"PIL.Image.MAX_IMAGE_PIXELS, {most}"
            )
        ImageOps.exif_transpose(image, in_place=True)  # one copy, below, is enough
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            image = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
            image.info.pop("transparency", None)  # a level of 16 bits
        if "transparency" in image.info:  # else Pillow warns
            image = image.convert("RGBA")
        return image.convert("RGB")
    except Exception as error:  # of damaged bytes: struct.error, TypeError, SyntaxError, ...
        reason = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is none of {', '.join(FORMATS)}"
        raise ValueError(
            f"images: expected a picture, got {name!r}, which Pillow cannot read: "
            f"{reason}. Remove or replace that file."
        ) from error


def to_tensor(image: "Image", size: int) -> Tensor:
    """The middle of a picture, (3, size, size) uint8; see `PictureFiles`."""
    from PIL import Image, ImageOps
    from torchvision.transforms.v2 import functional as F

    if image.size != (size, size):
        # The same as a resize of the short side to 8/7 size and a centre crop, but a very long
        # picture never becomes a huge one in between.
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC, bleed=1 / 16)
    return F.pil_to_tensor(image)


def png(picture: Tensor) -> bytes:
    """A picture (C, H, W) uint8 as the content of a PNG file."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(picture.movedim(0, -1).squeeze(-1).cpu().numpy()).save(content, "PNG")
    return content.getvalue()
