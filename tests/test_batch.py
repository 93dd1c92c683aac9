"""What travels: finding pictures and labels, their checks, identities, and MixBatch's laws."""

import copy
import dataclasses
import gc
import pickle
import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from supermix_transforms.batch import MixBatch, MixResult, register
from supermix_transforms.inputs import (
    check_images,
    check_labels,
    find_images,
    find_labels,
    identities,
    sample_keys,
    split_batch,
)
from supermix_transforms.results import Mixed, Outcome, TeacherLabels

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = torch.rand(5, 3, 9, 7)
LABELS = torch.tensor([0, 1, 2, 3, 1])


class Pair(NamedTuple):
    pictures: torch.Tensor
    classes: torch.Tensor


# Finding labels


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        (IMAGES, LABELS, "more"),
        Pair(IMAGES, LABELS),
        {"image": IMAGES, "labels": LABELS},
        {"image": IMAGES, "Label": LABELS},
        {"image": IMAGES, "my_labels": LABELS},
        OrderedDict(labels=LABELS, image=IMAGES),
        {"label_names": "no", "LABELS": LABELS, "image": IMAGES},
        (IMAGES, {"labels": LABELS, "area": 3}),
        {"jpg": IMAGES, "cls": LABELS},
        {"x": IMAGES, "target": LABELS},
        {"x": IMAGES, "Targets": LABELS},
        {0: "number", "x": IMAGES, "label": LABELS},
        {"target": "boxes", "x": IMAGES, "cls": "class", "fine_label": LABELS},
    ],
    ids=lambda batch: (
        type(batch).__name__ if not isinstance(batch, Mapping) else "-".join(map(str, batch))
    ),
)
def test_labels_are_found_where_torchvision_would_look_and_under_cls_and_target(batch):
    assert find_labels(batch) is LABELS


def test_labels_getter_is_asked_with_the_whole_batch():
    batch = (IMAGES, "other", LABELS)
    assert find_labels(batch, lambda whole: whole[2]) is LABELS


def test_labels_getter_none_means_that_there_are_none():
    assert find_labels((IMAGES, LABELS), None) is None


@pytest.mark.parametrize("batch", [IMAGES, [IMAGES], (IMAGES,), {"image": IMAGES}, {}, 3, None])
def test_labels_that_are_nowhere_are_an_error_with_a_next_step(batch):
    with pytest.raises(ValueError, match=r"Could not infer where the labels are.*labels_getter="):
        find_labels(batch)


def test_unknown_labels_getter_is_an_error():
    with pytest.raises(ValueError, match=r'labels_getter: expected "default", a callable or None'):
        find_labels((IMAGES, LABELS), "deafult")


# Finding pictures


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES, LABELS),
        {"labels": LABELS, "image": IMAGES},  # torchvision would mix the labels
        {"labels": torch.rand(5, 4), "depth": torch.rand(5, 9, 7), "image": IMAGES},
        (LABELS, {"deep": [IMAGES]}),
        (tv_tensors.Mask(torch.zeros(5, 1, 9, 7)), IMAGES),
    ],
)
def test_pictures_are_the_first_plain_batch_of_four_dimensions(batch):
    (found,) = find_images(batch, LABELS)
    assert found is IMAGES


def test_tv_images_are_the_pictures_all_of_them_and_no_plain_tensor():
    first, second = tv_tensors.Image(torch.rand(5, 3, 9, 7)), tv_tensors.Image(IMAGES)
    found = find_images({"plain": IMAGES, "a": first, "b": [second]})
    assert len(found) == 2
    assert found[0] is first
    assert found[1] is second


def test_labels_of_four_dimensions_are_not_taken_for_pictures():
    labels = torch.rand(5, 3, 9, 7)
    assert find_images((labels, IMAGES), labels)[0] is IMAGES


@pytest.mark.parametrize("batch", [{"image": "text"}, ([], 3), Image.new("RGB", (4, 4))])
def test_no_picture_is_an_error_with_a_next_step(batch):
    with pytest.raises(ValueError, match=r"expected a batch of pictures.*got .*v2\.ToImage"):
        find_images(batch)


def test_split_batch_names_what_is_left_by_key_or_place():
    images, labels, extra = split_batch([IMAGES, LABELS, "a", "b"], "default")
    assert images is IMAGES
    assert labels is LABELS
    assert extra == {2: "a", 3: "b"}
    batch = {"key": ["a"], "labels": LABELS, "image": IMAGES}
    assert split_batch(batch, "default")[2] == {"key": ["a"]}
    assert split_batch(IMAGES, None)[1:] == (None, {})


