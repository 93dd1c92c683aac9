"""
Tuning: what each setting does, and what it costs
=================================================

The same tuples of pictures, mixed with one setting changed at a time. *Pairs* are teacher calls: a
forward and a backward of one picture. *Seen* is the probability that the teacher gives to the
classes of a mix together.
"""

import matplotlib.pyplot as plt
import torch

from supermix_transforms import SolverSettings, TeacherLabeler, supermix
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher

net = load_teacher("efficientnet-lite0")
teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
images = torch.stack([picture for _, picture in demo_pictures()])
classes = teacher(images).hard


def show(cases, sources=((0, 1), (1, 2), (2, 3)), weights=None):
    """A row of mixes and first masks for each case, with what it cost."""
    figure, axes = plt.subplots(len(cases), 2 * len(sources), figsize=(9, 1.75 * len(cases)))
    for row, (name, settings) in zip(axes, cases.items(), strict=True):
        tuples = torch.tensor(sources)
        shares = torch.full(tuples.shape, 1 / tuples.shape[1]) if weights is None else weights[name]
        mixed = supermix(images, teacher, sources=tuples, weights=shares, settings=settings)
        pairs = (mixed.forwards + mixed.backwards).mean() / 2
        seen = mixed.logits.softmax(1).gather(1, classes[tuples]).sum(dim=1).mean()
        for column, (image, masks) in enumerate(zip(mixed.images, mixed.masks, strict=True)):
            row[2 * column].imshow(image.movedim(0, -1))
            row[2 * column + 1].imshow(masks[0], cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(f"{name}\n{pairs:.1f} pairs\nseen {seen:.2f}", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.tight_layout(pad=0.4)


# %%
# **Sparsity**: how much of the picture may belong to several images. Small values cut like
# scissors, larger ones blend.

show({f"sparsity {value}": SolverSettings(sparsity=value) for value in (0.02, 0.074, 0.15)})

# %%
# **Sigma**: the blur of the masks' steps, in cells of the mask. Larger ones give larger regions.

show({f"sigma {value}": SolverSettings(sigma=value) for value in (0.25, 0.5, 2.0)})

# %%
# **Polish**: further steps after the mix has converged. The teacher sees both classes more clearly,
# and a mix costs as many pairs more.

show({f"polish {value}": SolverSettings(polish=value) for value in (0, 4, 8)})

# %%
# **min_share**: the probability that the classes must have together before a mix counts as
# converged. It takes steps where they are needed alone.

show({f"min_share {value}": SolverSettings(min_share=value) for value in (0.0, 0.5, 0.8)})

# %%
# **Weights and alpha**: Eq. 2 asks for shares r of the classes, drawn from Dirichlet(alpha): near
# even ones for a large alpha, one picture that takes nearly all for a small one.

shares = {"r 0.5": (0.5, 0.5), "r 0.8": (0.8, 0.2), "r 0.95": (0.95, 0.05)}
show(
    dict.fromkeys(shares, SolverSettings()),
    weights={name: torch.tensor([value] * 3) for name, value in shares.items()},
)

# %%
# **k**: more pictures a mix take more calls, and each is left with less room.

show(
    {"k 3": SolverSettings(), "k 3, paper": SolverSettings(method="paper", max_steps=20)},
    sources=((0, 1, 2), (1, 2, 3), (2, 3, 4)),
)
