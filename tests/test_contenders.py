"""What the compared methods are given, and what is counted of them: nothing on trust."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from picky import picky_labeler, picky_pictures

from supermix_transforms import TeacherLabeler
from supermix_transforms.commands import contenders
from supermix_transforms.commands.contenders import (
    AUTHORS,
    METHODS,
    STEPPED,
    Made,
    draw_batches,
    is_float32,
    largest_limit,
    make_method,
    make_sample,
    measure,
)
from supermix_transforms.draws import draw_weights
from supermix_transforms.settings import SolverSettings
from supermix_transforms.transforms import SuperMix

pytestmark = pytest.mark.usefixtures("one_thread")

MIXERS = ["fast", *STEPPED, *AUTHORS, "mixup", "cutmix"]


def batches(labeler=None, *, pictures=12, count=12, batch_size=12, k=2, seed=0):
    options = {"k": k, "alpha": 3.0, "count": count, "batch_size": batch_size, "seed": seed}
    return draw_batches(picky_pictures(pictures), labeler or picky_labeler(), **options)


def made(name, labeler=None, max_steps=None, **options):
    labeler = labeler or picky_labeler()
    (batch,) = batches(labeler, **options)
    k = options.get("k", 2)
    result = make_method(name, labeler, k=k, alpha=3.0, max_steps=max_steps)(batch)
    return result, make_sample(result, batch, labeler), batch


@lru_cache
def at_its_own_limit(name):
    return made(name)[1]


# -- what they are given ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("k", [2, 3])
def test_every_method_mixes_the_same_tuples(name, k):
    result, _, batch = made(name, k=k, max_steps=2)
    assert result.mixed.sources.tolist() == batch.sources.tolist()
    if name != "cutmix":  # its weights are the areas that are left
        torch.testing.assert_close(result.mixed.weights, batch.weights)
    assert result.mixed.images.dtype == torch.uint8


def test_matched_tuples_are_others_with_weights_drawn_the_same_way():
    result, _, batch = made("fast-matched")
    sources = result.mixed.sources
    assert sources.tolist() != batch.sources.tolist()
    assert sources[:, 0].tolist() == list(range(12))
    assert torch.equal(result.mixed.weights, draw_weights(batch.draw, sources, 3.0))


def test_tuples_are_those_that_supermix_draws():
    labeler = picky_labeler()
    (batch,) = batches(labeler)
    mixed = SuperMix(labeler, k=2, alpha=3.0).mix(batch.images, None, batch.draw).mixed
    assert torch.equal(mixed.sources, batch.sources)


@pytest.mark.parametrize(
    ("pictures", "count", "batch_size", "k", "sizes"),
    [
        (12, 12, 12, 2, [12]),
        (12, 12, 5, 2, [4, 4, 4]),
        (12, 10, 4, 2, [4, 4, 4]),
        (5, 30, 10, 2, [10, 10, 10]),
        (5, 12, 8, 3, [5, 5, 5]),
        (12, 30, 10, 2, [10, 10, 10]),
        (3, 9, 9, 3, [9]),
        (2, 2, 16, 2, [2]),
        (12, 5, 4, 4, [4, 4]),
    ],
)
def test_batches_have_one_size_and_each_picture_as_often(pictures, count, batch_size, k, sizes):
    drawn = batches(pictures=pictures, count=count, batch_size=batch_size, k=k)
    assert [len(batch.images) for batch in drawn] == sizes
    seen = [image.tobytes() for batch in drawn for image in batch.images.numpy()]
    times = [seen.count(image.numpy().tobytes()) for _, image in picky_pictures(pictures)]
    assert max(times) - min(times) <= 1


@pytest.mark.parametrize("k", [2, 3])
def test_few_pictures_give_many_tuples_of_different_pictures_and_weights(k):
    drawn = batches(pictures=5, count=30, batch_size=10, k=k)
    weights = torch.cat([batch.weights for batch in drawn]).tolist()
    assert len({tuple(row) for row in weights}) == 30
    for batch in drawn:
        names = batch.images.flatten(1)[batch.sources]  # (B, k, pixels)
        for one in range(k):
            for other in range(one):
                assert (names[:, one] != names[:, other]).any(dim=1).all()


def test_draws_depend_on_the_seed():
    one, same, other = (batches(seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one.weights, same.weights)
    assert torch.equal(one.sources, same.sources)
    assert not torch.equal(one.weights, other.weights)


def test_too_few_pictures_are_an_error():
    with pytest.raises(ValueError, match="images: expected at least k = 3 pictures, got 2"):
        batches(pictures=2, k=3)


# -- what is counted -------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 5, 13])
@pytest.mark.parametrize("name", STEPPED)
def test_a_lower_limit_is_what_a_run_at_that_limit_gives(name, limit):
    whole = at_its_own_limit(name)
    _, short, _ = made(name, max_steps=limit)
    at = whole.at(limit)
    assert 0 < int(at.passed.sum()) <= int(whole.passed.sum())
    assert torch.equal(at.passed, short.passed)
    assert torch.equal(at.steps, short.steps)
    assert torch.equal(at.forwards, short.forwards)
    # a row that passes pays for a backward only where others of its graph go on
    assert ((at.backwards - short.backwards).abs() <= 1).all()
    assert torch.equal(at.backwards[~at.passed], short.backwards[~at.passed])
    assert torch.equal(at.sparsity[at.passed], short.sparsity[at.passed])


@pytest.mark.parametrize("limit", [1, 4, 9])
@pytest.mark.parametrize("name", ["authors", "authors-70"])
def test_a_lower_limit_of_the_authors_loop_is_what_a_run_at_that_limit_gives(name, limit):
    whole = at_its_own_limit(name)
    _, short, _ = made(name, max_steps=limit)
    at = whole.at(limit)
    for field in ("passed", "steps", "forwards", "backwards"):
        assert torch.equal(getattr(at, field), getattr(short, field))
    assert torch.equal(at.sparsity[at.passed], short.sparsity[at.passed])


def test_the_authors_loop_ends_sooner_at_its_tolerance_and_produces_less():
    (_, strict, _), (_, loose, _) = made("authors"), made("authors-70")
    assert int(strict.steps[0]) == 50
    assert int(loose.steps[0]) < 10
    assert int(loose.passed.sum()) < int(strict.passed.sum())


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_blind_mixes_are_judged_like_the_others(name):
    result, sample, _ = made(name)
    assert result.mixed.converged.all()  # by their own account
    assert int(sample.passed.sum()) < 6
    assert sample.forwards.tolist() == [1] * 12


def test_what_a_search_calls_unsolved_counts_if_the_teacher_is_convinced():
    labeler = picky_labeler()
    (batch,) = batches(labeler)
    settings = SolverSettings(margin=50.0, max_steps=3)  # nothing has such a margin
    mixed = SuperMix(labeler, settings=settings).mix(batch.images, None, batch.draw).mixed
    assert not mixed.converged.any()
    assert make_sample(Made(mixed), batch, labeler).passed.any()


@pytest.mark.parametrize("name", ["fast", "authors"])
def test_a_faked_success_is_found_out(name):
    labeler = picky_labeler()
    result, sample, batch = made(name, labeler)
    assert sample.passed.any()
    black = torch.zeros_like(result.mixed.images)
    faked = replace(result.mixed, images=black, outcome=torch.zeros(12, dtype=torch.int64))
    assert faked.converged.all()
    finished = None if result.finished is None else torch.ones_like(result.finished)
    again = make_sample(Made(faked, finished), batch, labeler)
    assert not again.passed.any()


def test_what_the_authors_script_throws_away_does_not_count():
    labeler = picky_labeler()
    result, sample, batch = made("authors", labeler)
    nothing = Made(result.mixed, torch.zeros_like(result.finished), result.seconds)
    assert sample.passed.any()
    assert not make_sample(nothing, batch, labeler).passed.any()


def test_mixes_are_checked_in_float32_and_half_a_batch_at_a_time():
    labeler = picky_labeler(torch.bfloat16)
    net = labeler._alive()[0].module
    result, _, batch = made("fast", labeler)
    calls = []

    def note(module, inputs, output):
        calls.append((len(output), output.dtype))

    handle = net.register_forward_hook(note)
    make_sample(result, batch, labeler)
    handle.remove()
    assert calls == [(6, torch.float32)] * 4  # the mixes, then the originals


@pytest.mark.parametrize(
    ("name", "dtype"), [("authors", torch.float32), ("authors-same-dtype", torch.bfloat16)]
)
def test_the_authors_loop_runs_in_float32_unless_it_is_asked_for_ours(name, dtype):
    labeler = picky_labeler(torch.bfloat16)
    net = labeler._alive()[0].module
    (batch,) = batches(labeler)
    seen = set()
    handle = net.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    make_method(name, labeler, k=2, alpha=3.0, max_steps=2)(batch)
    handle.remove()
    assert seen == {dtype}


def test_whether_ours_is_float32_is_seen_in_the_answers():
    images = torch.stack([image for _, image in picky_pictures(4)])
    assert is_float32(picky_labeler(), images)
    assert not is_float32(picky_labeler(torch.bfloat16), images)


def test_the_lower_limit_is_three_forwards_and_a_backward_for_each_picture():
    asked = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(3))

        def forward(self, images):
            asked.append((len(images), images.requires_grad))
            return images.mean(dim=(2, 3)) * self.scale

    labeler = TeacherLabeler(Net())
    (batch,) = batches(labeler)
    asked.clear()
    result = make_method("lower-limit", labeler, k=2, alpha=3.0)(batch)
    assert asked == [(12, False), (12, True), (12, False)]
    assert len(result.seconds) == 3
    assert list(result.seconds) == sorted(result.seconds)
    sample = make_sample(result, batch, labeler)
    assert sample.forwards.tolist() == [3] * 12
    assert sample.backwards.tolist() == [1] * 12


def test_the_limit_of_a_search_is_its_own():
    names = ("fast", "fast-matched", "paper", "newton-tv", "sgd", "authors", "authors-70")
    limits = [largest_limit(name, 2, (17, 15)) for name in names]
    assert limits == [20, 20, 50, 50, 300, 50, 50]


# -- how they are run ------------------------------------------------------------------------------


def test_methods_take_turns_and_another_one_is_first_each_time(monkeypatch):
    ran = []
    make = contenders.make_method

    def noted(name, labeler, *, k, alpha, max_steps=None):
        run = make(name, labeler, k=k, alpha=alpha, max_steps=max_steps)

        def each(batch):
            ran.append((name, max_steps))
            return run(batch)

        return each

    monkeypatch.setattr(contenders, "make_method", noted)
    labeler = picky_labeler()
    two = batches(labeler, count=12, batch_size=6)
    lots = {"mixup": two, "cutmix": two[:1], "lower-limit": two}
    measured = measure(lots, labeler, 2, 3.0, repeats=3)
    warm_up, rest = ran[:3], [name for name, limit in ran[3:] if limit is None]
    assert warm_up == [(name, 1) for name in lots]
    mixup, cutmix, lower = ["mixup"] * 2, ["cutmix"], ["lower-limit"] * 2
    assert rest == [*mixup, *cutmix, *lower, *cutmix, *lower, *mixup, *lower, *mixup, *cutmix]
    for name, lot in lots.items():
        assert len(measured[name].samples) == len(lot)
        assert [len(repeat) for repeat in measured[name].times] == [len(lot)] * 3


def test_a_loop_that_reads_the_clock_also_pays_for_what_comes_after_its_last_step(monkeypatch):
    labeler = picky_labeler()
    lots = {"authors": batches(labeler), "lower-limit": batches(labeler)}
    ticks = iter(range(1000))
    monkeypatch.setattr(contenders.time, "perf_counter", lambda: float(next(ticks)))
    measured = measure(lots, labeler, 2, 3.0, repeats=1)["authors"]
    ((stamps,),) = measured.times
    # start, the loop's start, its 50 steps, the end: 52 s, of which 2 are before and after
    assert stamps[-1] == 52
    assert stamps == tuple(float(second) for second in range(3, 53))


def test_names_are_those_that_others_read():
    searched = ["fast", "fast-matched", "paper", "newton-tv", "sgd"]
    authors = ["authors", "authors-70", "authors-same-dtype"]
    assert list(METHODS) == [*searched, *authors, "mixup", "cutmix", "lower-limit"]