# Checks


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([1, 2], r"expected a tensor \(B, C, H, W\), got list\. Convert"),
        (IMAGES[0], r"expected a batch \(B, C, H, W\), got shape \(3, 9, 7\)\..*unsqueeze"),
        (IMAGES[None], r"expected a batch .*got shape \(1, 5, 3, 9, 7\)"),
        (IMAGES[:0], r"expected at least one picture with pixels, got shape \(0, 3, 9, 7\)\. Skip"),
        (IMAGES[:, :, :0], r"expected at least one picture with pixels, got shape \(5, 3, 0, 7\)"),
        (IMAGES.long(), r"expected uint8 or a floating dtype, got torch\.int64\. Convert"),
        (IMAGES.bool(), r"expected uint8 or a floating dtype, got torch\.bool"),
        (IMAGES.to(torch.complex64), r"expected uint8 or a floating dtype, got torch\.complex64"),
    ],
)
def test_pictures_that_can_not_be_mixed_say_why(images, message):
    with pytest.raises(ValueError, match="^images: " + message):
        check_images(images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_pictures_that_can_be_mixed_come_back_themselves(dtype):
    images = IMAGES.to(dtype)
    assert check_images(images) is images


def test_pictures_made_under_inference_mode_come_back_usable():
    with torch.inference_mode():
        images = IMAGES + 1
        checked = check_images(images)
    assert not checked.is_inference()
    assert_close(checked, IMAGES + 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("cat", r"expected a tensor, got str\. Pass class indices"),
        ([{"boxes": 1}] * 5, r"expected a tensor, got list"),
        (
            LABELS.view(5, 1, 1),
            r"expected class indices \(B,\) or probabilities .*\(5, 1, 1\)\. Flatten",
        ),
        (torch.tensor(3), r"expected class indices \(B,\) or .*got shape \(\)"),
        (LABELS[:4], r"expected one for each of the 5 pictures, got shape \(4,\)\. Check"),
        (torch.rand(4, 3), r"expected one for each of the 5 pictures, got shape \(4, 3\)"),
        (
            torch.rand(5, 3),
            r"expected probabilities of 4 classes, got shape \(5, 3\)\. Pass num_classes=3",
        ),
        (
            LABELS.float(),
            r"expected class indices of an integer dtype, got torch\.float32 \(5,\)\. Convert",
        ),
        (LABELS.bool(), r"expected class indices of an integer dtype, got torch\.bool"),
        (LABELS + 1, r"expected class indices in 0\.\.3, got 1\.\.4\. Is num_classes right"),
        (LABELS - 1, r"expected class indices in 0\.\.3, got -1\.\.2\. Is num_classes right"),
    ],
)
def test_labels_that_do_not_fit_say_why(labels, message):
    with pytest.raises(ValueError, match="^labels: " + message):
        check_labels(labels, 5, 4)


def test_labels_become_int64_indices_or_floating_probabilities():
    assert check_labels(LABELS.to(torch.int16), 5, 4).dtype == torch.int64
    assert check_labels([0, 1, 2, 3, 1], 5).tolist() == LABELS.tolist()
    assert check_labels(np.array([0, 1, 2, 3, 1]), 5).tolist() == LABELS.tolist()
    half = torch.rand(5, 4).half()
    assert check_labels(half, 5, 4) is half
    assert check_labels(torch.eye(5, 4).long(), 5, 4).dtype == torch.float32


# Identities


def test_a_sample_has_one_identity_in_any_batch():
    images = torch.rand(6, 3, 33, 41)
    whole = identities(images)
    assert whole.dtype == torch.int64
    assert whole.unique().numel() == 6
    order = torch.tensor([4, 0, 5])
    assert identities(images[order]).tolist() == whole[order].tolist()
    assert identities(images[2:3]).tolist() == whole[2:3].tolist()
    assert identities(images.to(memory_format=torch.channels_last)).tolist() == whole.tolist()


def test_identities_are_pinned_so_that_another_version_draws_the_same():
    images = torch.arange(12, dtype=torch.uint8).view(2, 1, 2, 3)
    assert identities(images).tolist() == [-8733602325793864250, -248267594205435020]
    assert identities(images, ["a", "b"]).tolist() == [-3363968419850569901, -41990240255536048]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_another_crop_of_a_sample_has_another_identity(dtype):
    image = (torch.rand(1, 3, 40, 40) * 255).to(dtype)
    crops = [image[..., y : y + 32, x : x + 32] for y in (0, 1, 8) for x in (0, 1, 8)]
    assert len({identities(crop).item() for crop in crops}) == 9


