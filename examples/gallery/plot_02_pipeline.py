"""
Inside a torchvision pipeline
=============================

``SuperMix`` is a transform of batches like torchvision's MixUp and CutMix. It composes with
``RandomChoice``, and stands beside transforms of single pictures.
"""

import matplotlib.pyplot as plt
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.utils import make_grid

from supermix_transforms import CutMix, MixUp, SuperMix, TeacherLabeler
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher

net = load_teacher("efficientnet-lite0")
teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
augment = v2.Compose([v2.RandomResizedCrop(224, scale=(0.5, 1)), v2.RandomHorizontalFlip()])

# %%
# Augment before mixing: the teacher judges the pictures as they are when they are mixed.

dataset = [(picture, label) for label, (_, picture) in enumerate(demo_pictures())]
loader = DataLoader(
    dataset,
    batch_size=5,
    collate_fn=lambda samples: torch.utils.data.default_collate(
        [(augment(picture), label) for picture, label in samples]
    ),
)

# %%
# One of three mixings for each batch, all labelled by the teacher, for two and three pictures.

mix = v2.RandomChoice(
    [SuperMix(teacher), CutMix(k=3, teacher=teacher), MixUp(k=3, teacher=teacher)]
)
torch.manual_seed(0)
rows = []
for _ in range(3):
    for images, labels in loader:
        mixed, targets = mix(images, labels)
        rows.append(mixed)
        print(mixed.shape, targets.shape, [net.class_names[i] for i in targets.argmax(dim=1)])

# %%
# A row for each batch.

plt.figure(figsize=(9, 5.5))
plt.imshow(make_grid(torch.cat(rows), nrow=5, padding=4, pad_value=255).movedim(0, -1))
plt.axis("off")
plt.tight_layout()
