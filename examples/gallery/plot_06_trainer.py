"""
With the Hugging Face Trainer
=============================

``output="dict"`` hands out ``{"pixel_values", "labels"}``, the names of transformers' models. Three
settings matter: columns are kept, labels are not smoothed again, and the model's own loss, which
wants class indices, fits hard labels; for soft ones override ``compute_loss``.
"""

import tempfile

from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from supermix_transforms import SuperMixCollate, TeacherLabeler
from supermix_transforms.demo import demo_pictures
from supermix_transforms.models import load_teacher

net = load_teacher("efficientnet-lite0")
teacher = TeacherLabeler(net.model, mean=net.mean, std=net.std)
dataset = [(picture, label) for label, (_, picture) in enumerate(demo_pictures())]

# %%
# The Trainer's loaders go through Accelerate, so mixing runs where the batch is moved.

config = ResNetConfig(hidden_sizes=[16, 32], depths=[1, 1], embedding_size=16, num_labels=1000)


class StudentForImageClassification(ResNetForImageClassification):
    """Takes the pictures as they come, uint8; transformers finds the loss by the name's end."""

    def forward(self, pixel_values, labels=None, **options):
        return super().forward(pixel_values=pixel_values / 255, labels=labels, **options)


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=5,
        remove_unused_columns=False,
        label_smoothing_factor=0.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(
        StudentForImageClassification(config),
        arguments,
        train_dataset=dataset,
        # the model's own loss wants class indices; where it takes probabilities, leave target= out
        data_collator=SuperMixCollate(teacher, output="dict", target="hard"),
    )
    result = trainer.train()
print(f"loss {result.training_loss:.2f} after {result.global_step} steps")
