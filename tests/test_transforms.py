"""MixUp, CutMix and SuperMix as torchvision v2 transforms.

What torchvision's own tests hold of its MixUp and CutMix is asked of torchvision's here too, by the
same functions, and of ours at k = 2 without a teacher. Ours differ where they must:

| difference | of which | test |
| --- | --- | --- |
| rows have up to k non-zeros | k > 2 | test_targets_of_k_images_have_up_to_k_non_zeros |
| targets are the teacher's probabilities, dense | with a teacher | test_a_teacher_labels_the_mix |
| Mask batches are mixed, lists of box dicts kept | all | test_masks_..., test_boxes_... |
| an empty batch is an error | all | test_an_empty_batch_is_an_error |
| a batch of fewer than k comes back unmixed | all | test_a_batch_of_fewer_than_k_... |
| Video is refused | all | test_what_can_not_be_mixed_is_refused |
| uint8 works in MixUp, rounded | all | test_uint8_stays_uint8_and_is_rounded |
| labels that are class 255 of 10 are a ValueError | all | test_labels_that_do_not_fit |
| weights are drawn for each sample | all | test_weights_are_drawn_for_each_sample |
"""

import copy
import pickle
import random
from collections import UserDict

import numpy as np
import PIL.Image
import pytest
import torch
from colours import NUM_CLASSES, Stubborn, colour_teacher, pictures
from torch.testing import assert_close
from torch.utils.data import DataLoader, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from supermix_transforms import CutMix, MixUp, SuperMix, TeacherLabeler
from supermix_transforms.dense import _box_shares as box_shares
from supermix_transforms.dense import mix_boxes, mix_masks
from supermix_transforms.draws import Draw, Purpose, generator
from supermix_transforms.inputs import identities
from supermix_transforms.masks import owners
from supermix_transforms.results import Mixed, Outcome

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, CLASSES = 5, 10  # one label for each picture, so a swapped axis shows
SIZE = (31, 37)
BLIND = [MixUp, CutMix]
THEIRS = [v2.MixUp, v2.CutMix]


def make_input(dtype=torch.float32, count=COUNT, seed=0):
    """Pictures of a class each."""
    images = torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    images = (images * 255).to(dtype) if dtype == torch.uint8 else images.to(dtype)
    return images, torch.arange(count) + 3


def supermix_of(k=2, **settings):
    return SuperMix(colour_teacher(), k=k, **settings)


def any_mix(name, k=2, **settings):
    """One of ours that takes the pictures of `colours`."""
    if name == "SuperMix":
        return supermix_of(k, **settings)
    return {"MixUp": MixUp, "CutMix": CutMix}[name](k=k, num_classes=NUM_CLASSES, **settings)


OURS = ["MixUp", "CutMix", "SuperMix"]


def check_output(images, targets, given, *, k=2):
    assert images.shape == given.shape
    assert images.dtype == given.dtype
    assert targets.shape == (len(given), CLASSES)
    assert_close(targets.sum(dim=1), torch.ones(len(given)))
    assert ((targets != 0).sum(dim=1) == k).all()
    assert not torch.equal(images, given)


# What torchvision's own tests hold, of ours and of theirs


@pytest.mark.parametrize("transform", BLIND + THEIRS)
def test_packed_and_unpacked_inputs_give_the_shape_back(transform):
    mix = transform(num_classes=CLASSES)
    images, labels = make_input()
    torch.manual_seed(1)
    check_output(*mix(images, labels), images)
    torch.manual_seed(1)
    packed = mix((images, labels))
    assert isinstance(packed, tuple)
    check_output(*packed, images)
    listed = mix([images, labels])
    assert isinstance(listed, list)


@pytest.mark.parametrize("transform", BLIND + THEIRS)
@pytest.mark.parametrize("packed", [False, True])
def test_works_as_a_collate_function_in_both_call_forms(transform, packed):
    mix = transform(num_classes=CLASSES)
    dataset = list(zip(*make_input(count=6), strict=True))

    def collate(samples):
        return mix(default_collate(samples)) if packed else mix(*default_collate(samples))

    torch.manual_seed(1)
    batches = list(DataLoader(dataset, 3, collate_fn=collate))
    assert len(batches) == 2
    for (images, targets), start in zip(batches, (0, 3), strict=True):
        check_output(images, targets, make_input(count=6)[0][start : start + 3])


@pytest.mark.parametrize("transform", BLIND + THEIRS)
@pytest.mark.parametrize(
    "key", ["labels", "LABELS", "label", "my_label", "the_labels_of_it", "LaBeL2"]
)
def test_labels_are_found_by_key(transform, key):
    images, labels = make_input()
    torch.manual_seed(1)
    output = transform(num_classes=CLASSES)({"image": images, key: labels, "more": "text"})
    check_output(output["image"], output[key], images)
    assert output["more"] == "text"
    assert list(output) == ["image", key, "more"]


@pytest.mark.parametrize("transform", BLIND + THEIRS)
def test_labels_are_found_by_getter_and_must_be_the_object_in_the_batch(transform):
    images, labels = make_input()
    batch = {"image": images, "other": labels}
    mix = transform(num_classes=CLASSES, labels_getter=lambda whole: whole["other"])
    torch.manual_seed(1)
    check_output(mix(batch)["image"], mix(batch)["other"], images)
    with pytest.raises((ValueError, StopIteration)):
        transform(num_classes=CLASSES, labels_getter=lambda whole: labels.clone())(batch)


@pytest.mark.parametrize("transform", BLIND)
def test_a_getter_that_returns_a_copy_is_a_value_error_of_ours(transform):
    with pytest.raises(ValueError, match="the very object that stands in the batch, got another T"):
        transform(num_classes=9, labels_getter=lambda batch: batch[1].clone())(*make_input())


