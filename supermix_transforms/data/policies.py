"""Augmentations of single pictures by name or from a file, with which the paper compares (Table 1).

Those that torchvision has are torchvision's. All choices are drawn from torch's global generator.
"""

import difflib
import importlib.resources
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from supermix_transforms.draws import set_epoch_of

__all__ = ["FILES", "OPERATIONS", "POLICIES", "Policy", "load_policy"]

_functional: Any = F  # its annotations speak of tensors alone

GREY = [127.0]  # of what comes from outside, and of what is cut out: near the mean of all pictures
COUNTS = (0.2, 0.3, 0.5)  # how probable it is that 0, 1, 2 operations of a phase are applied

Operation: TypeAlias = tuple[str, float, float]  # name, probability, magnitude


def _affine(image: Tensor, **options: Any) -> Tensor:
    plain = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "fill": GREY}
    moved: Tensor = _functional.affine(image, **{**plain, **options})
    return moved


def _shear(image: Tensor, x: float = 0.0, y: float = 0.0) -> Tensor:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return _affine(image, shear=degrees, center=[0, 0])


def _translate(image: Tensor, x: float = 0.0, y: float = 0.0) -> Tensor:
    height, width = image.shape[-2:]
    return _affine(image, translate=[round(x * width), round(y * height)])


def _solarize(image: Tensor, threshold: float) -> Tensor:
    if threshold > 255:  # published policies have 256, which torchvision refuses
        return image
    inverted: Tensor = _functional.solarize(image, threshold)
    return inverted


def cutout(image: Tensor, share: float) -> Tensor:
    """Grey a square whose centre is anywhere in the picture (DeVries and Taylor, 2017).

    Args:
        image: (C, H, W); is not changed.
        share: of the square's side in the picture's; it may stick out.
    """
    height, width = image.shape[-2:]
    sides = round(share * height), round(share * width)
    ends = []
    for side, whole in zip(sides, (height, width), strict=True):
        start = int(torch.randint(whole, ())) - side // 2
        ends.append(slice(max(0, start), max(0, start + side)))
    image = image.clone()
    image[..., ends[0], ends[1]] = int(GREY[0])
    return image


# of a picture and a magnitude; of those in MIRRORED either sign is drawn
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "ShearX": lambda image, m: _shear(image, x=m),  # pixels a pixel
    "ShearY": lambda image, m: _shear(image, y=m),
    "TranslateX": lambda image, m: _translate(image, x=m),  # shares of the side
    "TranslateY": lambda image, m: _translate(image, y=m),
    "Rotate": lambda image, m: _functional.rotate(image, m, fill=GREY),  # degrees
    "Contrast": lambda image, m: _functional.adjust_contrast(image, m),  # factors, 1: no change
    "Color": lambda image, m: _functional.adjust_saturation(image, m),
    "Brightness": lambda image, m: _functional.adjust_brightness(image, m),
    "Sharpness": lambda image, m: _functional.adjust_sharpness(image, m),
    "Solarize": _solarize,  # inverted from that value on, 256: nothing
    "Posterize": lambda image, m: _functional.posterize(image, int(m)),  # bits that are kept
    "Cutout": cutout,
    "AutoContrast": lambda image, _: _functional.autocontrast(image),
    "Equalize": lambda image, _: _functional.equalize(image),
    "Invert": lambda image, _: _functional.invert(image),
}
MIRRORED = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})


class Policy:
    """An augmentation as a file describes it.

    Such a file is JSON with one of two keys. Of ``"sub_policies"``, lists of operations, one is
    drawn for each picture, and its operations are tried one after the other. Of ``"phases"``,
    objects with "epochs" and "operations", one holds for its part of the training; 0, 1 or 2 of its
    operations are applied, in a random order. An operation is ``[name, probability, magnitude]``,
    with the names and units of `OPERATIONS`. ``"source"`` says where the numbers come from.

    Args:
        content: of the file.
        epochs: of the training, over which the phases are spread; None: their own.

    Raises:
        ValueError: for other content.
    """

    def __init__(self, content: Mapping[str, Any], *, epochs: int | None = None) -> None:
        self._sub_policies = [_operations(each) for each in _list(content, "sub_policies")]
        self._phases: list[tuple[float, list[Operation]]] = []  # share of training at its end
        phases = _list(content, "phases")
        try:
            lengths = [phase["epochs"] for phase in phases]
            if not all(isinstance(length, int) and length >= 0 for length in lengths):
                raise TypeError(f"{lengths} epochs")
            for number, phase in enumerate(phases, 1):
                end = sum(lengths[:number]) / sum(lengths)
                self._phases.append((end, _operations(phase["operations"])))
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(
                f'policy: expected phases with "epochs" and "operations", got {error!r}. See '
                "`Policy` for the format."
            ) from error
        if bool(self._phases) == bool(self._sub_policies):
            raise ValueError(
                'policy: expected either "sub_policies" or "phases", got '
                f"{', '.join(content) or 'nothing'}. See `Policy` for the format."
            )
        self._epochs = epochs or sum(lengths)
        self._phase = 0

    def set_epoch(self, epoch: int) -> None:
        """The phase of this epoch, from 0 on; the last one's after all."""
        share = epoch / max(1, self._epochs)
        ends = [end for end, _ in self._phases]
        self._phase = min(sum(end <= share for end in ends), len(ends) - 1)

    def __call__(self, image: Tensor) -> Tensor:
        """A picture (C, H, W) uint8, augmented."""
        if self._sub_policies:
            chosen = self._sub_policies[int(torch.randint(len(self._sub_policies), ()))]
            left = len(chosen)
        else:
            operations = self._phases[self._phase][1]
            chosen = [operations[i] for i in torch.randperm(len(operations)).tolist()]
            left = int(torch.multinomial(torch.tensor(COUNTS), 1))
        for name, probability, magnitude in chosen:
            if left > 0 and float(torch.rand(())) < probability:
                sign = -1 if name in MIRRORED and float(torch.rand(())) < 0.5 else 1
                image = OPERATIONS[name](image, sign * magnitude)
                left -= 1
        return image


