"""Views: what torchvision's transforms would look at, as rectangles."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from supermix_transforms.data.views import VIEWS, Crop, View, ViewDraws
from supermix_transforms.draws import Draw, Purpose, seeded

SIZES = [(300, 200), (31, 40), (20, 25), (33, 32)]  # width, height
TRANSFORMS = [
    v2.CenterCrop(33),
    v2.Compose([v2.Resize(64), v2.CenterCrop(48)]),
    v2.Compose([v2.Resize(50, interpolation=3, max_size=90), v2.CenterCrop((40, 60))]),
    v2.Compose([v2.Resize(60, interpolation=v2.InterpolationMode.LANCZOS), v2.CenterCrop(30)]),
    v2.Compose([v2.RandomResizedCrop((40, 30)), v2.RandomHorizontalFlip()]),
    v2.RandomResizedCrop(20, interpolation="bicubic"),
    v2.Compose([v2.RandomCrop(32, padding=4, pad_if_needed=True), v2.RandomHorizontalFlip(0.9)]),
    v2.Compose([v2.RandomCrop(20, padding=[1, 2, 3, 4]), v2.RandomHorizontalFlip(1.0)]),
    v2.Resize((17, 19)),
]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_a_view_is_what_torchvision_makes_of_the_picture(transform, size):
    whole = picture(*size)
    draws = ViewDraws(transform, seed=3)
    for index in range(6):
        prepared = draws.view.prepare(whole)
        ours = draws.view.cut(prepared, draws(prepared, 2, index))
        with seeded(Draw(3, 2, torch.tensor([index])), Purpose.VIEW, torch.device("cpu")):
            theirs = v2.functional.pil_to_tensor(transform(whole))
        assert np.array_equal(ours, theirs.numpy())


def test_draws_depend_on_seed_epoch_and_index_alone():
    whole = picture(300, 200)
    transform = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()])

    def crops(seed, epoch):
        draws = ViewDraws(transform, seed=seed)
        return [draws(whole, epoch, index) for index in range(20)]

    first = crops(0, 0)
    torch.rand(5)
    assert crops(0, 0) == first
    assert len(set(first)) == 20
    assert crops(1, 0) != first
    assert crops(0, 1) != first
    assert {crop.flip for crop in first} == {0, 1}


def test_what_only_changes_the_type_is_passed_over():
    steps = [v2.ToImage(), v2.RGB(), v2.Compose([v2.Resize(20), v2.PILToTensor()])]
    draws = ViewDraws(v2.Compose([*steps, v2.CenterCrop(8)]), seed=0)
    assert draws.view == View((8, 8), resize=(20,))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (None, "expected pictures of one size, got no crop"),
        (v2.Resize(20), "expected pictures of one size"),
        (v2.ColorJitter(), "expected Resize, CenterCrop, .* got ColorJitter"),
        (v2.Compose([v2.CenterCrop(8), v2.Resize(20)]), "in this order .* got Resize"),
        (v2.Compose([v2.CenterCrop(8), v2.RandomCrop(5)]), "in this order .* got RandomCrop"),
        (v2.Compose([v2.CenterCrop(8), v2.Normalize([0.5], [0.5])]), "do the rest to the batch"),
        (v2.RandomCrop(8, padding=1, fill=3), "expected RandomCrop that pads with black"),
        (v2.RandomCrop(8, padding=1, padding_mode="edge"), "expected RandomCrop that pads"),
        (lambda picture: picture, "got <function"),
        (transforms.RandomResizedCrop(8), r"of torchvision\.transforms\.v2, in this order"),
        (v2.CenterCrop(20_000), "expected a size of 1..16384"),
    ],
)
def test_transforms_that_no_rectangle_describes_are_errors(transform, message):
    with pytest.raises(ValueError, match=message):
        ViewDraws(transform, seed=0)


@given(st.lists(st.integers(-(1 << 15), (1 << 15) - 1), min_size=4, max_size=4))
def test_a_crop_of_any_numbers_is_cut_or_refused_within_bounded_memory(numbers):
    view = View((8, 8))
    whole = picture(40, 30)
    crop = Crop(*numbers, 0)
    top, left, height, width = numbers
    inside = (
        min(height, width) >= 1
        and min(top, left) >= -8
        and top + height <= whole.height + 8
        and left + width <= whole.width + 8
    )
    if inside:
        assert view.cut(whole, crop).shape == (3, 8, 8)
    else:
        with pytest.raises(ValueError, match="These are not the pictures"):
            view.cut(whole, crop)


def test_a_picture_that_is_too_long_to_be_stored_is_an_error():
    draws = ViewDraws(v2.CenterCrop(4), seed=0)
    with pytest.raises(ValueError, match="at most 16384 pixels a side"):
        draws(picture(16385, 2), 0, 0)


def test_a_resize_may_have_nothing_but_a_largest_side():
    draws = ViewDraws(v2.Compose([v2.Resize(None, max_size=30), v2.CenterCrop(8)]), seed=0)
    assert draws.view.prepare(Image.new("RGB", (60, 40))).size == (30, 20)


def test_padding_beyond_the_crop_is_an_error():
    with pytest.raises(ValueError, match="expected padding of at most the crop's 8 pixels"):
        ViewDraws(v2.RandomCrop(8, padding=9), seed=0)


@pytest.mark.parametrize("name", VIEWS)
def test_the_command_lines_views_show_pictures_smaller_than_they_are(name):
    picture = Image.new("RGB", (11, 7), (255, 255, 255))
    draws = ViewDraws(VIEWS[name](32), seed=0)
    prepared = draws.view.prepare(picture)
    image = draws.view.cut(prepared, draws(prepared, 0, 0))
    assert image.shape == (3, 32, 32)
    assert image.max() == 255
