"""Pictures and labels from tars, and the order in which they come."""

import json
import pickle
import re
from collections import Counter

import pytest
import torch
from tars import picture, samples, write_shards, write_tar
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from supermix_transforms import ShardDataset, ShardSampler
from supermix_transforms.data.shards import find_shards
from supermix_transforms.data.tarindex import index_path

to_image = v2.ToImage()


def shade(image) -> int:
    return int(to_image(image)[0, 0, 0])


# -- the data set ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, [3, 5, 2])
    return tmp_path


def test_samples_come_from_all_shards_in_order(folder):
    dataset = ShardDataset(folder)
    assert len(dataset) == 10
    assert dataset.lengths == [3, 5, 2]
    assert [(shade(image), label) for image, label in dataset] == [(n, n) for n in range(10)]
    assert dataset[-1][1] == 9
    for outside in (10, -11):
        with pytest.raises(IndexError):
            dataset[outside]


def test_shards_are_named_in_many_ways(folder):
    paths = [folder / f"part-{i}.tar" for i in range(3)]
    assert find_shards(folder) == find_shards(str(folder)) == paths
    assert find_shards(f"{folder}/part-{{0..2}}.tar") == paths
    assert find_shards([paths[2], f"{folder}/part-{{0,1}}.tar"]) == [paths[2], *paths[:2]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_rgb_and_transformed(tmp_path, kind):
    suffix = {"JPEG": "jpeg"}.get(kind, kind.lower())
    write_tar(tmp_path / "a.tar", [(f"a.{suffix}", picture(40, kind)), ("a.cls", b"3")])
    plain, label = ShardDataset(tmp_path)[0]
    assert (plain.mode, plain.size, label) == ("RGB", (6, 5), 3)
    image, _ = ShardDataset(tmp_path, transform=v2.Compose([to_image, v2.Resize((8, 8))]))[0]
    assert image.shape == (3, 8, 8)
    assert abs(int(image[0, 4, 4]) - 40) < 6


@pytest.mark.parametrize(
    ("suffix", "content", "labels", "expected"),
    [
        ("cls", b"7\n", None, 7),
        ("txt", b"12", None, 12),
        ("json", b"5", None, 5),
        ("json", b'{"label": 4, "x": 1}', None, 4),
        ("json", b'{"cls": 2, "label": 4}', None, 2),
        ("txt", b"dog", ["cat", "dog"], 1),
        ("json", b'{"label": "cat"}', ["cat", "dog"], 0),
        ("npy", b"123", lambda members: len(members["npy"]), 3),
    ],
)
def test_labels_are_found(tmp_path, suffix, content, labels, expected):
    write_tar(tmp_path / "a.tar", [("a.png", picture(1)), (f"a.{suffix}", content)])
    assert ShardDataset(tmp_path, labels=labels)[0][1] == expected


@pytest.mark.parametrize("content", [b"dog", b"", b"\xff", b"1.5", b"1e3", b"true", b"9" * 19])
@pytest.mark.parametrize("suffix", ["cls", "txt", "json"])
def test_a_label_that_is_no_index_is_an_error(tmp_path, suffix, content):
    write_tar(tmp_path / "a.tar", [("a.png", picture(1)), (f"a.{suffix}", content)])
    with pytest.raises(ValueError, match=r"expected a class index as the label of 'a in .*labels="):
        ShardDataset(tmp_path)[0]


def test_samples_without_picture_or_label_are_errors_or_counted(tmp_path):
    members = [*samples(0, 2), ("x.cls", b"1"), ("y.png", picture(1)), ("0000.cls", b"2")]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=r"got 3 without: 'x' in a.tar has no picture"):
        ShardDataset(tmp_path)
    expected = (
        r"3 samples skipped: 'x' .* no picture; 'y' .* no label; '0000' in a.tar is there twice"
    )
    with pytest.warns(UserWarning, match=expected):
        dataset = ShardDataset(tmp_path, on_error="skip")
    assert [label for _, label in dataset] == [0, 1]
    assert dataset.skipped == 3


def test_members_that_are_too_large_are_errors_or_counted(tmp_path, monkeypatch):
    large = [("x.png", picture(1)), ("x.cls", b" " * 200 + b"1")]
    large += [("y.png", picture(1) + bytes(200)), ("y.cls", b"1")]
    members = [*samples(0, 2), *large, ("0002.png", picture(2)), ("0002.cls", b" " * 199 + b"2")]
    write_tar(tmp_path / "a.tar", [*members, ("0002.mp4", bytes(900))])  # which nobody reads
    monkeypatch.setattr("supermix_transforms.data.shards.MOST_MEMBER_BYTES", 200)
    with pytest.raises(
        ValueError, match=r"got 2 without: 'x' in a.tar has a member of more than 2"
    ):
        ShardDataset(tmp_path)
    with pytest.warns(UserWarning, match="2 samples skipped: 'x' .* 'y' in a.tar has a member of"):
        dataset = ShardDataset(tmp_path, on_error="skip")
    assert [label for _, label in dataset] == [0, 1, 2]
    assert dataset.skipped == 2
    with pytest.raises(ValueError, match=r"got 3 without: .*'0002' in a.tar has a member"):
        ShardDataset(tmp_path, labels=lambda members: len(members["mp4"]))


