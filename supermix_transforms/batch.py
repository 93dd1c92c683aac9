"""What travels: labels, class maps, mixes, and the batch that a loader hands out.

Also here: how pictures and labels are found in whatever a data set or a loader yields, and the
registry by which a batch that was stacked in a worker finds the mixer that owns it.
"""

import hashlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torchvision import tv_tensors

from supermix_transforms.losses import sparsity
from supermix_transforms.masks import Normalisation, render

__all__ = ["ClassMaps", "MixBatch", "Mixed", "Outcome", "TeacherLabels"]

OutputForm: TypeAlias = Literal["batch", "tuple", "concat", "dict"]
TargetForm: TypeAlias = Literal["soft", "hard"]
LabelsGetter: TypeAlias = Callable[[Any], Any] | Literal["default"] | None


class Outcome(IntEnum):
    """How the search for a tuple's masks ended."""

    CONVERGED = 0  # the teacher's top k classes of the mix are those of its sources
    MAX_STEPS = 1  # the steps were used up before that; the mix is the best one found
    NOT_FINITE = 2  # the teacher answered NaN or inf; the label is Eq. 2's
    UNMIXED = 3  # fewer than k pictures were there: the picture is the original


class ClassMaps(NamedTuple):
    """The last feature map of each picture and the linear classifier over its average.

    ``logits = features.mean(dim=(2, 3)) @ weight.T + bias``.
    """

    features: Tensor  # (B, D, h, w) float32
    weight: Tensor  # (N, D) float32
    bias: Tensor  # (N,) float32

    def maps(self) -> Tensor:
        """The share of each cell in each logit, (B, N, h, w) float32, without the bias."""
        return torch.einsum("nd,bdhw->bnhw", self.weight, self.features)


