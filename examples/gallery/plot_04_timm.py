"""
In timm's training script
=========================

In timm's train.py, SuperMix is the ``collate_fn`` of the training loader. Its prefetcher unpacks
each batch in the training process, where the teacher is: it is given uint8 pictures, as
`TeacherLabeler` wants them, and normalises originals and mixes afterwards, as ever.
"""

import timm
import torch
from PIL.Image import fromarray
from timm.data import create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import Dataset

from supermix_transforms import SuperMixCollate, TeacherLabeler
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher


class Pictures(Dataset):
    """What timm's create_dataset makes: pictures of Pillow, and a transform that timm sets."""

    def __init__(self):
        self.pictures = [fromarray(each.movedim(0, -1).numpy()) for _, each in demo_pictures()]
        self.transform = None

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.transform(self.pictures[index]), index


# %%
# These lines are SuperMix's: the teacher on the training's device, and the collate, with
# ``output="concat"`` for originals and mixes in one batch (Eq. 9). Weak augmentation, so that the
# teacher still recognises what it is shown.

device = torch.device("cpu")
net = load_teacher("efficientnet-lite0")
teacher = TeacherLabeler(net.model.to(device), mean=net.mean, std=net.std)
collate = SuperMixCollate(teacher, output="concat")

loader = create_loader(
    Pictures(),
    input_size=(3, 224, 224),
    batch_size=5,
    is_training=True,
    scale=(0.6, 1.0),
    color_jitter=0,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    device=device,
    collate_fn=collate,
)

# %%
# The loop is timm's, with its loss for soft targets and one more line, ``set_epoch``.

student = timm.create_model("mobilenetv3_small_050", num_classes=1000)
criterion = SoftTargetCrossEntropy()
optimiser = create_optimizer_v2(student, opt="adamw", lr=1e-3)
scheduler = CosineLRScheduler(optimiser, t_initial=2)

for epoch in range(2):
    collate.set_epoch(epoch)
    for images, targets in loader:
        loss = criterion(student(images), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    scheduler.step(epoch + 1)
    print(f"epoch {epoch}: {tuple(images.shape)} {images.dtype}, loss {loss:.2f}")
