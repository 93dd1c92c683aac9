"""One teacher: how it is asked, in which precision, and what it is given.

It is run in eval mode and put back as it was.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supermix_transforms.heads import Head, eager, find_head, watching
from supermix_transforms.results import ClassMaps

__all__ = ["Member", "device_of", "evaluating"]

OVERSHOOT = 0.5  # beyond 0..1, which bicubic resizing of floats may leave by a little


class Member:
    """One teacher with its preprocessing."""

    def __init__(
        self,
        teacher: Any,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        size: int | tuple[int, int] | None,
        classes: Sequence[int] | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        if not callable(teacher):
            raise TypeError(
                f"teacher: expected a module or a callable from images to logits, got "
                f"{type(teacher).__name__}. Pass the model itself, or a list of models."
            )
        if isinstance(teacher, nn.parallel.DistributedDataParallel):
            # it would wait for the other ranks in each forward, and each rank's search has its own
            teacher = teacher.module
        self.teacher: Callable[[Tensor], Any] = teacher
        self.module: nn.Module | None = teacher if isinstance(teacher, nn.Module) else None
        self.size: tuple[int, int] | None = (size, size) if isinstance(size, int) else size
        self.classes: list[int] | None = (
            None if classes is None else [int(label) for label in classes]
        )
        self._dtype = dtype
        if mean is not None and std is not None:
            mean, std = tuple(map(float, mean)), tuple(map(float, std))
            if len(mean) != len(std) or not all(value > 0 for value in std):
                raise ValueError(
                    f"mean, std: expected one of each channel, all of std above 0, got {mean} and "
                    f"{std}."
                )
        self._mean, self._std = mean, std
        self._device = None if device is None else device_of(device)
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._channels_last = True
        self._head: Head | None = None
        self._searched = self._ranged = False
        tensors = [] if self.module is None else [*self.module.parameters(), *self.module.buffers()]
        if any(tensor.is_inference() for tensor in tensors):
            raise ValueError(
                "teacher: expected ordinary weights, got inference tensors, through which no "
                "gradient can pass. Build or load the teacher outside torch.inference_mode()."
            )

    def __repr__(self) -> str:
        name = getattr(self.teacher, "__name__", type(self.teacher).__name__)
        some = "" if self.classes is None else f", classes={self.classes}"
        return f"{name}(mean={self._mean}, std={self._std}, size={self.size}{some})"

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
        with evaluating([self.module]), precision(images.device):
            logits = self._run(images)
        return self._chosen(logits.float())

    def examine(self, images: Tensor) -> tuple[Tensor, ClassMaps | None]:
        """One float32 forward: logits (B, N) and class maps, searched for on the first batch."""
        images = self._preprocess(images)
        with evaluating([self.module]), _full_precision(images.device):
            if not self._searched and self.module is not None:
                with eager(self.module):
                    self._head = find_head(self.module, self._run, images[:4])
            if self.module is None or self._head is None:
                logits = self._run(images).float()
                # numbers that are not finite explain nothing: search again in the next batch
                self._searched = self._searched or bool(logits[:4].isfinite().all())
                return self._chosen(logits), None
            self._searched = True
            seen: list[Tensor] = []
            with (
                eager(self.module),
                watching(self._head.place, self._head.is_input, seen.append),
            ):
                logits = self._run(images).float()
            maps = self._head.explain(seen[-1], logits) if seen else None
            if maps is not None and self.classes is not None:
                weight, bias = maps.weight[self.classes], maps.bias[self.classes]
                maps = maps._replace(weight=weight, bias=bias)
            return self._chosen(logits), maps

    def _chosen(self, logits: Tensor) -> Tensor:
        """The columns of `classes`."""
        if self.classes is None:
            return logits
        if not 0 <= min(self.classes) <= max(self.classes) < logits.shape[1]:
            raise ValueError(
                f"classes: expected some of the teacher's, 0..{logits.shape[1] - 1}, got "
                f"{min(self.classes)}..{max(self.classes)}."
            )
        return logits[:, self.classes]

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        dtype = self._dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if dtype == torch.float32:
            return _full_precision(device)
        return torch.autocast(device.type, dtype=dtype)

    def _preprocess(self, images: Tensor) -> Tensor:
        if self.device is not None:
            images = images.to(self.device)
        if not images.is_floating_point():
            images = images.float() / 255
        if self._mean is not None and self._std is not None:
            if images.shape[1] not in (len(self._mean), 1) and len(self._mean) != 1:
                raise ValueError(
                    f"teacher: expected pictures of {len(self._mean)} channels, as its mean has, "
                    f"got {images.shape[1]}. Convert them (v2.RGB()), or pass another mean and std."
                )
            self._check_range(images)
            mean, std = self._mean_and_std(images.device)
            images = (images - mean) / std
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images.float(), self.size, mode="bilinear", antialias=True)
        return images

    def _check_range(self, images: Tensor) -> None:
        """Warn of pictures that were normalised already; looked for in the first batch alone."""
        if self._ranged or images.numel() == 0:
            return
        self._ranged = True
        low, high = (float(value) for value in images.detach().aminmax())
        if low < -OVERSHOOT or high > 1 + OVERSHOOT:
            warnings.warn(
                f"teacher: expected pictures in 0..1, to be given mean {self._mean} and std "
                f"{self._std}, got {low:.2f}..{high:.2f}. If they are normalised already, pass no "
                "mean and std; if by other numbers, m and s, pass mean=(mean - m) / s and "
                "std=std / s, channel by channel.",
                stacklevel=2,
            )

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
        if answer.shape[1] < 2:
            raise ValueError(
                f"teacher: expected logits of at least two classes, got {tuple(answer.shape)}. Of "
                "one logit x, for yes and no, make two: torch.cat([-x, x], dim=1) / 2."
            )
        return answer


def device_of(device: torch.device | str) -> torch.device:
    """As tensors there have it: of index 0 where "cuda" has none."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise ValueError(
            f"device: expected one of this machine, got {str(device)!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error


@contextmanager
def evaluating(modules: Sequence[nn.Module | None]) -> Iterator[None]:
    """Eval mode inside; each submodule's own training flag afterwards, whatever happened."""
    present = [module for module in modules if module is not None]
    training = [part for module in present for part in module.modules() if _is_training(part)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _is_training(part: nn.Module) -> bool:
    return getattr(part, "training", False)  # a frozen module of TorchScript does not know


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast, whatever the reader of a batch has switched on."""
    return torch.autocast(device.type, enabled=False)
