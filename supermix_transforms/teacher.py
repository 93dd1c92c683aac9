"""The teacher: any module or callable from images to logits, asked politely.

It is run in eval mode and put back as it was, never trained, never registered as a submodule. One
forward of the originals gives their logits, and, where the logits are linear in an averaged feature
map, the class maps from which the fast solver starts.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from supermix_transforms.inputs import check_images
from supermix_transforms.member import Member, evaluating
from supermix_transforms.memory import group_size
from supermix_transforms.results import ClassMaps, TeacherLabels

__all__ = ["TeacherLabeler", "as_labeler"]


class TeacherLabeler:
    """Soft and hard labels from one teacher, or from the mean probability of several.

    Args:
        teacher: a module or callable, images (B, C, H, W) -> logits (B, N) or an object with
            ``.logits``; or a list of them. Members of a list may be labelers, each with its own
            mean, std, size, dtype and device; leave these out here then.
        mean: per channel, of pictures in 0..1; subtracted before the teacher.
        std: per channel; divides after the mean.
        size: side in pixels, or (height, width), that pictures are resized to for the teacher only.
        classes: indices of those of the teacher's classes that your data has, in the order of your
            labels; its answer is cut down to them. None is all.
        temperature: of the probabilities, > 0.
        top: keep the n largest probabilities of each label (float16) instead of all N.
        dtype: of autocast. None is float32 on the CPU and bfloat16 on CUDA. The classes of
            originals are always read in float32: 0.7 % of pictures change class in bfloat16.
        device: where pictures are sent; None is where the teacher's weights are.

    uint8 pictures are given to the teacher as float in 0..1, floating ones as they come. A warning
    says so where these are far outside of 0..1 though there is a mean.

    Raises:
        TypeError: if a teacher is neither a module nor a callable.
        ValueError: for settings out of range, for settings of a member beside a labeler, which has
            its own, and for weights made under inference mode.

    Example:
        >>> labeler = TeacherLabeler(lambda images: images.mean(dim=(2, 3)))
        >>> labeler(torch.zeros(4, 3, 8, 8)).probs[0]
        tensor([0.3333, 0.3333, 0.3333])
    """

    def __init__(
        self,
        teacher: Any,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
        classes: Sequence[int] | None = None,
        temperature: float = 1.0,
        top: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}.")
        if top is not None and top < 1:
            raise ValueError(f"top: expected at least 1 class, or None for all, got {top}.")
        if (mean is None) != (std is None):
            raise ValueError(f"expected mean and std together, got mean={mean} and std={std}.")
        self.temperature = temperature
        self.top = top
        teachers = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
        if not teachers:
            raise ValueError("teacher: expected at least one, got an empty list.")
        if classes is not None and (not len(classes) or len(set(classes)) < len(classes)):
            raise ValueError(f"classes: expected each class once, one at least, got {classes}.")
        own: dict[str, Any] = {"mean": mean, "std": std, "size": size, "classes": classes}
        own |= {"dtype": dtype, "device": device}
        given = [name for name, value in own.items() if value is not None]
        if given and any(isinstance(each, TeacherLabeler) for each in teachers):
            raise ValueError(
                f"{given[0]}: expected None beside a labeler, which has its own, got "
                f"{own[given[0]]}. Pass it where that labeler is made; give other members of a "
                "list labelers of their own."
            )
        members: list[Member] = []
        for each in teachers:
            if isinstance(each, TeacherLabeler):
                members.extend(each._alive())
            else:
                members.append(Member(each, mean, std, size, classes, dtype, device))
        self._members: tuple[Member, ...] | None = tuple(members)

    def __call__(self, images: Tensor) -> TeacherLabels:
        """Labels of pictures (B, C, H, W), uint8 or floating, on the teacher's device.

        Raises:
            ValueError: for what are no pictures, or not of the mean's channels; for a teacher that
                answers with anything but logits (B, N), or several that differ in N.
            RuntimeError: if the labeler was pickled.
        """
        with torch.inference_mode(False), torch.no_grad():
            return self.label(self.ask(images))

    def ask(self, images: Tensor) -> Tensor:
        """Logits (B, N) float32 of pictures as for a call, without gradients.

        Raises:
            ValueError, RuntimeError: as a call.
        """
        with torch.inference_mode(False), torch.no_grad():
            parts = _parts(self.prepare(images))
            return torch.cat([self.logits(part) for part in parts])

    def label(self, logits: Tensor) -> TeacherLabels:
        """Labels of logits (B, N), at this labeler's temperature and top."""
        return TeacherLabels.from_logits(logits, temperature=self.temperature, top=self.top)

    def logits(self, images: Tensor, *, precise: bool = False) -> Tensor:
        """Logits (B, N) float32, differentiable in the pictures; what the solver calls.

        Several teachers give the logarithm of their mean probability. `precise`: without autocast.
        """
        answers = [member(images, precise=precise) for member in self._alive()]
        return self._mean([answer.to(images.device) for answer in answers])

    @property
    def half(self) -> bool:
        """Whether `logits` are computed in half precision, and so known to about 0.1 only."""
        return any(member.dtype in (torch.bfloat16, torch.float16) for member in self._alive())

    @staticmethod
    def _mean(answers: list[Tensor]) -> Tensor:
        if len(answers) == 1:
            return answers[0]
        widths = sorted({answer.shape[1] for answer in answers})
        if len(widths) > 1:
            raise ValueError(
                f"teacher: expected the same number of classes from all, got {widths}. "
                "Mean probabilities need teachers of one data set."
            )
        log_probs = torch.stack([answer.log_softmax(dim=1) for answer in answers])
        return log_probs.logsumexp(dim=0) - math.log(len(answers))

    def examine(self, images: Tensor) -> tuple[Tensor, ClassMaps | None]:
        """One float32 forward of the originals: logits (B, N), and class maps if there are any."""
        members = self._alive()
        with torch.inference_mode(False), torch.no_grad():
            parts = _parts(self.prepare(images))
            if len(members) > 1:
                return torch.cat([self.logits(part, precise=True) for part in parts]), None
            answers = [members[0].examine(part) for part in parts]
            logits = torch.cat([logits for logits, _ in answers])
            maps = [maps for _, maps in answers if maps is not None]
            if len(maps) < len(answers):
                return logits, None
            return logits, maps[0]._replace(features=torch.cat([part.features for part in maps]))

    def class_maps(self, images: Tensor) -> ClassMaps | None:
        """Last feature maps and the classifier over their average, or None.

        Found by hooks and verified numerically on the first batch: None for lists, plain callables,
        and modules whose logits are not linear in an averaged feature map. Where the maps found do
        not explain the logits of a later batch, None for that batch.

        Raises:
            ValueError: for pictures and answers, as when the labeler is called.
            RuntimeError: if the labeler was pickled.
        """
        return self.examine(images)[1]

    def prepare(self, images: Tensor) -> Tensor:
        """Pictures checked and moved to the teacher's device."""
        images = check_images(images)
        return images if self.device is None else images.to(self.device)

    @property
    def device(self) -> torch.device | None:
        """Where the teacher runs, of several the first one that is anywhere.

        None for a callable that takes pictures where they are.
        """
        devices = (member.device for member in self._alive())
        return next((device for device in devices if device is not None), None)

    @property
    def digest(self) -> str:
        """The sha256 of the teachers' weights and of how pictures are prepared for them.

        A callable that is no module has no weights to look at; its name stands for it.
        """
        total = hashlib.sha256()
        for member in self._alive():
            total.update(repr(member).encode())
            state = {} if member.module is None else member.module.state_dict()
            for name, value in sorted(state.items()):
                total.update(name.encode())
                if isinstance(value, Tensor):
                    flat = value.detach().cpu().contiguous().flatten()
                    total.update(flat.view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode for many calls at once; training flags are put back at the end."""
        with evaluating([member.module for member in self._alive()]):
            yield

    def _alive(self) -> "tuple[Member, ...]":
        if self._members is None:
            raise RuntimeError(
                "this teacher was pickled, and a teacher does not travel between processes. Build "
                "the transform or collate in the process that mixes."
            )
        return self._members

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherLabeler":
        return self  # shared: v2.Compose and others are deep-copied freely, a teacher is not

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_members": None}

    def __repr__(self) -> str:
        names = "a pickled teacher"
        if self._members is not None:
            names = ", ".join(map(repr, self._members))
        return f"TeacherLabeler({names}, temperature={self.temperature}, top={self.top})"


def _parts(images: Tensor) -> Sequence[Tensor]:
    """A batch as a teacher is given it: on a CPU, a few at a time."""
    size = group_size(images)
    return (images,) if size is None else images.split(size)


def as_labeler(teacher: Any) -> TeacherLabeler:
    """`teacher` itself if it is a labeler, else a labeler with default settings around it."""
    return teacher if isinstance(teacher, TeacherLabeler) else TeacherLabeler(teacher)