@dataclass(frozen=True, eq=False)
class TeacherLabels:
    """A teacher's probabilities for B pictures: dense, or the n largest of each.

    Dense labels hold ``log_probs`` (B, N) float32 and nothing else. Sparse ones hold the n largest
    as ``log_probs`` (B, n) float16, largest first, with their class ``indices`` (B, n) int64 and
    the mass of all other classes, ``rest`` (B,) float32.
    """

    log_probs: Tensor
    num_classes: int
    indices: Tensor | None = None
    rest: Tensor | None = None

    @classmethod
    def from_logits(
        cls, logits: Tensor, *, temperature: float = 1.0, top: int | None = None
    ) -> "TeacherLabels":
        """Labels of logits (B, N) at a temperature, whole or reduced to the ``top`` largest."""
        log_probs = (logits.float() / temperature).log_softmax(dim=1)
        dense = cls(log_probs, log_probs.shape[1])
        if top is None or top >= dense.num_classes:
            return dense
        indices, largest, rest = dense.top(top)
        return cls(largest.half(), dense.num_classes, indices, rest)

    @classmethod
    def from_probs(cls, probs: Tensor) -> "TeacherLabels":
        """Dense labels of probabilities (B, N)."""
        return cls(probs.float().log(), probs.shape[1])

    @property
    def probs(self) -> Tensor:
        """Probabilities (B, N) float32; what sparse labels left out is spread evenly."""
        if self.indices is None or self.rest is None:
            return self.log_probs.exp()
        kept = self.log_probs.float().exp()
        kept = kept * ((1 - self.rest) / kept.sum(dim=1)).unsqueeze(1)  # undo float16's rounding
        others = self.num_classes - kept.shape[1]
        spread = (self.rest / max(others, 1)).unsqueeze(1)
        return spread.expand(-1, self.num_classes).scatter(1, self.indices, kept)

    @property
    def hard(self) -> Tensor:
        """The most probable class, (B,) int64."""
        return self.log_probs.argmax(dim=1) if self.indices is None else self.indices[:, 0]

    def top(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The n most probable: indices (B, n) int64, log-probs (B, n) float32, rest mass (B,).

        Raises:
            ValueError: if n is not in 1..N, or more than sparse labels hold.
        """
        if not 1 <= n <= self.log_probs.shape[1]:
            raise ValueError(
                f"top: expected n in 1..{self.log_probs.shape[1]}, got {n}. "
                "Make the labels with a larger top=, or with top=None to keep all classes."
            )
        log_probs, indices = self.log_probs.float().topk(n, dim=1)
        if self.indices is not None:
            indices = self.indices.gather(1, indices)
        if self.rest is None:
            return indices, log_probs, (1 - log_probs.exp().sum(dim=1)).clamp(min=0)
        left = self.log_probs.float().exp().sum(dim=1) - log_probs.exp().sum(dim=1)
        return indices, log_probs, self.rest + left.clamp(min=0)

    def __len__(self) -> int:
        return len(self.log_probs)

    def __getitem__(self, rows: Tensor) -> "TeacherLabels":
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "TeacherLabels":
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TeacherLabels":
        return TeacherLabels(
            change(self.log_probs),
            self.num_classes,
            None if self.indices is None else change(self.indices),
            None if self.rest is None else change(self.rest),
        )


@dataclass(frozen=True, eq=False)
class Mixed:
    """M mixed pictures and how each came about.

    ``mask_logits`` is None where the masks are not a rendered grid (MixUp, CutMix); ``fixed_masks``
    holds them then. MixUp and CutMix search for nothing, so they count as converged.
    """

    images: Tensor  # (M, C, H, W), dtype of the sources
    sources: Tensor  # (M, k) int64, rows of the pictures that were mixed
    weights: Tensor  # (M, k) float32, r of Eq. 2
    outcome: Tensor  # (M,) int64, values of Outcome
    steps: Tensor  # (M,) int64, Newton steps taken
    sparsity: Tensor  # (M,) float32, L_s of Eq. 5 of the masks as they are
    forwards: Tensor  # (M,) float32, teacher forwards, its share of the originals' included
    backwards: Tensor  # (M,) float32
    logits: Tensor | None = None  # (M, N) float32, the teacher's for `images`, where it was asked
    mask_logits: Tensor | None = None  # (M, k, w, w) float32
    normalisation: Normalisation = "softmax"
    fixed_masks: Tensor | None = None  # (M, k, H, W) float32

    @property
    def masks(self) -> Tensor:
        """(M, k, H, W) float32 in [0, 1], summing to 1 over k; rendered at each call."""
        if self.mask_logits is None:
            assert self.fixed_masks is not None
            return self.fixed_masks
        height, width = self.images.shape[-2:]
        return render(self.mask_logits, (height, width), self.normalisation)

    @property
    def converged(self) -> Tensor:
        """(M,) bool: the teacher's top k classes of the mix are those of its sources."""
        return self.outcome == Outcome.CONVERGED

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def unsearched(
        cls, images: Tensor, sources: Tensor, masks: Tensor, outcome: Outcome
    ) -> "Mixed":
        """Mixes that no solver made; the weights are the areas that the masks give."""
        nothing = torch.zeros(len(images), device=images.device)
        return cls(
            images=images,
            sources=sources,
            weights=masks.mean(dim=(2, 3)),
            outcome=torch.full((len(images),), int(outcome), device=images.device),
            steps=nothing.long(),
            sparsity=sparsity(masks),
            forwards=nothing,
            backwards=nothing.clone(),
            fixed_masks=masks,
        )

    @staticmethod
    def concatenate(parts: "Sequence[Mixed]") -> "Mixed":
        """Parts of one kind, one after the other."""
        if len(parts) == 1:
            return parts[0]
        first = vars(parts[0])
        values: dict[str, Any] = {
            name: torch.cat([vars(part)[name] for part in parts])
            for name, value in first.items()
            if isinstance(value, Tensor)
        }
        return replace(parts[0], **values)

    def __getitem__(self, rows: Tensor) -> "Mixed":
        values: dict[str, Any] = {
            name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **values)

    def update(self, rows: Tensor, other: "Mixed") -> "Mixed":
        """A copy in which the given rows come from `other`, one of its rows for each."""
        values: dict[str, Any] = {
            name: value.index_copy(0, rows, vars(other)[name])
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **values)


class MixResult(NamedTuple):
    """What a mixer makes of a batch; everything is on the teacher's device."""

    images: Tensor
    labels: Tensor | None
    teacher: TeacherLabels | None  # of the originals
    mixed: Mixed | None  # None: labels only
    mixed_teacher: TeacherLabels | None
    targets: Tensor | None  # (M, N) of the mixes, or of the originals where nothing was mixed
    traced: bool = True  # False: somebody else's transform, whose sources and masks nobody knows


class Mixer(Protocol):
    """Who turns originals into mixes: the collate or the loader that made the batch."""

    output: OutputForm
    target: TargetForm

    def mix(self, images: Tensor, labels: Tensor | None, ids: Tensor) -> MixResult: ...


# Batches that were stacked in a worker carry their mixer's token; the mixer itself, and with it the
# teacher, stays in the process that registered it here.
_mixers: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()


def register(token: str, mixer: Mixer) -> None:
    """Make `mixer` the owner of all batches that arrive in this process with `token`."""
    _mixers[token] = mixer


class MixBatch:
    """Originals with labels, and the mixes made of them when they are first asked for.

    Reading any of ``teacher, mixed, mixed_teacher, targets, sources, weights, mask_logits, masks,
    outcome, converged, steps`` makes the mix, once, as ``.mix()`` does; ``.to(device)`` moves the
    originals and returns the form that ``output=`` asked for. ``mixed_images, targets = batch``
    works too.

    It is no mapping, tuple or dataclass on purpose: whatever walks containers (Accelerate,
    Lightning, ``pin_memory``) must see a leaf with ``.to`` and never the raw pictures inside.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        ids: Tensor,
        extra: dict[Any, Any],
        mixer: Mixer | None,
        token: str = "",
    ) -> None:
        self.extra = extra
        self._images, self._labels, self._ids = images, labels, ids
        self._mixer, self._token = mixer, token
        self._result: MixResult | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_mixer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._mixer = _mixers.get(self._token)
        if self._mixer is not None and threading.current_thread() is threading.main_thread():
            refuse_dispatch(self._mixer)

    # -- originals ---------------------------------------------------------------------------

    @property
    def images(self) -> Tensor:
        """The originals, (B, C, H, W), as the loader stacked them."""
        return self._images if self._result is None else self._result.images

    @property
    def labels(self) -> Tensor | None:
        """The samples' own labels, (B,) int64 or (B, N), or None where they have none."""
        return self._labels if self._result is None else self._result.labels

    @property
    def teacher(self) -> TeacherLabels | None:
        """The teacher's labels of the originals; None where there is no teacher."""
        return self.mix()._done.teacher

    # -- mixes -------------------------------------------------------------------------------

    @property
    def mixed(self) -> Tensor:
        """The mixed pictures, (M, C, H, W), originals' dtype; M = B unless some were dropped."""
        return self._mixes.images

    @property
    def mixed_teacher(self) -> TeacherLabels | None:
        """The teacher's labels of the mixes; None where there is no teacher."""
        return self.mix()._done.mixed_teacher

    @property
    def targets(self) -> Tensor:
        """The label of each of ``mixed``: (M, N) float32, or (M,) int64 for ``target="hard"``."""
        mixer, targets = self._owner(), self.mix()._done.targets
        if targets is None:
            raise ValueError(
                "targets: these mixes have no labels, for the samples had none and no teacher was "
                "given. Pass teacher=, or a labels_getter= that finds the labels."
            )
        return targets.argmax(dim=1) if mixer.target == "hard" else targets

    @property
    def sources(self) -> Tensor | None:
        """(M, k) int64: rows of ``images`` that each mix is made of, its own row first."""
        return self._mixes.sources if self.mix()._done.traced else None

    @property
    def weights(self) -> Tensor | None:
        """(M, k) float32: the mixing weights r of Eq. 2."""
        return self._mixes.weights if self.mix()._done.traced else None

    @property
    def mask_logits(self) -> Tensor | None:
        """(M, k, w, w) float32; None for mixes that are not made of a grid (MixUp, CutMix)."""
        return self._mixes.mask_logits

    @property
    def masks(self) -> Tensor | None:
        """(M, k, H, W) float32 in [0, 1], summing to 1 over k."""
        return self._mixes.masks if self.mix()._done.traced else None

    @property
    def outcome(self) -> Tensor:
        """(M,) int64, values of `Outcome`."""
        return self._mixes.outcome

    @property
    def converged(self) -> Tensor:
        """(M,) bool: the teacher's top k classes of the mix are those of its sources."""
        return self._mixes.converged

    @property
    def steps(self) -> Tensor:
        """(M,) int64: solver steps taken."""
        return self._mixes.steps

    def mix(self) -> "MixBatch":
        """Make the mixes now, unless they are there already. Returns the batch itself."""
        if self._result is None:
            self._result = self._owner().mix(self._images, self._labels, self._ids)
        return self

    # -- moving ------------------------------------------------------------------------------

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Any:
        """Move the originals and return the form that ``output=`` asked for.

        Mixes live where the teacher lives; ``"tuple"``, ``"concat"`` and ``"dict"`` are handed out
        on `device`.
        """
        try:
            if self._result is None:
                self._images = self._images.to(device, non_blocking=non_blocking)
                if self._labels is not None:
                    self._labels = self._labels.to(device, non_blocking=non_blocking)
            return self._form(device)
        except TypeError as error:
            # Accelerate answers a TypeError by calling .to again, which would mix twice and could
            # lose the error.
            raise RuntimeError(f"mixing failed: {error}") from error

    def pin_memory(self, device: str | None = None) -> "MixBatch":
        """Pin the originals. Runs in a side thread of the DataLoader, so nothing is mixed here."""
        del device
        self._images = self._images.pin_memory()
        self._labels = None if self._labels is None else self._labels.pin_memory()
        return self

    def __iter__(self) -> Iterator[Any]:
        """``images, targets = batch``: the pictures to learn from and their labels."""
        return iter(self.as_tuple())

    def __len__(self) -> int:
        return len(self._images)

    def __repr__(self) -> str:
        state = "not mixed yet" if self._result is None else "mixed"
        return f"MixBatch({len(self)} pictures {tuple(self._images.shape[1:])}, {state})"

    def as_tuple(self) -> tuple[Tensor, Tensor]:
        """The mixes and their targets; the originals and theirs where nothing was mixed."""
        done = self.mix()._done
        return (done.images if done.mixed is None else done.mixed.images), self.targets

    def as_concat(self) -> tuple[Tensor, Tensor]:
        """Originals and mixes in one, (B + M, C, H, W), and their targets: one loss does Eq. 9."""
        mixed, targets = self.as_tuple()
        done = self._done
        if done.labels is None:
            raise ValueError(
                'output="concat": the originals need labels of their own, and none were found. '
                'Pass labels_getter=, or take output="batch" and use batch.teacher.'
            )
        labels = done.labels
        if targets.ndim == 2 and labels.ndim == 1:
            labels = torch.nn.functional.one_hot(labels, targets.shape[1])
        if targets.ndim == 1 and labels.ndim == 2:
            labels = labels.argmax(dim=1)
        return torch.cat([done.images, mixed]), torch.cat([labels.to(targets), targets])

    def as_dict(self) -> dict[str, Tensor]:
        """``{"pixel_values", "labels"}``, the names of Hugging Face models."""
        mixed, targets = self.as_tuple()
        return {"pixel_values": mixed, "labels": targets}

    def _form(self, device: torch.device | str | int) -> Any:
        """What ``output=`` asked for, on `device`."""
        output = self._owner().output
        if output == "batch":
            return self
        if output == "dict":
            return {name: value.to(device) for name, value in self.as_dict().items()}
        pair = self.as_concat() if output == "concat" else self.as_tuple()
        return tuple(value.to(device) for value in pair)

    @property
    def _done(self) -> MixResult:
        assert self._result is not None
        return self._result

    @property
    def _mixes(self) -> Mixed:
        mixed = self.mix()._done.mixed
        if mixed is None:
            raise ValueError(
                "this batch was labelled but not mixed (MixLoader was given no mix=): read .images "
                "and .teacher, or pass mix=SuperMix(teacher)."
            )
        return mixed

    def _owner(self) -> Mixer:
        if torch.utils.data.get_worker_info() is not None:
            raise RuntimeError(
                "mixing was asked for inside a DataLoader worker, where the teacher must not run. "
                "Read the mixes in the process that iterates over the loader."
            )
        if self._mixer is None:
            raise RuntimeError(
                "this MixBatch has no mixer in this process: its collate was pickled into another "
                "one, and a teacher does not travel. Build the SuperMixCollate inside the function "
                "that runs on each rank, and keep it alive as long as the loader."
            )
        return self._mixer


def refuse_dispatch(mixer: object) -> None:
    """Raise if Accelerate is about to concatenate, broadcast and slice this mixer's batches.

    Tuples can not be cut out of a batch that was mixed elsewhere, so its dispatch mode can never
    carry a MixBatch. Asked where the batch is made and where it arrives.
    """
    module = sys.modules.get("accelerate.data_loader")
    if module is None:
        return
    from accelerate.state import GradientState

    active = GradientState().active_dataloader
    if isinstance(active, module.DataLoaderDispatcher) and active.collate_fn is mixer:
        raise RuntimeError(
            "Accelerate's dispatch mode can not carry a MixBatch: it would broadcast one batch and "
            "cut it into slices, while mixes refer to rows of the whole. It is the default for an "
            "IterableDataset. Use Accelerator(dataloader_config=DataLoaderConfiguration("
            "dispatch_batches=False)), or leave this loader unprepared and wrap it: "
            "MixLoader(loader, SuperMix(teacher))."
        )


# -- finding pictures and labels -------------------------------------------------------------------


def find_labels(inputs: Any, getter: LabelsGetter = "default") -> Any:
    """The labels in a batch, as torchvision's MixUp looks for them.

    ``"default"``: in a tuple or list, the second element (if that is a mapping, look inside); in a
    mapping, the key "labels" or "label" ignoring case, else the first that contains "label", else
    "cls" (webdataset), else "target". A callable is given the whole input. None: there are none.

    Raises:
        ValueError: if the default search finds nothing.
    """
    if getter is None:
        return None
    if callable(getter):
        return getter(inputs)
    if getter != "default":
        raise ValueError(f'labels_getter: expected "default", a callable or None, got {getter!r}.')
    candidate = inputs
    if isinstance(inputs, (tuple, list)) and len(inputs) >= 2:
        candidate = inputs[1]
    if isinstance(candidate, Mapping):
        keys = [key for key in candidate if isinstance(key, str)]
        for test in (
            lambda key: key in ("labels", "label"),
            lambda key: "label" in key,
            lambda key: key == "cls",
            lambda key: key in ("target", "targets"),
        ):
            for key in keys:
                if test(key.lower()):
                    return candidate[key]
    elif candidate is not inputs:
        return candidate
    raise ValueError(
        "Could not infer where the labels are: expected (images, labels, ...) or a mapping with a "
        f"key like 'labels', got {_outline(inputs)}. Pass labels_getter=, a function that takes "
        "the batch and returns them, or labels_getter=None where there are none."
    )


def find_images(inputs: Any, labels: Any = None) -> list[Tensor]:
    """The picture tensors of a batch: every tv_tensors.Image, else the first plain (B, C, H, W).

    Raises:
        ValueError: if there is none.
    """
    leaves = [x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor) and x is not labels]
    images: list[Tensor] = [leaf for leaf in leaves if isinstance(leaf, tv_tensors.Image)]
    if not images:
        plain = [leaf for leaf in leaves if not isinstance(leaf, tv_tensors.TVTensor)]
        images = [leaf for leaf in plain if leaf.ndim == 4][:1] or plain[:1]
    if not images:
        raise ValueError(
            f"expected a batch of pictures, a tensor (B, C, H, W), got {_outline(inputs)}. "
            "Convert pictures to tensors first (v2.ToImage()) and stack them."
        )
    return images


