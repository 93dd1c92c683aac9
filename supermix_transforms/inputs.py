"""What comes in: pictures, labels and identities in whatever a data set or a loader yields."""

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.data import get_worker_info
from torchvision import tv_tensors

__all__ = [
    "LabelsGetter",
    "check_device",
    "check_images",
    "check_labels",
    "check_same_kind",
    "find_images",
    "find_labels",
    "identities",
    "sample_keys",
    "sendable",
    "split_batch",
]

LabelsGetter: TypeAlias = Callable[[Any], Any] | Literal["default"] | None

SAMPLED_VALUES = 1024  # of each picture's pixels go into its identity


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
    if isinstance(inputs, Mapping) and not isinstance(inputs, dict):
        inputs = dict(inputs)  # Hugging Face's BatchFeature, which torch's trees do not open
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
    """Check that pictures are where the teacher is; None: it takes them anywhere.

    Raises:
        ValueError: if they are not.
    """
    if device is not None and images.device != device:
        raise ValueError(
            f"images: expected pictures on the teacher's device {device}, got {images.device}. "
            f"Move them (images.to({str(device)!r})), or the teacher."
        )


def check_same_kind(picture: Tensor, before: Tensor) -> Tensor:
    """What `after` made of a picture, if it has the shape and dtype that it had before."""
    if picture.shape != before.shape or picture.dtype != before.dtype:
        raise ValueError(
            f"after: expected a picture {tuple(before.shape)} {before.dtype} back, got "
            f"{tuple(picture.shape)} {picture.dtype}. Dtype and size have to stay; change them in "
            "the data set's transform."
        )
    return picture


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
        if shape[1] == 1 or not (labels.is_floating_point() or bool((labels // 2 == 0).all())):
            raise ValueError(
                f"labels: expected probabilities (B, N), got {labels.dtype} of shape {shape} that "
                "can be none. Pass class indices as (B,): labels.squeeze(1) of one column."
            )
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
            digest.update(str(keys[row]).encode(errors="surrogateescape"))
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


def sendable(extra: dict[Any, Any]) -> dict[Any, Any]:
    """A batch's other fields as a worker can hand them on: what requires grad cannot leave it.

    Raises:
        ValueError: in a worker, for what cannot be pickled. Torch only prints why, and the process
            that iterates waits for ever.
    """
    extra = tree_map_only(Tensor, Tensor.detach, extra)
    for name, values in extra.items() if get_worker_info() is not None else ():
        others = [each for each in tree_flatten(values)[0] if not isinstance(each, Tensor)]
        try:
            ForkingPickler.dumps(others)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ValueError(
                f"extra: expected fields that a worker can hand on, got {name!r}: {error}. Leave "
                "it out of the samples or of collate=, or use num_workers=0."
            ) from error
    return extra
