"""
A plain training loop
=====================

One line of a DataLoader: ``collate_fn=SuperMixCollate(teacher)``. Batches then carry the mixes and
the teacher's labels beside the originals; Eq. 9 of the paper learns from both.
"""

import torch
from torch.utils.data import DataLoader

from supermix_transforms import SuperMixCollate, TeacherLabeler, supermix, supermix_loss
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher
from supermix_transforms.plots import contact_sheet, make_panels

# %%
# A teacher, and a data set of five pictures, each of a class of its own.

net = load_teacher("efficientnet-lite0")
teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
dataset = [(picture, label) for label, (_, picture) in enumerate(demo_pictures())]

# %%
# The loop. The teacher mixes and labels a batch when its mixes are first read.

student = torch.nn.Sequential(
    torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.LazyLinear(1000)
)
optimiser = torch.optim.SGD(student.parameters(), lr=0.01)
collate = SuperMixCollate(teacher, k=2)

for epoch in range(2):
    collate.set_epoch(epoch)  # other partners and weights in each epoch
    for batch in DataLoader(dataset, batch_size=5, shuffle=True, collate_fn=collate):
        logits = student(batch.images / 255)
        mixed_logits = student(batch.mixed / 255)
        loss = supermix_loss(logits, batch.labels, mixed_logits, batch.targets)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    print(f"epoch {epoch}: loss {loss:.2f}, converged {batch.converged.tolist()}")

# %%
# What was mixed: a row holds the two pictures with their weights, the masks and the mix, and what
# the teacher sees in it.

images = torch.stack([picture for picture, _ in dataset])
mixed = supermix(
    images,
    teacher,
    sources=torch.tensor([[0, 1], [1, 2], [2, 3]]),
    weights=torch.full((3, 2), 0.5),
)
classes = teacher(images).hard
figure = contact_sheet(make_panels(images, mixed, classes, net.class_names))