@pytest.mark.filterwarnings("ignore:.*skipped")  # in workers
@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_can_not_be_read_are_errors_or_counted(tmp_path, workers):
    torn = [("0007.png", picture(7)[:40]), ("0007.cls", b"7")]
    write_tar(tmp_path / "a.tar", [*samples(0, 7), *torn, *samples(8, 2)])
    loader = DataLoader(ShardDataset(tmp_path, transform=to_image), 5, num_workers=workers)
    with pytest.raises(ValueError, match=r"got '0007 in .*which Pillow cannot read"):
        list(loader)

    dataset = ShardDataset(tmp_path, transform=to_image, on_error="skip")
    loader = DataLoader(dataset, 5, num_workers=workers)
    if workers:
        labels = [labels.tolist() for _, labels in loader]
    else:
        with pytest.warns(UserWarning, match=r"1 samples skipped: .*'0007 in"):
            labels = [labels.tolist() for _, labels in loader]
    assert labels == [[0, 1, 2, 3, 4], [5, 6, 8, 9]]
    assert dataset.skipped == 1  # in whatever process


def test_labels_that_can_not_be_read_are_counted(tmp_path):
    bad = [("0002.png", picture(2)), ("0002.cls", b"two"), ("0003.png", b""), ("0003.cls", b"3")]
    write_tar(tmp_path / "a.tar", [*samples(0, 2), *bad])
    dataset = ShardDataset(tmp_path, transform=to_image, on_error="skip")
    with pytest.warns(UserWarning, match="1 samples skipped") as warned:
        (batch,) = DataLoader(dataset, 4)
    assert batch[1].tolist() == [0, 1]
    assert dataset.skipped == 2
    reasons = ["expected a class index as the label of '0002 in", "'0003 in .*Pillow cannot read"]
    assert len(warned) == 2
    for each, reason in zip(warned, reasons, strict=True):
        assert re.search(f"1 samples skipped: .*{reason}", str(each.message))


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_batch_of_which_nothing_can_be_read_is_an_error(tmp_path):
    members = [(f"{n}.{s}", b"no") for n in range(4) for s in ("png", "cls")]
    write_tar(tmp_path / "a.tar", members)
    dataset = ShardDataset(tmp_path, on_error="skip")
    with pytest.raises(ValueError, match="expected a batch of 2 samples, got none that can be"):
        next(iter(DataLoader(dataset, 2)))


def test_only_what_can_not_be_read_is_skipped(tmp_path):
    def broken(_):
        raise ValueError("a mistake in the transform")

    shard = write_tar(tmp_path / "a.tar", samples(0, 4))
    dataset = ShardDataset(tmp_path, transform=broken, on_error="skip")
    with pytest.raises(ValueError, match="a mistake in the transform"):
        dataset.__getitems__([0, 1])

    dataset = ShardDataset(tmp_path, on_error="skip")
    write_tar(shard, [("x.png", picture(9)), *samples(0, 4)])
    with pytest.raises(ValueError, match="has changed since it was opened"):
        dataset.__getitems__([0, 1])
    assert dataset.skipped == 0


def test_names_that_are_paths_lead_nowhere(tmp_path):
    victim = tmp_path / "victim"
    folder = tmp_path / "shards"
    folder.mkdir()
    names = [f"{victim}", "../victim", "a/../../victim", "\x1b[31mred", "a\nb", "ü\udcff"]
    members = [
        (f"{name}.{suffix}", content)
        for number, name in enumerate(names)
        for suffix, content in [("png", picture(number)), ("cls", b"%d" % number)]
    ]
    members += [("../bad.png", picture(1)), ("../bad.cls", b"no \x1b[31m")]
    write_tar(folder / "a.tar", members)
    dataset = ShardDataset(folder)
    assert [dataset[n][1] for n in range(len(names))] == list(range(len(names)))
    assert [dataset.name(n) for n in range(len(names))] == [f"a.tar/{name}" for name in names]
    with pytest.raises(ValueError, match=r"the label of '../bad in ") as error:
        dataset[len(names)]
    assert "\x1b" not in str(error.value)
    assert {path.name for path in tmp_path.rglob("*")} == {"shards", "a.tar", "a.tar.index"}


