"""Views: which part of a picture is looked at, as numbers that can be stored.

A recipe names pictures, so what a data set's transform did to them has to be done again when it is
replayed. Of torchvision's transforms those are taken whose outcome a rectangle and a flip describe.
Everything is done by Pillow, whose arithmetic is in integers: the same on any machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from supermix_transforms.draws import Draw, Purpose, seeded

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["VIEWS", "Crop", "View", "ViewDraws"]

Array: TypeAlias = npt.NDArray[Any]

_functional: Any = F  # its annotations speak of tensors alone

MOST_PIXELS = 1 << 14  # of a picture's side: crops are stored in 16 bits
STAGES: tuple[Any, ...] = (
    v2.Resize,
    (v2.CenterCrop, v2.RandomCrop, v2.RandomResizedCrop),
    v2.RandomHorizontalFlip,
)
VIEWS: dict[str, Any] = {  # of the command line: from a size to a transform
    "random-resized-crop": lambda size: v2.Compose(
        [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    ),
    "random-crop": lambda size: v2.Compose(
        [
            v2.RandomCrop(size, padding=size // 8, pad_if_needed=True),
            v2.RandomHorizontalFlip(),
        ]
    ),
    "center-crop": lambda size: v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size)]),
}
ALLOWED = "Resize, CenterCrop, RandomCrop, RandomResizedCrop, RandomHorizontalFlip"


class Crop(NamedTuple):
    """A rectangle of a picture, in pixels after `View.resize`; black where it is outside."""

    top: int
    left: int
    height: int
    width: int
    flip: int  # 1: mirrored


@dataclass(frozen=True)
class View:
    """From a picture and a `Crop` to pixels.

    The picture is resized as torchvision's Resize does it (None: it is not), the rectangle is cut
    out, resized to `size`, and mirrored.
    """

    size: tuple[int, int]  # height and width of what comes out
    resize: tuple[int, ...] | None = None  # of the short side, or height and width
    max_size: int | None = None  # of the long side
    resize_interpolation: str = "bilinear"
    crop_interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(1 <= side <= MOST_PIXELS for side in self.size):
            raise ValueError(f"view: expected a size of 1..{MOST_PIXELS} pixels, got {self.size}.")
        for name in (self.resize_interpolation, self.crop_interpolation):
            v2.InterpolationMode(name)  # a ValueError that names it

    def prepare(self, picture: "Image") -> "Image":
        """The picture in whose pixels crops are."""
        if self.resize is not None:
            mode = v2.InterpolationMode(self.resize_interpolation)
            # () is a Resize that has a max_size alone
            size = list(self.resize) or None
            picture = _functional.resize(picture, size, mode, self.max_size)
        return picture

    def cut(self, picture: "Image", crop: Crop) -> Array:
        """The pixels (3, H, W) uint8 of a crop of a picture that was prepared.

        Raises:
            ValueError: for a crop that is far outside of the picture.
        """
        top, left, height, width, flip = crop
        near = all(
            side >= 1 and -out <= start and start + side <= whole + out
            for start, side, whole, out in (
                (top, height, picture.height, self.size[0]),
                (left, width, picture.width, self.size[1]),
            )
        )
        if not near:
            raise ValueError(
                f"recipes: expected crops of a picture of {picture.width} x {picture.height} "
                f"pixels, got {crop}. These are not the pictures that the recipes were made of."
            )
        picture = picture.crop((left, top, left + width, top + height))
        if (height, width) != self.size:
            mode = v2.InterpolationMode(self.crop_interpolation)
            picture = _functional.resize(picture, list(self.size), mode)
        if flip:
            picture = _functional.horizontal_flip(picture)
        return np.asarray(picture).transpose(2, 0, 1).copy()


class ViewDraws:
    """What a torchvision transform would look at, drawn from (seed, epoch, index of the sample).

    Args:
        transform: a v2 transform or a Compose of them, in this order: Resize, at most one of
            CenterCrop, RandomCrop and RandomResizedCrop, RandomHorizontalFlip. ToImage and
            PILToTensor are passed over.
        seed: of the draws.

    Raises:
        ValueError: for other transforms, and where the size of what comes out is not fixed.
    """

    def __init__(self, transform: Callable[..., Any] | None, *, seed: int) -> None:
        self.seed = seed
        self._crop: Any = None
        self._flip = 0.0
        resize: Any = None
        stage = 0
        self.steps: list[Any] = _steps(transform)
        for step in self.steps:
            place = next((i for i, kind in enumerate(STAGES, 1) if isinstance(step, kind)), 0)
            if place <= stage:
                old = "" if isinstance(step, v2.Transform) else " of torchvision.transforms.v2"
                raise ValueError(
                    f"transform: expected {ALLOWED}{old}, in this order and each at most once, got "
                    f"{step}. Recipes store rectangles and flips only; do the rest to the batch."
                )
            stage = place
            if place == 1:
                resize = step
            elif place == 2:
                self._crop = _check_padding(step)
            else:
                self._flip = step.p
        if self._crop is not None:
            size = tuple(self._crop.size)
        elif resize is not None and resize.size is not None and len(resize.size) == 2:
            size = tuple(resize.size)
        else:
            raise ValueError(
                "transform: expected pictures of one size, got no crop, and no Resize to height "
                f"and width, in {transform}. Add v2.RandomResizedCrop(size) or v2.CenterCrop(size)."
            )
        self.view: View = View(
            size=(int(size[0]), int(size[1])),
            resize=None if resize is None else tuple(resize.size or ()),
            max_size=None if resize is None else resize.max_size,
            resize_interpolation="bilinear" if resize is None else _name(resize.interpolation),
            crop_interpolation=_name(getattr(self._crop, "interpolation", "bilinear")),
        )

    def __call__(self, picture: "Image", epoch: int, index: int) -> Crop:
        """The crop of a picture that was prepared."""
        if max(picture.size) > MOST_PIXELS:
            raise ValueError(
                f"transform: expected pictures of at most {MOST_PIXELS} pixels a side, got "
                f"{picture.size}. Add v2.Resize(...) before the crop."
            )
        draw = Draw(self.seed, epoch, torch.tensor([index]))
        with seeded(draw, Purpose.VIEW, torch.device("cpu")):
            top, left, height, width = _box(self._crop, picture)
            return Crop(top, left, height, width, flip=int(torch.rand(()) < self._flip))


def _steps(transform: Callable[..., Any] | None) -> list[Any]:
    """The transforms in a Compose, without those that only change the type."""
    if transform is None:
        return []
    if isinstance(transform, v2.Compose):
        return [inner for step in transform.transforms for inner in _steps(step)]
    return [] if isinstance(transform, (v2.ToImage, v2.PILToTensor, v2.RGB)) else [transform]


def _check_padding(step: Any) -> Any:
    if isinstance(step, v2.RandomCrop) and (step.fill != 0 or step.padding_mode != "constant"):
        raise ValueError(
            f"transform: expected RandomCrop that pads with black, got {step}. Leave fill= and "
            "padding_mode= out."
        )
    if isinstance(step, v2.RandomCrop) and step.padding is not None:
        sides = [step.padding] if isinstance(step.padding, int) else list(step.padding)
        if max(sides) > min(step.size):
            raise ValueError(
                f"transform: expected padding of at most the crop's {min(step.size)} pixels, got "
                f"{step}: a crop could show nothing of the picture."
            )
    return step


def _name(interpolation: Any) -> str:
    """The name of what torchvision takes as an enum, a name, or Pillow's number."""
    if isinstance(interpolation, v2.InterpolationMode):
        return str(interpolation.value)
    if isinstance(interpolation, str):
        return interpolation
    from torchvision.transforms.functional import pil_modes_mapping

    names = {number: str(mode.value) for mode, number in pil_modes_mapping.items()}
    return names[interpolation]


def _box(crop: Any, picture: "Image") -> Sequence[int]:
    """Top, left, height, width."""
    if crop is None:
        return 0, 0, picture.height, picture.width
    if isinstance(crop, v2.CenterCrop):
        height, width = crop.size
        spare = picture.height - height, picture.width - width
        # as torchvision rounds, where it cuts and where it pads
        top, left = (round(each / 2) if each >= 0 else -(-each // 2) for each in spare)
        return top, left, height, width
    params = crop.make_params([picture])
    left, top, *_ = params.get("padding", (0, 0))
    return params["top"] - top, params["left"] - left, params["height"], params["width"]
