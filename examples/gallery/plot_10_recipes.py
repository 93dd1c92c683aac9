"""
Write the mixed set once, replay it often
=========================================

``generate`` writes recipes of mixes, some 150 bytes each; ``replay`` makes the same pictures
from the shards in any DataLoader, without a teacher.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import webdataset
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from supermix_transforms import ShardDataset, ShardSampler, TeacherLabeler, generate, replay
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher

net = load_teacher("efficientnet-lite0")
teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
folder = Path(tempfile.mkdtemp())

# %%
# A shard, which stands for yours, read in views: a crop and a flip of each picture.

with webdataset.TarWriter(str(folder / "photos-000.tar")) as tar:
    for label, (name, picture) in enumerate(demo_pictures()):
        tar.write({"__key__": Path(name).stem, "png": to_pil_image(picture), "cls": label})
views = v2.Compose([v2.RandomResizedCrop(224, scale=(0.5, 1)), v2.RandomHorizontalFlip()])
photos = ShardDataset(folder / "photos-000.tar", transform=views)

# %%
# Written once: killed, it would go on.

summary = generate(photos, teacher, folder / "recipes", passes=2)
print(f"{summary.mixes} mixes, {summary.converged} converged, {summary.bytes} bytes")

# %%
# Read in every epoch, by workers too; ``mixes.collate`` gives a MixBatch as the collate does.

mixes = replay(folder / "recipes", photos)
sampler = ShardSampler(mixes)
seen = [batch.mixed for batch in DataLoader(mixes, 5, sampler=sampler, collate_fn=mixes.collate)]

plt.figure(figsize=(9, 3.8))
plt.imshow(make_grid(torch.cat(seen), nrow=5, padding=4, pad_value=255).movedim(0, -1))
plt.axis("off")
plt.tight_layout()