@pytest.mark.parametrize("transform", BLIND + THEIRS)
@pytest.mark.parametrize(
    ("images", "labels", "classes"),
    [
        (torch.rand(5, 3, 4, 4), "not a tensor", 10),
        (torch.rand(5, 3, 4, 4), [0, 1, 2, 3, 4], 10),
        (torch.rand(5, 3, 4, 4), torch.zeros(5, 2, 2), 10),
        (torch.rand(5, 3, 4, 4), torch.rand(5, 9), 10),
        (torch.rand(5, 3, 4, 4), torch.arange(5), None),
        (torch.rand(3, 4, 4), torch.arange(5), 10),
        (torch.rand(5, 3, 4, 4), torch.arange(4), 10),
        (PIL.Image.new("RGB", (4, 4)), torch.arange(5), 10),
    ],
    ids=["text", "list", "rank 3", "width", "no num_classes", "rank of images", "count", "PIL"],
)
def test_bad_input_is_a_value_error(transform, images, labels, classes):
    with pytest.raises(ValueError, match=r"\w"):
        transform(num_classes=classes)(images, labels)


@pytest.mark.parametrize("transform", BLIND + THEIRS)
def test_labels_that_are_nowhere_are_a_value_error(transform):
    with pytest.raises(ValueError, match="Could not infer where the labels are"):
        transform(num_classes=CLASSES)({"image": torch.rand(5, 3, 4, 4), "other": torch.arange(5)})


@pytest.mark.parametrize("transform", BLIND + THEIRS)
def test_float16_works_and_stays(transform):
    images, labels = make_input(torch.float16)
    torch.manual_seed(1)
    check_output(*transform(num_classes=CLASSES)(images, labels), images)


