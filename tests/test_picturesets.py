"""Folders, torchvision's data sets, views of them, and pictures in the place of mixes."""

import itertools
import pickle
import random

import pytest
import torch
import torchvision.datasets
from colours import NUM_CLASSES, colour_teacher, pictures
from PIL import Image
from tars import picture, write_colours
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from supermix_transforms import ShardDataset, SuperMixCollate, TeacherLabeler
from supermix_transforms.data.picturesets import (
    OtherPictures,
    PictureSet,
    Shown,
    class_indices,
    open_folder,
    open_torchvision,
)
from supermix_transforms.data.views import ViewDraws

CLASSES = ("blue", "green", "red")


@pytest.fixture
def folder(tmp_path):
    """Two pictures in each of three classes, one of them deeper, and a file that is no picture."""
    for number, name in enumerate(CLASSES):
        (tmp_path / name / "deeper").mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(picture(10 * number))
        (tmp_path / name / "deeper" / "b.jpg").write_bytes(picture(10 * number + 5, "JPEG"))
        (tmp_path / name / "notes.txt").write_text("no picture")
    return tmp_path


def shades(pictures: PictureSet) -> list[tuple[int, int, int]]:
    return [
        (index, image.getpixel((0, 0))[0], label)
        for index, image, label in pictures.readable(range(len(pictures)))
    ]


def test_subfolders_are_classes(folder):
    found = open_folder(folder)
    assert found.classes == CLASSES
    assert len(found) == 6
    seen = shades(found)
    assert [label for _, _, label in seen] == [0, 0, 1, 1, 2, 2]
    assert [shade for _, shade, _ in seen][::2] == [0, 10, 20]  # of the PNGs: exact
    assert [label for *_, label in found.readable([4, 1], labelled=False)] == [None, None]
    assert [found.label(index) for index in (0, 5)] == [0, 2]


def test_pictures_of_a_flat_folder_have_no_class(folder):
    (folder / "own.webp").write_bytes(picture(99, "WEBP"))
    found = open_folder(folder)
    assert found.classes is None
    assert len(found) == 7  # subfolders are searched as well
    assert {label for _, _, label in shades(found)} == {0}


def test_pictures_are_upright_and_rgb(tmp_path):
    turned = Image.new("L", (8, 4), 50)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "a.jpg", exif=exif)
    ((_, image, _),) = open_folder(tmp_path).readable([0])
    assert (image.size, image.mode) == ((4, 8), "RGB")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nowhere", "expected a folder of pictures"),
        (lambda path: path, "expected pictures"),  # nothing in it
        (lambda path: (path / "empty").mkdir() or path, "expected pictures"),  # a class of none
    ],
)
def test_folders_without_pictures_are_errors(tmp_path, make, message):
    with pytest.raises(ValueError, match=f"images: {message}"):
        open_folder(make(tmp_path))


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(picture(1)[:40])
    with pytest.raises(ValueError, match=r"expected a picture, got .*bad\.png"):
        list(open_folder(tmp_path).readable([0]))


def test_data_sets_of_torchvision_have_parts(tmp_path, monkeypatch):
    class Small:
        classes = ("x", "y")

        def __init__(self, root, train=True, transform=None):
            self.count = 4 if train else 2
            self.root = root

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            return Image.new("L", (3, 3), index), index % 2

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Small)
    found = open_torchvision("CIFAR100", tmp_path)
    assert (len(found), found.classes) == (4, ("x", "y"))
    assert [label for *_, label in found.readable([0, 3])] == [0, 1]
    assert next(found.readable([2]))[1].mode == "RGB"
    assert len(open_torchvision("CIFAR100", tmp_path, "test")) == 2
    with pytest.raises(ValueError, match=r'expected "train" or "test" of CIFAR100, got .val.'):
        open_torchvision("CIFAR100", tmp_path, "val")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("CIFAR100", "train", r"expected CIFAR100, 'train', in .*: Dataset not found"),
        ("Imagenette", "val", r"expected Imagenette, 'val', in .*Fetch it first"),
        ("Nothing", "train", "expected a data set of torchvision that has parts"),
        ("ImageFolder", "train", ".*a folder is --images"),
    ],
)
def test_data_sets_that_are_not_there_are_errors(tmp_path, name, split, message):
    with pytest.raises(ValueError, match=f"dataset: {message}"):
        open_torchvision(name, tmp_path, split)


# -- views -----------------------------------------------------------------------------------------


def view(augment=None, indices=range(20)) -> Shown:
    from io import BytesIO

    dataset = [
        (Image.open(BytesIO(picture(number, size=(40, 30)))), number) for number in range(20)
    ]
    draws = ViewDraws(v2.RandomCrop(16), seed=3)
    return Shown(PictureSet(dataset, None), draws, indices, augment)


def noise(image: torch.Tensor) -> torch.Tensor:
    return torch.randint_like(image, 256)


def test_a_view_has_picture_label_and_place():
    shown = view(indices=[7, 9])
    image, label, place = shown[1]
    assert (image.shape, image.dtype, label, place) == ((3, 16, 16), torch.uint8, 9, 1)


def test_labels_are_read_without_pictures(folder):
    (folder / "red" / "a.png").write_bytes(b"no picture")
    assert class_indices(open_folder(folder), [4, 0]).tolist() == [2, 0]


def test_augmentation_depends_on_epoch_and_sample_alone():
    shown = view(noise)
    torch.manual_seed(1)
    first = [image for image, *_ in shown.__getitems__([3, 4, 3])]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    random.seed(5)
    again = shown[3][0]
    assert torch.equal(first[0], again)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is put back
    shown.set_epoch(1)
    assert not torch.equal(shown[3][0], again)


