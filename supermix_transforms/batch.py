"""The batch that a loader hands out: originals with labels, and their mixes.

Also here: the registry by which a batch that was stacked in a worker finds the mixer that owns it.
"""

import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from supermix_transforms.results import Mixed, TeacherLabels

__all__ = ["MixBatch", "MixResult", "Mixer", "refuse_dispatch", "register"]

OutputForm: TypeAlias = Literal["batch", "tuple", "concat", "dict"]
TargetForm: TypeAlias = Literal["soft", "hard"]


class MixResult(NamedTuple):
    """What a mixer makes of a batch; everything is on the teacher's device."""

    images: Tensor
    labels: Tensor | None
    teacher: TeacherLabels | None  # of the originals
    mixed: Mixed | None  # None: labels only
    mixed_teacher: TeacherLabels | None
    targets: Tensor | None  # (M, N) of the mixes, or of the originals where nothing was mixed
    traced: bool = True  # False: somebody else's transform, whose sources and masks nobody knows

    def to(self, device: torch.device | str | int) -> "MixResult":
        moved: dict[str, Any] = {
            name: value if value is None else value.to(device)
            for name, value in self._asdict().items()
            if name != "traced"
        }
        return self._replace(**moved)

    def pin_memory(self) -> "MixResult":
        pinned: dict[str, Any] = {
            name: value.pin_memory()
            for name, value in self._asdict().items()
            if name != "traced" and value is not None
        }
        return self._replace(**pinned)


class Mixer(Protocol):
    """Who turns originals into mixes: the collate or the loader that made the batch."""

    output: OutputForm
    target: TargetForm

    def mix(self, images: Tensor, labels: Tensor | None, ids: Tensor, extra: Any) -> MixResult: ...


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
    works too. ``extra`` holds the samples' other fields, as they were stacked, by key or position.

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
        self._holds = False  # a result that came from elsewhere
        self._device: torch.device | str | int | None = None  # where .to() was asked to put all

    def hold(self, result: MixResult) -> None:
        """Take mixes that were made elsewhere; its mixer, which has no teacher, may travel then."""
        self._result, self._holds = result, True

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) if self._holds else {**vars(self), "_mixer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._holds:
            return
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
                "targets: these mixes have no labels: the transform gave none, and there is no "
                "teacher here. Pass teacher=, or a labels_getter= that finds the labels."
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

    @property
    def is_mixed(self) -> bool:
        """Whether there are mixes: not where a `MixLoader` without a transform only labelled."""
        return self.mix()._done.mixed is not None

    @property
    def calls(self) -> float:
        """The teacher's forwards and backwards for the mixes, in pictures; replayed: 0."""
        mixed = self.mix()._done.mixed
        if mixed is None:
            return 0.0
        return float((mixed.forwards + mixed.backwards).nan_to_num().sum())

    def mix(self) -> "MixBatch":
        """Make the mixes now, unless they are there already. Returns the batch itself."""
        if self._result is None:
            result = self._owner().mix(self._images, self._labels, self._ids, self.extra)
            self._result = result if self._device is None else result.to(self._device)
        return self

    # -- moving ------------------------------------------------------------------------------

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Any:
        """Move the batch and return the form that ``output=`` asked for.

        Mixing runs where the teacher lives; what it makes is handed out on `device`. `extra` stays
        where it is.

        Raises:
            RuntimeError: if the mixer is not in this process, or mixing raised a TypeError.
        """
        self._device = device
        try:
            if self._result is None:
                self._images = self._images.to(device, non_blocking=non_blocking)
                if self._labels is not None:
                    self._labels = self._labels.to(device, non_blocking=non_blocking)
            else:
                self._result = self._result.to(device)
            return self.form()
        except TypeError as error:
            # Accelerate answers a TypeError by calling .to again, which would mix twice and could
            # lose the error.
            raise RuntimeError(f"mixing failed: {error}") from error

    def pin_memory(self, device: str | None = None) -> "MixBatch":
        """Pin what is there. Runs in a side thread of the DataLoader, so nothing is mixed here."""
        del device
        self._result = self._result and self._result.pin_memory()
        self._images = self._images.pin_memory()
        self._labels = None if self._labels is None else self._labels.pin_memory()
        return self

    def __iter__(self) -> Iterator[Any]:
        """``images, targets = batch``: mixes and targets; with "concat", after the originals."""
        concat = getattr(self._mixer, "output", None) == "concat"
        return iter(self.as_concat() if concat else self.as_tuple())

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
        if mixed.dtype != done.images.dtype:
            raise ValueError(
                f'output="concat": expected mixes of the originals\' {done.images.dtype}, got '
                f"{mixed.dtype} from the transform. Convert pictures before they are stacked."
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

    def form(self) -> Any:
        """What ``output=`` asked for."""
        output = self._owner().output
        if output == "batch":
            return self
        if output == "dict":
            return self.as_dict()
        return self.as_concat() if output == "concat" else self.as_tuple()

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
        if self._result is None and torch.utils.data.get_worker_info() is not None:
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

    Tuples cannot be cut out of a batch that was mixed elsewhere, so its dispatch mode can never
    carry a MixBatch. Asked where the batch is made and where it arrives.
    """
    module = sys.modules.get("accelerate.data_loader")
    if module is None:
        return
    from accelerate.state import GradientState

    active = GradientState().active_dataloader
    if isinstance(active, module.DataLoaderDispatcher) and active.collate_fn is mixer:
        raise RuntimeError(
            "Accelerate's dispatch mode cannot carry a MixBatch: it would broadcast one batch and "
            "cut it into slices, while mixes refer to rows of the whole. It is the default for an "
            "IterableDataset. Use Accelerator(dataloader_config=DataLoaderConfiguration("
            "dispatch_batches=False)), or leave this loader unprepared and wrap it: "
            "MixLoader(loader, SuperMix(teacher))."
        )
