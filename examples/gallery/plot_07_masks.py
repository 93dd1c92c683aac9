"""
Segmentation masks and boxes mixed along
========================================

In the same call, each pixel of a segmentation mask comes from the picture that owns it in the mix,
and boxes are kept where enough of them is seen.
"""

import matplotlib.pyplot as plt
import torch
from torchvision import tv_tensors

from supermix_transforms import SuperMix, TeacherLabeler
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher

net = load_teacher("efficientnet-lite0")
teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
images = torch.stack([picture for _, picture in demo_pictures()][:4])
labels = torch.arange(4)

# %%
# Here a picture's mask is its number everywhere but in a frame, and its one box is its middle.

masks = torch.zeros(4, 224, 224, dtype=torch.uint8)
masks[:, 16:-16, 16:-16] = torch.arange(1, 5, dtype=torch.uint8)[:, None, None]
boxes = [
    {
        "boxes": tv_tensors.BoundingBoxes(
            [[40, 40, 184, 184]], format="XYXY", canvas_size=(224, 224)
        ),
        "labels": torch.tensor([number]),
    }
    for number in range(4)
]
mixed, targets, mixed_masks, mixed_boxes = SuperMix(teacher)(
    images, labels, tv_tensors.Mask(masks), boxes
)
print(mixed_masks.shape, [len(each["boxes"]) for each in mixed_boxes])

# %%
# Mixes, and whose pixels they are.

figure, axes = plt.subplots(2, 4, figsize=(9, 4.6))
for column in range(4):
    axes[0, column].imshow(mixed[column].movedim(0, -1))
    for box in mixed_boxes[column]["boxes"]:
        left, top, right, bottom = box.tolist()
        axes[0, column].plot(
            [left, right, right, left, left], [top, top, bottom, bottom, top], color="white"
        )
    axes[1, column].imshow(mixed_masks[column], vmin=0, vmax=4, cmap="Set2")
for axis in axes.flat:
    axis.axis("off")
figure.tight_layout()
