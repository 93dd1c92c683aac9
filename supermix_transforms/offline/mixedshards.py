"""Mixes as samples of a WebDataset tar: picture, class, soft label and where it comes from."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from supermix_transforms.data.pictures import read_picture
from supermix_transforms.offline.ledger import UnitEntry
from supermix_transforms.results import Mixed, Outcome, TeacherLabels

__all__ = [
    "INFO",
    "PictureFormat",
    "decoded",
    "encode_pictures",
    "info_of",
    "samples_of",
    "stored_probs",
    "write_tar",
]

PictureFormat: TypeAlias = Literal["png", "webp", "jpg"]
INFO = "_info.json"
SAVE: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP"},
    "jpg": {"format": "JPEG", "subsampling": 0},  # at full resolution: borders of masks are sharp
}


def encode_pictures(images: Tensor, suffix: PictureFormat, quality: int) -> list[bytes]:
    """Pictures (M, 3, H, W) uint8 as files; `quality` is of webp and jpg, 1..100."""
    from PIL import Image

    files = []
    options = SAVE[suffix] if suffix == "png" else {**SAVE[suffix], "quality": quality}
    for picture in images.cpu():
        content = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(content, **options)
        files.append(content.getvalue())
    return files


def decoded(files: Sequence[bytes]) -> Tensor:
    """The pictures that a reader of these files sees, (M, 3, H, W) uint8."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    return torch.stack([pil_to_tensor(read_picture("a mix", content)) for content in files])


def samples_of(
    files: Sequence[bytes],
    mixed: Mixed,
    labels: TeacherLabels,
    *,
    suffix: PictureFormat,
    top: int,
    names: Sequence[str],
    crops: Tensor,
    epoch: int,
) -> list[dict[str, Any]]:
    """The members of each mix, by suffix.

    Args:
        files: the pictures.
        mixed: the M mixes; its sources are rows of `names` and `crops`.
        labels: the teacher's.
        suffix: of the pictures.
        top: n; N keeps the whole label.
        names: of the originals.
        crops: (B, 5), see `views.Crop`.
        epoch: the pass.
    """
    index, log_probs, rest = labels.top(top)
    samples: list[dict[str, Any]] = []
    for row, content in enumerate(files):
        sources = mixed.sources[row].tolist()
        source = {
            "sources": [names[place] for place in sources],
            "crops": crops[sources].tolist(),
            "weights": [round(weight, 6) for weight in mixed.weights[row].tolist()],
            "outcome": Outcome(int(mixed.outcome[row])).name,
            "steps": int(mixed.steps[row]),
            "pass": epoch,
        }
        sample = {
            suffix: content,
            "cls": str(int(index[row, 0])).encode(),
            "json": json.dumps(source).encode(),
        }
        if top < labels.num_classes:
            label = {
                "indices": index[row].tolist(),
                "log_probs": [round(value, 4) for value in log_probs[row].tolist()],
                "rest": round(float(rest[row]), 6),
            }
            sample["soft.json"] = json.dumps(label).encode()
        else:
            array = io.BytesIO()
            np.save(array, labels.probs[row].cpu().numpy().astype(np.float16))
            sample["soft.npy"] = array.getvalue()
        samples.append(sample)
    return samples


def stored_probs(members: Mapping[str, bytes], num_classes: int) -> Tensor:
    """The teacher's label of a sample, (N,) float32; what a short one left out is spread evenly.

    For ``ShardDataset(folder, labels=partial(stored_probs, num_classes=N))``.

    Raises:
        ValueError: for members without such a label, or with another one.
    """
    try:
        if "soft.npy" in members:
            array = np.load(io.BytesIO(members["soft.npy"]), allow_pickle=False)
            probs = torch.from_numpy(array).float()
            if probs.shape != (num_classes,):
                raise ValueError(f"a label of shape {tuple(probs.shape)}")
            return probs
        label = json.loads(members["soft.json"])
        top = TeacherLabels(
            torch.tensor(label["log_probs"])[None].half(),
            num_classes,
            torch.tensor(label["indices"])[None],
            torch.tensor(label["rest"])[None],
        )
        return top.probs[0]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"shards: expected the teacher's label of {num_classes} classes in soft.json or "
            f"soft.npy, got {type(error).__name__}: {error}. Pass shards that `supermix generate "
            "--as shards` wrote."
        ) from error


def info_of(entries: Iterable[UnitEntry]) -> bytes:
    """What timm looks for in ``_info.json``: the shards of a split, "train", and their lengths."""
    entries = sorted(entries, key=lambda each: each.unit)
    split = {
        "name": "train",
        "num_samples": sum(entry.mixes for entry in entries),
        "filenames": [entry.file for entry in entries],
        "shard_lengths": [entry.mixes for entry in entries],
    }
    return (json.dumps({"splits": {"train": split}}, indent=1) + "\n").encode()


def write_tar(file: BinaryIO, unit: str, samples: Iterable[dict[str, bytes]]) -> None:
    """The samples of a unit as a tar; the same bytes for the same samples."""
    import webdataset

    writer = webdataset.TarWriter(file, encoder=False, mtime=0, compress=False)
    for number, sample in enumerate(samples):
        writer.write({"__key__": f"{unit}-{number:05d}", **sample})
    writer.close()
