"""The teacher: any module or callable from images to logits, asked politely.

It is run in eval mode and put back as it was, never trained, never registered as a submodule. One
forward of the originals gives their logits, and, where the logits are linear in an averaged feature
map, the class maps from which the fast solver starts.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supermix_transforms.heads import Head, eager, find_head, watching
from supermix_transforms.inputs import check_images
from supermix_transforms.memory import group_size
from supermix_transforms.results import ClassMaps, TeacherLabels

__all__ = ["TeacherLabeler", "as_labeler"]


class TeacherLabeler:
    """Soft and hard labels from one teacher, or from the mean probability of several.

    Args:
        teacher: a module or callable, images (B, C, H, W) -> logits (B, N) or an object with
            ``.logits``; or a list of them. Members of a list may be labelers, each with its own
            mean, std, size, dtype and device; there are none here then.
        mean: per channel, of pictures in 0..1; subtracted before the teacher.
        std: per channel; divides after the mean.
        size: side in pixels, or (height, width), that pictures are resized to for the teacher only.
        temperature: of the probabilities, > 0.
        top: keep the n largest probabilities of each label (float16) instead of all N.
        dtype: of autocast. None is float32 on the CPU and bfloat16 on CUDA. The classes of
            originals are always read in float32: 0.7 % of pictures change class in bfloat16.
        device: where pictures are sent; None is where the teacher's weights are.

    uint8 pictures are given to the teacher as float in 0..1, floating ones as they come.

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
        own = {"mean": mean, "std": std, "size": size, "dtype": dtype, "device": device}
        given = [name for name, value in own.items() if value is not None]
        if given and any(isinstance(each, TeacherLabeler) for each in teachers):
            raise ValueError(
                f"{given[0]}: expected None beside a labeler, which has its own, got "
                f"{own[given[0]]}. Pass it where that labeler is made; give other members of a "
                "list labelers of their own."
            )
        members: list[_Member] = []
        for each in teachers:
            if isinstance(each, TeacherLabeler):
                members.extend(each._alive())
            else:
                members.append(_Member(each, mean, std, size, dtype, device))
        self._members: tuple[_Member, ...] | None = tuple(members)

    def __call__(self, images: Tensor) -> TeacherLabels:
        """Labels of pictures (B, C, H, W), uint8 or floating, on the teacher's device.

        Raises:
            ValueError: for what are no pictures, or not of the mean's channels; for a teacher that
                answers with anything but logits (B, N), or several that differ in N.
            RuntimeError: if the labeler was pickled.
        """
        with torch.inference_mode(False), torch.no_grad():
            images = self.prepare(images)
            return self.label(torch.cat([self.logits(part) for part in _parts(images)]))

    def label(self, logits: Tensor) -> TeacherLabels:
        """Labels of logits (B, N), at this labeler's temperature and top."""
        return TeacherLabels.from_logits(logits, temperature=self.temperature, top=self.top)

    def logits(self, images: Tensor, *, precise: bool = False) -> Tensor:
        """Logits (B, N) float32, differentiable in the pictures; what the solver calls.

        Several teachers give the logarithm of their mean probability. `precise`: without autocast.
        """
        return self._mean([member(images, precise=precise) for member in self._alive()])

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
        return log_probs.logsumexp(dim=0) - torch.tensor(float(len(answers))).log().item()

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
        """Where the teacher runs; None for a callable that takes pictures where they are."""
        return self._alive()[0].device

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
        with _evaluating([member.module for member in self._alive()]):
            yield

    def _alive(self) -> "tuple[_Member, ...]":
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
    """A batch as a teacher is given it; one without pictures is one part."""
    size = group_size(images) if len(images) > 0 else None
    return (images,) if size is None else images.split(size)


def as_labeler(teacher: Any) -> TeacherLabeler:
    """`teacher` itself if it is a labeler, else a labeler with default settings around it."""
    return teacher if isinstance(teacher, TeacherLabeler) else TeacherLabeler(teacher)