def check_images(images: object) -> Tensor:
    """A batch of pictures that can be mixed, or the error that says why not."""
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images: expected a tensor (B, C, H, W), got {type(images).__name__}. "
            "Convert pictures with v2.ToImage() and stack them."
        )
    if images.ndim != 4:
        raise ValueError(
            f"images: expected a batch (B, C, H, W), got shape {tuple(images.shape)}. "
            "Mixing needs a batch: apply it after the loader or in its collate function, and add a "
            "leading dimension with images.unsqueeze(0) where there is one picture only."
        )
    if images.shape[0] == 0 or 0 in images.shape[1:]:
        raise ValueError(
            f"images: expected at least one picture with pixels, got shape {tuple(images.shape)}. "
            "Skip empty batches."
        )
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(
            f"images: expected uint8 or a floating dtype, got {images.dtype}. "
            "Convert them with v2.ToDtype(torch.float32, scale=True)."
        )
    # under inference mode autograd may not save such tensors; a copy made outside of it is usual
    with torch.inference_mode(False):
        return images.clone() if images.is_inference() else images


def check_device(images: Tensor, device: torch.device | None) -> None:
    """Raise unless pictures are where the teacher is; None: it takes them anywhere."""
    if device is not None and images.device != device:
        raise ValueError(
            f"images: expected pictures on the teacher's device {device}, got {images.device}. "
            f"Move them (images.to({str(device)!r})), or the teacher."
        )