def test_a_pickle_in_a_shard_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    trap = pickle.dumps(Trap())
    suffixes = ("pyd", "pkl", "pickle", "pth", "npy", "npz", "pt")
    write_tar(tmp_path / "a.tar", [*samples(0, 1), *((f"0000.{s}", trap) for s in suffixes)])
    assert ShardDataset(tmp_path)[0][1] == 0
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap).close()
    assert (tmp_path / "sprung").exists()  # it would have


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "expected at least one tar, got an empty list"),
        ("missing.tar", r"got 'missing.tar': No such file"),
        ("http://127.0.0.1/a.tar", "cache_dir: expected a folder .* got None and 'http"),
        ("pipe:touch sprung", "cache_dir: expected a folder .* got None and 'pipe"),
    ],
)
def test_shards_that_are_not_there_are_errors(tmp_path, monkeypatch, urls, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        ShardDataset(urls)
    with pytest.raises(ValueError, match=r"expected \*.tar in '.', got none"):
        ShardDataset(".")
    assert not any(tmp_path.iterdir())


def test_a_shard_that_is_not_there_is_noticed_before_others_are_indexed(tmp_path):
    shards = write_shards(tmp_path, [3])
    with pytest.raises(ValueError, match=r"nowhere\.tar': No such file"):
        ShardDataset([*shards, tmp_path / "nowhere.tar"])
    assert not index_path(shards[0]).exists()


def test_shards_without_samples_and_shards_named_twice_are_errors(tmp_path):
    write_tar(tmp_path / "a.tar", [("a", b"")])
    with pytest.raises(ValueError, match="expected samples, got none in 1 shards"):
        ShardDataset(tmp_path)
    with pytest.raises(ValueError, match=r"expected each tar once, got '.*a.tar' twice"):
        ShardDataset([tmp_path, tmp_path / "a.tar"])
    with pytest.raises(ValueError, match=r"on_error: expected .* got 'warn'"):
        ShardDataset(tmp_path, on_error="warn")


# -- the order -------------------------------------------------------------------------------------


class Lengths:
    def __init__(self, *lengths):
        self.lengths = list(lengths)


def test_each_epoch_has_all_samples_in_another_order():
    sampler = ShardSampler(Lengths(3, 5, 2), seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(10))
        assert list(sampler) == orders[-1]
    assert orders[0] != orders[1] != orders[2]
    assert list(ShardSampler(Lengths(3, 5, 2), seed=2)) != orders[0]
    assert list(ShardSampler(Lengths(3, 5, 2), shuffle=False)) == list(range(10))
    assert len(sampler) == 10


def test_samples_are_shuffled_within_a_window_of_shards():
    sampler = ShardSampler(Lengths(*[10] * 8), window=2)
    shards = [place // 10 for place in sampler]
    windows = [set(shards[first : first + 20]) for first in range(0, 80, 20)]
    assert [len(window) for window in windows] == [2] * 4
    assert set.union(*windows) == set(range(8))
    assert any(shards[i] != shards[i + 1] for i in range(9))
    assert sorted(windows[0]) != [0, 1] or sorted(windows[1]) != [2, 3]


@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
def test_ranks_share_an_epoch_and_have_equally_many(replicas):
    ranks = [
        ShardSampler(Lengths(3, 5, 2), rank=rank, num_replicas=replicas) for rank in range(replicas)
    ]
    whole = list(ShardSampler(Lengths(3, 5, 2)))
    each = [list(rank) for rank in ranks]
    assert {len(some) for some in each} == {len(ranks[0])} == {-(-10 // replicas)}
    dealt = [each[i % replicas][i // replicas] for i in range(len(each[0]) * replicas)]
    assert dealt == whole + whole[: len(dealt) - 10]
    assert max(Counter(dealt).values()) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": -1}, "window: expected at least 0 shards, got -1"),
        ({"rank": 1}, "rank, num_replicas: expected both or none, got 1 and None"),
        ({"rank": 2, "num_replicas": 2}, "rank: expected 0..1, got 2"),
    ],
)
def test_orders_that_can_not_be_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ShardSampler(Lengths(1), **options)


def test_a_loader_reads_shards_with_workers(folder):
    dataset = ShardDataset(folder, transform=to_image)
    batches = list(DataLoader(dataset, 4, sampler=ShardSampler(dataset), num_workers=2))
    for images, labels in batches:
        assert images[:, 0, 0, 0].tolist() == labels.tolist()
    assert torch.cat([labels for _, labels in batches]).sort().values.tolist() == list(range(10))


def test_json_labels_that_nest_without_end_are_errors(tmp_path):
    deep = json.dumps("x").encode() + b"[" * 100_000
    write_tar(tmp_path / "a.tar", [("a.png", picture(1)), ("a.json", b"[" * 100_000 + deep)])
    with pytest.raises(ValueError, match="expected a class index"):
        ShardDataset(tmp_path)[0]


def test_a_label_is_read_without_its_picture(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", b"no picture"), ("0.cls", b"7"), ("0.json", b"3")])
    dataset = ShardDataset(tmp_path / "a.tar")
    assert dataset.label(0) == 7
    seen = ShardDataset(tmp_path / "a.tar", labels=lambda members: sorted(members))
    assert seen.label(0) == ["cls", "json"]
