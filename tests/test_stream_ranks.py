"""A webdataset stream on 1 and 2 ranks, with and without workers; judges stream_script.py."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from stream_script import BATCH, CASES, EPOCHS, example, options
from tars import picture, write_shards, write_tar
from test_shard_ranks import COUNT, LENGTHS, TESTS, torchrun

from supermix_transforms import ShardDataset

ALL = [case for case in CASES if case.startswith("all")]
EQUAL = [case for case in CASES if case.startswith("equal")]
gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


class Trap:
    """Opened by pickle, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def write(folder: Path) -> None:
    """Five shards of keys "0", "1", ..., with a trap in each sample."""
    trap = pickle.dumps(Trap(folder / "sprung"))
    number = 0
    for i, length in enumerate(LENGTHS):
        members = []
        for _ in range(length):
            members += [(f"{number}.png", picture(11 * number)), (f"{number}.cls", b"1")]
            members += [(f"{number}.{suffix}", trap) for suffix in ("pyd", "pth", "pkl", "pickle")]
            number += 1
        write_tar(folder / f"part-{i}.tar", members)


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request, tmp_path_factory):
    """What each rank got in each case, and the folder of the shards."""
    folder = tmp_path_factory.mktemp("stream")
    write(folder)
    torchrun(request.param, TESTS / "stream_script.py", folder)
    results = [json.loads((folder / f"rank{i}.json").read_text()) for i in range(request.param)]
    return results, folder


def batches(rank: dict, case: str, epoch: int) -> list[list[str]]:
    return [fact["keys"] for fact in rank[case] if fact["epoch"] == epoch]


def keys(rank: dict, case: str, epoch: int) -> list[str]:
    return [key for batch in batches(rank, case, epoch) for key in batch]


@pytest.mark.slow
@gloo
@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize("case", ALL)
def test_each_sample_comes_once_over_all_ranks_and_workers(ranks, case, epoch):
    seen = [key for rank in ranks[0] for key in keys(rank, case, epoch)]
    assert sorted(seen, key=int) == [str(number) for number in range(COUNT)]
    for rank in ranks[0]:
        assert {len(batch) for batch in batches(rank, case, epoch)[:-1]} == {BATCH}


@pytest.mark.slow
@gloo
@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize(("case", "whole"), [*zip(EQUAL, ALL, strict=False)])
def test_ranks_have_as_many_whole_batches_as_the_poorest(ranks, case, whole, epoch):
    every = [batches(rank, whole, epoch) for rank in ranks[0]]
    least = min(sum(map(len, each)) for each in every) // BATCH
    assert least > 0
    for rank, each in zip(ranks[0], every, strict=True):
        assert batches(rank, case, epoch) == each[:least]


@pytest.mark.slow
@gloo
def test_the_order_is_of_seed_and_epoch_and_none_of_the_tars(ranks):
    for case in CASES:
        orders = [keys(ranks[0][0], case, epoch) for epoch in range(EPOCHS)]
        assert orders[0] != orders[1]
        assert orders[0] != sorted(orders[0], key=int)
    for rank in ranks[0]:
        assert rank["all by workers"] == rank["all by workers again"]
    if len(ranks[0]) > 1:  # other shards
        first, second = (set(keys(ranks[0][0], "all", epoch)) for epoch in range(EPOCHS))
        assert first != second


@pytest.mark.slow
@gloo
def test_a_student_is_trained_with_unequally_many_batches(ranks):
    results, _ = ranks
    own = [sum(LENGTHS[rank :: len(results)]) for rank in range(len(results))]
    assert [rank["trained"]["steps"] for rank in results] == [-(-each // BATCH) for each in own]
    assert all(rank["trained"]["weights"] == results[0]["trained"]["weights"] for rank in results)


@pytest.mark.slow
@gloo
def test_no_pickle_of_the_stream_was_opened(ranks):
    import webdataset as wds

    _, folder = ranks
    dataset = ShardDataset(folder)
    assert len([dataset[number] for number in range(COUNT)]) == COUNT
    assert not (folder / "sprung").exists()
    plain = wds.WebDataset(str(folder / "part-0.tar"), shardshuffle=False)
    next(iter(plain.decode(only="pyd")))
    assert (folder / "sprung").exists()  # it would have been
    (folder / "sprung").unlink()


@pytest.mark.parametrize(("count", "workers"), [(3, 0), (1, 3), (2, 2)])
def test_fewer_shards_than_readers_are_an_error(tmp_path, monkeypatch, capsys, count, workers):
    write_shards(tmp_path, [3, 2])
    write_tar(tmp_path / "part-2.tar", [])
    monkeypatch.setenv("RANK", str(count - 1))
    monkeypatch.setenv("WORLD_SIZE", str(count))
    with pytest.raises(SystemExit):
        example().main([*options(tmp_path), f"--workers={workers}"])
    message = f"of {count * max(1, workers)} readers ({count} ranks, {workers} workers), got 2 with"
    assert message in " ".join(capsys.readouterr().err.split())