def check_labels(labels: object, batch: int, num_classes: int | None = None) -> Tensor:
    """Labels as a tensor: class indices (B,) int64, or probabilities (B, N).

    Raises:
        ValueError: for anything else, for another number of rows, for indices out of range.
    """
    if not isinstance(labels, Tensor):
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"labels: expected a tensor, got {type(labels).__name__}. Pass class indices (B,) "
                "or probabilities (B, N), or a labels_getter= that returns them."
            ) from error
    shape = tuple(labels.shape)
    if labels.ndim not in (1, 2):
        raise ValueError(
            f"labels: expected class indices (B,) or probabilities (B, N), got shape {shape}. "
            "Flatten them, or pass a labels_getter= that returns the right part of the batch."
        )
    if len(labels) != batch:
        raise ValueError(
            f"labels: expected one for each of the {batch} pictures, got shape {shape}. "
            "Check the collate function, or pass labels_getter=."
        )
    if labels.ndim == 2:
        if num_classes is not None and shape[1] != num_classes:
            raise ValueError(
                f"labels: expected probabilities of {num_classes} classes, got shape {shape}. "
                f"Pass num_classes={shape[1]}, or a teacher for {shape[1]} classes."
            )
        return labels if labels.is_floating_point() else labels.float()
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels: expected class indices of an integer dtype, got {labels.dtype} {shape}. "
            "Convert them with .long()."
        )
    labels = labels.long()
    if num_classes is not None and len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"labels: expected class indices in 0..{num_classes - 1}, got {low}..{high}. "
                "Is num_classes right, and does the teacher know the data set's classes?"
            )
    return labels


