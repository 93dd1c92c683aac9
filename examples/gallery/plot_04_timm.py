"""
In timm's training loop
=======================

timm's loop wants pairs of pictures and soft targets, which is what its own Mixup gives:
``output="tuple"`` gives them, too. In timm's train.py, this is the ``collate_fn``, and the loss is
``SoftTargetCrossEntropy``.
"""

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader

from supermix_transforms import SuperMixCollate, TeacherLabeler
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher

net = load_teacher("efficientnet-lite0")
teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
dataset = [(picture, label) for label, (_, picture) in enumerate(demo_pictures())]

# %%
# Two lines are SuperMix's: the collate, and ``.to``, which mixes and hands out the pair. timm's
# prefetcher and pictures of uint8 go on as they were.

collate = SuperMixCollate(teacher, output="tuple")
loader = DataLoader(dataset, batch_size=5, shuffle=True, collate_fn=collate)

student = timm.create_model("mobilenetv3_small_050", num_classes=1000)
criterion = SoftTargetCrossEntropy()
optimiser = create_optimizer_v2(student, opt="adamw", lr=1e-3)
scheduler = CosineLRScheduler(optimiser, t_initial=2)

mean, std = (torch.tensor(value)[:, None, None] for value in (net.mean, net.std))
for epoch in range(2):
    collate.set_epoch(epoch)
    for batch in loader:
        images, targets = batch.to("cpu")
        loss = criterion(student((images / 255 - mean) / std), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    scheduler.step(epoch + 1)
    print(f"epoch {epoch}: loss {loss:.2f}")
