"""Teacher-supervised mixing augmentation for PyTorch (SuperMix, CVPR 2021)."""

from supermix_transforms.batch import MixBatch
from supermix_transforms.data.sampling import ShardSampler
from supermix_transforms.data.shards import ShardDataset
from supermix_transforms.loader import MixLoader, SuperMixCollate
from supermix_transforms.losses import kd_loss, supermix_loss
from supermix_transforms.masks import mix_images
from supermix_transforms.mixing import supermix
from supermix_transforms.offline.generation import generate
from supermix_transforms.offline.replaying import replay
from supermix_transforms.results import ClassMaps, Mixed, Outcome, TeacherLabels
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler
from supermix_transforms.transforms import CutMix, MixUp, SuperMix

__version__ = "0.1.0"

__all__ = [
    "ClassMaps",
    "CutMix",
    "MixBatch",
    "MixLoader",
    "MixUp",
    "Mixed",
    "Outcome",
    "ShardDataset",
    "ShardSampler",
    "SolverSettings",
    "SuperMix",
    "SuperMixCollate",
    "TeacherLabeler",
    "TeacherLabels",
    "generate",
    "kd_loss",
    "mix_images",
    "replay",
    "supermix",
    "supermix_loss",
]