def test_a_key_changes_an_identity():
    images = IMAGES[:1].expand(3, -1, -1, -1)
    assert identities(images).unique().numel() == 1
    assert identities(images, ["a", "b", "a"]).unique().numel() == 2


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 1), (1, 32, 32), (3, 19, 18), (1, 1025, 1)])
def test_pictures_of_any_size_have_an_identity(size):
    assert identities(torch.rand(2, *size)).unique().numel() == 2


def test_identities_write_into_nothing():
    images = torch.rand(2, 3, 9, 7, requires_grad=True)
    version = images._version
    identities(images)
    assert images._version == version
    assert images.grad is None


@pytest.mark.parametrize(
    ("batch", "keys"),
    [
        ({"__key__": ["a", "b"], "index": torch.tensor([1, 2])}, ["a", "b"]),
        ({"index": torch.tensor([7, 8])}, [7, 8]),
        ({"idx": (7, 8)}, (7, 8)),
        ({"index": torch.rand(2, 2), "image": IMAGES}, None),
        ((IMAGES, LABELS), None),
    ],
)
def test_keys_of_samples_are_their_key_or_index(batch, keys):
    assert sample_keys(batch) == keys


# MixBatch


class Halver:
    """A mixer whose mixes are half as bright, with known labels; counts its calls."""

    def __init__(self, output="batch", target="soft", mixes=True, labels=True):
        self.output, self.target, self.mixes, self.calls = output, target, mixes, 0
        self.error = None

    def mix(self, images, labels, ids, extra):
        self.calls += 1
        if self.error is not None:
            raise self.error
        teacher = TeacherLabels.from_logits(images.float().mean(dim=(2, 3)))
        if not self.mixes:
            return MixResult(images, labels, teacher, None, None, teacher.probs)
        count = len(images)
        sources = torch.stack([torch.arange(count), torch.arange(count).roll(1)], dim=1)
        masks = torch.full((count, 2, *images.shape[2:]), 0.5)
        mixed = Mixed.unsearched((images / 2).to(images.dtype), sources, masks, Outcome.CONVERGED)
        probs = TeacherLabels.from_logits(mixed.images.float().mean(dim=(2, 3)) * 9)
        return MixResult(images, labels, teacher, mixed, probs, probs.probs)


def make_batch(mixer, labels=LABELS % 3, images=IMAGES):
    return MixBatch(images, labels, ids=identities(images), extra={"key": ["a"]}, mixer=mixer)


READERS = [
    "teacher",
    "mixed",
    "mixed_teacher",
    "targets",
    "sources",
    "weights",
    "mask_logits",
    "masks",
    "outcome",
    "converged",
    "steps",
]


def test_a_batch_is_a_leaf_for_whatever_walks_containers():
    batch = make_batch(Halver())
    assert not isinstance(batch, (Mapping, Sequence, tuple, list, dict))
    assert not dataclasses.is_dataclass(batch)
    assert tree_leaves([batch]) == [batch]
    for name in ("keys", "items", "__getitem__", "_fields"):
        assert not hasattr(batch, name)


@pytest.mark.parametrize("name", READERS)
def test_any_reader_mixes_and_only_the_first_does(name):
    mixer = Halver()
    batch = make_batch(mixer)
    assert mixer.calls == 0
    getattr(batch, name)
    assert mixer.calls == 1
    for each in READERS:
        getattr(batch, each)
    batch.mix().to("cpu")
    assert mixer.calls == 1


def test_originals_length_repr_and_moving_do_not_mix():
    mixer = Halver()
    batch = make_batch(mixer)
    assert batch.images is IMAGES
    assert_close(batch.labels, LABELS % 3)
    assert len(batch) == 5
    assert batch.extra == {"key": ["a"]}
    assert repr(batch) == "MixBatch(5 pictures (3, 9, 7), not mixed yet)"
    assert batch.to("cpu", non_blocking=True) is batch
    copied = copy.copy(batch), pickle.loads(pickle.dumps(batch))
    assert mixer.calls == 0
    assert len(copied[0]) == len(copied[1]) == 5
    batch.mix()
    assert repr(batch) == "MixBatch(5 pictures (3, 9, 7), mixed)"


def test_a_batch_unpacks_to_mixes_and_targets():
    images, targets = make_batch(Halver())
    assert_close(images, IMAGES / 2)
    assert targets.shape == (5, 3)


def test_a_pickled_batch_holds_its_raw_parts_and_no_mixer():
    mixer = Halver()
    mixer.secret = lambda: None  # cannot be pickled
    batch = make_batch(mixer)
    back = pickle.loads(pickle.dumps(batch))
    assert_close(back.images, IMAGES)
    assert back.extra == batch.extra
    with pytest.raises(RuntimeError, match="has no mixer in this process"):
        back.mix()


