"""The two forms in which mixes are stored: what is made of a batch, and how a unit is written."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from supermix_transforms.batch import MixResult
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.draws import Draw
from supermix_transforms.files import write_atomically
from supermix_transforms.loader import Unconverged
from supermix_transforms.methods import margins
from supermix_transforms.mixing import keep_rows, or_labels, settled_rows
from supermix_transforms.offline.ledger import Ledger
from supermix_transforms.offline.mixedshards import (
    INFO,
    PictureFormat,
    decoded,
    encode_pictures,
    info_of,
    samples_of,
    write_tar,
)
from supermix_transforms.offline.recipes import Group, Layout, encode
from supermix_transforms.offline.stored import to_group
from supermix_transforms.quantised import LEVELS, whole_weights
from supermix_transforms.results import Mixed, Outcome, TeacherLabels
from supermix_transforms.teacher import TeacherLabeler
from supermix_transforms.transforms import CutMix, MixUp

__all__ = ["MIXES", "Form", "MadeBatch", "RecipeForm", "ShardForm"]


class MadeBatch(NamedTuple):
    """Mixes, and where their originals come from."""

    result: MixResult
    samples: Tensor  # (B,) indices in the data set
    crop: Tensor  # (B, 5)
    epoch: int


class Form(Protocol):
    """A form in which mixes are stored."""

    name: str
    suffix: str

    def make(self, batch: MadeBatch) -> tuple[Any, Tensor]:
        """What is stored of a batch, and the outcomes (M,) of its mixes."""

    def write(self, file: BinaryIO, unit: str, made: list[Any]) -> None:
        """A unit."""

    def finish(self, ledger: Ledger) -> None:
        """When all units are there."""


class RecipeForm:
    """Records of how the mixes are made again, see `recipes`."""

    name: str = "recipes"
    suffix: str = ".recipe"

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def make(self, batch: MadeBatch) -> tuple[Group, Tensor]:
        group = to_group(batch.result, index=batch.samples, crop=batch.crop, layout=self._layout)
        return group, torch.from_numpy(group.outcome)

    def write(self, file: BinaryIO, unit: str, made: list[Group]) -> None:
        file.write(encode(self._layout, made))

    def finish(self, ledger: Ledger) -> None:
        pass


class ShardForm:
    """Samples of mixed pictures, see `mixedshards`."""

    name: str = "shards"
    suffix: str = ".tar"

    def __init__(
        self,
        dataset: ShardDataset,
        labeler: TeacherLabeler,
        picture_format: PictureFormat,
        quality: int,
        top: int,
        unconverged: Unconverged,
    ) -> None:
        self._dataset, self._labeler = dataset, labeler
        self._format, self._quality, self._top = picture_format, quality, top
        self._unconverged = unconverged

    def make(self, batch: MadeBatch) -> tuple[list[dict[str, Any]], Tensor]:
        mixed, labels = batch.result.mixed, batch.result.mixed_teacher
        assert mixed is not None and labels is not None
        files = encode_pictures(mixed.images, self._format, self._quality)
        if self._format != "png" and files:
            # the teacher judges and labels what is handed out
            pictures = decoded(files).to(mixed.images.device)
            mixed, labels = _judged(self._labeler, batch.result, pictures)
            if self._unconverged == "drop":  # those that did until they were encoded
                rows = settled_rows(mixed)
                mixed, labels = keep_rows(mixed, rows), labels[rows]
                files = [files[row] for row in rows.tolist()]
        samples = samples_of(
            files,
            mixed,
            labels,
            suffix=self._format,
            top=self._top,
            names=[self._dataset.name(int(index)) for index in batch.samples],
            crops=batch.crop,
            epoch=batch.epoch,
        )
        return samples, mixed.outcome.cpu()

    def write(self, file: BinaryIO, unit: str, made: list[list[dict[str, Any]]]) -> None:
        write_tar(file, unit, itertools.chain.from_iterable(made))

    def finish(self, ledger: Ledger) -> None:
        ledger.sweep({Path(INFO).stem})
        write_atomically(ledger.folder / INFO, info_of(ledger.entries().values()))


def _judged(
    labeler: TeacherLabeler, result: MixResult, pictures: Tensor
) -> tuple[Mixed, TeacherLabels]:
    """Outcome and label of mixes that were encoded: the teacher's, of those `pictures`."""
    mixed, before = result.mixed, result.mixed_teacher
    assert mixed is not None and before is not None
    logits = labeler.ask(pictures)
    own = or_labels(logits, before.probs, temperature=labeler.temperature)
    if mixed.mask_logits is not None and result.teacher is not None:  # it was searched for
        wanted = result.teacher.hard[mixed.sources]  # (M, k); a class may stand there twice
        members = torch.zeros_like(logits, dtype=torch.bool).scatter(1, wanted, True)
        gone = (mixed.outcome == Outcome.CONVERGED) & (margins(logits, members) <= 0)
        outcome = mixed.outcome.masked_fill(gone, int(Outcome.MAX_STEPS))
        mixed = replace(mixed, outcome=outcome)
    return mixed, labeler.label(own)


class WholeMixUp(MixUp):
    """MixUp by 255ths, as recipes store them."""

    def _masks(self, draw: Draw, sources: Tensor, weights: Tensor, size: tuple[int, int]) -> Tensor:
        whole = whole_weights((weights.double() * (1 << 20)).round().long()).float() / LEVELS
        return super()._masks(draw, sources, whole, size)


MIXES: dict[str, Callable[..., Any]] = {"mixup": WholeMixUp, "cutmix": CutMix}