@pytest.mark.parametrize("transform", BLIND + THEIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_soft_labels_keep_a_floating_dtype(transform, dtype):
    images, labels = make_input()
    soft = torch.nn.functional.one_hot(labels, CLASSES).to(dtype)
    targets = transform()(images, soft)[1]
    assert targets.dtype == dtype
    assert_close(targets.sum(dim=1).float(), torch.ones(COUNT), atol=2e-3, rtol=0)


@pytest.mark.parametrize("transform", BLIND + THEIRS)
def test_integer_soft_labels_and_class_indices_become_float32(transform):
    images, labels = make_input()
    soft = torch.nn.functional.one_hot(labels, CLASSES)
    assert transform()(images, soft)[1].dtype == torch.float32
    assert transform(num_classes=CLASSES)(images, labels)[1].dtype == torch.float32


@pytest.mark.parametrize("transform", BLIND + THEIRS)
def test_tv_images_keep_their_type_and_share_the_masks(transform):
    images, labels = make_input()
    first, second = tv_tensors.Image(images), tv_tensors.Image(images)
    output = transform(num_classes=CLASSES)({"labels": labels, "a": first, "b": [second]})
    assert type(output["a"]) is type(output["b"][0]) is tv_tensors.Image
    assert torch.equal(output["a"], output["b"][0])
    assert not torch.equal(output["a"], images)


@pytest.mark.parametrize("transform", BLIND + THEIRS)
def test_eval_does_not_disable_mixing(transform):
    images, labels = make_input()
    torch.manual_seed(1)
    check_output(*transform(num_classes=CLASSES).eval()(images, labels), images)


@pytest.mark.parametrize("transform", BLIND + THEIRS)
def test_randomness_is_torchs_global_one(transform):
    mix = transform(num_classes=CLASSES)
    numpy_state, python_state = np.random.get_state()[1].copy(), random.getstate()
    torch.manual_seed(3)
    first = mix(*make_input())
    assert not torch.equal(first[1], mix(*make_input())[1])
    torch.manual_seed(3)
    for value, again in zip(first, mix(*make_input()), strict=True):
        assert torch.equal(value, again)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state


@pytest.mark.parametrize("transform", BLIND + THEIRS)
def test_pickles_without_a_teacher(transform):
    mix = pickle.loads(pickle.dumps(transform(num_classes=CLASSES)))
    assert mix(*make_input())[1].shape == (COUNT, CLASSES)


@pytest.mark.parametrize("transform", BLIND + THEIRS)
def test_random_choice_of_ours_and_theirs_works(transform):
    choice = v2.RandomChoice([transform(num_classes=CLASSES), v2.CutMix(num_classes=CLASSES)])
    for _ in range(4):
        assert choice(*make_input())[1].shape == (COUNT, CLASSES)


# The same of SuperMix, and of all at k > 2


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("name", OURS)
def test_output_has_the_shape_of_the_input_for_any_k(name, k):
    images, labels = pictures(5)
    output = any_mix(name, k)(images, labels)
    assert isinstance(output, tuple)
    mixed, targets = output
    assert mixed.shape == images.shape
    assert mixed.dtype == images.dtype
    assert targets.shape == (5, NUM_CLASSES)
    assert targets.dtype == torch.float32
    assert_close(targets.sum(dim=1), torch.ones(5))
    assert not torch.equal(mixed, images)
    assert mixed.isfinite().all()


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("transform", BLIND)
def test_targets_of_k_images_have_up_to_k_non_zeros(transform, k):
    _, targets = transform(k=k, num_classes=CLASSES, seed=1, alpha=9.0)(*make_input())
    counts = (targets != 0).sum(dim=1)
    assert (counts <= k).all()
    assert (counts == k).float().mean() >= (1.0 if transform is MixUp else 0.6)  # boxes overlap


@pytest.mark.parametrize("k", [2, 3])
def test_a_teacher_sees_every_class_in_a_supermix(k):
    images, labels = pictures(4, size=(16, 16))
    mix = supermix_of(k, seed=0)
    result = mix.mix(images, labels, Draw(0, 0, identities(images)))
    assert result.mixed.converged.all()
    seen = colour_teacher()(result.mixed.images).topk(k).indices.sort(dim=1).values
    assert torch.equal(seen, labels[result.mixed.sources].sort(dim=1).values)


@pytest.mark.parametrize("name", OURS)
def test_a_teacher_labels_the_mix(name):
    images, labels = pictures(5)
    teacher = TeacherLabeler(colour_teacher(), temperature=3.0)
    kind = {"MixUp": MixUp, "CutMix": CutMix, "SuperMix": SuperMix}[name]
    mixed, targets = kind(teacher=teacher, k=3)(images, labels)
    assert_close(targets, teacher(mixed).probs)
    assert (targets > 0).all()  # dense


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("k", [2, 3])
def test_packed_collate_mapping_and_tv_inputs(name, k):
    images, labels = pictures(5)
    mix = any_mix(name, k, seed=1)
    expected = mix(images, labels)
    assert_close(mix((images, labels)), expected)
    listed = mix([images, labels])
    assert isinstance(listed, list)
    assert_close(tuple(listed), expected)
    # labels come first: torchvision's would mix those and leave the pictures
    mapping = mix({"labels": labels, "image": images, "path": ["a"] * 5, "n": 3})
    assert_close((mapping["image"], mapping["labels"]), expected)
    assert (mapping["path"], mapping["n"]) == (["a"] * 5, 3)
    samples = list(zip(images, labels, strict=True))
    loader = DataLoader(samples, 5, collate_fn=lambda batch: mix(*default_collate(batch)))
    assert_close(next(iter(loader)), expected)
    wrapped = mix(tv_tensors.Image(images), labels)
    assert type(wrapped[0]) is tv_tensors.Image
    assert type(wrapped[1]) is torch.Tensor
    assert_close(wrapped[0].as_subclass(torch.Tensor), expected[0])


@pytest.mark.parametrize("name", OURS)
def test_several_tv_images_share_the_masks(name):
    images, labels = pictures(5)
    grey = tv_tensors.Image(images.mean(dim=1, keepdim=True))
    mix = any_mix(name, seed=1)
    first, _, second = mix(tv_tensors.Image(images), labels, grey)
    mixed = mix.mix(images, labels, Draw(1, 0, identities(images))).mixed
    assert type(second) is tv_tensors.Image
    assert_close(
        second.as_subclass(torch.Tensor), first.as_subclass(torch.Tensor).mean(1, keepdim=True)
    )
    assert_close(second.as_subclass(torch.Tensor), slow_mix(grey, mixed.sources, mixed.masks))


@pytest.mark.parametrize("name", OURS)
def test_a_second_tv_image_of_another_size_is_an_error(name):
    images, labels = pictures(5)
    other = tv_tensors.Image(torch.rand(5, 3, 4, 4))
    with pytest.raises(ValueError, match=r"Image: expected the batch and size.*Stack and resize"):
        any_mix(name)(tv_tensors.Image(images), labels, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("name", OURS)
def test_input_is_not_modified(name, dtype):
    images, labels = pictures(5, dtype=dtype)
    mask = tv_tensors.Mask(torch.randint(0, 9, (5, 9, 7)))
    boxes = [{"boxes": torch.tensor([[0.0, 0, 3, 3]]), "labels": torch.tensor([1])}] * 5
    leaves = [images, labels, mask, boxes[0]["boxes"], boxes[0]["labels"]]
    versions, copies = [leaf._version for leaf in leaves], [leaf.clone() for leaf in leaves]
    output = any_mix(name)(images, labels, mask, boxes)
    assert output[0].dtype == dtype
    assert [leaf._version for leaf in leaves] == versions
    assert all(torch.equal(leaf, before) for leaf, before in zip(leaves, copies, strict=True))


@pytest.mark.parametrize("name", OURS)
def test_uint8_stays_uint8_and_is_rounded(name):
    images, labels = pictures(5, dtype=torch.uint8)
    mix = any_mix(name, seed=1)
    output, _ = mix(images, labels)
    assert output.dtype == torch.uint8
    mixed = mix.mix(images, labels, Draw(1, 0, identities(images))).mixed
    exact = slow_mix(images.double(), mixed.sources, mixed.masks.double())
    assert (output.double() - exact).abs().max() <= 0.501


@pytest.mark.parametrize("name", OURS)
def test_pictures_made_under_inference_mode_are_mixed(name):
    mix = any_mix(name, seed=1)
    with torch.inference_mode():
        images, labels = pictures(5)
        inside = mix(images, labels)
    assert images.is_inference()
    assert_close(any_mix(name, seed=1)(images, labels), any_mix(name, seed=1)(*pictures(5)))
    assert_close(inside, any_mix(name, seed=1)(*pictures(5)))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", OURS)
def test_a_batch_of_fewer_than_k_comes_back_unmixed(name, count):
    images, labels = pictures(count)
    mask = tv_tensors.Mask(torch.arange(count)[:, None, None].expand(-1, 9, 7))
    boxes = [{"boxes": torch.tensor([[0.0, 0, 3, 3]])} for _ in range(count)]
    output, targets, masks, kept = any_mix(name, k=3)(images, labels, mask, boxes)
    assert torch.equal(output, images)
    assert targets.argmax(dim=1).tolist() == labels.tolist()
    assert torch.equal(masks, mask)
    assert [len(each["boxes"]) for each in kept] == [1] * count


@pytest.mark.parametrize("name", OURS)
def test_eval_does_not_disable_ours(name):
    images, labels = pictures(5)
    assert not torch.equal(any_mix(name).eval()(images, labels)[0], images)


@pytest.mark.parametrize("name", OURS)
def test_an_empty_batch_is_an_error(name):
    with pytest.raises(ValueError, match="expected at least one picture with pixels, got shape"):
        any_mix(name)(torch.rand(0, 3, 9, 7), torch.zeros(0, dtype=torch.long))


# Settings


@pytest.mark.parametrize("k", [1, 0, -2, 2.0, "2", True, None])
@pytest.mark.parametrize("name", OURS)
def test_k_under_two_is_an_error(name, k):
    with pytest.raises(ValueError, match="k: expected an integer of at least 2 images a mix, got"):
        any_mix(name, k)


@pytest.mark.parametrize("alpha", [0, -1.0, float("inf"), float("nan"), "1"])
@pytest.mark.parametrize("name", OURS)
def test_alpha_that_is_not_positive_is_an_error(name, alpha):
    with pytest.raises(ValueError, match=r"alpha: expected a positive number, Dirichlet.*got"):
        any_mix(name, alpha=alpha)


@pytest.mark.parametrize("name", OURS)
def test_other_settings_out_of_range_are_errors(name):
    with pytest.raises(ValueError, match=r"box_threshold: expected a share in 0\.\.1, got 1\.5"):
        any_mix(name, box_threshold=1.5)
    with pytest.raises(ValueError, match=r'partners: expected "random" or "matched", got \'near\''):
        supermix_of(partners="near")
    with pytest.raises(ValueError, match="partner_cap: expected at least 1, got 0"):
        supermix_of(partner_cap=0)


def test_settings_are_seen_in_the_repr():
    assert "k=3" in repr(any_mix("MixUp", 3))
    assert "method='fast'" in repr(supermix_of())


# Against slow references


def slow_mix(images, sources, masks):
    """Eq. 1 pixel by pixel."""
    output = torch.zeros(len(sources), *images.shape[1:], dtype=images.dtype)
    for row in range(len(sources)):
        for y in range(images.shape[2]):
            for x in range(images.shape[3]):
                for i, source in enumerate(sources[row]):
                    output[row, :, y, x] += masks[row, i, y, x] * images[source, :, y, x]
    return output


@pytest.mark.parametrize("k", [2, 3, 4])
def test_mixup_is_the_weighted_sum_of_whole_images(k):
    images, labels = make_input()
    result = MixUp(k=k, num_classes=CLASSES).mix(images, labels, Draw(1, 2, identities(images)))
    sources, weights = result.mixed.sources, result.mixed.weights
    assert_close(weights.sum(dim=1), torch.ones(COUNT))
    for row in range(COUNT):
        assert sources[row, 0] == row
        assert len(set(sources[row].tolist())) == k
        image, target = torch.zeros(3, *SIZE), torch.zeros(CLASSES)
        for i in range(k):
            image += weights[row, i] * images[sources[row, i]]
            target[labels[sources[row, i]]] += weights[row, i]
        assert_close(result.mixed.images[row], image)
        assert_close(result.targets[row], target)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_cutmix_pastes_boxes_and_labels_by_the_exact_areas(k):
    images, labels = make_input()
    draw = Draw(1, 2, identities(images))
    result = CutMix(k=k, num_classes=CLASSES).mix(images, labels, draw)
    sources = result.mixed.sources
    wanted = MixUp(k=k, num_classes=CLASSES).mix(images, labels, draw).mixed
    assert torch.equal(sources, wanted.sources)
    height, width = SIZE
    for row in range(COUNT):
        random = generator(draw, draw.ids[sources[row]].tolist(), Purpose.RECTANGLES)
        boxes, total = [], wanted.weights[row, 0].item()
        for i in range(1, k):
            total += wanted.weights[row, i].item()
            side = (wanted.weights[row, i].item() / total) ** 0.5 / 2
            y, x = random.integers(height), random.integers(width)
            boxes.append((y, x, int(side * height), int(side * width)))
        areas = [0] * k
        for y in range(height):
            for x in range(width):
                owner = 0
                for i, (centre_y, centre_x, half_y, half_x) in enumerate(boxes, start=1):
                    inside_y = centre_y - half_y <= y < centre_y + half_y
                    if inside_y and centre_x - half_x <= x < centre_x + half_x:
                        owner = i
                areas[owner] += 1
                pixel = images[sources[row, owner], :, y, x]
                assert torch.equal(result.mixed.images[row, :, y, x], pixel)
        target = torch.zeros(CLASSES)
        for i in range(k):
            target[labels[sources[row, i]]] += areas[i] / (height * width)
        assert_close(result.targets[row], target, rtol=0, atol=1e-7)


def test_cutmix_areas_follow_the_weights():
    """Boxes lose only what the border cuts off, and what is pasted over them."""
    images = torch.zeros(300, 1, 20, 20)
    ids = torch.arange(300)
    mixed = CutMix(k=3, alpha=2.0).mix(images, torch.eye(300), Draw(0, 0, ids)).mixed
    assert_close(mixed.weights.sum(dim=1), torch.ones(300))
    drawn = MixUp(k=3, alpha=2.0).mix(images, torch.eye(300), Draw(0, 0, ids)).mixed.weights
    seen = mixed.weights[:, 1:]
    assert torch.corrcoef(torch.stack([seen.flatten(), drawn[:, 1:].flatten()]))[0, 1] > 0.75


def test_weights_are_drawn_for_each_sample():
    images = torch.rand(200, 1, 2, 2)
    weights = MixUp(k=3, alpha=4.0).mix(images, torch.eye(200), Draw(0, 0, torch.arange(200)))
    weights = weights.mixed.weights
    assert weights.unique().numel() > 590
    assert_close(weights.mean(dim=0), torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    variance = (1 / 3) * (2 / 3) / (3 * 4.0 + 1)  # Dirichlet's
    assert_close(weights.var(dim=0), torch.full((3,), variance), atol=0.005, rtol=0)


# Randomness


@pytest.mark.parametrize("name", OURS)
def test_without_a_seed_torchs_global_generator_decides(name):
    images, labels = pictures(5)
    mix = any_mix(name)
    torch.manual_seed(5)
    first = mix(images, labels)
    second = mix(images, labels)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(5)
    assert torch.equal(mix(images, labels)[0], first[0])


@pytest.mark.parametrize("name", OURS)
def test_an_integer_seed_depends_on_pictures_and_epoch_alone(name):
    images, labels = pictures(5)
    mix = any_mix(name, seed=4)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = mix(images, labels)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    torch.manual_seed(99)
    assert torch.equal(any_mix(name, seed=4)(images, labels)[0], first[0])
    assert not torch.equal(any_mix(name, seed=5)(images, labels)[0], first[0])
    mix.set_epoch(1)
    assert not torch.equal(mix(images, labels)[0], first[0])
    mix.set_epoch(0)
    assert torch.equal(mix(images, labels)[0], first[0])
    # the place in the batch does not matter
    order = torch.tensor([3, 1, 4, 0, 2])
    assert_close(mix(images[order], labels[order])[0], first[0][order])
    # other pixels, another draw
    draws = [
        mix.mix(x, labels, Draw(4, 0, identities(x))).mixed.weights
        for x in (images, images.flip(-1))
    ]
    assert name == "CutMix" or not torch.equal(*draws)


# Composition


def steps(dtype):
    scale = [] if dtype == torch.uint8 else [v2.ToDtype(dtype, scale=True)]
    return [
        [v2.AutoAugment(), *scale],
        [v2.RandAugment(), *scale],
        [v2.TrivialAugmentWide(), *scale],
        [*scale, v2.RandomErasing(p=1.0)],
        [v2.RandomHorizontalFlip(), *scale],
    ]


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("name", OURS)
def test_composes_after_torchvisions_augmentations(name, dtype, place):
    images, labels = pictures(5, size=(16, 16), dtype=torch.uint8)
    chain = v2.Compose([*steps(dtype)[place], any_mix(name)])
    output, targets = chain(images, labels)
    assert output.shape == images.shape
    assert output.dtype == dtype
    assert targets.shape == (5, NUM_CLASSES)
    assert_close(targets.sum(dim=1), torch.ones(5))


def test_random_choice_and_random_apply_hold_ours():
    images, labels = pictures(5)
    choice = v2.RandomChoice([any_mix("SuperMix", 3), any_mix("MixUp"), any_mix("CutMix", 4)])
    for _ in range(6):
        output, targets = choice(images, labels)
        assert output.shape == images.shape
        assert targets.shape == (5, NUM_CLASSES)
    assert torch.equal(v2.RandomApply([any_mix("SuperMix")], p=0.0)(images, labels)[0], images)
    assert not torch.equal(v2.RandomApply([any_mix("SuperMix")], p=1.0)(images, labels)[0], images)


def test_ours_compose_before_a_normalisation():
    images, labels = pictures(5, dtype=torch.uint8)
    chain = v2.Compose(
        [any_mix("SuperMix"), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
    )
    output, targets = chain(images, labels)
    assert output.min() < 0
    assert targets.dtype == torch.float32


# The teacher inside a transform


def make_taught():
    teacher = colour_teacher()
    return teacher, [SuperMix(teacher), MixUp(teacher=teacher), CutMix(teacher=teacher)]


@pytest.mark.parametrize("place", range(3))
def test_the_teacher_is_not_a_part_of_the_transform(place):
    teacher, taught = make_taught()
    mix = taught[place]
    assert list(mix.modules()) == [mix]
    assert list(mix.parameters()) == []
    assert mix.state_dict() == {}
    chain = v2.Compose([mix])
    assert chain.state_dict() == {}
    mix.to(torch.float64)
    assert {weight.dtype for weight in teacher.parameters()} == {torch.float32}
    teacher.train()
    mix.eval()
    assert teacher.training
    mix(*pictures(4))
    assert all(module.training for module in teacher.modules())
    assert all(weight.grad is None and weight.requires_grad for weight in teacher.parameters())


@pytest.mark.parametrize("place", range(3))
def test_a_deep_copy_shares_the_teacher(place):
    teacher, taught = make_taught()
    twin = copy.deepcopy(v2.Compose([taught[place]])).transforms[0]
    assert twin is not taught[place]
    assert twin.teacher is taught[place].teacher
    twin(*pictures(4))
    with torch.no_grad():
        teacher[0].weight.zero_()
        teacher[0].bias.zero_()
    assert_close(twin(*pictures(4))[1], torch.full((4, NUM_CLASSES), 0.25))  # it is one teacher


@pytest.mark.parametrize("place", range(3))
def test_pickling_drops_the_teacher_with_a_clear_error_on_use(place):
    _, taught = make_taught()
    data = pickle.dumps(taught[place])
    assert len(data) < 2000
    twin = pickle.loads(data)
    assert twin.k == 2
    repr(twin)
    with pytest.raises(RuntimeError, match=r"this teacher was pickled.*Build the transform or"):
        twin(*pictures(4))


def test_pictures_on_another_device_than_the_teacher_are_an_error():
    teacher = TeacherLabeler(colour_teacher(), device="meta")
    with pytest.raises(ValueError, match=r"device meta, got cpu\. Move them"):
        SuperMix(teacher)(*pictures(4))


def test_a_solvers_failure_is_an_outcome_and_no_error():
    images, labels = pictures(3)
    mix = SuperMix(Stubborn(), seed=0)
    result = mix.mix(images, labels, Draw(0, 0, identities(images)))
    assert (result.mixed.outcome == Outcome.MAX_STEPS).all()
    assert torch.equal(mix(images, labels)[1], result.mixed_teacher.probs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_the_teacher_can_not_judge_get_their_own_labels(bad):
    images, labels = pictures(4)
    teacher = colour_teacher()

    def moody(pixels):
        logits = teacher(pixels)
        return torch.where(pixels.flatten(1).amax(dim=1, keepdim=True) > 0.8999, bad, logits)

    output, targets = SuperMix(moody)(images, labels)
    assert output.isfinite().all()
    assert targets.isfinite().all()
    assert_close(targets.sum(dim=1), torch.ones(4))


def test_matched_partners_need_class_maps():
    images, labels = pictures(4)
    assert SuperMix(colour_teacher(), partners="matched")(images, labels)[0].shape == images.shape
    with pytest.raises(ValueError, match=r'partners="matched": expected a teacher .*"random"'):
        SuperMix(lambda x: colour_teacher()(x), partners="matched")(images, labels)


# Labels


@pytest.mark.parametrize("name", OURS)
def test_labels_may_be_probabilities(name):
    images, labels = pictures(5)
    soft = torch.nn.functional.one_hot(labels, NUM_CLASSES).float()
    expected = any_mix(name, seed=1)(images, labels)
    assert_close(any_mix(name, seed=1)(images, soft), expected)


def test_probabilities_need_no_num_classes():
    images, labels = pictures(5)
    soft = torch.nn.functional.one_hot(labels, NUM_CLASSES).float()
    assert MixUp()(images, soft)[1].shape == (5, NUM_CLASSES)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_there_may_be_no_labels(name, form):
    images, _ = pictures(5)
    mix = any_mix(name, seed=1, labels_getter=None)
    batch = {"tensor": images, "tuple": (images, "more"), "mapping": {"image": images}}[form]
    output = mix(batch)
    assert type(output) is type(batch)
    mixed = output if form == "tensor" else output[0 if form == "tuple" else "image"]
    assert mixed.shape == images.shape
    assert not torch.equal(mixed, images)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 4]), r"class indices in 0\.\.3, got 0\.\.4"),
        (torch.tensor([0, -1, 2, 3]), r"class indices in 0\.\.3, got -1\.\.3"),
        (torch.rand(4, 5), r"probabilities of 4 classes, got shape \(4, 5\)"),
    ],
)
def test_labels_that_do_not_fit_the_teacher_are_an_error(place, labels, message):
    images, _ = pictures(4)
    with pytest.raises(ValueError, match="labels: expected " + message):
        make_taught()[1][place](images, labels)


