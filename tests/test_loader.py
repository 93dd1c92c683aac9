"""SuperMixCollate and MixLoader: in plain loops, with workers, under Accelerate, around others."""

import copy
import os
import pickle
import subprocess
import sys
import tarfile
import traceback
from pathlib import Path

import pytest
import torch
from colours import (
    NUM_CLASSES,
    Pictures,
    PictureStream,
    Stubborn,
    WatchedTeacher,
    colour_teacher,
    pictures,
)
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from supermix_transforms import (
    CutMix,
    MixBatch,
    MixLoader,
    MixUp,
    Outcome,
    SuperMix,
    SuperMixCollate,
    TeacherLabeler,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def teacher():
    return colour_teacher()


def facts(batch):
    """All that a batch says, as tensors."""
    batch.mix()
    return {
        "images": batch.images,
        "labels": batch.labels,
        "mixed": batch.mixed,
        "targets": batch.targets,
        "teacher": batch.teacher.probs,
        "mixed_teacher": batch.mixed_teacher.probs,
        "sources": batch.sources,
        "weights": batch.weights,
        "masks": batch.masks,
        "outcome": batch.outcome,
        "steps": batch.steps,
    }


def epoch_of(loader):
    return [facts(batch) for batch in loader]


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for first, second in zip(one, other, strict=True):
        for name in first:
            assert torch.equal(first[name], second[name]), name


def differs(one, other, name="weights"):
    return any(not torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True))


def assert_first_raises(loader, error, message):
    with pytest.raises(error, match=message) as caught:
        next(iter(loader))
    # The traceback holds the loader's iterator in a cycle; when the garbage collector breaks it,
    # workers are told too late that they may go, and each is waited for for five seconds.
    traceback.clear_frames(caught.tb)


# A batch


@pytest.mark.parametrize("k", [2, 3])
def test_a_loader_hands_out_originals_mixes_and_labels_of_both(teacher, k):
    loader = DataLoader(Pictures(8, size=(16, 16)), 4, collate_fn=SuperMixCollate(teacher, k=k))
    batches = list(loader)
    assert len(batches) == 2
    for batch in batches:
        assert type(batch) is MixBatch
        assert repr(batch).endswith("not mixed yet)")
        assert batch.to("cpu") is batch
        assert batch.images.shape == batch.mixed.shape == (4, 3, 16, 16)
        assert batch.labels.tolist() == [0, 1, 2, 3]
        assert batch.labels.device == batch.mixed.device == batch.teacher.probs.device
        assert batch.sources.shape == batch.weights.shape == (4, k)
        assert batch.sources[:, 0].tolist() == [0, 1, 2, 3]
        assert batch.mask_logits.shape == (4, k, 16, 16)
        assert batch.masks.shape == (4, k, 16, 16)
        assert batch.converged.all()
        assert_close(batch.teacher.probs, teacher(batch.images).softmax(dim=1))
        assert_close(batch.mixed_teacher.probs, teacher(batch.mixed).softmax(dim=1))
        assert_close(batch.targets, batch.mixed_teacher.probs)
        assert not batch.targets.requires_grad


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_another_mix_is_labelled_by_the_teacher(teacher, mix):
    collate = SuperMixCollate(teacher, mix=mix(k=3))
    batch = next(iter(DataLoader(Pictures(4), 4, collate_fn=collate)))
    assert batch.sources.shape == (4, 3)
    assert batch.mask_logits is None
    assert_close(batch.mixed_teacher.probs, teacher(batch.mixed).softmax(dim=1))
    assert_close(batch.teacher.probs, teacher(batch.images).softmax(dim=1))
    assert batch.converged.all()


def test_a_mix_without_a_teacher_has_its_own_targets():
    collate = SuperMixCollate(None, mix=MixUp(num_classes=NUM_CLASSES), output="tuple")
    batch = next(iter(DataLoader(Pictures(4), 4, collate_fn=collate)))
    assert batch.teacher is None
    assert batch.mixed_teacher is None
    assert ((batch.targets > 0).sum(dim=1) == 2).all()
    assert_close(batch.to("cpu"), (batch.mixed, batch.targets))


