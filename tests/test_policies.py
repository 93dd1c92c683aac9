"""Augmentations by name and from files."""

import json
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from supermix_transforms.data.policies import FILES, OPERATIONS, POLICIES, Policy, load_policy
from supermix_transforms.data.policies import _functional as F
from supermix_transforms.data.policies import cutout as cut

NAMES = (*POLICIES, *FILES)


def picture(seed: int = 0, size: tuple[int, int] = (32, 24)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)


def only(name: str, magnitude: float, probability: float = 1.0) -> Policy:
    return Policy({"sub_policies": [[[name, probability, magnitude]]]})


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_changes_pictures_and_keeps_size_and_type(name):
    policy = load_policy(name)
    if name == "pba-cifar10":
        policy.set_epoch(199)  # nothing is done in its first phase
    torch.manual_seed(0)
    images = [picture(seed) for seed in range(8)]
    results = [policy(image) for image in images]
    assert {(each.shape, each.dtype) for each in results} == {((3, 32, 24), torch.uint8)}
    assert sum(not torch.equal(a, b) for a, b in zip(images, results, strict=True)) >= 4
    assert all(torch.equal(image, picture(seed)) for seed, image in enumerate(images))


@pytest.mark.parametrize("name", ["pba-cifar10", "cutout"])
def test_a_cutout_may_follow_and_both_are_told_the_epoch(name):
    policy = load_policy(f"{name}+cutout", epochs=4)
    first, last = policy.transforms
    policy.set_epoch(3)
    alone = load_policy(name, epochs=4)
    alone.set_epoch(3)
    assert first._phase == alone._phase
    torch.manual_seed(0)
    result = policy(picture())
    torch.manual_seed(0)
    assert torch.equal(result, last(alone(picture())))
    assert not torch.equal(result, picture())


