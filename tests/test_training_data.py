"""Loaders of a training run: shards, folders, recipes, mixed shards, unlabelled pictures."""

import pytest
import torch
from colours import NUM_CLASSES, colour_teacher
from tars import picture, write_colours, write_tar
from torchvision.transforms.v2.functional import to_pil_image

from supermix_transforms import (
    MixBatch,
    ShardDataset,
    ShardSampler,
    SuperMix,
    TeacherLabeler,
    generate,
)
from supermix_transforms.data.picturesets import open_folder
from supermix_transforms.data.views import VIEWS
from supermix_transforms.training.data import (
    _tenth,
    mixed_pictures,
    of_recipes,
    online,
    open_source,
    open_validation,
    other_pictures,
)
from supermix_transforms.training.loss import sample_places

OPTIONS = {"batch_size": 5, "num_workers": 0}


@pytest.fixture
def shards(tmp_path):
    """22 pictures of one colour each, of 20 x 24 pixels."""
    (tmp_path / "shards").mkdir()
    write_colours(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def folder(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            (tmp_path / "photos" / name / f"{number}.png").write_bytes(
                picture(40 * number, size=(20, 20))
            )
    return tmp_path / "photos"


def labeler() -> TeacherLabeler:
    return TeacherLabeler(colour_teacher())


def ours(pictures, validation=None, **options):
    options = {"labeler": labeler(), "mix": None, "view": VIEWS["random-crop"], **options}
    return online(pictures, validation, size=16, **options, **OPTIONS)


def test_a_tenth_of_the_pictures_is_held_out_and_never_trained_on(shards):
    data = ours(ShardDataset(shards))
    kept = data.train.dataset.indices
    assert data.labels().tolist() == [i % 4 for i in kept]
    trained, judged = (
        [loader.dataset.indices[place] for *_, places in loader for place in places.tolist()]
        for loader in (data.train, data.validation)
    )
    assert len(judged) == 3
    assert judged == ours(ShardDataset(shards), seed=5).validation.dataset.indices
    assert sorted(trained + judged) == list(range(22))
    assert data.num_classes == NUM_CLASSES
    images, labels, _ = next(iter(data.validation))
    assert (images.shape, images.dtype) == ((3, 3, 16, 16), torch.uint8)
    assert labels.tolist() == [i % 4 for i in judged]


def test_what_is_held_out_has_no_period():
    held_out = _tenth(1000)
    assert len(held_out) == 100
    assert len({place % 10 for place in held_out}) == 10


def test_with_a_validation_set_nothing_is_held_out(shards):
    dataset = ShardDataset(shards)
    data = ours(dataset, dataset)
    assert len(data.train.dataset) == len(data.validation.dataset) == 22


def test_pictures_are_mixed_while_training(shards):
    teacher = labeler()
    data = ours(ShardDataset(shards), labeler=teacher, mix=SuperMix(teacher), target="hard")
    batch = next(iter(data.train))
    assert isinstance(batch, MixBatch)
    assert batch.converged.all()
    assert torch.equal(batch.targets, batch.mixed_teacher.hard)
    assert batch.targets.shape == (5,)


def test_an_augmentation_is_before_the_mixing(shards):
    black = torch.zeros_like
    teacher = labeler()
    data = ours(ShardDataset(shards), labeler=teacher, mix=SuperMix(teacher), augment=black)
    batch = next(iter(data.train))
    assert batch.images.max() == 0
    assert (batch.teacher.hard == 3).all()  # dark
    assert data.validation.dataset[0][0].max() > 0


def test_recipes_keep_their_groups_together_or_are_shuffled(shards, tmp_path):
    dataset = ShardDataset(shards, transform=VIEWS["random-crop"](16))
    generate(dataset, labeler(), tmp_path / "recipes", batch_size=5, unit_batches=1)
    most = []  # groups of five in a batch of five
    for window in (0, 1000):
        data = of_recipes(tmp_path / "recipes", dataset, None, window=window, **OPTIONS)
        batches = [batch.extra["index"].tolist() for batch in data.train]
        assert sorted(index for batch in batches for index in batch) == list(range(22))
        most.append(max(len({index // 5 for index in batch}) for batch in batches))
    assert most[0] <= 3 < most[1]


def test_what_comes_after_the_mixing_is_what_the_teacher_labels(shards):
    teacher = labeler()
    options = {"labeler": teacher, "mix": SuperMix(teacher)}
    batch = next(iter(ours(ShardDataset(shards), after=torch.zeros_like, **options).train))
    assert batch.images.max() > 0
    assert batch.mixed.max() == 0
    assert (batch.mixed_teacher.hard == 3).all()  # dark


def test_classes_of_a_folder_must_be_the_teachers(folder):
    pictures = open_source(images=str(folder))
    with pytest.raises(ValueError, match="expected the teacher's 4 classes, got 2: cats, dogs"):
        ours(pictures)
    assert ours(pictures, labelled=False).num_classes == NUM_CLASSES
    assert ours(pictures, labeler=None).num_classes == 2  # cross-entropy of their own


def test_pictures_without_classes_want_a_teacher(folder):
    flat = open_source(images=str(folder / "cats"))
    with pytest.raises(ValueError, match="expected a subfolder for each class"):
        ours(flat)
    assert ours(flat, labelled=False).num_classes == NUM_CLASSES


def test_shards_do_not_tell_how_many_classes_there_are(shards):
    dataset = ShardDataset(shards)
    with pytest.raises(ValueError, match="expected a number of classes"):
        ours(dataset, labeler=None)
    assert ours(dataset, labeler=None, num_classes=7).num_classes == 7


def test_recipes_give_originals_and_mixes(shards, tmp_path):
    dataset = ShardDataset(shards, transform=VIEWS["random-crop"](16))
    generate(dataset, colour_teacher(), tmp_path / "recipes", batch_size=6)
    data = of_recipes(tmp_path / "recipes", ShardDataset(shards), None, **OPTIONS)
    assert (data.validation, data.num_classes) == (None, NUM_CLASSES)
    assert data.labels().tolist() == [i % 4 for i in range(22)]
    batch = next(iter(data.train))
    assert batch.images.shape == batch.mixed.shape == (5, 3, 16, 16)
    places = sample_places(batch)
    assert torch.equal(data.labels()[places], batch.labels)
    assert not torch.equal(places, batch.extra["index"])  # which mix it is
    data = of_recipes(tmp_path / "recipes", ShardDataset(shards), ShardDataset(shards), **OPTIONS)
    assert next(iter(data.validation))[0].shape == (5, 3, 16, 16)
    with pytest.raises(ValueError, match="Pass it as --recipes"):
        mixed_pictures(tmp_path / "recipes", 16)


@pytest.mark.parametrize("top", [None, 2])
def test_mixed_shards_bring_their_labels(shards, tmp_path, top):
    dataset = ShardDataset(shards, transform=VIEWS["random-crop"](16))
    generate(dataset, colour_teacher(), tmp_path / "mixed", form="shards", batch_size=6, top=top)
    mix, num_classes = mixed_pictures(tmp_path / "mixed", 16)
    assert num_classes == NUM_CLASSES
    options = {"labeler": None, "mix": mix, "num_classes": num_classes}
    data = ours(ShardDataset(shards), target="hard", **options)
    batch = next(iter(data.train))
    assert batch.mixed.shape == (5, 3, 16, 16)
    known = labeler()(batch.mixed)
    assert torch.equal(batch.targets, known.hard)
    assert len(data.validation.dataset) == 3
    data = ours(ShardDataset(shards), hold_out=False, **options)
    assert (data.validation, len(data.train.dataset)) == (None, 22)
    with pytest.raises(ValueError, match=r"num-classes: expected the 4 classes of .*, got 9"):
        ours(ShardDataset(shards), mix=mix, num_classes=9)
    soft = ours(ShardDataset(shards), **options)
    batch = next(iter(soft.train))
    expected = TeacherLabeler(colour_teacher(), top=top)(batch.mixed).probs
    assert torch.allclose(batch.targets, expected, atol=2e-3)
    assert torch.allclose(batch.targets.sum(dim=1), torch.ones(5), atol=2e-3)
    next((tmp_path / "mixed").glob("*.tar")).unlink()
    with pytest.raises(ValueError, match=r"mixed-shards: expected \d tars in .*, got \d"):
        mixed_pictures(tmp_path / "mixed", 16)


@pytest.mark.parametrize("kind", ["tars", "folder"])
def test_the_teacher_labels_unlabelled_pictures(shards, tmp_path, kind):
    if kind == "tars":
        members = [(f"{number:03}.png", picture(20 * number)) for number in range(10)]
        words = [str(write_tar(tmp_path / "unlabelled.tar", members))]
    else:
        (tmp_path / "unlabelled").mkdir()
        for number in range(10):
            (tmp_path / "unlabelled" / f"{number}.png").write_bytes(picture(20 * number))
        words = [str(tmp_path / "unlabelled")]
    teacher = labeler()
    mix = other_pictures(words, VIEWS["center-crop"](16))
    data = ours(ShardDataset(shards), labeler=teacher, mix=mix, target="hard")
    batch = next(iter(data.train))
    assert batch.mixed.shape == (5, 3, 16, 16)
    assert (batch.mixed[:, 2] == 7).all()  # all pictures of tars.picture have this blue
    assert torch.equal(batch.targets, teacher(batch.mixed).hard)


def test_one_source_of_pictures_is_asked_for(shards, folder):
    with pytest.raises(ValueError, match="expected one of --shards, --images, --dataset, got none"):
        open_source()
    with pytest.raises(ValueError, match="got --shards and --images"):
        open_source(shards=[str(shards)], images=str(folder))
    assert len(open_source(shards=[str(shards)])) == 22
    with pytest.raises(ValueError, match="dataset: expected CIFAR100, 'train'"):
        open_source(dataset="torchvision/CIFAR100", root=str(folder))


def test_shards_without_labels_are_read_where_none_are_wanted(tmp_path):
    path = str(
        write_tar(
            tmp_path / "a.tar",
            [("a.png", picture(20, size=(20, 20))), ("b.png", picture(40, size=(20, 20)))],
        )
    )
    with pytest.raises(ValueError, match="has no label"):
        ours(open_source(shards=[path]))
    data = ours(open_source(shards=[path], labelled=False), labelled=False)
    assert next(iter(data.train))[0].shape == (1, 3, 16, 16)
    assert len(data.validation.dataset) == 1


def test_validation_is_of_the_same_kind(shards, folder):
    assert len(open_validation([str(shards)], shards=["elsewhere"])) == 22
    assert len(open_validation([str(folder)], images="elsewhere")) == 12
    with pytest.raises(ValueError, match="dataset: expected CIFAR100, 'test'"):
        open_validation(["test"], dataset="CIFAR100", root=str(folder))
    with pytest.raises(ValueError, match="expected one folder or part, got a b"):
        open_validation(["a", "b"], images="elsewhere")


def test_a_folder_to_validate_on_has_the_classes_of_the_training_folder(tmp_path):
    def folder(name: str, *classes: str):
        for label in classes:
            (tmp_path / name / label).mkdir(parents=True)
            to_pil_image(torch.zeros(3, 20, 20)).save(tmp_path / name / label / "a.png")
        return open_folder(tmp_path / name)

    train = folder("train", "ant", "bee", "cat")
    options = {"labeler": None, "view": VIEWS["center-crop"], "size": 16, "mix": None}
    assert online(train, folder("same", "ant", "bee", "cat"), **options, batch_size=2).validation
    for other in (folder("fewer", "bee", "cat"), folder("other", "ant", "bee", "dog")):
        with pytest.raises(ValueError, match="validation: expected the classes of the training"):
            online(train, other, **options, batch_size=2)


def test_shards_are_read_in_an_order_that_stays_near(tmp_path):
    write_colours(tmp_path)
    pictures = ShardDataset(tmp_path)
    options = {"labeler": None, "view": VIEWS["center-crop"], "size": 16, "mix": None}
    data = online(pictures, None, num_classes=4, batch_size=2, **options)
    sampler = data.train.sampler
    assert isinstance(sampler, ShardSampler)
    assert sum(sampler.lengths) == len(data.train.dataset)
    assert len(sampler.lengths) == len(pictures.lengths)
    assert sorted(sampler) == list(range(len(data.train.dataset)))