@pytest.mark.parametrize("target", ["soft", "hard"])
@pytest.mark.parametrize("output", ["tuple", "concat", "dict"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_output_forms_of_collate_and_wrapper(teacher, output, target, wrapped):
    dataset, settings = Pictures(4), {"output": output, "target": target}
    if wrapped:
        loader = MixLoader(DataLoader(dataset, 4), SuperMix(teacher), **settings)
        form = next(iter(loader))
    else:
        loader = DataLoader(dataset, 4, collate_fn=SuperMixCollate(teacher, **settings))
        form = next(iter(loader)).to("cpu")
    whole = next(iter(DataLoader(dataset, 4, collate_fn=SuperMixCollate(teacher))))
    images, targets = (form["pixel_values"], form["labels"]) if output == "dict" else form
    wanted = whole.targets if target == "soft" else whole.targets.argmax(dim=1)
    assert torch.equal(images[-4:], whole.mixed)
    assert torch.equal(targets[-4:], wanted)
    if output == "concat":
        assert torch.equal(images[:4], whole.images)
        own = targets[:4].argmax(dim=1) if target == "soft" else targets[:4]
        assert own.tolist() == [0, 1, 2, 3]
    else:
        assert len(images) == 4


def test_a_plain_loop_unpacks_batches(teacher):
    for images, targets in DataLoader(Pictures(8), 4, collate_fn=SuperMixCollate(teacher)):
        assert images.shape == (4, 3, 9, 7)
        assert targets.shape == (4, NUM_CLASSES)


def test_a_plain_loop_unpacks_originals_and_mixes_where_it_asked_for_both(teacher):
    collate = SuperMixCollate(teacher, output="concat", target="hard")
    for batch in DataLoader(Pictures(8), 4, collate_fn=collate):
        images, targets = batch
        moved, moved_targets = batch.to("cpu")
        assert images.shape == (8, 3, 9, 7)
        assert torch.equal(images, moved)
        assert torch.equal(targets, moved_targets)


def test_the_wrapper_and_the_collate_make_the_same_batches(teacher):
    dataset = Pictures(9)
    collated = DataLoader(dataset, 4, collate_fn=SuperMixCollate(teacher, seed=3))
    wrapped = MixLoader(DataLoader(dataset, 4), SuperMix(teacher), seed=3)
    assert len(wrapped) == 3
    assert_same(epoch_of(collated), epoch_of(wrapped))


def test_the_wrapper_has_what_the_loader_has(teacher):
    loader = DataLoader(Pictures(9), 4)
    wrapped = MixLoader(loader, SuperMix(teacher))
    assert wrapped.dataset is loader.dataset
    assert wrapped.batch_size == 4
    with pytest.raises(AttributeError, match="no attribute 'mixup'"):
        wrapped.mixup  # noqa: B018
    assert copy.copy(wrapped).dataset is loader.dataset
    with pytest.raises(AttributeError, match=r"MixLoader.*_private"):
        wrapped._private  # noqa: B018


@pytest.mark.parametrize("mode", ["inference", "no_grad", "autocast", "grad"])
def test_the_readers_mode_does_not_change_a_mix(teacher, mode):
    loader = DataLoader(Pictures(4), 4, collate_fn=SuperMixCollate(teacher))
    expected = epoch_of(loader)
    modes = {
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "grad": torch.enable_grad(),
    }
    with modes[mode]:
        read = epoch_of(loader)
    assert_same(expected, read)
    assert not read[0]["mixed"].is_inference()
    assert not read[0]["mixed"].requires_grad


def test_samples_that_require_grad_are_stacked(teacher):
    weight = torch.ones(1, requires_grad=True)
    samples = [(image * weight, label) for image, label in Pictures(4)]
    batch = SuperMixCollate(teacher)(samples)
    assert not batch.images.requires_grad
    pickle.dumps(batch)
    assert batch.mixed.shape == (4, 3, 9, 7)


def test_a_deep_copy_of_a_collate_owns_its_batches_and_shares_the_teacher(teacher):
    collate = SuperMixCollate(teacher, seed=1)
    twin = copy.deepcopy(collate)
    twin.set_epoch(5)
    samples = list(Pictures(4))
    one, other = (pickle.loads(pickle.dumps(each(samples))) for each in (collate, twin))
    del samples
    assert differs([facts(one)], [facts(other)])
    assert torch.equal(one.teacher.probs, other.teacher.probs)


# Samples


def test_fields_of_mapping_samples_travel_as_extra(teacher):
    loader = DataLoader(Pictures(8, mapping=True), 4, collate_fn=SuperMixCollate(teacher))
    first, second = loader
    assert first.extra.keys() == {"__key__", "weight"}
    assert second.extra["__key__"] == ["key4", "key5", "key6", "key7"]
    assert second.extra["weight"].tolist() == [2, 2.5, 3, 3.5]
    assert second.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_field_that_can_not_leave_a_worker_is_an_error_and_no_wait_without_end(teacher, workers):
    def stack(samples):
        batch = default_collate(samples)
        return {**batch, "reader": {"open": lambda: batch}}

    collate = SuperMixCollate(teacher, collate=stack)
    dataset = Pictures(4, mapping=True)
    loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=collate, timeout=60 * workers)
    if workers == 0:
        (batch,) = loader
        assert batch.extra["reader"]["open"]()["__key__"] == batch.extra["__key__"]
        return
    assert_first_raises(loader, ValueError, "fields that a worker can hand on, got 'reader': ")


def test_a_samples_key_is_part_of_its_identity(teacher):
    image, _ = Pictures(1)[0]
    samples = [{"__key__": f"k{i}", "image": image, "label": 0} for i in range(4)]
    keyed = SuperMixCollate(None, mix=MixUp(num_classes=4))(samples)
    assert keyed.weights.unique(dim=0).shape[0] == 4
    for sample in samples:
        del sample["__key__"]
    plain = SuperMixCollate(None, mix=MixUp(num_classes=4))(samples)
    assert plain.weights.unique(dim=0).shape[0] == 1


def test_a_users_collate_and_labels_getter_are_used(teacher):
    def stack(samples):
        images, labels = default_collate(samples)
        return {"picture": images, "truth": labels, "source": "mine"}

    collate = SuperMixCollate(teacher, collate=stack, labels_getter=lambda batch: batch["truth"])
    batch = collate(list(Pictures(4)))
    assert batch.extra == {"source": "mine"}
    assert batch.labels.tolist() == [0, 1, 2, 3]
    assert batch.mixed.shape == (4, 3, 9, 7)


@pytest.mark.parametrize("output", ["batch", "tuple", "dict"])
def test_samples_without_labels_are_labelled_by_the_teacher(teacher, output):
    collate = SuperMixCollate(teacher, labels_getter=None, output=output)
    batch = next(iter(DataLoader(list(Pictures(4).images), 4, collate_fn=collate)))
    assert batch.labels is None
    assert batch.targets.shape == (4, NUM_CLASSES)
    batch.to("cpu")


def test_soft_labels_of_samples_are_kept_for_the_originals(teacher):
    images, labels = pictures(4)
    soft = torch.eye(NUM_CLASSES)[labels] * 0.9 + 0.025
    collate = SuperMixCollate(teacher, output="concat")
    _, targets = collate(list(zip(images, soft, strict=True))).to("cpu")
    assert_close(targets[:4], soft)


def test_uint8_samples_stay_uint8(teacher):
    images, labels = pictures(4, dtype=torch.uint8)
    batch = SuperMixCollate(teacher)(list(zip(images, labels, strict=True)))
    assert batch.images.dtype == batch.mixed.dtype == torch.uint8
    assert_close(batch.mixed_teacher.probs, teacher(batch.mixed / 255).softmax(dim=1))


# Errors


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            [(torch.rand(3, 4, 4), 0), (torch.rand(3, 4, 5), 1)],
            r"the samples could not be stacked: .*Expected tensors of one size; add v2\.ToImage",
        ),
        (
            [(Image.new("RGB", (4, 4)), 0), (Image.new("RGB", (4, 4)), 1)],
            r"the samples could not be stacked: .*Expected tensors of one size; add v2\.ToImage",
        ),
        (
            [{"image": torch.rand(3, 4, 4)}] * 2,
            r"Could not infer where the labels are.*keys \['image'\]\. Pass labels_getter=",
        ),
        ([torch.rand(3, 4, 4)] * 2, r"Could not infer where the labels are.*a tensor \(2, 3, 4, 4"),
        ([(torch.rand(4), 0)] * 2, r"images: expected a batch \(B, C, H, W\), got shape \(2, 4\)"),
        ([(torch.rand(3, 4, 4), "cat")] * 2, r"labels: expected a tensor, got .*labels_getter="),
        ([(torch.rand(3, 4, 4), 0.5)] * 2, r"an integer dtype, got torch\.float64"),
    ],
    ids=["ragged", "PIL", "no labels", "no labels in a tensor", "vectors", "names", "floats"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_do_not_fit_are_an_error(teacher, samples, message, workers):
    loader = DataLoader(samples, 2, num_workers=workers, collate_fn=SuperMixCollate(teacher))
    assert_first_raises(loader, ValueError, message)


@pytest.mark.parametrize("mix", [None, MixUp(), v2.MixUp(num_classes=9)])
def test_labels_the_teacher_does_not_know_are_an_error(teacher, mix):
    batch = SuperMixCollate(teacher, mix=mix)([(image, 7) for image in Pictures(4).images])
    with pytest.raises(ValueError, match=r"labels: expected class indices in 0\.\.3, got 7\.\.7"):
        batch.mix()
    loader = DataLoader([(torch.rand(3, 4, 4), 7)] * 2, 2)
    batch = next(iter(MixLoader(loader, labeler=TeacherLabeler(teacher))))
    with pytest.raises(ValueError, match=r"labels: expected class indices in 0\.\.3, got 7\.\.7"):
        _ = batch.teacher


def test_settings_out_of_range_are_errors(teacher):
    for name, value in (("output", "list"), ("target", "both"), ("unconverged", "ignore")):
        with pytest.raises(ValueError, match=f"{name}: expected one of .*, got '{value}'"):
            SuperMixCollate(teacher, **{name: value})
    with pytest.raises(ValueError, match=r"teacher: expected a module or callable, got None\. Pas"):
        SuperMixCollate(None)
    with pytest.raises(ValueError, match="k: expected an integer of at least 2"):
        SuperMixCollate(teacher, k=1)
    loader = DataLoader(Pictures(4), 4)
    with pytest.raises(ValueError, match="MixLoader: expected mix= or labeler=, got neither"):
        MixLoader(loader)
    with pytest.raises(ValueError, match="after: expected mixes to transform, got no mix="):
        MixLoader(loader, labeler=TeacherLabeler(teacher), after=v2.Identity())
    with pytest.raises(ValueError, match=r'output="concat": expected mixes .* got no mix='):
        MixLoader(loader, labeler=TeacherLabeler(teacher), output="concat")


def test_a_wrapper_around_a_collates_batches_is_an_error(teacher):
    loader = DataLoader(Pictures(4), 4, collate_fn=SuperMixCollate(teacher))
    with pytest.raises(ValueError, match="expected plain batches, got a MixBatch"):
        next(iter(MixLoader(loader, SuperMix(teacher))))


def test_a_collate_that_was_pickled_into_another_process_says_what_to_do(teacher, tmp_path):
    path = tmp_path / "collate.pickle"
    path.write_bytes(pickle.dumps(SuperMixCollate(teacher, after=v2.Identity())))
    code = (
        "import pickle, sys, torch; collate = pickle.load(open(sys.argv[1], 'rb'));"
        "collate([(torch.rand(3, 4, 4), 0), (torch.rand(3, 4, 4), 1)]).to('cpu')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 1
    assert "RuntimeError: this MixBatch has no mixer in this process" in process.stderr
    assert "Build the SuperMixCollate inside the function that runs on each rank" in process.stderr


# Batches that are short, or of one class


def test_a_short_last_batch_is_handed_on_unmixed(teacher):
    *whole, last = DataLoader(Pictures(7), 3, collate_fn=SuperMixCollate(teacher, k=3))
    assert all((batch.outcome != Outcome.UNMIXED).all() for batch in whole)
    assert last.outcome.tolist() == [Outcome.UNMIXED]
    assert torch.equal(last.mixed, last.images)
    assert_close(last.mixed_teacher.probs, last.teacher.probs)
    assert last.sources.tolist() == [[0, 0, 0]]
    assert last.masks.sum(dim=1).unique().tolist() == [1]


@pytest.mark.parametrize("kind", [SuperMix, MixUp, CutMix])
def test_a_batch_size_under_k_is_an_error_at_the_first_batch(teacher, kind):
    mix = kind(teacher=teacher, k=3)
    loader = DataLoader(Pictures(7), 2, collate_fn=SuperMixCollate(teacher, mix=mix))
    with pytest.raises(
        ValueError, match="batches of at least k=3 pictures, got 2 in the first one"
    ):
        next(iter(loader)).mix()
    with pytest.raises(ValueError, match="Use a larger batch_size or a smaller k"):
        next(iter(MixLoader(DataLoader(Pictures(7), 2), SuperMix(teacher, k=3), output="tuple")))


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("partners", ["random", "matched"])
def test_a_batch_of_one_class_is_no_error(teacher, k, partners):
    samples = [(image, 0) for image in Pictures(13).images[::4]]
    batch = SuperMixCollate(teacher, k=k, partners=partners)(samples)
    assert batch.converged.all()  # the criterion is for the set
    assert batch.targets.argmax(dim=1).tolist() == [0] * 4


# after=


def test_after_changes_the_picture_before_the_teacher_labels_it(teacher):
    samples = list(Pictures(4))
    plain = SuperMixCollate(teacher)(samples)
    after = SuperMixCollate(teacher, after=v2.Compose([lambda x: x.flip(0), v2.Identity()]))
    batch = after(samples)  # red and blue change places
    assert torch.equal(batch.mixed, plain.mixed.flip(1))
    assert_close(batch.mixed_teacher.probs, teacher(batch.mixed).softmax(dim=1))
    assert_close(batch.targets, batch.mixed_teacher.probs)
    assert_close(batch.teacher.probs, plain.teacher.probs)
    assert torch.equal(batch.masks, plain.masks)
    assert torch.equal(batch.converged, plain.converged)


def test_a_random_after_depends_on_seed_and_epoch_alone(teacher):
    samples = list(Pictures(4))

    def mixed(seed, epoch=0):
        collate = SuperMixCollate(teacher, seed=seed, after=v2.RandomErasing(p=1.0))
        collate.set_epoch(epoch)
        return collate(samples).mixed

    state = torch.random.get_rng_state()
    first = mixed(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert_close(mixed(0), first)
    assert not torch.equal(mixed(1), first)
    assert not torch.equal(mixed(0, epoch=1), first)


def test_after_is_drawn_for_each_picture(teacher):
    samples = list(Pictures(16))
    plain = SuperMixCollate(teacher)(samples).mixed
    flipped = SuperMixCollate(teacher, after=v2.RandomHorizontalFlip())(samples).mixed
    rows = [torch.equal(one, other) for one, other in zip(plain, flipped, strict=True)]
    assert {True, False} == set(rows)


@pytest.mark.parametrize("after", [lambda x: x[..., 1:], lambda x: x.double(), lambda x: x[:2]])
def test_after_must_keep_dtype_and_size(teacher, after):
    batch = SuperMixCollate(teacher, after=after)(list(Pictures(4)))
    with pytest.raises(ValueError, match=r"after: expected a picture \(3, 9, 7\) torch\.float32"):
        batch.mix()


@pytest.mark.parametrize("mix", [SuperMix, MixUp, CutMix])
def test_the_loaders_labeler_has_the_last_word(teacher, mix):
    images, labels = default_collate(list(Pictures(4)))
    labeler = TeacherLabeler(teacher, temperature=4.0)
    (batch,) = MixLoader([(images, labels)], mix(teacher=teacher), labeler=labeler)
    assert_close(batch.mixed_teacher.probs, labeler(batch.mixed).probs)
    assert_close(batch.targets, labeler(batch.mixed).probs)
    assert_close(batch.teacher.probs, labeler(images).probs)


def test_a_mixed_batch_moves_as_a_whole(teacher):
    batch = SuperMixCollate(teacher)(list(Pictures(4))).mix().to("meta")
    assert batch.images.device.type == batch.labels.device.type == "meta"
    assert batch.mixed.device.type == batch.targets.device.type == "meta"
    assert batch.teacher.probs.device.type == batch.mask_logits.device.type == "meta"


def test_a_copied_batch_of_a_wrapper_keeps_its_mixer(teacher):
    loader = MixLoader([default_collate(list(Pictures(4)))], SuperMix(teacher))
    (batch,) = loader
    assert_close(copy.deepcopy(batch).mixed, batch.mixed)


# Mixes that do not converge


def stubborn_batch(unconverged, count=8, **settings):
    collate = SuperMixCollate(Stubborn(), unconverged=unconverged, **settings)
    return collate(list(Pictures(count)))


def test_keep_hands_out_mixes_that_did_not_converge():
    batch = stubborn_batch("keep")
    assert len(batch.mixed) == 8
    assert 0 < batch.converged.sum() < 8
    assert set(batch.outcome.tolist()) == {Outcome.CONVERGED, Outcome.MAX_STEPS}


def test_drop_leaves_only_those_that_did():
    keep, drop = stubborn_batch("keep"), stubborn_batch("drop")
    rows = keep.converged
    assert len(drop) == 8
    assert drop.images.shape[0] == drop.labels.shape[0] == len(drop.teacher) == 8
    for name in ("mixed", "targets", "sources", "weights", "masks", "mask_logits", "steps"):
        assert torch.equal(getattr(drop, name), getattr(keep, name)[rows]), name
    assert drop.converged.all()
    assert len(drop.mixed_teacher) == rows.sum()
    assert drop.calls == pytest.approx(keep.calls)  # those of the dropped ones, too
    images, targets = stubborn_batch("drop", output="concat").to("cpu")
    assert len(images) == len(targets) == 8 + rows.sum()


def test_drop_may_leave_none_and_every_form_stands_it():
    samples = [pair for pair in Pictures(7) if pair[1] != 3]
    for output in ("batch", "tuple", "concat", "dict"):
        collate = SuperMixCollate(Stubborn(), unconverged="drop", output=output)
        form = collate(samples).to("cpu")
        if output == "concat":
            assert len(form[0]) == len(form[1]) == len(samples)
        batch = collate(samples).mix()
        assert batch.mixed.shape == (0, 3, 9, 7)
        assert batch.targets.shape == (0, NUM_CLASSES)
        assert batch.masks.shape == (0, 2, 9, 7)


def test_drop_keeps_a_short_last_batch():
    collate = SuperMixCollate(Stubborn(), unconverged="drop")
    first, _, last = DataLoader(Pictures(9), 4, collate_fn=collate)
    first.mix()
    assert last.outcome.tolist() == [Outcome.UNMIXED]
    assert len(last.mixed) == 1


def test_redraw_gives_failed_tuples_other_partners_and_counts_the_calls():
    keep, redraw = stubborn_batch("keep"), stubborn_batch("redraw")
    failed = ~keep.converged
    assert redraw.converged.sum() > keep.converged.sum()
    assert len(redraw.mixed) == 8
    assert torch.equal(redraw.mixed[~failed], keep.mixed[~failed])
    assert torch.equal(redraw.sources[~failed], keep.sources[~failed])
    cured = failed & redraw.converged
    assert cured.any()
    assert (redraw.sources[cured] != keep.sources[cured]).any(dim=1).all()
    still = ~redraw.converged
    assert torch.equal(redraw.mixed[still], keep.mixed[still])  # the first try, not the last
    more = redraw._mixes.forwards - keep._mixes.forwards
    assert (more[failed] > 0.9).all()
    assert (more[~failed] == 0).all()
    assert torch.equal(redraw.mixed, stubborn_batch("redraw").mixed)


def test_forwards_and_backwards_are_those_that_the_teacher_did():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.rows = Stubborn(), 0

        def forward(self, images):
            self.rows += len(images)
            return self.inner(images)

    for unconverged in ("keep", "redraw"):
        counting = Counting()
        collate = SuperMixCollate(counting, unconverged=unconverged)
        collate(list(Pictures(8))).mix()  # the first batch also looks for class maps
        counting.rows = 0
        batch = collate(list(Pictures(8))).mix()
        assert batch._mixes.forwards.sum().item() == pytest.approx(counting.rows, rel=1e-4)


# Labels only


def test_a_labeler_alone_labels_without_mixing(teacher):
    labeler = TeacherLabeler(teacher, top=2)
    for batch in MixLoader(DataLoader(Pictures(8), 4), labeler=labeler):
        assert torch.equal(batch.teacher.hard, batch.labels)
        assert batch.teacher.indices.shape == (4, 2)
        with pytest.raises(ValueError, match="labelled but not mixed"):
            _ = batch.mixed
    images, targets = next(
        iter(MixLoader(DataLoader(Pictures(8), 4), labeler=TeacherLabeler(teacher), output="tuple"))
    )
    assert torch.equal(images, Pictures(4).images)
    assert_close(targets, teacher(images).softmax(dim=1))
    form = next(
        iter(MixLoader(DataLoader(Pictures(8), 4), labeler=labeler, output="dict", target="hard"))
    )
    assert form["labels"].tolist() == [0, 1, 2, 3]


# Somebody else's transforms


def foreign():
    return v2.RandomChoice(
        [MixUp(k=3, num_classes=4), v2.MixUp(num_classes=4), v2.CutMix(num_classes=4)]
    )


@pytest.mark.parametrize("taught", [True, False])
def test_foreign_transforms_are_repeatable_and_leave_the_generator_as_found(teacher, taught):
    def batches(seed=0, epoch=0):
        collate = SuperMixCollate(teacher if taught else None, mix=foreign(), seed=seed)
        collate.set_epoch(epoch)
        made = [batch.mix() for batch in DataLoader(Pictures(40), 5, collate_fn=collate)]
        return [{"mixed": batch.mixed, "targets": batch.targets} for batch in made]

    first = batches()
    torch.manual_seed(77)
    assert_same(first, batches())
    assert differs(first, batches(seed=1), "mixed")
    assert differs(first, batches(epoch=1), "mixed")
    torch.manual_seed(5)
    collate = SuperMixCollate(teacher, mix=foreign())
    batch = collate(list(Pictures(5)))
    state = torch.get_rng_state()
    batch.mix()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_foreign_transform_that_works_in_place_leaves_the_originals(teacher):
    def blacken(images, labels):
        return images.zero_(), labels

    for loader in (
        DataLoader(Pictures(5), 5, collate_fn=SuperMixCollate(teacher, mix=blacken)),
        MixLoader(DataLoader(Pictures(5), 5), blacken, labeler=teacher),
    ):
        (batch,) = loader
        assert not batch.mixed.any()
        assert torch.equal(batch.images, torch.stack([image for image, _ in Pictures(5)]))


def test_pictures_that_were_not_mixed_are_not_the_originals_themselves(teacher):
    collate = SuperMixCollate(teacher, k=3, after=v2.RandomErasing(p=1.0, inplace=True))
    collate.take_short()
    batch = collate(list(Pictures(2)))
    assert (batch.outcome == Outcome.UNMIXED).all()
    assert not torch.equal(batch.mixed, batch.images)
    assert torch.equal(batch.images, torch.stack([image for image, _ in Pictures(2)]))


def test_what_somebody_elses_transform_calls_its_teacher_is_not_asked(teacher):
    class Own(v2.Transform):
        def __init__(self):
            super().__init__()
            self.teacher = torch.nn.Identity()

        def forward(self, images, labels):
            return images.flip(3), labels

    (batch,) = MixLoader(DataLoader(Pictures(5), 5), Own())
    assert torch.equal(batch.mixed, batch.images.flip(3))
    assert batch.mixed_teacher is None


def test_nobody_knows_a_foreign_mixs_sources(teacher):
    batch = SuperMixCollate(teacher, mix=foreign())(list(Pictures(5)))
    assert batch.sources is None
    assert batch.weights is None
    assert batch.masks is None
    assert batch.mask_logits is None
    assert batch.outcome.tolist() == [Outcome.CONVERGED] * 5
    assert_close(batch.targets, teacher(batch.mixed).softmax(dim=1))
    untaught = SuperMixCollate(None, mix=foreign())(list(Pictures(5)))
    assert untaught.teacher is None
    assert_close(untaught.targets.sum(dim=1), torch.ones(5))


def test_a_foreign_transform_that_returns_no_targets_is_labelled_by_the_teacher(teacher):
    flip = v2.RandomHorizontalFlip(p=1.0)
    batch = SuperMixCollate(teacher, mix=flip)(list(Pictures(5)))
    assert torch.equal(batch.mixed, batch.images.flip(-1))
    assert_close(batch.targets, teacher(batch.mixed).softmax(dim=1))
    without = SuperMixCollate(None, mix=flip)(list(Pictures(5)))
    with pytest.raises(ValueError, match="targets: these mixes have no labels"):
        _ = without.targets


# Workers and determinism


@pytest.fixture(scope="module")
def expected(teacher):
    loader = DataLoader(Pictures(11), 4, collate_fn=SuperMixCollate(teacher, seed=3))
    return epoch_of(loader)


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (0, {}),
        (1, {"multiprocessing_context": "fork"}),
        (2, {"multiprocessing_context": "fork"}),
        (2, {"multiprocessing_context": "fork", "persistent_workers": True}),
        (2, {"multiprocessing_context": "spawn", "persistent_workers": True}),
    ],
    ids=["0", "1 fork", "2 fork", "2 fork persistent", "2 spawn persistent"],
)
def test_the_batches_are_the_same_for_any_workers_and_new_each_epoch(
    teacher, expected, workers, settings
):
    collate = SuperMixCollate(teacher, seed=3, after=v2.Lambda(lambda x: x))  # not for pickle
    loader = DataLoader(Pictures(11), 4, num_workers=workers, collate_fn=collate, **settings)
    first = epoch_of(loader)
    assert_same(first, expected)
    collate.set_epoch(1)
    second = epoch_of(loader)
    assert differs(second, first)
    assert torch.equal(second[0]["images"], first[0]["images"])
    collate.set_epoch(0)
    assert_same(epoch_of(loader), expected)


def test_another_seed_draws_otherwise(teacher, expected):
    loader = DataLoader(Pictures(11), 4, collate_fn=SuperMixCollate(teacher, seed=4))
    assert differs(epoch_of(loader), expected)


def test_draws_do_not_depend_on_global_generators(teacher, expected):
    torch.manual_seed(123)
    loader = DataLoader(Pictures(11), 4, collate_fn=SuperMixCollate(teacher, seed=3))
    state = torch.get_rng_state()
    batch = loader.collate_fn(list(Pictures(4)))
    batch.mix()
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(epoch_of(loader), expected)


def test_the_teacher_runs_only_in_the_process_that_iterates(tmp_path):
    teacher = WatchedTeacher(str(tmp_path / "pids"))
    loader = DataLoader(
        Pictures(8),
        4,
        num_workers=2,
        multiprocessing_context="fork",
        collate_fn=SuperMixCollate(teacher),
    )
    assert len(epoch_of(loader)) == 2
    pids = (tmp_path / "pids").read_text().split()
    assert set(pids) == {str(os.getpid())}
    assert len(pids) >= 4


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # no CUDA
@pytest.mark.parametrize("workers", [0, 2])
def test_pin_memory_changes_nothing(teacher, expected, workers):
    loader = DataLoader(
        Pictures(11),
        4,
        num_workers=workers,
        pin_memory=True,
        collate_fn=SuperMixCollate(teacher, seed=3),
    )
    assert_same(epoch_of(loader), expected)


def test_pinning_touches_the_raw_parts_only(teacher, monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self)
    batch = SuperMixCollate(teacher)(list(Pictures(4)))
    assert pin_memory(batch) is batch
    assert len(pinned) == 2
    assert repr(batch).endswith("not mixed yet)")


# Accelerate


@pytest.fixture
def accelerate():
    """Accelerate with a state of its own, forgotten afterwards."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    yield accelerate
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("output", ["batch", "tuple", "concat", "dict"])
def test_a_prepared_loader_hands_out_any_form(accelerate, teacher, expected, output, workers):
    collate = SuperMixCollate(teacher, seed=3, output=output)
    accelerator = accelerate.Accelerator(cpu=True)
    loader = accelerator.prepare(
        DataLoader(Pictures(11), 4, num_workers=workers, collate_fn=collate)
    )
    batches = list(loader)
    assert len(batches) == 3
    for batch, wanted in zip(batches, expected, strict=True):
        if output == "batch":
            assert_same([facts(batch)], [wanted])
            continue
        images, targets = batch.values() if output == "dict" else batch
        assert torch.equal(images[-len(wanted["mixed"]) :], wanted["mixed"])
        assert torch.equal(targets[-len(wanted["mixed"]) :], wanted["targets"])


@pytest.mark.parametrize("kind", ["collate", "wrapper"])
def test_accumulation_syncs_on_the_last_batch_and_only_then_out_of_turn(accelerate, teacher, kind):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    student = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, NUM_CLASSES))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    if kind == "collate":
        collate = SuperMixCollate(teacher, output="concat")
        loader = DataLoader(Pictures(18), 4, num_workers=2, collate_fn=collate)
        student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    else:
        student, optimizer, inner = accelerator.prepare(
            student, optimizer, DataLoader(Pictures(18), 4)
        )
        loader = MixLoader(inner, SuperMix(teacher), output="concat")
    flags = []
    for images, targets in loader:
        with accelerator.accumulate(student):
            loss = nn.functional.cross_entropy(student(images), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        flags.append(accelerator.sync_gradients)
    assert flags == [False, True, False, True, True]


def test_skipped_batches_do_not_change_the_draws_of_the_rest(accelerate, teacher):
    accelerator = accelerate.Accelerator(cpu=True)
    collate = SuperMixCollate(teacher, seed=3)
    loader = accelerator.prepare(DataLoader(Pictures(11), 4, collate_fn=collate))
    whole = epoch_of(loader)
    resumed = SuperMixCollate(teacher, seed=3)
    loader = accelerator.prepare(DataLoader(Pictures(11), 4, collate_fn=resumed))
    assert_same(epoch_of(accelerate.skip_first_batches(loader, 1)), whole[1:])


@pytest.mark.parametrize("output", ["batch", "tuple"])
def test_gather_for_metrics_takes_what_a_batch_holds(accelerate, teacher, output):
    accelerator = accelerate.Accelerator(cpu=True)
    collate = SuperMixCollate(teacher, output=output)
    loader = accelerator.prepare(DataLoader(Pictures(11), 4, collate_fn=collate))
    rows = 0
    for batch in loader:
        pair = (batch.mixed, batch.targets) if output == "batch" else batch
        images, targets = accelerator.gather_for_metrics(pair)
        assert len(images) == len(targets)
        rows += len(images)
    assert rows == 11


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["stream", "map-style", "map-style, split"])
@pytest.mark.parametrize("output", ["batch", "tuple"])
def test_dispatch_mode_is_an_error_that_names_the_cure(accelerate, teacher, workers, kind, output):
    settings = accelerate.DataLoaderConfiguration(
        dispatch_batches=None if kind == "stream" else True, split_batches=kind.endswith("split")
    )
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=settings)
    samples = PictureStream(8) if kind == "stream" else Pictures(8, mapping=True)
    collate = SuperMixCollate(teacher, output=output)
    loader = DataLoader(samples, 4, num_workers=workers, collate_fn=collate)
    loader = accelerator.prepare(loader)
    assert type(loader).__name__ == "DataLoaderDispatcher"
    message = r"dispatch mode cannot carry a MixBatch.*dispatch_batches=False"
    assert_first_raises(loader, RuntimeError, message)


def test_the_cure_of_dispatch_mode_works(accelerate, teacher):
    settings = accelerate.DataLoaderConfiguration(dispatch_batches=False)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=settings)
    loader = DataLoader(PictureStream(8), 4, collate_fn=SuperMixCollate(teacher))
    batches = list(accelerator.prepare(loader))
    assert [len(batch.mixed) for batch in batches] == [4, 4]
    wrapped = MixLoader(DataLoader(PictureStream(8), 4), SuperMix(teacher))
    assert_same(epoch_of(batches), epoch_of(wrapped))


def test_a_dispatcher_left_by_break_does_not_block_other_loaders(accelerate, teacher):
    accelerator = accelerate.Accelerator(cpu=True)
    dispatched = accelerator.prepare(DataLoader(PictureStream(8), 2))
    for _ in dispatched:
        break
    from accelerate.state import GradientState

    assert type(GradientState().active_dataloader).__name__ == "DataLoaderDispatcher"
    for workers in (0, 2):
        loader = DataLoader(
            Pictures(8), 4, num_workers=workers, collate_fn=SuperMixCollate(teacher)
        )
        assert len(epoch_of(loader)) == 2
    assert len(epoch_of(MixLoader(DataLoader(Pictures(8), 4), SuperMix(teacher)))) == 2


def test_a_wrapper_around_a_dispatched_loader_of_plain_batches_works(accelerate, teacher):
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(PictureStream(8), 4))
    assert len(epoch_of(MixLoader(loader, SuperMix(teacher)))) == 2


def test_prepare_leaves_a_wrapper_alone(accelerate, teacher):
    wrapper = MixLoader(DataLoader(Pictures(8), 4), SuperMix(teacher))
    assert accelerate.Accelerator(cpu=True).prepare(wrapper) is wrapper


# The wrapper around other loaders


def test_the_wrapper_never_reads_ahead(teacher):
    read = []

    def source():
        for batch in DataLoader(Pictures(12), 4):
            read.append(len(read))
            yield batch

    for count, _ in enumerate(MixLoader(source(), SuperMix(teacher)), start=1):
        assert len(read) == count


def test_set_epoch_is_passed_on_and_draws_anew(teacher):
    class Told:
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter(DataLoader(Pictures(8), 4))

    told = Told()
    wrapper = MixLoader(told, SuperMix(teacher))
    first = epoch_of(wrapper)
    wrapper.set_epoch(4)
    assert told.epoch == 4
    assert differs(epoch_of(wrapper), first)
    MixLoader(DataLoader(Pictures(8), 4), SuperMix(teacher)).set_epoch(1)  # a DataLoader has none


def test_a_transforms_own_seed_wins_over_the_loaders(teacher):
    def batches(own, seed):
        loader = MixLoader(DataLoader(Pictures(8), 4), SuperMix(teacher, seed=own), seed=seed)
        return epoch_of(loader)

    assert_same(batches(7, 0), batches(7, 1))
    assert_same(batches(None, 7), batches(7, 0))
    assert differs(batches(None, 7), batches(None, 8))


def test_the_length_of_a_loader_without_one_is_a_type_error(teacher):
    with pytest.raises(TypeError, match="generator has no length"):
        len(MixLoader((batch for batch in ()), SuperMix(teacher)))


def thousand_classes():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory):
    """The first six samples of each of two shards of real pictures."""
    urls = []
    for path in sorted((data / "imagenet-sample").glob("*.tar"))[:2]:
        urls.append(str(tmp_path_factory.mktemp("shards") / path.name))
        with tarfile.open(path) as source, tarfile.open(urls[-1], "w") as target:
            for _ in range(12):  # cls and jpg
                member = source.next()
                target.addfile(member, source.extractfile(member))
    return urls


@pytest.mark.parametrize("workers", [0, 2])
def test_around_a_webdataset_loader(shards, workers):
    wds = pytest.importorskip("webdataset")
    transform = v2.Compose([v2.ToImage(), v2.Resize((24, 24))])

    def batches():
        dataset = (
            wds.WebDataset(shards, shardshuffle=False)
            .decode("pil", only=["jpg", "cls"])
            .to_tuple("jpg", "cls")
            .map_tuple(transform)
            .batched(3)
        )
        loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers)
        return epoch_of(MixLoader(loader, SuperMix(thousand_classes()), seed=2))

    made = batches()
    assert [len(batch["mixed"]) for batch in made] == [3] * 4
    assert made[0]["mixed"].dtype == torch.uint8
    assert made[0]["mixed"].shape == (3, 3, 24, 24)
    assert made[0]["targets"].shape == (3, 1000)
    assert_same(made, batches())


def test_around_a_timm_loader():
    data = pytest.importorskip("timm.data")
    dataset = FakeData(6, (3, 32, 32), num_classes=10)
    loader = data.create_loader(
        dataset, (3, 24, 24), 3, use_prefetcher=False, num_workers=0, persistent_workers=False
    )
    wrapper = MixLoader(loader, SuperMix(thousand_classes()), output="tuple")
    forms = list(wrapper)
    assert len(forms) == len(wrapper) == 2
    assert forms[0][0].shape == (3, 3, 24, 24)
    assert forms[0][1].shape == (3, 1000)


class Forgetful(torch.nn.Module):
    """NaN for dark pictures."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        logits = self.net(images)
        dark = images.mean(dim=(1, 2, 3)) < 0.5
        return torch.where(dark[:, None], torch.nan, logits)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("after", [None, lambda image: image])
@pytest.mark.parametrize("kind", [SuperMix, MixUp, CutMix])
def test_where_the_teacher_has_no_answer_the_label_is_that_of_the_sources(
    teacher, kind, after, temperature
):
    images, labels = torch.rand(8, 3, 9, 7), torch.arange(8) % NUM_CLASSES
    images[::2] *= 0.6
    labeler = TeacherLabeler(Forgetful(teacher), temperature=temperature)
    (batch,) = MixLoader([(images, labels)], kind(teacher=labeler), after=after, labeler=labeler)
    lost = batch.outcome == Outcome.NOT_FINITE
    assert lost.any()
    assert batch.targets.isfinite().all()
    assert batch.teacher.probs.isfinite().all()
    sources = labels[batch.sources[lost]]
    held = batch.targets[lost].gather(1, sources).sum(dim=1)
    same = sources[:, 0] == sources[:, 1]
    assert_close(torch.where(same, held / 2, held), torch.ones(int(lost.sum())), atol=1e-3, rtol=0)


def test_settings_of_supermix_beside_another_mix_are_an_error(teacher):
    for options in ({"k": 3}, {"partner_cap": 7}):
        with pytest.raises(
            ValueError, match="mix: expected k, alpha, partners, partner_cap and se"
        ):
            SuperMixCollate(teacher, mix=MixUp(teacher=teacher), **options)


def test_a_transform_that_loses_the_labels_is_an_error(teacher):
    batch = SuperMixCollate(teacher, mix=lambda images, labels: images)(list(Pictures(4)))
    with pytest.raises(ValueError, match=r"mix: expected a transform of \(images, labels\)"):
        batch.mix()


def test_originals_and_mixes_of_two_dtypes_are_not_put_together(teacher):
    def doubled(images, labels):
        return images.double(), labels

    collate = SuperMixCollate(teacher, mix=doubled, output="concat")
    with pytest.raises(
        ValueError, match=r"concat.*expected mixes of the originals' torch\.float32"
    ):
        collate(list(Pictures(4))).to("cpu")


def test_the_epoch_of_the_transform_is_the_loaders_or_its_own(teacher):
    images, labels = next(iter(DataLoader(Pictures(8), 8)))

    def sources(epoch: int, who: str) -> list:
        mix = SuperMix(teacher, seed=1)
        loader = MixLoader([(images, labels)], mix)
        {"transform": mix, "loader": loader}[who].set_epoch(epoch)
        return next(iter(loader)).sources.tolist()

    assert sources(1, "transform") == sources(1, "loader")
    assert len({str(sources(epoch, "transform")) for epoch in range(3)}) > 1
    choice = v2.RandomChoice([SuperMix(teacher), MixUp(teacher=teacher)])
    MixLoader([], choice, labeler=TeacherLabeler(teacher)).set_epoch(5)
    assert [part.epoch for part in choice.transforms] == [5, 5]