@pytest.mark.parametrize("transform", BLIND)
def test_labels_that_do_not_fit(transform):
    images, _ = pictures(4)
    with pytest.raises(ValueError, match=r"class indices in 0\.\.9, got 0\.\.255"):
        transform(num_classes=10)(images, torch.tensor([0, 1, 2, 255]))
    with pytest.raises(ValueError, match=r"expected num_classes for labels that are class indices"):
        transform()(images, torch.arange(4))
    with pytest.raises(ValueError, match=r"num_classes: expected 4, the teacher's, got 7"):
        transform(num_classes=7, teacher=colour_teacher())(images, torch.arange(4))


# Segmentation masks


def slow_owners(values, mixed):
    """Mask batches (B, ..., H, W) pixel by pixel."""
    masks, output = mixed.masks, values.clone()
    for row in range(len(values)):
        for y in range(values.shape[-2]):
            for x in range(values.shape[-1]):
                best = max(range(masks.shape[1]), key=lambda i: masks[row, i, y, x].item())
                output[row, ..., y, x] = values[mixed.sources[row, best], ..., y, x]
    return output


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
@pytest.mark.parametrize("name", OURS)
def test_masks_are_mixed_by_the_owner_of_each_pixel(name, shape, k):
    images, labels = pictures(5)
    values = torch.randint(0, 99, (5, *shape, 9, 7))
    mix = any_mix(name, k, seed=1)
    output = mix({"image": images, "labels": labels, "mask": tv_tensors.Mask(values)})["mask"]
    assert type(output) is tv_tensors.Mask
    assert output.dtype == values.dtype
    mixed = mix.mix(images, labels, Draw(1, 0, identities(images))).mixed
    assert torch.equal(output.as_subclass(torch.Tensor), slow_owners(values, mixed))
    assert torch.equal(mix_masks(values, mixed), slow_owners(values, mixed))
    if name != "MixUp":
        assert not torch.equal(output, values)


