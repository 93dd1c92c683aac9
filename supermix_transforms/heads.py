"""Class maps: where a module's logits are linear in an averaged feature map, that map.

Nothing is looked up by name. Every tensor that passes through the module is compared with what its
classifier reads, and the maps of each later batch are checked against that batch's logits.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from supermix_transforms.results import ClassMaps

__all__ = ["Head", "eager", "find_head", "watching"]

TOLERANCE = 1e-3  # of float32, relative to the largest value
HALF_TOLERANCE = 8  # of half types, in eps; random nets, ResNet-18 among them, need up to 0.6


class Head(NamedTuple):
    """Where the averaged feature map passes, and the linear layer over its average."""

    place: nn.Module
    is_input: bool  # the map is what `place` is given, not what it returns
    classifier: nn.Linear | nn.Conv2d | None  # None: the averaged map is the logits

    def explain(self, features: Tensor, logits: Tensor) -> ClassMaps | None:
        """Class maps of a batch, from its map (B, C, h, w), or None if they do not explain it.

        Rows whose logits (B, N) are not finite are not judged.
        """
        maps = self._maps(features.float())
        if features.shape[1] != maps.weight.shape[1]:
            return None
        explained = maps.features.mean(dim=(2, 3)) @ maps.weight.T + maps.bias
        if explained.shape != logits.shape:
            return None
        judged = logits.isfinite().all(dim=1, keepdim=True)
        explained, expected = (torch.where(judged, t, 0.0) for t in (explained, logits))
        dtypes = [] if self.classifier is None else [self.classifier.weight.dtype]
        return maps if _close(explained, expected, features.dtype, *dtypes) else None

    def _maps(self, features: Tensor) -> ClassMaps:
        if self.classifier is None:
            channels = features.shape[1]
            eye = torch.eye(channels, device=features.device)
            return ClassMaps(features, eye, eye.new_zeros(channels))
        weight = self.classifier.weight.detach().float().flatten(1)
        bias = self.classifier.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().float()
        return ClassMaps(features, weight, bias)


def eager(model: nn.Module) -> AbstractContextManager[Any]:
    """What torch.compile made of `model` runs as it was written: compiled code calls no hooks."""
    for part in model.modules():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
            return stance
    return nullcontext()


@contextmanager
def watching(module: nn.Module, is_input: bool, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand each feature map that passes through `module` to `see`; the hook is gone afterwards.

    What is no map is not handed on: the module may be called again, on the map's average.
    """

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        value = (inputs[0] if inputs else None) if is_input else output
        if _is_map(value):
            see(value)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def find_head(model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> Head | None:
    """The last feature map whose spatial mean is what the classifier reads, if there is one.

    Every tensor that enters or leaves a module is compared with the classifier's input, by value:
    no architecture is looked up by name. The tensors are kept by reference until the forward is
    over, so a map that an in-place activation changes afterwards is seen as the classifier saw it.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return None  # its forward takes no hooks
    seen: list[tuple[nn.Module, bool, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for is_input, value in ((True, inputs[0] if inputs else None), (False, output)):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if value.ndim in (2, 4) and len(value) == len(images):
                seen.append((module, is_input, value))

    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        logits = run(images).float()
    finally:
        for handle in handles:
            handle.remove()
    if not logits.isfinite().all():
        return None

    heads: list[tuple[nn.Linear | nn.Conv2d | None, Tensor]] = []  # classifiers with their input
    inputs = {module: value for module, is_input, value in seen if is_input}
    for module, is_input, value in reversed(seen):
        if is_input or not isinstance(module, (nn.Linear, nn.Conv2d)) or module not in inputs:
            continue
        one_by_one = not isinstance(module, nn.Conv2d) or module.kernel_size == (1, 1)
        if one_by_one and _close(value.flatten(1), logits, value.dtype):
            heads.append((module, inputs[module].flatten(1)))
            break
    heads.append((None, logits))  # a fully convolutional net averages its class maps themselves

    # `watching` a module called several times takes its last map for the one
    last = {(place, is_input): value for place, is_input, value in seen if _is_map(value)}
    for classifier, average in heads:
        for place, is_input, value in reversed(seen):
            if last.get((place, is_input)) is not value:
                continue
            mean = value.float().mean(dim=(2, 3))
            if not _close(mean, average, value.dtype, average.dtype):
                continue
            head = Head(place, is_input, classifier)
            if head.explain(value, logits) is not None:
                return head
    return None


def _is_map(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a batch of maps of more than one cell."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim == 4
        and value.shape[2] * value.shape[3] > 1
    )


def _close(values: Tensor, expected: Tensor, *dtypes: torch.dtype) -> bool:
    """Equal but for the rounding of a forward in the coarsest of `dtypes`."""
    if values.shape != expected.shape:
        return False
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    tolerance = max(TOLERANCE, HALF_TOLERANCE * eps)
    scale = expected.abs().max().clamp(min=1e-6)
    return bool(((values.float() - expected.float()).abs().max() / scale) < tolerance)
