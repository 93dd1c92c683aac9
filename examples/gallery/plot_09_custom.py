"""
A teacher of your own
=====================

Anything that maps pictures to logits, differentiably, is a teacher: a module, an object whose
answer has ``.logits``, or a plain function. Where class maps are found in a module, the search
starts near its end; a function starts from saliency and takes a few calls more.
"""

import torch

from supermix_transforms import SuperMixCollate, TeacherLabeler
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher

net = load_teacher("efficientnet-lite0")


def animals_and_things(images: torch.Tensor) -> torch.Tensor:
    """Logits of two classes: ImageNet's first 398 are animals."""
    logits = net.model(images)
    return torch.stack([logits[:, :398].logsumexp(1), logits[:, 398:].logsumexp(1)], dim=1)


# %%
# A teacher of two classes: what matters of a mix is whether both are to be seen, and how clearly.

teacher = TeacherLabeler(animals_and_things, mean=net.mean, std=net.std)
samples = [(picture, int(name != "chelsea.png")) for name, picture in demo_pictures()]  # a cat
batch = SuperMixCollate(teacher)(samples)
names = ("animal", "thing")
for row, sources in enumerate(batch.sources.tolist()):
    seen = [names[batch.teacher.hard[source]] for source in sources]
    animal, thing = batch.targets[row].tolist()
    print(f"{' and '.join(seen):18} animal {animal:.2f}, thing {thing:.2f}")
