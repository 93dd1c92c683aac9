"""
Under Accelerate
================

Prepare the loader as ever. Mixing runs in each process with its own teacher; which pictures are
mixed how depends on the samples, not on the number of processes.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from supermix_transforms import SuperMixCollate, TeacherLabeler, supermix_loss
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher

accelerator = Accelerator(cpu=True)  # leave cpu=True out where there is a GPU
net = load_teacher("efficientnet-lite0")
net.model.to(accelerator.device)
teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
dataset = [(picture, label) for label, (_, picture) in enumerate(demo_pictures())]

# %%
# Build the collate in the function that runs on each rank, and keep it as long as the loader.

collate = SuperMixCollate(teacher)
loader = DataLoader(dataset, batch_size=5, shuffle=True, collate_fn=collate)
student = torch.nn.Sequential(
    torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 1000)
)
optimiser = torch.optim.SGD(student.parameters(), lr=0.01)
student, optimiser, loader = accelerator.prepare(student, optimiser, loader)

# %%
# In a launch, this is the same loop: ``accelerate launch --num_processes 8 this_file.py``.

for epoch in range(2):
    collate.set_epoch(epoch)
    for batch in loader:
        logits, mixed_logits = student(batch.images / 255), student(batch.mixed / 255)
        loss = supermix_loss(logits, batch.labels, mixed_logits, batch.targets)
        accelerator.backward(loss)
        optimiser.step()
        optimiser.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss:.2f}")
accelerator.end_training()
