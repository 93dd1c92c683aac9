"""Distillation of features, with which the paper compares: FitNet, AT, VID and CRD.

    hints = HintLoss("at", student, teacher, images)
    with hints.watching(student) as seen:
        logits = student(images)
    loss = cross_entropy(logits, labels) + hints(seen, images)

The losses are torchdistill's, with the settings of RepDistiller (Tian et al., "Contrastive
Representation Distillation", ICLR 2020). torchdistill's training loop is not used.
"""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HINTS", "WEIGHTS", "Features", "HintLoss"]

HINTS = ("fitnet", "at", "vid", "crd")
# RepDistiller, scripts/run_cifar_distill.sh: `-b`, beside a cross-entropy of weight 1
WEIGHTS = {"fitnet": 100.0, "at": 1000.0, "vid": 1.0, "crd": 0.8}
EMBEDDED = 128  # crd: dimensions that both networks' features are mapped to
NEGATIVES = 16384  # crd: of each row, where there are as many of other classes
MOMENTUM, TEMPERATURE = 0.5, 0.07  # crd: of the memories, of the scores
ONE = {"path": "maps", "io": "output"}  # how torchdistill's losses are told what to read

Features: TypeAlias = dict[str, dict[str, Any]]  # path -> "input" or "output" -> what passed


