"""Mixing in a loader: a collate function for any DataLoader, a wrapper around any loader.

Stacking may happen in a worker; mixing needs the teacher and happens in the process that iterates,
when a batch's mixes are first asked for.
"""

import copy
import uuid
from collections.abc import Callable, Iterator, Sized
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import default_collate

from supermix_transforms.batch import (
    MixBatch,
    MixResult,
    OutputForm,
    TargetForm,
    refuse_dispatch,
    register,
)
from supermix_transforms.batchmix import BatchMix, tell_epoch
from supermix_transforms.data.picturesets import OtherPictures
from supermix_transforms.draws import Draw, Purpose, seeded, set_epoch_of
from supermix_transforms.inputs import (
    LabelsGetter,
    check_images,
    check_labels,
    check_same_kind,
    identities,
    sample_keys,
    sendable,
    split_batch,
)
from supermix_transforms.mixing import keep_rows, label_mixes, label_originals, settled_rows
from supermix_transforms.results import Mixed, Outcome, TeacherLabels
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler, as_labeler
from supermix_transforms.transforms import SuperMix

__all__ = ["MixLoader", "SuperMixCollate"]

Unconverged = Literal["keep", "drop", "redraw"]
REDRAWS = 2


class _BatchMixer:
    """From stacked originals to mixes and labels; what the collate and the wrapper share."""

    def __init__(
        self,
        transform: Callable[..., Any] | None,
        labeler: TeacherLabeler | None,
        after: Callable[..., Any] | None,
        output: OutputForm,
        target: TargetForm,
        unconverged: Unconverged,
        labels_getter: LabelsGetter,
        seed: int,
    ) -> None:
        for name, value, allowed in (
            ("output", output, ("batch", "tuple", "concat", "dict")),
            ("target", target, ("soft", "hard")),
            ("unconverged", unconverged, ("keep", "drop", "redraw")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {value!r}.")
        if transform is None and output == "concat":
            raise ValueError(
                'output="concat": expected mixes to put beside the originals, got no mix=. Pass '
                'mix=SuperMix(teacher), or output="tuple" for originals with the teacher\'s labels.'
            )
        self.output, self.target = output, target
        self.labels_getter = labels_getter
        self.seed = seed
        self.epoch: int = 0
        if labeler is None and isinstance(transform, BatchMix):
            labeler = transform.teacher
        self._transform, self._labeler, self._after = transform, labeler, after
        self._unconverged = unconverged
        self._has_mixed = False
        self._token = ""

    def _enlist(self) -> None:
        """Become the owner of batches that are copied or come from another process."""
        self._token = uuid.uuid4().hex
        register(self._token, self)

    def set_epoch(self, epoch: int) -> None:
        """Draw other partners and weights than in other epochs."""
        self.epoch = epoch
        tell_epoch(self._transform, epoch)

    def take_short(self) -> None:
        """Hand on a batch of fewer than k pictures unmixed even if it is the first one."""
        self._has_mixed = True

    @property
    def device(self) -> torch.device | None:
        """Where mixing runs and its results live; None: where the pictures are."""
        return None if self._labeler is None else self._labeler.device

    def mix(self, images: Tensor, labels: Tensor | None, ids: Tensor, extra: Any) -> MixResult:
        """Mix and label pictures (B, C, H, W); results are on the teacher's device."""
        with torch.inference_mode(False), torch.no_grad():
            device = self.device or images.device
            images = check_images(images.to(device))
            if labels is not None:
                labels = check_labels(labels.to(device), len(images))
            transform = self._transform
            if transform is None:
                assert self._labeler is not None
                teacher = label_originals(self._labeler, images, labels)
                return MixResult(images, labels, teacher, None, None, teacher.probs)
            if isinstance(transform, BatchMix):
                result = self._ours(transform, images, labels, ids)
            elif isinstance(transform, OtherPictures):
                result = self._foreign(partial(transform, extra=extra), images, labels, ids)
                if result.targets is not None:  # what another teacher said, when it mixed them
                    result = result._replace(mixed_teacher=TeacherLabels.from_probs(result.targets))
            else:
                result = self._foreign(transform, images, labels, ids)
            result = self._finish(result, Draw(self.seed, self.epoch, ids))
            return self._drop(result) if self._unconverged == "drop" else result

    def _ours(
        self, transform: BatchMix, images: Tensor, labels: Tensor | None, ids: Tensor
    ) -> MixResult:
        if len(images) < transform.k and not self._has_mixed:
            raise ValueError(
                f"expected batches of at least k={transform.k} pictures, got {len(images)} in the "
                "first one. Use a larger batch_size or a smaller k; only the last batch of an "
                "epoch may be short, and is then handed on unmixed."
            )
        self._has_mixed = True
        seed = self.seed if transform.seed is None else transform.seed
        redraws = REDRAWS if self._unconverged == "redraw" else 0
        draw = Draw(seed, transform.epoch, ids)  # whoever has set it
        others = self._labeler is not None and transform.teacher is not self._labeler
        relabel = others or (self._labeler is not None and self._after is not None)
        result = transform.mix(images, labels, draw, redraws=redraws, relabel=relabel)
        # our own labeler has the last word
        return result._replace(teacher=None, mixed_teacher=None) if others else result

    def _foreign(
        self, transform: Callable[..., Any], images: Tensor, labels: Tensor | None, ids: Tensor
    ) -> MixResult:
        """Somebody else's transform: it draws from torch's global generator, put back after it."""
        with seeded(Draw(self.seed, self.epoch, ids), Purpose.FOREIGN, images.device):
            own = images.clone()  # it may work in place, as timm's Mixup does
            output = transform(own, labels) if labels is not None else transform(own)
        if labels is not None and not (isinstance(output, (tuple, list)) and len(output) == 2):
            raise ValueError(
                f"mix: expected a transform of (images, labels) that returns both, got "
                f"{type(output).__name__} from {type(transform).__name__}."
            )
        pictures, targets = output if labels is not None else (output, None)
        itself = torch.arange(len(pictures), device=images.device)[:, None]
        masks = pictures.new_ones((len(pictures), 1, *pictures.shape[2:]), dtype=torch.float32)
        mixed = Mixed.unsearched(pictures, itself, masks, Outcome.CONVERGED)
        if targets is not None and targets.ndim == 1:
            targets = None  # it left class indices as they were: those of the originals
        return MixResult(images, labels, None, mixed, None, targets, traced=False)

    def _finish(self, result: MixResult, draw: Draw) -> MixResult:
        """`after=`, and whatever labels the transform has not given."""
        mixed, labeler = result.mixed, self._labeler
        assert mixed is not None
        if self._after is not None:
            with seeded(draw, Purpose.AFTER, mixed.images.device):
                # one at a time: a batch would be cropped or flipped as a whole
                images = [check_same_kind(self._after(image), image) for image in mixed.images]
            mixed = replace(mixed, images=torch.stack(images))
            result = result._replace(mixed=mixed)
        if labeler is None:
            return result
        if self._after is not None or result.mixed_teacher is None:
            # the teacher labels what is handed out
            label, mixed = label_mixes(labeler, mixed, result.labels)
            result = result._replace(mixed=mixed, mixed_teacher=label, targets=label.probs)
        if result.teacher is None:
            forwards = mixed.forwards + len(result.images) / max(1, len(mixed))
            teacher = label_originals(labeler, result.images, result.labels)
            result = result._replace(mixed=replace(mixed, forwards=forwards), teacher=teacher)
        return result

    def _drop(self, result: MixResult) -> MixResult:
        mixed, label, targets = result.mixed, result.mixed_teacher, result.targets
        assert mixed is not None
        rows = settled_rows(mixed)
        return result._replace(
            mixed=keep_rows(mixed, rows),
            mixed_teacher=None if label is None else label[rows],
            targets=None if targets is None else targets[rows],
        )


class SuperMixCollate(_BatchMixer):
    """A ``collate_fn`` whose batches carry mixes and the teacher's labels beside the originals.

    ``DataLoader(dataset, 128, num_workers=8, collate_fn=SuperMixCollate(teacher))`` yields
    `MixBatch`. Under Accelerate, prepare that loader as usual. Build it in the process that
    iterates: a teacher does not travel.

    Args:
        teacher: as for `SuperMix`; None where `mix` needs none.
        k: images a mix.
        alpha: concentration of the Dirichlet weights.
        partners: ``"random"`` or ``"matched"``.
        partner_cap: how often a picture may be a partner (matched).
        settings: the solver's.
        mix: another transform of ``(images, labels)``, in the place of SuperMix: `MixUp`, `CutMix`,
            ``v2.RandomChoice([...])``. The teacher then labels its result, anew unless it is the
            very `TeacherLabeler` that the transform has; k, alpha, partners and settings are the
            transform's own.
        after: transform of each mixed picture (C, H, W), before the teacher labels it; size and
            dtype stay.
        output: what a batch's ``.to(device)`` returns: ``"batch"`` the `MixBatch`; ``"tuple"``
            ``(mixed, targets)``; ``"concat"`` originals and mixes in one, ``(2B images, 2B
            targets)``; ``"dict"`` ``{"pixel_values", "labels"}``.
        target: ``"soft"``, the teacher's probabilities, or ``"hard"``, its class.
        unconverged: ``"keep"`` mixes the teacher does not see all classes in, ``"drop"`` them (a
            batch then has fewer mixes than originals, at worst none), or ``"redraw"`` them, at most
            twice, and keep what still fails.
        collate: stacks the samples. Segmentation masks and boxes of samples stay those of the
            originals, under ``extra``; only the transforms mix them along.
        labels_getter: finds the labels in the stacked batch; None where there are none.
        seed: of all draws, with the epoch (`set_epoch`) and the samples' identities.

    Raises:
        ValueError: for settings out of range.
    """

    def __init__(
        self,
        teacher: Any,
        *,
        k: int = 2,
        alpha: float = 3.0,
        partners: Literal["random", "matched"] = "random",
        partner_cap: int = 2,
        settings: SolverSettings = SolverSettings(),
        mix: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
        output: OutputForm = "batch",
        target: TargetForm = "soft",
        unconverged: Unconverged = "keep",
        collate: Callable[[list[Any]], Any] = default_collate,
        labels_getter: LabelsGetter = "default",
        seed: int = 0,
    ) -> None:
        labeler = None if teacher is None else as_labeler(teacher)
        if mix is None:
            if labeler is None:
                raise ValueError(
                    "teacher: expected a module or callable, got None. Pass a teacher, or a mix= "
                    "that needs none, such as MixUp(num_classes=10)."
                )
            mix = SuperMix(
                labeler,
                k=k,
                alpha=alpha,
                partners=partners,
                partner_cap=partner_cap,
                settings=settings,
            )
        elif (k, alpha, partners, partner_cap, settings) != (2, 3.0, "random", 2, SolverSettings()):
            raise ValueError(
                "mix: expected k, alpha, partners, partner_cap and settings to be left out beside "
                "it, for they are SuperMix's. Pass them to the transform that is given as mix=."
            )
        super().__init__(mix, labeler, after, output, target, unconverged, labels_getter, seed)
        self.collate = collate
        self._enlist()

    def __call__(self, samples: list[Any]) -> MixBatch:
        """Stack samples; nothing is mixed yet."""
        refuse_dispatch(self)
        try:
            batch = self.collate(samples)
        except (RuntimeError, TypeError) as error:
            if self.collate is not default_collate:
                raise
            raise ValueError(
                f"the samples could not be stacked: {error}. Expected tensors of one size; add "
                "v2.ToImage() and v2.Resize or v2.RandomResizedCrop to the data set's transform, "
                "or pass collate=."
            ) from error
        images, labels, extra = split_batch(batch, self.labels_getter)
        return MixBatch(
            images.detach(),  # what requires grad cannot leave a worker
            None if labels is None else labels.detach(),
            ids=identities(images, sample_keys(batch)),
            extra=sendable(extra),
            mixer=self if self._transform is not None else None,
            token=self._token,
        )

    def __getstate__(self) -> dict[str, Any]:
        # what a worker needs to stack; the teacher stays behind, and with it all that mixes
        return {**vars(self), "_transform": None, "_labeler": None, "_after": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SuperMixCollate":
        twin = object.__new__(SuperMixCollate)
        vars(twin).update(vars(self))  # the teacher is shared
        twin._transform = copy.deepcopy(self._transform, memo)
        twin._enlist()
        return twin


class MixLoader(_BatchMixer):
    """A wrapper around any loader of stacked batches: mixes them, or only labels them.

    Around a DataLoader, a loader that Accelerate prepared, a ``wds.WebLoader``, a timm loader. It
    never reads ahead, so gradient accumulation under Accelerate stays right; prepare the loader
    inside, not the wrapper.

    Args:
        loader: yields ``(images, labels, ...)`` or mappings.
        mix: a transform of ``(images, labels)``: `SuperMix`, `MixUp`, ``v2.RandomChoice([...])``.
        labeler: labels originals and mixes; by default the teacher of `mix`.
        after: as for `SuperMixCollate`.
        output: as for `SuperMixCollate`, but the loader yields that form itself.
        target: as for `SuperMixCollate`.
        unconverged: as for `SuperMixCollate`.
        labels_getter: as for `SuperMixCollate`.
        seed: as for `SuperMixCollate`.

    Raises:
        ValueError: if there is neither a transform nor a labeler.
    """

    def __init__(
        self,
        loader: Any,
        mix: Callable[..., Any] | None = None,
        *,
        labeler: TeacherLabeler | None = None,
        after: Callable[..., Any] | None = None,
        output: OutputForm = "batch",
        target: TargetForm = "soft",
        unconverged: Unconverged = "keep",
        labels_getter: LabelsGetter = "default",
        seed: int = 0,
    ) -> None:
        if mix is None and labeler is None:
            raise ValueError(
                "MixLoader: expected mix= or labeler=, got neither. Pass SuperMix(teacher) to mix, "
                "or labeler=TeacherLabeler(teacher) to label only."
            )
        if mix is None and after is not None:
            raise ValueError("after: expected mixes to transform, got no mix=. Pass mix=, too.")
        given = None if labeler is None else as_labeler(labeler)
        super().__init__(mix, given, after, output, target, unconverged, labels_getter, seed)
        self.loader = loader
        self._enlist()

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if isinstance(batch, MixBatch):
                raise ValueError(
                    "MixLoader: expected plain batches, got a MixBatch. The loader has a "
                    "SuperMixCollate already: iterate over it directly."
                )
            images, labels, extra = split_batch(batch, self.labels_getter)
            mix_batch = MixBatch(
                images,
                labels,
                ids=identities(images, sample_keys(batch)),
                extra=extra,
                mixer=self,
                token=self._token,
            )
            yield mix_batch.to(self.device or images.device)

    def __getattr__(self, name: str) -> Any:
        """What else a script asks of its loader: ``dataset``, ``sampler``, ``batch_size``, ..."""
        if name.startswith("_") or "loader" not in vars(self):  # not there yet while it is copied
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length.")
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew, and tell the loader inside, if it wants to know."""
        super().set_epoch(epoch)
        set_epoch_of(self.loader, epoch)