def test_a_batch_that_arrives_finds_the_owner_of_its_token():
    mixer = Halver()
    register("a token", mixer)
    batch = MixBatch(IMAGES, None, ids=identities(IMAGES), extra={}, mixer=None, token="a token")
    assert_close(pickle.loads(pickle.dumps(batch)).mixed, IMAGES / 2)
    assert mixer.calls == 1
    del mixer
    gc.collect()
    with pytest.raises(RuntimeError, match="keep it alive as long as the loader"):
        pickle.loads(pickle.dumps(batch)).to("cpu")


class ReadsInside:
    """A collate that reads the mixes where it must not."""

    def __call__(self, samples):
        images = torch.stack(samples)
        batch = MixBatch(images, None, ids=identities(images), extra={}, mixer=Halver())
        return batch.mixed


def test_mixes_asked_for_inside_a_worker_are_an_error():
    loader = DataLoader(list(IMAGES), 2, num_workers=1, collate_fn=ReadsInside())
    with pytest.raises(
        RuntimeError, match="inside a DataLoader worker, where the teacher must"
    ) as caught:
        next(iter(loader))
    traceback.clear_frames(caught.tb)  # else the worker is waited for for five seconds


def test_a_type_error_inside_to_becomes_a_runtime_error_and_mixes_once():
    mixer = Halver("tuple")
    mixer.error = TypeError("inner")
    with pytest.raises(RuntimeError, match="mixing failed: inner") as caught:
        make_batch(mixer).to("cpu")
    assert isinstance(caught.value.__cause__, TypeError)
    assert mixer.calls == 1


def test_other_errors_inside_to_pass_as_they_are():
    mixer = Halver("tuple")
    mixer.error = ValueError("inner")
    with pytest.raises(ValueError, match=r"^inner$"):
        make_batch(mixer).to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("soft_labels", [False, True])
@pytest.mark.parametrize("target", ["soft", "hard"])
@pytest.mark.parametrize("output", ["tuple", "concat", "dict"])
def test_output_forms_have_their_shapes_and_dtypes(output, target, soft_labels, dtype):
    images = (IMAGES * (255 if dtype == torch.uint8 else 1)).to(dtype)
    labels = torch.eye(3)[LABELS % 3] if soft_labels else LABELS % 3
    form = make_batch(Halver(output, target), labels, images).to("cpu")
    count = 10 if output == "concat" else 5
    if output == "dict":
        assert list(form) == ["pixel_values", "labels"]
        form = tuple(form.values())
    assert type(form) is tuple
    pixels, targets = form
    assert pixels.shape == (count, 3, 9, 7)
    assert pixels.dtype == dtype
    assert targets.shape == ((count, 3) if target == "soft" else (count,))
    assert targets.dtype == (torch.float32 if target == "soft" else torch.int64)
    if output == "concat":
        assert_close(pixels[:5], images)
        own = targets[:5] if target == "hard" else targets[:5].argmax(dim=1)
        assert own.tolist() == (LABELS % 3).tolist()
    assert_close(pixels[-5:], (images / 2).to(dtype))


def test_hard_targets_are_the_soft_ones_most_probable():
    soft, hard = make_batch(Halver()).targets, make_batch(Halver(target="hard")).targets
    assert_close(hard, soft.argmax(dim=1))


def test_concat_without_labels_of_the_originals_is_an_error():
    with pytest.raises(ValueError, match=r'output="concat": the originals need labels.*batch\.tea'):
        make_batch(Halver("concat"), labels=None).to("cpu")


def test_a_batch_that_was_only_labelled_hands_out_originals_and_the_teachers_labels():
    batch = make_batch(Halver("tuple", mixes=False))
    images, targets = batch.to("cpu")
    assert images is IMAGES
    assert_close(targets, batch.teacher.probs)
    assert batch.mixed_teacher is None
    for name in ("mixed", "sources", "weights", "masks", "mask_logits", "outcome", "converged"):
        with pytest.raises(ValueError, match="labelled but not mixed"):
            getattr(batch, name)


def test_mixes_without_labels_say_so_where_targets_are_read():
    mixer = Halver()
    batch = make_batch(mixer)
    batch.mix()
    batch._result = batch._result._replace(targets=None)
    with pytest.raises(ValueError, match=r"targets: these mixes have no labels.*labels_getter="):
        _ = batch.targets


def test_a_name_that_is_no_utf_8_has_an_identity():
    images = torch.rand(2, 3, 4, 4)
    one, other = ([name, "b.png"] for name in ("caf\udce9.png", "cafe.png"))
    assert identities(images, one)[0] != identities(images, other)[0]
    assert identities(images, one)[1] == identities(images, other)[1]