class Chain(v2.Compose):
    """Augmentations one after the other, each of which is told the epoch if it wants to know."""

    def set_epoch(self, epoch: int) -> None:
        """As of `Policy`."""
        for step in self.transforms:
            set_epoch_of(step, epoch)


POLICIES: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "autoaugment-cifar10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=GREY),
    "autoaugment-imagenet": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=GREY),
    "cutout": lambda: Policy({"sub_policies": [[["Cutout", 1.0, 0.5]]]}),
    "randaugment": lambda: v2.RandAugment(fill=GREY),
    "trivialaugment": lambda: v2.TrivialAugmentWide(fill=GREY),
}
FILES = ("fast-autoaugment-cifar10", "pba-cifar10")
WITH_CUTOUT = "+cutout"


def load_policy(name: str | Path, *, epochs: int | None = None) -> Callable[[Any], Any]:
    """An augmentation of a picture (C, H, W) uint8, which keeps its size and dtype.

    Args:
        name: "cutout" (half the side); torchvision's "autoaugment-cifar10", "autoaugment-imagenet",
            "randaugment" and "trivialaugment"; "fast-autoaugment-cifar10" (Lim et al., 2019) and
            "pba-cifar10" (Ho et al., 2019) with their published numbers; or a file of a `Policy`.
            With "+cutout" behind the name a cutout follows, as in these papers' CIFAR figures.
        epochs: of the training, for a policy that changes in its course.

    Raises:
        ValueError: for another name, and a file that is not there or holds something else.
    """
    if str(name).endswith(WITH_CUTOUT):
        first = load_policy(str(name).removesuffix(WITH_CUTOUT), epochs=epochs)
        return Chain([first, POLICIES["cutout"]()])
    if str(name) in POLICIES:
        return POLICIES[str(name)]()
    if str(name) in FILES:
        folder = importlib.resources.files("supermix_transforms.data") / "policy_files"
        text = (folder / f"{name}.json").read_text(encoding="utf-8")
        return Policy(json.loads(text), epochs=epochs)
    names = [*POLICIES, *FILES]
    if not str(name).endswith(".json"):
        near = difflib.get_close_matches(str(name), names)
        raise ValueError(
            f"policy: expected one of {', '.join(names)}, or a file.json, got {str(name)!r}."
            + (f" Did you mean {', '.join(near)}?" if near else "")
        )
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"policy: expected a JSON file, got {str(name)!r}: {error}. Check the path."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"policy: expected an object in {str(name)!r}, got {type(content).__name__}. See "
            "`Policy` for the format."
        )
    return Policy(content, epochs=epochs)


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    found = content.get(key, [])
    if not isinstance(found, list):
        raise ValueError(
            f'policy: expected a list of "{key}", got {found!r:.80}. See `Policy` for the format.'
        )
    return found


def _operations(given: Sequence[Any]) -> list[Operation]:
    """Operations of a file, once they are found to be some."""
    found: list[Operation] = []
    for each in given if isinstance(given, list) else [given]:
        try:
            name, probability, magnitude = each
            right = name in OPERATIONS and 0 <= probability <= 1 and math.isfinite(magnitude)
        except (TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise ValueError(
                "policy: expected operations [name, probability in 0..1, magnitude] with a name "
                f"of {', '.join(OPERATIONS)}, got {json.dumps(each)[:80]}. "
                "See `OPERATIONS` for the units."
            )
        found.append((name, float(probability), float(magnitude)))
    return found