def test_mixup_takes_the_mask_of_the_largest_weight():
    images, labels = pictures(5)
    mix = MixUp(k=3, num_classes=NUM_CLASSES, seed=2)
    values = tv_tensors.Mask(torch.arange(5)[:, None, None].expand(-1, 9, 7))
    output = mix(images, labels, values)[2]
    mixed = mix.mix(images, labels, Draw(2, 0, identities(images))).mixed
    largest = mixed.sources.gather(1, mixed.weights.argmax(dim=1, keepdim=True))
    assert torch.equal(output.as_subclass(torch.Tensor), largest[:, :, None].expand(-1, 9, 7))
    assert (largest[:, 0] != torch.arange(5)).any()


@pytest.mark.parametrize("shape", [(4, 9, 7), (5, 9, 8), (5, 1, 8, 7)])
def test_masks_of_another_size_are_an_error(shape):
    images, labels = pictures(5)
    with pytest.raises(ValueError, match=r"Mask: expected the batch and size of the pictures \(5"):
        any_mix("MixUp")(images, labels, tv_tensors.Mask(torch.zeros(shape)))


# Boxes


def halves(count=2, height=8, width=10):
    """Mixes whose left half is of picture i and whose right half is of the next one."""
    images = torch.zeros(count, 3, height, width)
    masks = torch.zeros(count, 2, height, width)
    masks[:, 0, :, : width // 2] = 1
    masks[:, 1, :, width // 2 :] = 1
    sources = torch.stack([torch.arange(count), torch.arange(count).roll(-1)], dim=1)
    return Mixed.unsearched(images, sources, masks, Outcome.CONVERGED)


TARGETS = [
    {
        "labels": torch.tensor([1, 2, 3]),
        "boxes": torch.tensor([[0.0, 0, 4, 4], [4, 0, 8, 4], [6, 0, 10, 8]]),
        "names": ["left", "quarter", "right"],
        "image_id": 7,
    },
    {
        "labels": torch.tensor([4, 5]),
        "boxes": torch.tensor([[5.0, 2, 9, 6], [0, 0, 5, 8]]),
        "names": ["right of 2", "left of 2"],
        "image_id": 8,
    },
]


@pytest.mark.parametrize(
    ("threshold", "first", "second"),
    [
        (0.3, [1, 4], [5, 2, 3]),
        (0.25, [1, 2, 4], [5, 2, 3]),  # a quarter of box 2 is left, three quarters right
        (0.5, [1, 4], [5, 2, 3]),
        (1.0, [1, 4], [5, 3]),
        (0.0, [1, 2, 3, 4, 5], [4, 5, 1, 2, 3]),
    ],
)
def test_boxes_are_kept_by_their_owners_share(threshold, first, second):
    outputs = mix_boxes(TARGETS, halves(), threshold)
    assert [output["labels"].tolist() for output in outputs] == [first, second]


def test_fields_of_boxes_follow_them_whatever_their_order_and_others_are_the_firsts():
    one, two = mix_boxes(TARGETS, halves(), 0.3)
    assert list(one) == list(TARGETS[0])
    assert one["boxes"].tolist() == [[0, 0, 4, 4], [5, 2, 9, 6]]
    assert one["names"] == ["left", "right of 2"]
    assert one["image_id"] == 7
    assert two["boxes"].tolist() == [[0, 0, 5, 8], [4, 0, 8, 4], [6, 0, 10, 8]]
    assert two["names"] == ["left of 2", "quarter", "right"]
    assert two["image_id"] == 8
    reordered = [dict(reversed(each.items())) for each in TARGETS]
    assert mix_boxes(reordered, halves(), 0.3)[1]["names"] == two["names"]
    assert mix_boxes(reordered, halves(), 0.3)[1]["labels"].tolist() == [5, 2, 3]


def test_a_field_that_is_as_long_as_the_boxes_by_chance_stays_whole():
    targets = [{**each, "size": (8, 10), "pair": torch.tensor([1, 2])} for each in TARGETS]
    outputs = mix_boxes(targets, halves(), 0.3)  # the second picture has two boxes, too
    for output in outputs + mix_boxes(targets[::-1], halves(), 0.3):
        assert output["size"] == (8, 10)
        assert output["pair"].tolist() == [1, 2]


def test_pictures_without_boxes_mix_with_others():
    empty = {
        "labels": torch.zeros(0, dtype=torch.long),
        "boxes": torch.zeros(0, 4),
        "names": [],
        "image_id": 9,
    }
    one, two = mix_boxes([empty, TARGETS[1]], halves(), 0.3)
    assert one["boxes"].tolist() == [[5, 2, 9, 6]]
    assert one["labels"].tolist() == [4]
    assert (one["names"], one["image_id"]) == (["right of 2"], 9)
    assert two["names"] == ["left of 2"]
    none = mix_boxes([empty, empty], halves(), 0.3)
    assert none[0]["boxes"].shape == (0, 4)
    assert none[0]["labels"].shape == (0,)


@pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
def test_tv_boxes_keep_type_format_and_canvas(form):
    targets = []
    for each in TARGETS:
        boxes = tv_tensors.BoundingBoxes(each["boxes"], format="XYXY", canvas_size=(8, 10))
        boxes = v2.functional.convert_bounding_box_format(boxes, new_format=form)
        targets.append({**each, "boxes": boxes})
    for output, plain in zip(
        mix_boxes(targets, halves(), 0.3), mix_boxes(TARGETS, halves(), 0.3), strict=True
    ):
        boxes = output["boxes"]
        assert type(boxes) is tv_tensors.BoundingBoxes
        assert boxes.format == tv_tensors.BoundingBoxFormat[form]
        assert boxes.canvas_size == (8, 10)
        corners = v2.functional.convert_bounding_box_format(boxes, new_format="XYXY")
        assert_close(corners.as_subclass(torch.Tensor), plain["boxes"])
        assert output["labels"].tolist() == plain["labels"].tolist()


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", OURS)
def test_boxes_of_a_batch_travel_with_its_pictures(name, k):
    images, labels = pictures(5)
    corners = torch.tensor([[0.0, 0, 3, 3], [2, 2, 7, 9], [0, 5, 7, 9]])
    boxes = [
        {"boxes": corners[: 1 + i % 3], "labels": torch.arange(10 * i, 10 * i + 1 + i % 3)}
        for i in range(5)
    ]
    mix = any_mix(name, k, seed=1, box_threshold=0.4)
    output = mix({"image": images, "label": labels, "objects": boxes})["objects"]
    mixed = mix.mix(images, labels, Draw(1, 0, identities(images))).mixed
    owner = owners(mixed.masks)
    for row in range(5):
        expected = []
        for i, source in enumerate(mixed.sources[row].tolist()):
            for box, label in zip(boxes[source]["boxes"], boxes[source]["labels"], strict=True):
                left, top, right, bottom = box.int().tolist()
                inside = [
                    owner[row, y, x] == i for y in range(top, bottom) for x in range(left, right)
                ]
                if sum(inside) / len(inside) >= 0.4:
                    expected.append(label.item())
        assert output[row]["labels"].tolist() == expected
        assert len(output[row]["boxes"]) == len(expected)


def test_detection_batches_without_class_labels_work():
    images, _ = pictures(2, size=(8, 10))
    output = SuperMix(colour_teacher(), labels_getter=None)(images, TARGETS)
    assert [len(each["boxes"]) == len(each["names"]) for each in output[1]] == [True, True]


def test_boxes_outside_the_picture_or_without_area_are_dropped():
    targets = [
        {"boxes": torch.tensor([[20.0, 0, 30, 4], [1, 1, 1, 1], [-3, -3, 2, 2]])},
        {"boxes": torch.zeros(0, 4)},
    ]
    assert mix_boxes(targets, halves(), 0.3)[0]["boxes"].tolist() == [[-3, -3, 2, 2]]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (TARGETS[:1], r"boxes: expected one dict for each of 2 pictures.*got 1 with"),
        ([*TARGETS, *TARGETS], r"expected one dict for each of 2 pictures.*got 4 with"),
        (
            [TARGETS[0], {"boxes": torch.zeros(0, 4)}],
            r"all with the same fields, got 2 with \['boxes', .*\]\. Give",
        ),
        ([{"boxes": torch.zeros(0)}] * 2, r"a tensor \(n, 4\) for each picture, got \(0,\)\. Pass"),
        ([{"boxes": [[0, 0, 1, 1]]}] * 2, r"a tensor \(n, 4\) for each picture, got list"),
    ],
)
def test_boxes_that_do_not_fit_are_an_error(targets, message):
    images, labels = pictures(2, size=(8, 10))
    with pytest.raises(ValueError, match=message):
        any_mix("CutMix")(images, labels, targets)


