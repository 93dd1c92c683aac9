"""How a user's typed program reads the public surface; run by the type checker only.

mypy --strict reads this file in CI: a name whose type is unknown makes an `assert_type` fail.
"""

from typing import Any, assert_type

from torch import Tensor, nn
from torch.utils.data import DataLoader

from supermix_transforms import (
    CutMix,
    MixBatch,
    Mixed,
    MixLoader,
    ShardDataset,
    ShardSampler,
    SolverSettings,
    SuperMix,
    SuperMixCollate,
    TeacherLabeler,
    TeacherLabels,
    generate,
    kd_loss,
    mix_images,
    replay,
    supermix,
    supermix_loss,
)


def train(net: nn.Module, student: nn.Module, images: Tensor, labels: Tensor) -> None:
    teacher = TeacherLabeler(net, mean=(0.5,), std=(0.25,), top=10)
    assert_type(teacher(images), TeacherLabels)
    assert_type(teacher(images).hard, Tensor)
    assert_type(teacher.top, int | None)

    photos = ShardDataset("photos.tar")
    collate = SuperMixCollate(teacher, k=3, settings=SolverSettings(polish=4))
    assert_type(collate.epoch, int)
    loader = DataLoader(photos, sampler=ShardSampler(photos), collate_fn=collate)
    for batch in MixLoader(loader, SuperMix(teacher)):
        assert isinstance(batch, MixBatch)  # output= decides
        assert_type(batch.mixed, Tensor)
        assert_type(batch.labels, Tensor | None)
        assert_type(batch.targets, Tensor)
        assert_type(batch.converged, Tensor)
        logits, mixed_logits = student(batch.images), student(batch.mixed)
        assert_type(supermix_loss(logits, labels, mixed_logits, batch.targets), Tensor)
        assert_type(kd_loss(logits, teacher(images).probs, labels), Tensor)

    mixed = supermix(images, teacher, sources=labels, weights=images)
    assert_type(mixed, Mixed)
    assert_type(mixed.masks, Tensor)
    assert_type(mix_images(images, mixed.masks), Tensor)
    assert_type(CutMix(teacher=teacher).alpha, float)
    assert_type(generate(photos, teacher, "recipes").mixes, int)
    assert_type(replay("recipes", photos).settings, dict[str, Any])