@pytest.mark.parametrize("name", NAMES)
def test_torchs_generator_alone_decides(name):
    policy = load_policy(name)
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist()
    torch.manual_seed(3)
    first = [policy(picture(seed)) for seed in range(4)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    random.seed(2)
    torch.manual_seed(3)
    again = [policy(picture(seed)) for seed in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("name", "magnitude", "expected"),
    [
        ("Contrast", 1.5, lambda image: F.adjust_contrast(image, 1.5)),
        ("Color", 0.3, lambda image: F.adjust_saturation(image, 0.3)),
        ("Brightness", 0.6, lambda image: F.adjust_brightness(image, 0.6)),
        ("Sharpness", 1.9, lambda image: F.adjust_sharpness(image, 1.9)),
        ("Solarize", 100, lambda image: torch.where(image >= 100, 255 - image, image)),
        ("Solarize", 256, lambda image: image),
        ("Posterize", 3, lambda image: image & 0b11100000),
        ("Invert", 0, lambda image: 255 - image),
        ("AutoContrast", 0, F.autocontrast),
        ("Equalize", 0, F.equalize),
    ],
)
def test_operations_are_torchvisions(name, magnitude, expected):
    assert torch.equal(only(name, magnitude)(picture()), expected(picture()))


def test_pictures_move_to_either_side_by_a_share_of_the_side():
    results = []
    torch.manual_seed(0)
    for _ in range(12):
        moved = only("TranslateX", 0.25)(picture())  # 6 of 24
        right = torch.equal(moved[:, :, 6:], picture()[:, :, :-6])
        left = torch.equal(moved[:, :, :-6], picture()[:, :, 6:])
        assert right != left
        assert (moved[:, :, :6] == 127).all() or left
        results.append(right)
    assert 0 < sum(results) < 12
    down = OPERATIONS["TranslateY"](picture(), 1 / 32)
    assert torch.equal(down[:, 1:], picture()[:, :-1])


def test_shears_and_turns_are_what_they_say():
    bars = torch.zeros(3, 33, 33, dtype=torch.uint8)
    bars[:, :, 16] = 255
    sheared = OPERATIONS["ShearX"](bars, 0.25)
    tops, bottoms = (int(row.argmax()) for row in (sheared[0, 0], sheared[0, 31]))
    assert abs(abs(tops - bottoms) - 8) <= 1  # 32 rows, a quarter of a pixel each
    assert torch.equal(OPERATIONS["ShearY"](bars, 0.0), bars)
    turned = OPERATIONS["Rotate"](bars, 90.0)
    assert (turned[:, 16] == 255).all()


def test_cutout_greys_a_square_that_may_stick_out():
    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    areas, corners = [], []
    for _ in range(200):
        hole = (cut(image, 0.5) == 127).all(dim=0)
        rows, columns = hole.any(dim=1).nonzero(), hole.any(dim=0).nonzero()
        assert int(hole.sum()) == len(rows) * len(columns)  # a rectangle
        areas.append(int(hole.sum()))
        corners.append(bool(hole[0, 0]))
    assert max(areas) == 16 * 16
    assert 64 <= min(areas) < 128  # a quarter is left in a corner
    assert any(corners)
    assert (image == 0).all()


def test_an_operation_is_applied_as_often_as_its_probability_says():
    torch.manual_seed(0)
    assert torch.equal(only("Invert", 0, 0.0)(picture()), picture())
    policy = only("Invert", 0, 0.3)
    inverted = sum(torch.equal(policy(picture()), 255 - picture()) for _ in range(1000))
    assert 250 < inverted < 350


def test_one_sub_policy_is_drawn_and_done_in_its_order():
    two = Policy({"sub_policies": [[["Posterize", 1, 1], ["Invert", 1, 0]], [["Solarize", 1, 0]]]})
    torch.manual_seed(0)
    seen = [two(picture()) for _ in range(20)]
    first, second = 255 - (picture() & 128), 255 - picture()
    kinds = [(torch.equal(each, first), torch.equal(each, second)) for each in seen]
    assert set(kinds) == {(True, False), (False, True)}


def test_at_most_two_operations_of_a_phase_are_applied():
    operations = [["Invert", 1, 0], ["Solarize", 1, 0], ["Invert", 1, 0]]  # each inverts
    policy = Policy({"phases": [{"epochs": 1, "operations": operations}]})
    torch.manual_seed(0)
    inverted = sum(torch.equal(policy(picture()), 255 - picture()) for _ in range(1000))
    assert 250 < inverted < 350  # one: 0.3; none: 0.2; two: 0.5


def test_phases_are_spread_over_the_training():
    phases = [
        {"epochs": 1, "operations": []},
        {"epochs": 3, "operations": [["Invert", 1, 0]] * 2 + [["Posterize", 1, 8]] * 8},
    ]
    for epochs, start in ((None, 1), (8, 2), (40, 10), (2, 1)):
        policy = Policy({"phases": phases}, epochs=epochs)
        torch.manual_seed(0)
        changed = []
        for epoch in range(start + 2):
            policy.set_epoch(epoch)
            results = [policy(picture()) for _ in range(30)]
            changed.append(any(not torch.equal(result, picture()) for result in results))
        assert changed == [False] * start + [True] * 2


def test_published_policies_have_their_numbers():
    fast, population = (load_policy(name) for name in FILES)
    assert len(fast._sub_policies) == 493
    assert {len(each) for each in fast._sub_policies} == {2}
    assert fast._sub_policies[0][0][:2] == ("Contrast", pytest.approx(0.83207, abs=1e-5))
    assert fast._sub_policies[0][0][2] == pytest.approx(0.1 + 1.8 * 0.49884, abs=1e-4)
    assert len(population._phases) == 17
    assert population._phases[0] == (pytest.approx(12 / 200), [])
    assert population._phases[-1][0] == 1
    assert max(len(operations) for _, operations in population._phases) <= 30


def test_pbas_numbers_belong_to_their_operations():
    # the source's vector from epoch 12 on begins 0 0, 3 7, 1 9, 2 0, 2 0 (tenths of probability,
    # level) for Rotate, TranslateX, TranslateY, Brightness, Color; its 25th pair is 6 0, Solarize's
    phases = load_policy("pba-cifar10")._phases
    first = [
        ("TranslateX", 0.3, 7 / 32),
        ("TranslateY", 0.1, 9 / 32),
        ("Brightness", 0.2, 0.1),
        ("Color", 0.2, 0.1),
    ]
    assert phases[1][1][:4] == first
    assert phases[1][1][10] == ("Solarize", 0.6, 256)
    # the last one's begins 0 6, 6 6, 10 0, 3 4, 5 8, 0 9, 7 3, and ends 5 2, 7 6
    last = phases[-1][1]
    assert last[:3] == [
        ("TranslateX", 0.6, 6 / 32),
        ("TranslateY", 1, 0),
        ("Brightness", 0.3, 0.82),
    ]
    assert last[3:5] == [("Color", 0.5, 1.54), ("Sharpness", 0.7, 0.64)]
    assert last[-2:] == [("Cutout", 0.5, 4 / 32), ("Contrast", 0.7, 1.18)]


@pytest.mark.parametrize("name", FILES)
def test_every_published_operation_can_be_applied(name):
    policy = load_policy(name)
    lists = [*policy._sub_policies, *(operations for _, operations in policy._phases)]
    given = {(operation, magnitude) for each in lists for operation, _, magnitude in each}
    assert len({operation for operation, _ in given}) == 15
    torch.manual_seed(0)
    for operation, magnitude in given:
        result = OPERATIONS[operation](picture(size=(8, 8)), magnitude)
        assert (result.shape, result.dtype) == ((3, 8, 8), torch.uint8)


def test_a_file_is_a_policy(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"source": "me", "sub_policies": [[["Invert", 1.0, 0]]]}))
    assert torch.equal(load_policy(path)(picture()), 255 - picture())
    assert isinstance(load_policy("autoaugment-cifar10"), v2.AutoAugment)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "expected a JSON file"),
        ("[]", "expected an object in"),
        ("{}", 'expected either "sub_policies" or "phases", got nothing'),
        ('{"source": "x"}', 'expected either "sub_policies" or "phases", got source'),
        ('{"sub_policies": [[["Blur", 1, 0]]]}', r"expected operations .*got \[\"Blur\", 1, 0\]"),
        ('{"sub_policies": [[["Invert", 1.5, 0]]]}', "expected operations"),
        ('{"sub_policies": [[["Rotate", 1, NaN]]]}', "expected operations"),
        ('{"sub_policies": [[["Rotate", 1]]]}', "expected operations"),
        ('{"sub_policies": ["Rotate"]}', "expected operations"),
        ('{"sub_policies": 7}', 'expected a list of "sub_policies", got 7'),
        ('{"sub_policies": null}', 'expected a list of "sub_policies", got None'),
        ('{"phases": {"epochs": 1}}', 'expected a list of "phases"'),
        (f'{{"sub_policies": [[["Rotate", 1, 1{"0" * 400}]]]}}', "expected operations"),
        ('{"phases": [{"epochs": NaN, "operations": []}]}', "expected phases"),
        ('{"phases": [{"epochs": Infinity, "operations": []}]}', "expected phases"),
        (
            '{"phases": [{"epochs": -1, "operations": []}, {"epochs": 2, "operations": []}]}',
            "expected",
        ),
        ('{"phases": [{"epochs": 1}]}', "expected phases .* got KeyError.*operations"),
        ('{"phases": [{"operations": []}]}', 'expected phases with "epochs" and "operations"'),
        ('{"phases": [{"epochs": 0, "operations": []}]}', "expected phases"),
        ('{"phases": [7]}', "expected phases"),
        ('{"phases": [{"epochs": 1, "operations": [["Rotate", "often", 3]]}]}', "expected operat"),
    ],
)
def test_files_of_other_content_are_errors(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"policy: {message}"):
        load_policy(path)


def test_unknown_names_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"Did you mean randaugment"):
        load_policy("randaugmnet")
    with pytest.raises(ValueError, match="policy: expected a JSON file, got"):
        load_policy(tmp_path / "nowhere.json")