# Refusals


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (PIL.Image.new("RGB", (7, 9)), r"got a PIL image\. Add v2\.ToImage"),
        (tv_tensors.Video(torch.rand(5, 2, 3, 9, 7)), r"got Video, which cannot be mixed\. Take"),
        (
            tv_tensors.KeyPoints(torch.rand(5, 2), canvas_size=(9, 7)),
            r"got KeyPoints, which cannot be mixed",
        ),
        (
            tv_tensors.BoundingBoxes(torch.rand(5, 4), format="XYXY", canvas_size=(9, 7)),
            r"got a bare BoundingBoxes\. Pass \[\{'boxes'",
        ),
    ],
    ids=["PIL", "Video", "KeyPoints", "BoundingBoxes"],
)
def test_what_can_not_be_mixed_is_refused(name, extra, message):
    images, labels = pictures(5)
    for batch in (
        {"image": images, "labels": labels, "more": [extra]},
        {"a": extra, "label": labels},
    ):
        with pytest.raises(ValueError, match=f"{name}: expected .*{message}"):
            any_mix(name)(batch)


@pytest.mark.parametrize("name", OURS)
def test_single_pictures_are_refused_with_the_cure(name):
    with pytest.raises(ValueError, match=r"expected a batch \(B, C, H, W\), got shape \(3, 9, 7\)"):
        any_mix(name)(torch.rand(3, 9, 7), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("mix", [MixUp(num_classes=4), CutMix(num_classes=4)])
def test_a_dense_target_that_lost_its_type_is_an_error(mix):
    images, labels = torch.rand(4, 3, 9, 7), torch.arange(4)
    masks = torch.zeros(4, 9, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected dense targets as tv_tensors.Mask, got a plain"):
        mix(images, labels, masks)
    mix(images, labels, masks[:, :3])  # of another size: none of ours


def test_boxes_outside_of_the_picture_are_not_seen():
    owned = torch.ones(10, 10, dtype=torch.bool)
    boxes = torch.tensor([[2.0, -9.0, 6.0, -3.0], [-8.0, 2.0, -1.0, 5.0], [12.0, 2.0, 15.0, 5.0]])
    assert box_shares(boxes, owned).tolist() == [0, 0, 0]
    assert box_shares(torch.tensor([[-2.0, -2.0, 2.0, 2.0]]), owned).tolist() == [1]


def test_fields_of_the_picture_are_not_taken_for_those_of_its_only_box():
    images = torch.rand(4, 3, 12, 12)
    targets = [
        {"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]), "image_id": torch.tensor([n])}
        for n in range(4)
    ]
    _, mixed = CutMix(num_classes=4, labels_getter=None)(images, targets)
    assert [target["image_id"].tolist() for target in mixed] == [[n] for n in range(4)]


def test_cutmix_of_weights_that_are_all_one_pictures_is_that_picture():
    images, labels = torch.rand(32, 3, 8, 8), torch.arange(32) % 10
    mixed, targets = CutMix(k=3, alpha=0.01, num_classes=10, seed=0)(images, labels)
    assert mixed.isfinite().all()
    assert_close(targets.sum(dim=1), torch.ones(32))


@pytest.mark.parametrize("labels", [torch.tensor([[3], [5]]), torch.tensor([[3, 1], [0, 2]])])
def test_whole_numbers_in_columns_are_no_probabilities(labels):
    with pytest.raises(ValueError, match=r"expected probabilities \(B, N\), got torch\.int64"):
        MixUp()(torch.rand(2, 3, 8, 8), labels)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_mapping_that_is_no_dict_is_mixed(labelled):
    images, labels = pictures(6)
    batch = UserDict(pixel_values=images, **({"labels": labels} if labelled else {}))
    mix = SuperMix(colour_teacher(), labels_getter="default" if labelled else None, seed=0)
    found = mix(batch)
    assert not torch.equal(found["pixel_values"], images)
    assert torch.equal(found["pixel_values"], mix(dict(batch))["pixel_values"])
    assert torch.equal(batch["pixel_values"], images)
    if labelled:
        assert found["labels"].shape == (6, NUM_CLASSES)
