"""
With Lightning
==============

Lightning moves a batch to the device by its ``.to``, which is where mixing runs. With
``output="concat"`` that hands out originals and mixes in one, so ``training_step`` is an
ordinary one.
"""

import lightning
import torch
from torch.utils.data import DataLoader

from supermix_transforms import SuperMixCollate, TeacherLabeler
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher

net = load_teacher("efficientnet-lite0")
teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
dataset = [(picture, label) for label, (_, picture) in enumerate(demo_pictures())]


class Student(lightning.LightningModule):
    """A linear classifier of small pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 1000)
        )

    def training_step(self, batch, batch_idx):
        images, targets = batch
        loss = torch.nn.functional.cross_entropy(self.network(images / 255), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


# %%
# The collate hears of epochs by a callback.


class Epochs(lightning.Callback):
    """Other partners and weights in each epoch."""

    def on_train_epoch_start(self, trainer, module):
        trainer.train_dataloader.collate_fn.set_epoch(trainer.current_epoch)


collate = SuperMixCollate(teacher, output="concat")
loader = DataLoader(dataset, batch_size=5, shuffle=True, collate_fn=collate)
trainer = lightning.Trainer(
    max_epochs=2,
    accelerator="cpu",
    callbacks=[Epochs()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
student = Student()
trainer.fit(student, loader)
print(f"loss {trainer.callback_metrics['loss']:.2f} after {trainer.global_step} steps")