class _Member:
    """One teacher with its preprocessing."""

    def __init__(
        self,
        teacher: Any,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        size: int | tuple[int, int] | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        if not callable(teacher):
            raise TypeError(
                f"teacher: expected a module or a callable from images to logits, got "
                f"{type(teacher).__name__}. Pass the model itself, or a list of models."
            )
        self.teacher: Callable[[Tensor], Any] = teacher
        self.module = teacher if isinstance(teacher, nn.Module) else None
        self.size = (size, size) if isinstance(size, int) else size
        self._dtype = dtype
        self._mean, self._std = mean, std
        # as tensors there have it: of index 0 where "cuda" has none
        self._device = None if device is None else torch.empty(0, device=device).device
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._channels_last = True
        self._head: Head | None = None
        self._searched = False
        tensors = [] if self.module is None else [*self.module.parameters(), *self.module.buffers()]
        if any(tensor.is_inference() for tensor in tensors):
            raise ValueError(
                "teacher: expected ordinary weights, got inference tensors, through which no "
                "gradient can pass. Build or load the teacher outside torch.inference_mode()."
            )

    def __repr__(self) -> str:
        name = getattr(self.teacher, "__name__", type(self.teacher).__name__)
        return f"{name}(mean={self._mean}, std={self._std}, size={self.size})"

    @property
    def device(self) -> torch.device | None:
        if self._device is not None or self.module is None:
            return self._device
        return next((tensor.device for tensor in self.module.parameters()), None)

    @property
    def dtype(self) -> torch.dtype:
        """In which it answers: of autocast, or of its weights if that is off."""
        on_cuda = self.device is not None and self.device.type == "cuda"
        dtype = self._dtype or (torch.bfloat16 if on_cuda else torch.float32)
        weights = None if self.module is None else next(self.module.parameters(), None)
        return dtype if weights is None or dtype != torch.float32 else weights.dtype

    def __call__(self, images: Tensor, *, precise: bool = False) -> Tensor:
        """Logits (B, N) float32 of pictures (B, C, H, W); `precise`: without autocast."""
        images = self._preprocess(images)
        precision = _full_precision if precise else self._precision
        with _evaluating([self.module]), precision(images.device):
            logits = self._run(images)
        return logits.float()

    def examine(self, images: Tensor) -> tuple[Tensor, ClassMaps | None]:
        """One float32 forward: logits (B, N) and class maps, searched for on the first batch."""
        images = self._preprocess(images)
        with _evaluating([self.module]), _full_precision(images.device):
            if not self._searched and self.module is not None:
                with eager(self.module):
                    self._head = find_head(self.module, self._run, images[:4])
            if self.module is None or self._head is None:
                logits = self._run(images).float()
                # numbers that are not finite explain nothing: search again in the next batch
                self._searched = self._searched or bool(logits[:4].isfinite().all())
                return logits, None
            self._searched = True
            seen: list[Tensor] = []
            with (
                eager(self.module),
                watching(self._head.place, self._head.is_input, seen.append),
            ):
                logits = self._run(images).float()
            return logits, self._head.explain(seen[-1], logits) if seen else None

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        dtype = self._dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if dtype == torch.float32:
            return _full_precision(device)
        return torch.autocast(device.type, dtype=dtype)

    def _preprocess(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            images = images.float() / 255
        if self._mean is not None and self._std is not None:
            if images.shape[1] not in (len(self._mean), 1) and len(self._mean) != 1:
                raise ValueError(
                    f"teacher: expected pictures of {len(self._mean)} channels, as its mean has, "
                    f"got {images.shape[1]}. Convert them (v2.RGB()), or pass another mean and std."
                )
            mean, std = self._mean_and_std(images.device)
            images = (images - mean) / std
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images.float(), self.size, mode="bilinear", antialias=True)
        return images

    def _mean_and_std(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two tensors (C, 1, 1), made once for each device."""
        if device not in self._statistics:
            with torch.inference_mode(False):  # they outlive the mode around this call
                mean, std = (
                    torch.tensor(value, dtype=torch.float32, device=device)[:, None, None]
                    for value in (self._mean, self._std)
                )
            self._statistics[device] = mean, std
        return self._statistics[device]

    def _run(self, images: Tensor) -> Tensor:
        """The teacher's answer as a tensor (B, N)."""
        if self.module is not None:
            weights = next(self.module.parameters(), None)
            if weights is not None and weights.is_floating_point():
                images = images.to(weights.dtype)
            if self._channels_last:  # convolutions take half the time on the CPU
                try:
                    return self._answer(images.contiguous(memory_format=torch.channels_last))
                except RuntimeError as error:
                    if "view" not in str(error):
                        raise
                    self._channels_last = False  # it calls .view on a feature map
        return self._answer(images)

    def _answer(self, images: Tensor) -> Tensor:
        answer = self.teacher(images)
        if isinstance(answer, dict) and "logits" in answer:
            answer = answer["logits"]
        answer = getattr(answer, "logits", answer)
        if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(images):
            got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(
                f"teacher: expected logits ({len(images)}, N) for {len(images)} pictures, or an "
                f"object with .logits, got {got}. Wrap it: lambda images: model(images)[0]."
            )
        return answer


@contextmanager
def _evaluating(modules: Sequence[nn.Module | None]) -> Iterator[None]:
    """Eval mode inside; each submodule's own training flag afterwards, whatever happened."""
    present = [module for module in modules if module is not None]
    training = [part for module in present for part in module.modules() if part.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast, whatever the reader of a batch has switched on."""
    return torch.autocast(device.type, enabled=False)