class HintLoss(nn.Module):
    """A loss between features of a student and of its teacher.

    It owns what is trained for the loss alone (regressors, embeddings) and the memories of crd: its
    parameters belong in the optimiser, its ``state_dict()`` in the checkpoint. Neither network is
    part of it. Where the maps of a pair differ in size, the larger are averaged down.

    Args:
        method: "fitnet": squared error of the maps, by a 1x1 convolution of the student's; "at":
            attention maps; "vid": Gaussian likelihood of the teacher's maps; "crd": contrast of
            what both classifiers read, with samples of other classes.
        student: images -> logits, on the device of `images`.
        teacher: images -> logits; is run in eval mode without gradients, on the device where it is.
        images: normalised float images (B, 3, H, W) of the size that is trained on: both networks
            are run once, in eval mode, to find places and shapes.
        layers: names of modules that return maps (B, C, h, w), or "student_path:teacher_path"; not
            of crd. None: parts with convolutions that have one name and one size in both, such as
            ``layer1`` to ``layer3``, and of these for fitnet the middle one.
        labels: of crd: the class of each training sample, (N,).

    Raises:
        ValueError: for unknown methods and layers, networks without pairs of maps, or, for crd,
            without a linear classifier or labels of several classes.
        ImportError: if torchdistill is not installed.
    """

    def __init__(
        self,
        method: str,
        student: nn.Module,
        teacher: nn.Module,
        images: Tensor,
        *,
        layers: str | Sequence[str] | None = None,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__()
        if method not in HINTS:
            raise ValueError(f"hints: expected one of {', '.join(HINTS)}, got {method!r}.")
        _check(images)
        self.method = method
        self._teacher = (teacher,)  # in a tuple, it is no submodule
        if method == "crd":
            if layers is not None or labels is None:
                raise ValueError(
                    f"hints: crd expected labels and no layers, got layers={layers!r}, labels="
                    f"{labels if labels is None else '...'}. Pass labels=, the class of each "
                    "training sample; what the classifiers read is found."
                )
            (ours, width), (theirs, other) = (
                _classifier(network, images) for network in (student, teacher)
            )
            self._pairs = [(ours, theirs)]
            self.contrast: _Contrast = _Contrast(width, other, labels)
            return
        self._pairs = _pairs(student, teacher, images, layers)
        if method == "fitnet" and layers is None:  # RepDistiller's second of three
            self._pairs = [self._pairs[(len(self._pairs) - 1) // 2]]
        paths = zip(*self._pairs, strict=True)
        nets = zip((student, teacher), paths, strict=True)
        channels = (_channels(net, images, places) for net, places in nets)
        self.adapters: nn.ModuleList = nn.ModuleList(
            _adapter(method, *c) for c in zip(*channels, strict=True)
        )
        if method != "fitnet":
            losses, pair = _import("losses.mid_level"), {"pair": {"student": ONE, "teacher": ONE}}
            self.maps: nn.Module = (
                losses.ATLoss(pair, mode="code") if method == "at" else losses.VIDLoss(pair)
            )

    @contextmanager
    def watching(self, student: nn.Module) -> Iterator[Features]:
        """Record what passes in the student's forward inside; its hooks are gone afterwards.

        What is yielded is filled when the block ends.
        """
        with _watching(student, [ours for ours, _ in self._pairs]) as seen:
            yield seen

    def forward(self, seen: Features, images: Tensor, indices: Tensor | None = None) -> Tensor:
        """The loss, times its weight in `WEIGHTS`: a float32 scalar.

        Args:
            seen: of `watching`. Rows after those of `images` (mixes) are left aside.
            images: what the student was given first, (B, 3, H, W), for the teacher.
            indices: of crd: which of the N training samples they are, integers (B,). Negatives are
                drawn by torch's global generator.

        Raises:
            ValueError: for images of another rank, features that are missing or too few, and
                indices that are missing or out of range.
        """
        _check(images)
        known, _ = _look(self._teacher[0], images, [theirs for _, theirs in self._pairs])
        side, rows = "input" if self.method == "crd" else "output", []
        for ours, theirs in self._pairs:
            values = seen.get(ours, {}).get(side)
            if values is None or len(values) < len(images):
                raise ValueError(
                    f"hints: expected features of {ours!r} for {len(images)} images, got "
                    f"{0 if values is None else len(values)}. Run the student on these images first"
                    " in `with hints.watching(student) as seen:`, and not as torch.compile made it:"
                    " compiled code calls no hooks."
                )
            rows.append((values[: len(images)].float(), known[theirs][side].float()))
        with torch.autocast(images.device.type, enabled=False):
            if self.method == "crd":
                loss: Tensor = self.contrast(*rows[0], indices)
            else:
                terms = map(self._compare, self.adapters, *zip(*rows, strict=True))
                loss = torch.stack(list(terms)).sum()
        return WEIGHTS[self.method] * loss

    def _compare(self, adapter: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        """Maps (B, C, h, w) and (B, D, h', w')."""
        (h, w), (height, width) = student.shape[2:], teacher.shape[2:]
        if (h, w) != (height, width):
            size = min(h, height), min(w, width)
            student, teacher = (F.adaptive_avg_pool2d(maps, size) for maps in (student, teacher))
        if self.method == "fitnet":
            return F.mse_loss(adapter(student), teacher)
        loss: Tensor = self.maps(
            {"maps": {"output": adapter(student)}}, {"maps": {"output": teacher}}
        )
        return loss


class _Contrast(nn.Module):
    """CRD: the embeddings of both networks' features, the memories, and the negatives."""

    kinds: Tensor  # (N,), the class of each sample, 0..K-1
    order: Tensor  # (N,), samples sorted by class
    counts: Tensor  # (K,)
    starts: Tensor  # (K,), where a class begins in `order`

    def __init__(self, student: int, teacher: int, labels: Tensor) -> None:
        super().__init__()
        _, kinds, counts = labels.unique(return_inverse=True, return_counts=True)
        if labels.ndim != 1 or len(counts) < 2:
            raise ValueError(
                f"labels: crd expected (N,) of two classes at least, got {tuple(labels.shape)} of "
                f"{len(counts)}. Pass the class of each training sample."
            )
        places = {"kinds": kinds, "order": kinds.argsort(stable=True), "counts": counts}
        for name, value in (places | {"starts": counts.cumsum(0) - counts}).items():
            self.register_buffer(name, value, persistent=False)  # the labels tell
        samples, losses = len(labels), _import("losses.mid_level")
        self.negatives: int = min(NEGATIVES, samples - int(counts.max()))
        normalised = _import("models.wrapper").Normalizer4CRD
        self.student: nn.Module = normalised(nn.Linear(student, EMBEDDED))
        self.teacher: nn.Module = normalised(nn.Linear(teacher, EMBEDDED))
        sizes = EMBEDDED, samples, self.negatives, samples
        self.loss: Any = losses.CRDLoss(  # without types
            "ours", "rows", "theirs", *sizes, TEMPERATURE, MOMENTUM
        )

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor | None) -> Tensor:
        """Of features (B, D) and (B, E)."""
        rows, samples = len(student), len(self.kinds)
        numbers = [] if indices is None else indices.flatten().tolist()
        right = len(numbers) == rows and 0 <= min(numbers) <= max(numbers) < samples
        if indices is None or indices.ndim != 1 or not right:
            got = f"{len(numbers)} in {min(numbers)}..{max(numbers)}" if numbers else "none"
            raise ValueError(
                f"indices: crd expected {rows} integers (B,) in 0..{samples - 1}, got {got}. Pass "
                "the place of each image among the training samples whose labels were given."
            )
        indices = indices.to(student.device, torch.int64)
        ours, theirs = self.student(student), self.teacher(teacher)  # (B, EMBEDDED)
        # its own draw() fails in 1.1.5, and knows no classes
        contrast = torch.cat([indices[:, None], self.draw(indices)], dim=1)
        seen = {"ours": {"output": ours}, "rows": {"input": {"pos_idx": indices}}}
        seen["rows"]["input"]["contrast_idx"] = contrast
        loss: Tensor = self.loss(seen, {"theirs": {"output": theirs}})
        self.loss.params.detach_()  # else, the first step's graph is kept there
        if dist.is_available() and dist.is_initialized():
            self._remember_others(indices, ours, theirs)
        return loss.sum()  # of one element

    def draw(self, indices: Tensor) -> Tensor:
        """Samples of other classes than each of (B,), evenly and with repeats: (B, negatives)."""
        kinds = self.kinds[indices, None]  # (B, 1)
        counts, starts = self.counts[kinds], self.starts[kinds]
        size = len(indices), self.negatives
        draws = torch.randint(2**62, size, device=indices.device) % (len(self.kinds) - counts)
        return self.order[draws + counts * (draws >= starts)]  # its own class is jumped over

    @torch.no_grad()
    def _remember_others(self, *own: Tensor) -> None:
        """Rows of other processes: DistributedDataParallel hands on the first one's memory only."""
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, [value.detach().cpu() for value in own])
        del every[dist.get_rank()]
        for places, *embedded in every:
            for name, values in zip(("memory_v1", "memory_v2"), embedded, strict=True):
                memory = getattr(self.loss, name)
                where, new = places.to(memory.device), values.to(memory.device)
                memory[where] = F.normalize(MOMENTUM * memory[where] + (1 - MOMENTUM) * new)


# -- places ----------------------------------------------------------------------------------------


def _pairs(
    student: nn.Module, teacher: nn.Module, images: Tensor, layers: str | Sequence[str] | None
) -> list[tuple[str, str]]:
    """Paths in the student and in the teacher."""
    if layers is not None:
        given = [layers] if isinstance(layers, str) else layers
        split = [layer.partition(":") for layer in given]
        pairs = [(name, other if colon else name) for name, colon, other in split]
    else:
        ours, theirs = _stages(student, images), _stages(teacher, images)
        named = {path.rpartition(".")[2]: path for path in theirs}  # either may be wrapped
        pairs = [(path, named.get(path.rpartition(".")[2], "")) for path in ours]
        pairs = [(a, b) for a, b in pairs if b and ours[a][1:] == theirs[b][1:]]
    if not pairs:
        raise ValueError(
            "layers: expected maps of one name and one size in both networks, got "
            f"{_listed(student, images)} in the student and {_listed(teacher, images)} in the "
            'teacher. Pass layers=("student_path:teacher_path", ...).'
        )
    return pairs


def _stages(model: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    """(C, h, w) of maps of more than one cell that parts with convolutions return, by path."""
    prefix, parts = "", [("", model)]
    while len(parts) == 1:  # into what wraps a network: one part has all the parameters
        prefix, inside = f"{prefix}{parts[0][0]}.", parts[0][1].named_children()
        parts = [(name, part) for name, part in inside if any(True for _ in part.parameters())]
    convolve = (
        f"{prefix}{name}".removeprefix(".")
        for name, part in parts
        if any(isinstance(each, nn.Conv2d) and each is not part for each in part.modules())
    )
    shapes = _shapes(model, images, convolve)
    return {path: shape for path, shape in shapes.items() if shape[1] * shape[2] > 1}


def _channels(model: nn.Module, images: Tensor, paths: Sequence[str]) -> list[int]:
    known = {name for name, _ in model.named_modules() if name}
    shapes = _shapes(model, images, (path for path in paths if path in known))
    if wrong := [path for path in paths if path not in shapes]:
        raise ValueError(
            f"layers: expected modules of the {type(model).__name__} that return maps "
            f"(B, C, h, w), got {', '.join(map(repr, wrong))}. Its stages are "
            f"{_listed(model, images)}; named_modules() lists every path."
        )
    return [shapes[path][0] for path in paths]


def _shapes(model: nn.Module, images: Tensor, paths: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """(C, h, w) of those paths that return maps."""
    seen, _ = _look(model, images, paths)
    shapes = {path: tuple(getattr(io.get("output"), "shape", ())) for path, io in seen.items()}
    return {path: shape[1:] for path, shape in shapes.items() if len(shape) == 4}


def _listed(model: nn.Module, images: Tensor) -> str:
    return ", ".join(f"{path} {shape}" for path, shape in _stages(model, images).items()) or "none"


def _classifier(model: nn.Module, images: Tensor) -> tuple[str, int]:
    """The path of the linear layer whose output the logits are, and how many features it reads."""
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    seen, answer = _look(model, images, linear)
    logits = getattr(answer, "logits", answer)
    for name in reversed(linear):
        if "output" in seen[name] and torch.equal(seen[name]["output"], logits):
            return name, linear[name].in_features
    raise ValueError(
        f"hints: crd expected logits that an nn.Linear returns, got a {type(model).__name__} whose "
        f"linear layers ({', '.join(linear) or 'none'}) do not. Take another method."
    )


def _adapter(method: str, student: int, teacher: int) -> nn.Module:
    """From the student's number of channels to the teacher's."""
    if method == "at":
        return nn.Identity()
    if method == "fitnet":
        return nn.Sequential(nn.Conv2d(student, teacher, 1), nn.BatchNorm2d(teacher), nn.ReLU())
    make = _import("models.wrapper").Regressor4VID
    made: nn.Module = make(student, teacher, teacher, eps=1e-5, init_pred_var=5.0)
    return made


# -- running ---------------------------------------------------------------------------------------


@contextmanager
def _watching(model: nn.Module, paths: Iterable[str]) -> Iterator[Features]:
    seen: Features = {}
    manager = _import("core.forward_hook").ForwardHookManager(
        torch.device("cpu")
    )  # gathers nothing
    try:
        for path in paths:
            manager.add_hook(model, path)
        yield seen
        seen.update(manager.pop_io_dict())
    finally:
        manager.clear()


@torch.no_grad()
def _look(model: nn.Module, images: Tensor, paths: Iterable[str]) -> tuple[Features, Any]:
    """What passes at the paths, and the answer, in eval mode; each part's own mode afterwards."""
    training = [part for part in model.modules() if part.training]
    try:
        for part in training:
            part.training = False
        with _watching(model, paths) as seen:
            return seen, model(images)
    finally:
        for part in training:
            part.training = True


def _check(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        raise ValueError(
            f"images: expected normalised float images (B, 3, H, W), got {tuple(images.shape)} "
            f"{images.dtype}. Pass what the networks are given."
        )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(f"torchdistill.{name}")
    except ImportError as error:
        raise ImportError(
            f"hints: expected the package torchdistill, got {error}. "
            'Install it: pip install "supermix-transforms[distill]"'
        ) from error
