"""
An ensemble as the teacher
==========================

A list of networks is one teacher with their mean probability. Each may have its own size and
normalisation, in a ``TeacherLabeler`` of its own.
"""

import torch

from supermix_transforms import SuperMix, TeacherLabeler
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher

net = load_teacher("efficientnet-lite0")
whole = TeacherLabeler(net.model, mean=net.mean, std=net.std)
small = TeacherLabeler(net.model, mean=net.mean, std=net.std, size=160)
both = TeacherLabeler([whole, small])

# %%
# Here one network looks twice, at pictures of 224 and of 160 pixels: a mix must convince both views
# together.

images = torch.stack([picture for _, picture in demo_pictures()])
labels = torch.arange(len(images))
for name, teacher in (("224 pixels", whole), ("both", both)):
    mixed, targets = SuperMix(teacher, seed=0)(images, labels)
    share = small(mixed).probs.gather(1, targets.topk(2, dim=1).indices).sum(dim=1)
    print(f"{name}: the small view gives the two classes {share.mean():.2f} of its probability")