def split_batch(batch: Any, getter: LabelsGetter) -> tuple[Tensor, Tensor | None, dict[Any, Any]]:
    """A stacked batch as (images, labels or None, the other fields by key or position)."""
    labels = find_labels(batch, getter)
    images = find_images(batch, labels)[0]
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    single = isinstance(batch, Tensor)
    extra = {} if single else {k: v for k, v in items if v is not images and v is not labels}
    images = check_images(images)
    return images, (None if labels is None else check_labels(labels, len(images))), extra


# -- identities ------------------------------------------------------------------------------------

SAMPLED_VALUES = 1024  # of each picture's pixels go into its identity


def identities(images: Tensor, keys: Sequence[Any] | Tensor | None = None) -> Tensor:
    """A 64-bit digest of each sample, (B,) int64: of a strided part of its pixels, and its key.

    The same sample has the same identity in any batch, worker, rank or process; another crop of it
    has another.
    """
    flat = images.detach().flatten(1)
    part = flat[:, :: max(1, flat.shape[1] // SAMPLED_VALUES)].contiguous()
    part = part.cpu().view(torch.uint8) if part.dtype == torch.uint8 else part.float().cpu()
    digests = []
    for row in range(len(part)):
        digest = hashlib.blake2b(part[row].numpy().tobytes(), digest_size=8)
        if keys is not None:
            digest.update(str(keys[row]).encode())
        digests.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(digests, dtype=torch.int64)


def sample_keys(batch: Any) -> Sequence[Any] | None:
    """What names the samples of a stacked batch: its ``__key__`` or its index, if it has one."""
    if isinstance(batch, Mapping):
        for name in ("__key__", "index", "idx"):
            keys = batch.get(name)
            if isinstance(keys, Tensor) and keys.ndim == 1:
                return list(keys.tolist())
            if isinstance(keys, (list, tuple)):
                return keys
    return None


def _outline(value: Any) -> str:
    """What an input is made of, in a line."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping with keys {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {[type(item).__name__ for item in value]}"
    return type(value).__name__