def test_an_augmentation_hears_of_epochs():
    class Heard:
        epochs: tuple[int, ...] = ()

        def set_epoch(self, epoch):
            self.epochs += (epoch,)

        def __call__(self, image):
            return image

    heard = Heard()
    shown = view(heard)
    shown.set_epoch(4)
    assert heard.epochs == (4,)
    plain = view()
    plain.set_epoch(4)
    assert torch.equal(shown[3][0], plain[3][0])


# -- other pictures in the place of mixes ----------------------------------------------------------

OTHERS = pictures(12, size=(9, 7), seed=8)[0]


def beside(labels, collate_of, originals=None, **options):
    """A loader of six originals, each with one of twelve other pictures, and what it mixes by."""
    others = OtherPictures(TensorDataset(OTHERS, labels))
    dataset = others.beside(TensorDataset(*pictures(6)) if originals is None else originals)
    return DataLoader(dataset, 6, collate_fn=collate_of(others), **options)


def rows_of(batch) -> list[int]:
    return [int((mixed == OTHERS).all(dim=(1, 2, 3)).nonzero()) for mixed in batch.mixed]


@pytest.mark.parametrize("workers", [0, 2])
def test_other_pictures_are_labelled_by_the_teacher(workers):
    loader = beside(
        torch.zeros(12).long(),
        lambda others: SuperMixCollate(colour_teacher(), mix=others, target="hard"),
        num_workers=workers,
    )
    batch = next(iter(loader))
    assert torch.equal(batch.images, pictures(6)[0])
    assert torch.equal(batch.targets, torch.tensor(rows_of(batch)) % NUM_CLASSES)
    teacher = TeacherLabeler(colour_teacher())
    assert torch.equal(batch.mixed_teacher.hard, teacher(batch.mixed).hard)
    assert torch.equal(next(iter(loader)).mixed, batch.mixed)


def test_all_other_pictures_are_seen_before_one_is_seen_again():
    loader = beside(torch.zeros(12).long(), lambda others: SuperMixCollate(None, mix=others))
    epochs = []
    for epoch in range(4):
        loader.dataset.set_epoch(epoch)
        epochs.append(rows_of(next(iter(loader))))
    assert sorted(epochs[0] + epochs[1]) == sorted(epochs[2] + epochs[3]) == list(range(12))
    assert epochs[:2] != epochs[2:]
    small = OtherPictures(TensorDataset(OTHERS[:4], torch.zeros(4))).beside(loader.dataset)
    found = [
        int((small[place][-1].picture == OTHERS).all(dim=(1, 2, 3)).nonzero()) for place in range(6)
    ]
    assert sorted(found[:4]) == [0, 1, 2, 3]


def test_labels_that_mixes_were_stored_with_are_handed_on():
    probs = torch.rand(12, NUM_CLASSES).softmax(dim=1)
    loader = beside(probs, lambda others: SuperMixCollate(None, mix=others))
    batch = next(iter(loader))
    assert torch.equal(batch.targets, probs[rows_of(batch)])
    another = colour_teacher()  # labels the originals alone
    loader = beside(probs, lambda others: SuperMixCollate(another, mix=others))
    batch = next(iter(loader))
    assert torch.equal(batch.targets, probs[rows_of(batch)])
    assert torch.allclose(batch.mixed_teacher.probs, batch.targets)
    assert batch.calls == len(batch.images)


def test_samples_that_are_mappings_have_other_pictures_beside_them():
    images, labels = pictures(6)
    samples = [{"image": i, "label": n} for i, n in zip(images, labels, strict=True)]
    loader = beside(torch.zeros(12), lambda others: SuperMixCollate(None, mix=others), samples)
    batch = next(iter(loader))
    assert torch.equal(batch.images, images)
    assert len(set(rows_of(batch))) == 6


def test_batches_without_other_pictures_are_an_error():
    images, labels = pictures(6)
    collate = SuperMixCollate(None, mix=OtherPictures(TensorDataset(OTHERS)))
    batch = collate(list(zip(images, labels, strict=True)))
    with pytest.raises(ValueError, match="expected samples that bring another picture each"):
        batch.mix()


def test_views_of_other_pictures_change(tmp_path):
    write_colours(tmp_path)
    shown = Shown(ShardDataset(tmp_path), ViewDraws(v2.RandomCrop(16), seed=0), [0])
    images, labels = pictures(8, size=(16, 16), dtype=torch.uint8)
    dataset = OtherPictures(shown).beside(TensorDataset(images, labels))
    dataset.set_epoch(0)
    first = dataset[0][-1].picture
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[0][-1].picture)


def test_a_folder_goes_to_workers_that_are_spawned(tmp_path):
    to_pil_image(torch.zeros(3, 8, 8)).save(tmp_path / "a.png")
    pictures = pickle.loads(pickle.dumps(open_folder(tmp_path)))
    assert [index for index, *_ in pictures.readable([0])] == [0]


def test_labels_that_are_no_indices_are_an_error():
    pictures = PictureSet([(None, [1, 2])], ["a"])
    with pytest.raises(ValueError, match="labels: expected class indices, got others"):
        class_indices(pictures, [0])


def test_other_pictures_may_be_any_data_set():
    class Plain(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, row):
            return torch.full((3, 4, 4), row, dtype=torch.uint8), 0

    dataset = OtherPictures(Plain()).beside(TensorDataset(*pictures(5)))
    assert [int(dataset[place][-1].picture[0, 0, 0]) for place in range(3)] in [
        list(order) for order in itertools.permutations(range(3))
    ]
