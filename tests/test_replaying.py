"""Mixes made again without a teacher: the same pixels, the same labels, in any batch."""

import contextlib
import pickle
import shutil
import weakref

import numpy as np
import pytest
import torch
from colours import NUM_CLASSES, colour_teacher
from tars import write_colours
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from supermix_transforms import (
    MixBatch,
    Outcome,
    ShardDataset,
    ShardSampler,
    SolverSettings,
    generate,
    mix_images,
    replay,
)
from supermix_transforms.data.shards import UnreadableError
from supermix_transforms.offline import forms, reading
from supermix_transforms.offline.recipes import RecipeReader
from supermix_transforms.offline.stored import part_of, parts_of

pytestmark = pytest.mark.usefixtures("one_thread")
VIEW = v2.Compose([v2.RandomCrop(16, padding=2), v2.RandomHorizontalFlip()])
COUNT = 22
KINDS = {
    "supermix": {},
    "matched": {"partners": "matched"},
    "three": {"k": 3},
    "mixup": {"mix": "mixup", "k": 3},
    "cutmix": {"mix": "cutmix", "k": 3},
    "paper": {"settings": SolverSettings(method="paper", mask_size=4)},
    "short": {"batch_size": 7, "k": 3},  # the last batch has one picture
    "dropped": {"unconverged": "drop", "settings": SolverSettings(mask_size=4, max_steps=0)},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    write_colours(folder, COUNT)
    return folder


class Made:
    """A folder of recipes, and what its mixes were when they were generated."""

    def __init__(self, folder, shards, monkeypatch, **options) -> None:
        self.folder, self.shards = folder, shards
        self.mixes: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        make = forms.RecipeForm.make

        def watch(recipes, batch):
            mixed, label = batch.result.mixed, batch.result.mixed_teacher
            for row, own in enumerate(mixed.sources[:, 0]):
                place = batch.epoch, int(batch.samples[own])
                self.mixes[place] = mixed.images[row], label.probs[row]
            return make(recipes, batch)

        monkeypatch.setattr(forms.RecipeForm, "make", watch)
        known = {"batch_size": 5, "unit_batches": 2, "settings": SolverSettings(mask_size=4)}
        options = {**known, "passes": 2, "top": 3, **options}
        dataset = ShardDataset(shards, transform=VIEW)
        self.summary = generate(dataset, colour_teacher(), folder, **options)

    def replay(self, **options):
        return replay(self.folder, ShardDataset(self.shards), **options)

    def known(self, batch: MixBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the mixes of a batch were; an index tells the pass."""
        first = len([place for place in self.mixes if place[0] == 0])
        own = batch.extra["sources"][:, 0].tolist()
        places = [
            (int(index >= first), sample)
            for index, sample in zip(batch.extra["index"].tolist(), own, strict=True)
        ]
        return [self.mixes[place] for place in places]


@pytest.fixture(scope="module", params=KINDS)
def made(request, shards, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp(request.param)
        yield Made(folder, shards, patch, **KINDS[request.param])


@pytest.fixture(scope="module")
def usual(shards, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Made(tmp_path_factory.mktemp("usual"), shards, patch)


@pytest.mark.parametrize(("batch_size", "workers"), [(5, 0), (3, 0), (44, 0), (8, 2)])
def test_pictures_and_labels_are_those_that_were_generated(made, batch_size, workers):
    mixes = made.replay()
    assert len(mixes) == made.summary.mixes == len(made.mixes)
    loader = DataLoader(mixes, batch_size, num_workers=workers, collate_fn=mixes.collate)
    seen = 0
    for batch in loader:
        for row, (picture, probs) in enumerate(made.known(batch)):
            assert torch.equal(batch.mixed[row], picture)
            assert torch.allclose(batch.targets[row], probs, atol=1e-3)
        seen += len(batch)
    assert seen == len(mixes)


def test_masks_and_originals_give_the_mixes(made):
    mixes = made.replay()
    batch = mixes.collate(mixes.__getitems__(range(len(mixes))))
    inside = (batch.sources >= 0).all(dim=1).nonzero().flatten()
    assert len(inside) >= 0.8 * len(mixes)
    again = mix_images(batch.images[batch.sources[inside]], batch.masks[inside])
    assert torch.equal(again, batch.mixed[inside])
    assert (batch.masks.sum(dim=1) - 1).abs().max() < 1e-6
    assert torch.equal(batch.sources[:, 0], torch.arange(len(mixes)))
    assert torch.allclose(batch.weights.sum(dim=1), torch.ones(len(mixes)))


def test_a_batch_carries_what_a_mixed_batch_does(usual):
    mixes = usual.replay()
    (batch,) = DataLoader(mixes, 100, num_workers=1, collate_fn=mixes.collate)
    assert isinstance(batch, MixBatch)
    assert batch.images.shape == batch.mixed.shape == (2 * COUNT, 3, 16, 16)
    assert batch.mixed.dtype == torch.uint8
    assert torch.equal(batch.labels, batch.extra["sources"][:, 0] % NUM_CLASSES)
    assert torch.equal(batch.teacher.hard, batch.labels)  # the teacher knows colours
    assert batch.targets.shape == (2 * COUNT, NUM_CLASSES)
    assert (batch.outcome == Outcome.CONVERGED).float().mean() > 0.9
    assert torch.equal(batch.converged, batch.outcome == Outcome.CONVERGED)
    assert batch.mask_logits.shape == (2 * COUNT, 2, 4, 4)
    assert batch.to("cpu") is batch
    images, targets = batch
    assert images is batch.mixed
    assert targets.shape == (2 * COUNT, NUM_CLASSES)


def test_forms(usual):
    def first(**options):
        mixes = usual.replay(**options)
        loader = DataLoader(mixes, 6, num_workers=1, collate_fn=mixes.collate)
        return next(iter(loader))

    whole = first()
    mixed, targets = first(output="tuple")
    assert torch.equal(mixed, whole.mixed)
    assert torch.equal(targets, whole.targets)
    assert torch.equal(first(output="tuple", target="hard")[1], whole.targets.argmax(dim=1))
    assert torch.equal(first(target="hard").targets, whole.targets.argmax(dim=1))
    found = first(output="dict")
    assert found.keys() == {"pixel_values", "labels"}
    images, targets = first(output="concat")
    assert torch.equal(images, torch.cat([whole.images, whole.mixed]))
    assert torch.equal(targets[:6].argmax(dim=1), whole.labels)
    with pytest.raises(ValueError, match="output: expected one of"):
        usual.replay(output="list")


@pytest.fixture
def reads(monkeypatch):
    """Samples that are read, and whether their labels are."""
    found = []
    read = ShardDataset.read

    def watch(self, index, *, labelled=True):
        found.append((index, labelled))
        return read(self, index, labelled=labelled)

    monkeypatch.setattr(ShardDataset, "read", watch)
    return found


def test_no_picture_of_a_batch_is_decoded_twice_and_neighbours_share(usual, reads):
    mixes = usual.replay()
    mixes.__getitems__(range(10))  # two groups
    assert len(reads) == len(set(reads)) == 10
    reads.clear()
    mixes.__getitems__(range(3))
    assert len(reads) == 4  # of a chain of pairs


def test_a_picture_of_two_passes_is_decoded_once_for_both_views(usual, reads):
    mixes = usual.replay()
    batch = mixes.collate(mixes.__getitems__(range(2 * COUNT)))
    assert len(reads) == len(set(reads)) == COUNT
    for row, (image, _) in enumerate(usual.known(batch)):
        assert torch.equal(batch.mixed[row], image)


@pytest.mark.parametrize("output", ["batch", "concat", "tuple", "dict"])
def test_labels_are_read_where_they_are_handed_out(usual, reads, output):
    mixes = usual.replay(output=output)
    mixes.collate(mixes.__getitems__(range(3)))
    assert {labelled for _, labelled in reads} == {output in ("batch", "concat")}


def numbers_of(mixes, batch_size):
    """The mixes that can be made, read one batch after the other."""
    for start in range(0, len(mixes), batch_size):
        with contextlib.suppress(ValueError):  # nothing is left of this batch
            asked = range(start, min(start + batch_size, len(mixes)))
            yield from [mix.number for mix in mixes.__getitems__(asked)]


@pytest.mark.parametrize("batch_size", [1, 4, 2 * COUNT])
def test_a_label_that_cannot_be_read_costs_the_same_mixes_in_any_batch(
    usual, shards, monkeypatch, batch_size
):
    label = ShardDataset._label

    def fail(dataset, name, members):
        if name.startswith("0007 "):
            raise UnreadableError("a torn label")
        return label(dataset, name, members)

    monkeypatch.setattr(ShardDataset, "_label", fail)
    mixes = replay(usual.folder, ShardDataset(shards, on_error="skip"))
    with pytest.warns(UserWarning, match="skipped: a"):
        left = list(numbers_of(mixes, batch_size))
    assert len(left) == 2 * COUNT - 4  # in each pass its own mix, and the one it is the partner of


def test_a_sampler_shuffles_groups_and_keeps_neighbours(usual):
    mixes = usual.replay()
    assert mixes.lengths == [5, 5, 5, 5, 2] * 2
    sampler = ShardSampler(mixes, window=0)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == list(range(2 * COUNT))
    steps = np.diff(orders[0])
    assert (steps == 1).sum() >= 2 * COUNT - 10


def test_mixes_are_had_in_any_order(made):
    mixes = made.replay()
    order = [i for step in (3, 2, 1) for i in range(len(mixes) - step, -1, -3)]  # each once
    assert sorted(order) == list(range(len(mixes)))
    batch = mixes.collate(mixes.__getitems__(order))
    for row, (image, _) in enumerate(made.known(batch)):
        assert torch.equal(batch.mixed[row], image)


def test_single_mixes_are_had_too(usual):
    mixes = usual.replay()
    one = mixes[-1]
    assert one.number == len(mixes) - 1
    assert torch.equal(one.mixed, mixes.__getitems__([len(mixes) - 1])[0].mixed)
    together = mixes.collate(mixes.__getitems__(range(5)))
    assert torch.equal(mixes.collate([mixes[i] for i in range(5)]).sources, together.sources)
    assert (together.sources >= 0).all()
    with pytest.raises(IndexError):
        mixes[len(mixes)]


def test_it_travels_to_spawned_workers(usual):
    mixes = pickle.loads(pickle.dumps(usual.replay()))
    assert torch.equal(mixes[3].mixed, usual.replay()[3].mixed)


# -- what can go wrong -----------------------------------------------------------------------------


@pytest.fixture
def copy(usual, tmp_path):
    """A folder of recipes and one of shards, to be damaged."""
    recipes = shutil.copytree(usual.folder, tmp_path / "recipes")
    return recipes, shutil.copytree(usual.shards, tmp_path / "shards")


def unit(recipes):
    return recipes / "000-000001.recipe"


def test_a_unit_that_is_missing_is_an_error_or_counted(copy):
    recipes, shards = copy
    unit(recipes).unlink()
    with pytest.raises(ValueError, match=r"expected 6 units in .* got 5.* it goes on"):
        replay(recipes, ShardDataset(shards))
    dataset = ShardDataset(shards, on_error="skip")
    with pytest.warns(UserWarning, match="got 5"):
        mixes = replay(recipes, dataset)
    assert len(mixes) == 2 * COUNT - 10
    assert dataset.skipped == 1


def test_a_group_that_is_damaged_is_an_error_or_counted(copy):
    recipes, shards = copy
    content = bytearray(unit(recipes).read_bytes())
    content[-1] ^= 1  # of the unit's last group
    unit(recipes).write_bytes(content)
    mixes = replay(recipes, ShardDataset(shards))
    with pytest.raises(ValueError, match=r"group 1 of .*its checksum does not fit"):
        mixes.__getitems__(range(10, 20))
    dataset = ShardDataset(shards, on_error="skip")
    mixes = replay(recipes, dataset)
    with pytest.warns(UserWarning, match="5 samples skipped"):
        assert len(mixes.__getitems__(range(10, 20))) == 5
    assert dataset.skipped == 5
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match="expected a batch of 2 mixes, got none"),
    ):
        mixes.__getitems__([15, 16])


def test_a_unit_of_other_settings_is_an_error(copy, shards, tmp_path):
    recipes, shards = copy
    dataset = ShardDataset(shards, transform=VIEW)
    other = generate(dataset, colour_teacher(), tmp_path / "o", batch_size=5, unit_batches=2)
    assert other.finished
    shutil.copy(tmp_path / "o" / unit(recipes).name, recipes)
    lines = (recipes / "manifest.jsonl").read_text().splitlines(keepends=True)
    theirs = (tmp_path / "o" / "manifest.jsonl").read_text().splitlines(keepends=True)
    (recipes / "manifest.jsonl").write_text("".join([*lines, theirs[1]]))
    with pytest.raises(ValueError, match="expected a unit of these settings"):
        replay(recipes, dataset)


def test_other_shards_are_an_error(copy, tmp_path):
    recipes, shards = copy
    write_colours(shards, COUNT + 2)
    with pytest.raises(
        ValueError, match=r"expected the 3 shards .* of which colours-0.tar differs"
    ):
        replay(recipes, ShardDataset(shards))
    with pytest.raises(ValueError, match=r"expected the 3 shards .* got 2"):
        replay(recipes, ShardDataset([shards / "colours-0.tar", shards / "colours-1.tar"]))
    with pytest.raises(TypeError, match=r"dataset: expected a ShardDataset .* got str"):
        replay(recipes, str(shards))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_picture_that_can_not_be_read_any_more(usual, shards, monkeypatch, on_error):
    from supermix_transforms.data import shards as module

    read_picture = module.read_picture

    def fail(name, content):
        if name.startswith("0007 "):
            raise ValueError("a torn picture")
        return read_picture(name, content)

    monkeypatch.setattr(module, "read_picture", fail)
    dataset = ShardDataset(shards, on_error=on_error)
    mixes = replay(usual.folder, dataset)
    if on_error == "raise":
        with pytest.raises(ValueError, match="a torn picture"):
            mixes.__getitems__(range(2 * COUNT))
        return
    with pytest.warns(UserWarning, match="skipped"):
        found = mixes.__getitems__(range(COUNT))
    # its own mix, and the one it is the partner of
    assert len(found) == COUNT - 2
    assert dataset.skipped == 3


def test_a_group_of_which_nothing_can_be_read_does_not_end_the_batch(usual, shards, monkeypatch):
    from supermix_transforms.data import shards as module

    dataset = ShardDataset(shards, on_error="skip")
    mixes = replay(usual.folder, dataset)
    group = mixes._groups[0]
    gone = {dataset.name(int(sample)).rpartition("/")[2] for sample in group.sample}
    read_picture = module.read_picture

    def fail(name, content):
        if name.split()[0] in gone:
            raise ValueError("a torn picture")
        return read_picture(name, content)

    monkeypatch.setattr(module, "read_picture", fail)
    with pytest.warns(UserWarning, match="skipped"):
        assert [mix.number for mix in mixes.__getitems__([0, 1, 5, 6])] == [5, 6]


def test_pictures_that_are_decoded_otherwise_are_an_error(usual, monkeypatch):
    mixes = usual.replay()
    monkeypatch.setattr(type(mixes._view), "cut", lambda *_: np.zeros((3, 16, 16), dtype="u1"))
    with pytest.raises(ValueError, match=r"expected the pixels that were generated.*'pillow'"):
        mixes.__getitems__(range(5))


def test_mixed_shards_are_no_recipes(shards, tmp_path):
    dataset = ShardDataset(shards, transform=VIEW)
    generate(dataset, colour_teacher(), tmp_path, form="shards", batch_size=11)
    with pytest.raises(ValueError, match=r"got 'shards'.*Read mixed shards with webdataset"):
        replay(tmp_path, dataset)


def test_a_folder_that_is_none_is_an_error(shards, tmp_path):
    with pytest.raises(ValueError, match="expected a folder that `supermix generate` wrote"):
        replay(tmp_path / "nowhere", ShardDataset(shards))


def test_settings_made_up_are_an_error(copy):
    recipes, shards = copy
    import json

    path = recipes / "settings.json"
    for change in ({"view": {"size": [1 << 20, 4]}}, {"view": None}, {"num_classes": 10**9}):
        content = json.loads(path.read_text())
        content["settings"] |= change
        (recipes / "settings.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="recipes: expected"):
            replay(recipes, ShardDataset(shards))


def test_the_teacher_is_not_asked(usual, monkeypatch):
    monkeypatch.setattr("supermix_transforms.member.Member.__call__", None)
    assert len(usual.replay().__getitems__(range(5))) == 5


@pytest.mark.parametrize("output", ["batch", "tuple"])
def test_a_shuffled_batch_holds_four_groups_at_most(usual, monkeypatch, output):
    groups, most = [], []
    read = RecipeReader.group

    def count():
        for held in zip(*groups, strict=True):  # the groups, and an array of each
            most.append(sum(each() is not None for each in held))

    def watch(reader, number):
        group = read(reader, number)
        groups.append((weakref.ref(group), weakref.ref(group.grid)))
        count()
        return group

    def collate(batch):
        count()
        return mixes.collate(batch)

    monkeypatch.setattr(RecipeReader, "group", watch)
    monkeypatch.setattr(reading, "KEPT", 4)
    mixes = usual.replay(output=output)
    every = len(mixes)
    batches = list(DataLoader(mixes, every, shuffle=True, collate_fn=collate))
    count()
    assert len(batches) == 1
    assert len(groups) == len(mixes.lengths) == 10
    assert max(most) == 4


def test_a_part_of_a_group_has_the_records_of_its_mixes(made):
    mixes = made.replay()
    number = int(np.argmax(mixes.lengths))
    group, rows = mixes._groups[number], [3, 0, 4]
    part = part_of(group, rows)
    for row, place in enumerate(rows):
        for name in ("weight", "outcome", "steps", "index", "log_prob", "rest", "kind"):
            assert np.array_equal(vars(part)[name][row], vars(group)[name][place])
        for name in ("sample", "crop", "flip", "original_index", "original_log_prob"):
            ours, theirs = vars(part)[name][part.source[row]], vars(group)[name]
            assert np.array_equal(ours, theirs[group.source[place]])
    masks = [parts_of(each, which, (16, 16)) for each, which in ((part, range(3)), (group, rows))]
    assert np.array_equal(*masks)
    assert len(part.sample) == len(set(group.source[rows].flatten().tolist()))
    assert not any(np.shares_memory(vars(part)[name], vars(group)[name]) for name in vars(group))
