"""The training loop: what is learned from which batch, and runs that go on."""

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from colours import NUM_CLASSES, Pictures, colour_teacher, pictures
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from supermix_transforms import MixLoader, MixUp, SuperMixCollate, TeacherLabeler
from supermix_transforms.losses import kd_loss, supermix_kd_loss, supermix_loss
from supermix_transforms.training import (
    MODERN,
    PAPER,
    DistillSettings,
    distill,
    evaluate,
    make_accelerator,
)
from supermix_transforms.training.checkpoints import Checkpoint, Progress
from supermix_transforms.training.hints import HINTS, HintLoss
from supermix_transforms.training.loss import Pictured
from supermix_transforms.training.loss import batch_loss as loss_of

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = DistillSettings(epochs=3, lr=0.05, warmup_epochs=1, save_steps=2)


class Student(nn.Sequential):
    """A small network with all that a checkpoint must hold."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(6, NUM_CLASSES),
        )


def student() -> nn.Module:
    torch.manual_seed(3)
    return Student()


def online(count: int = 24, **options) -> DataLoader:
    collate = SuperMixCollate(colour_teacher(), **options)
    generator = torch.Generator().manual_seed(0)
    return DataLoader(Pictures(count), 6, shuffle=True, generator=generator, collate_fn=collate)


def plain(count: int = 24) -> DataLoader:
    return DataLoader(TensorDataset(*pictures(count)), 6)


def held_out() -> DataLoader:
    return DataLoader(TensorDataset(*pictures(10, seed=9)), 4)


def test_a_student_learns_from_mixes_and_the_results_have_their_keys(tmp_path):
    lines = []
    settings = DistillSettings(epochs=20, lr=0.2, warmup_epochs=1)
    summary = distill(
        student(),
        online(target="hard"),
        held_out(),
        tmp_path,
        settings=settings,
        teacher=TeacherLabeler(colour_teacher()),
        show=lines.append,
    )
    assert summary.top1 > 0.9
    assert summary.top5 == 1
    assert summary.agreement == summary.top1  # the teacher is always right here
    assert summary.student_samples == 20 * 2 * 24
    assert summary.teacher_calls >= 20 * 24
    found = json.loads((tmp_path / "results.json").read_text())
    names = {"top1", "top5", "ece", "agreement", "student_samples", "teacher_calls", "seconds"}
    assert names <= found.keys()
    assert found["seconds"].keys() == {"data", "mixing", "training"}
    assert len(lines) == 20
    assert lines[0].startswith("epoch 1 of 20: loss ")
    assert lines[0].endswith(" left")
    assert not lines[-1].endswith(" left")
    history = json.loads((tmp_path / "history.json").read_text())
    assert history[-1]["loss"] < history[0]["loss"]
    best = Student()
    best.load_state_dict(load_file(tmp_path / "best.safetensors"))
    images, labels = pictures(10, seed=9)
    best.eval()
    hits = (best(images).argmax(dim=1) == labels).float().mean()
    assert summary.best_top1 == pytest.approx(float(hits))


@pytest.mark.parametrize("kd", ["none", "originals", "both"])
@pytest.mark.parametrize("target", ["hard", "soft"])
def test_a_mixed_batch_gives_the_papers_losses(kd, target):
    network = student().eval()
    batch = next(iter(online(target=target)))
    settings = DistillSettings(kd=kd, kd_weight=0.3, temperature=2.0)
    loss, samples = loss_of(network, batch, settings)
    logits, mixed = network(batch.images), network(batch.mixed)
    if kd == "none":
        expected = supermix_loss(logits, batch.labels, mixed, batch.targets)
    else:
        expected = supermix_kd_loss(
            logits,
            batch.labels,
            batch.teacher.softened(2.0),
            mixed,
            batch.targets,
            batch.mixed_teacher.softened(2.0) if kd == "both" else None,
            temperature=2.0,
            weight=0.3,
        )
    assert torch.allclose(loss, expected)
    assert samples == 12


@pytest.mark.parametrize("kd", ["none", "originals"])
def test_a_labelled_batch_gives_cross_entropy_or_eq_8(kd):
    network = student().eval()
    images, labels = pictures(6)
    loader = MixLoader([(images, labels)], labeler=TeacherLabeler(colour_teacher()))
    (batch,) = loader
    loss, samples = loss_of(network, batch, DistillSettings(kd=kd))
    logits = network(images)
    expected = F.cross_entropy(logits, labels)
    if kd == "originals":
        expected = kd_loss(logits, batch.teacher.softened(4.0), labels)
    assert torch.allclose(loss, expected)
    assert samples == 6
    if kd == "none":
        pair, _ = loss_of(network, (images, labels), DistillSettings(label_smoothing=0.1))
        assert torch.allclose(pair, F.cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize("kd", ["none", "originals"])
def test_of_a_mixed_batch_the_originals_alone_may_be_learned(kd):
    """The baselines see the same views as the mixes are made of."""
    network = student().eval()
    batch = next(iter(online()))
    loss, samples = loss_of(network, batch, DistillSettings(kd=kd, learn="originals"))
    logits = network(batch.images)
    expected = F.cross_entropy(logits, batch.labels)
    if kd == "originals":
        expected = kd_loss(logits, batch.teacher.softened(4.0), batch.labels)
    assert torch.allclose(loss, expected)
    assert samples == 6


def test_of_plain_batches_the_teacher_is_asked():
    network, teacher = student().eval(), TeacherLabeler(colour_teacher())
    images, labels = pictures(6)
    wrong = (labels + 1) % NUM_CLASSES
    logits = network(images)
    loss, samples = loss_of(network, (images, wrong), DistillSettings(kd="both"), teacher)
    assert torch.allclose(loss, kd_loss(logits, teacher(images).softened(4.0), wrong))
    assert samples == 6
    loss, _ = loss_of(network, (images, wrong), DistillSettings(labels="teacher"), teacher)
    assert torch.allclose(loss, F.cross_entropy(logits, teacher(images).hard))


def test_pictures_without_labels_have_the_teachers(tmp_path):
    images, labels = pictures(24)
    unlabelled = TensorDataset(images, torch.zeros_like(labels))
    collate = SuperMixCollate(colour_teacher(), target="hard")
    train = DataLoader(unlabelled, 6, shuffle=True, collate_fn=collate)
    validation = DataLoader(TensorDataset(pictures(10, seed=9)[0], torch.zeros(10).long()), 4)
    settings = DistillSettings(epochs=20, lr=0.2, warmup_epochs=1, labels="teacher")
    teacher = TeacherLabeler(colour_teacher())
    summary = distill(student(), train, validation, tmp_path, settings=settings, teacher=teacher)
    assert summary.top1 > 0.9  # colour_teacher is always right
    assert summary.agreement == summary.top1


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "last.safetensors")


class Stop(Exception):
    pass


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5, 9, 11])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path, ema, after):
    settings = DistillSettings(epochs=3, lr=0.05, warmup_epochs=1, save_steps=3, ema=ema)
    whole = distill(student(), online(), held_out(), tmp_path / "whole", settings=settings)
    network, steps = student(), []

    def stop(*_):
        if network.training:
            steps.append(1)
            if len(steps) > after:
                raise Stop

    handle = network.register_forward_hook(stop)
    with pytest.raises(Stop):
        distill(network, online(), held_out(), tmp_path / "parts", settings=settings)
    handle.remove()
    parts = distill(student(), online(), held_out(), tmp_path / "parts", settings=settings)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    histories = [
        json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "parts")
    ]
    assert histories[0] == histories[1]
    assert (whole.top1, whole.student_samples) == (parts.top1, parts.student_samples)


def test_a_run_that_was_stopped_before_a_last_batch_of_one_goes_on(tmp_path):
    settings = DistillSettings(epochs=1, lr=0.05, warmup_epochs=0, save_steps=1)

    def stop(done: int, steps: int) -> None:
        assert steps == 5
        if done == 5:
            raise Stop  # after the checkpoint of the fourth

    whole = distill(student(), online(25), None, tmp_path / "whole", settings=settings)
    with pytest.raises(Stop):
        distill(student(), online(25), None, tmp_path / "parts", settings=settings, advance=stop)
    parts = distill(student(), online(25), None, tmp_path / "parts", settings=settings)
    assert whole.student_samples == parts.student_samples == 50
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)


def accumulating(steps: int):
    from accelerate import Accelerator, DataLoaderConfiguration

    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    return Accelerator(cpu=True, gradient_accumulation_steps=steps, dataloader_config=order)


@pytest.mark.parametrize("after", [2, 3, 6, 7, 11])
def test_a_run_that_accumulates_goes_on_with_whole_sums(tmp_path, after):
    settings = DistillSettings(epochs=3, lr=0.05, warmup_epochs=1, save_steps=1, ema=0.9)

    def run(name: str, advance=lambda done, steps: None):
        train = online()
        folder, accelerator = tmp_path / name, accumulating(3)  # an epoch has four batches
        options = {"settings": settings, "accelerator": accelerator, "advance": advance}
        return distill(student(), train, None, folder, **options)

    def stop(done: int, steps: int) -> None:
        assert steps == 12
        if done > after:
            raise Stop

    run("whole")
    with pytest.raises(Stop):
        run("parts", stop)
    run("parts")
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    images, labels = pictures(24)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 7, NUM_CLASSES)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    settings = DistillSettings(epochs=1, lr=0.05, warmup_epochs=0, milestones=())
    for network, steps in zip(networks, (1, 4), strict=True):
        train = DataLoader(TensorDataset(images, labels), 24 // steps)
        accelerator = accumulating(steps)
        distill(
            network, train, None, tmp_path / str(steps), settings=settings, accelerator=accelerator
        )
    assert torch.allclose(networks[0][1].weight, networks[1][1].weight, atol=1e-6)


class Staged(nn.Module):
    """A network with maps and a linear classifier, for losses of features."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), norm, nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 6, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(6, NUM_CLASSES)

    def forward(self, images):
        return self.fc(self.layer2(self.layer1(images)).mean(dim=(2, 3)))


def hinted(method: str) -> tuple[nn.Module, HintLoss]:
    torch.manual_seed(5)
    network, teacher = Staged(), Staged(5)
    labels = pictures(24)[1] if method == "crd" else None
    return network, HintLoss(method, network, teacher, pictures(2)[0], labels=labels)


def numbered(count: int = 24) -> DataLoader:
    """Mixes whose originals bring their places along."""
    images, labels = pictures(count)
    samples = TensorDataset(images, labels, torch.arange(count))
    return DataLoader(samples, 6, shuffle=True, collate_fn=SuperMixCollate(colour_teacher()))


@pytest.mark.parametrize("method", HINTS)
def test_a_loss_of_features_is_of_the_originals_alone(method):
    network, hints = hinted(method)
    batch = next(iter(numbered()))
    network.eval()  # batch statistics would be of the mixes as well
    whole = Pictured(network, None, None, hints)
    torch.manual_seed(1)
    loss, samples = loss_of(whole, batch, DistillSettings(), hinted=True)
    other = hinted(method)
    alone = Pictured(other[0].eval(), None, None, other[1])
    torch.manual_seed(1)  # crd draws
    _, hint = alone(batch.images, (6, batch.extra[2]))
    without, _ = loss_of(network, batch, DistillSettings())
    assert (loss - without).item() == pytest.approx(hint.item(), rel=1e-4)
    assert hint > 0
    assert samples == 12


@pytest.mark.parametrize("method", HINTS)
def test_a_run_with_a_loss_of_features_goes_on_to_the_same_weights(tmp_path, method):
    def run(name: str, advance=lambda done, steps: None):
        network, hints = hinted(method)
        options = {"settings": settings, "hints": hints, "advance": advance}
        return distill(network, numbered(), held_out(), tmp_path / name, **options)

    def stop(done: int, steps: int) -> None:
        if done == 7:
            raise Stop

    settings = DistillSettings(epochs=3, lr=0.001, warmup_epochs=1, save_steps=1, ema=0.9)
    run("whole")
    with pytest.raises(Stop):
        run("parts", stop)
    run("parts")
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(name.startswith("model/hints.") for name in one) == (method != "at")
    best = load_file(tmp_path / "whole" / "best.safetensors")
    assert best.keys() == Staged().state_dict().keys()


def test_trackers_hear_of_each_epoch(tmp_path):
    accelerator, heard = accumulating(1), []
    accelerator.log = lambda values, step: heard.append((step, values))
    distill(student(), plain(), held_out(), tmp_path, settings=FEW, accelerator=accelerator)
    assert [step for step, _ in heard] == [4, 8, 12]
    assert [values for _, values in heard] == json.loads((tmp_path / "history.json").read_text())


def test_a_finished_run_is_not_run_again(tmp_path):
    first = distill(student(), online(), held_out(), tmp_path, settings=FEW)
    before = weights(tmp_path)
    again = distill(student(), online(), held_out(), tmp_path, settings=FEW)
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path).items())
    assert again == first


def test_evaluation_is_what_the_metrics_say():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    network = student().eval()
    images, labels = pictures(10, seed=9)
    loader = accelerator.prepare(held_out())
    found = evaluate(network, loader, accelerator, TeacherLabeler(colour_teacher()))
    logits = network(images).detach()
    assert found["top1"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert found["top5"] == 1
    assert found["agreement"] == found["top1"]
    confidence, hit = logits.softmax(1).max(1).values, (logits.argmax(1) == labels).float()
    bins = (confidence * 15).long()
    gap = sum(abs(float((confidence - hit)[bins == each].sum())) for each in bins.unique()) / len(
        labels
    )
    assert found["ece"] == pytest.approx(gap, abs=1e-5)


def test_the_average_is_what_is_judged_and_kept(tmp_path):
    settings = DistillSettings(epochs=2, lr=0.05, warmup_epochs=0, ema=0.9)
    distill(student(), online(), held_out(), tmp_path, settings=settings)
    kept, best = weights(tmp_path), load_file(tmp_path / "best.safetensors")
    averaged = {
        name.removeprefix("average/module.network."): value
        for name, value in kept.items()
        if name.startswith("average/module.")
    }
    assert averaged.keys() == best.keys()
    name = "0.weight"
    assert not torch.equal(averaged[name], kept[f"model/network.{name}"])


def test_a_short_run_is_not_averaged_with_its_first_weights(tmp_path):
    settings = DistillSettings(epochs=6, lr=0.05, warmup_epochs=0, ema=0.9999)
    network = student()
    first = network[0].weight.detach().clone()
    distill(network, online(), None, tmp_path, settings=settings)
    last = network[0].weight.detach()
    averaged = weights(tmp_path)["average/module.network.0.weight"]
    assert (averaged - last).norm() < 0.5 * (first - last).norm()
    assert not torch.equal(averaged, last)


def test_learning_rates_of_the_presets():
    def rates(settings, steps_per_epoch=10):
        steps = settings.epochs * steps_per_epoch
        return [settings.rate(step, steps, steps_per_epoch) for step in range(steps)]

    paper = rates(PAPER)
    assert paper[0] == pytest.approx(0.1 / 50)
    assert paper[49] == paper[1999] == 0.1
    places = [2000, 3000, 4000, 5000]  # epochs 200, 300, 400, 500 of 600
    for number, place in enumerate(places, 1):
        assert paper[place] == pytest.approx(0.1 * 0.1**number)
        assert paper[place - 1] == pytest.approx(0.1 * 0.1 ** (number - 1))
    short = rates(replace(PAPER, epochs=10))
    assert short[:10] == pytest.approx([0.1 * (step + 1) / 10 for step in range(10)])
    # a warm-up of 1.2 steps
    assert rates(replace(PAPER, epochs=2), 6)[:2] == pytest.approx([0.1 / 1.2, 0.1])
    modern = rates(MODERN)
    assert max(modern) == pytest.approx(0.1)
    assert modern[-1] < 1e-6
    assert all(a >= b for a, b in pairwise(modern[50:]))


def test_uint8_pictures_are_scaled_and_normalised(tmp_path):
    seen = []
    network = student()
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images, labels = pictures(6, dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images, labels), 6)
    settings = DistillSettings(epochs=1, warmup_epochs=0)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    distill(network, loader, None, tmp_path, settings=settings, mean=mean, std=std)
    expected = (images.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    assert torch.allclose(seen[0], expected)


def test_without_validation_there_are_no_figures_of_it(tmp_path):
    summary = distill(student(), plain(), None, tmp_path, settings=FEW)
    assert (summary.top1, summary.best_top1, summary.teacher_calls) == (None, None, 0)
    last, best = (load_file(tmp_path / f"{name}.safetensors") for name in ("last", "best"))
    assert all(torch.equal(value, last[f"model/network.{name}"]) for name, value in best.items())


def test_the_teachers_calls_are_counted_whatever_is_learned(tmp_path):
    teacher = TeacherLabeler(colour_teacher())
    mixup = online(mix=MixUp(k=2, teacher=teacher))
    for name, train, options, calls in (
        ("ce", plain(), {}, 0),
        ("kd", plain(), {"kd": "originals"}, 24),
        ("mixup", mixup, {}, 48),  # the originals' labels and the mixes'
        ("none of the mixes", online(), {"learn": "originals"}, 0),
    ):
        settings = DistillSettings(epochs=1, **options)
        folder = tmp_path / name
        summary = distill(student(), train, None, folder, settings=settings, teacher=teacher)
        assert summary.teacher_calls == calls, name
        assert summary.student_samples == (48 if name == "mixup" else 24)


@pytest.mark.parametrize("what", ["student", "average", "hints"])
def test_whoever_is_judged_is_so_in_the_precision_of_training(tmp_path, what, own_precision):
    network, seen = (Staged(4) if what == "hints" else student()), []

    def look(module: nn.Module, *_) -> None:
        if not module.training:
            seen.append(torch.is_autocast_enabled("cpu"))

    next(part for part in network.modules() if isinstance(part, nn.Conv2d)).register_forward_hook(
        look
    )
    settings = DistillSettings(epochs=1, ema=0.9 if what == "average" else 0.0)
    hints = None
    if what == "hints":
        hints = HintLoss("at", network, Staged(6), torch.zeros(2, 3, 9, 7))
        seen.clear()
    accelerator = make_accelerator(settings, mixed_precision="bf16")
    options = {"settings": settings, "accelerator": accelerator, "hints": hints}
    distill(network, plain(), held_out(), tmp_path, **options)
    assert seen
    assert all(seen)


# -- what can go wrong -----------------------------------------------------------------------------


def test_kd_wants_the_teachers_labels(tmp_path):
    settings = DistillSettings(epochs=1, kd="both")
    with pytest.raises(ValueError, match="need the teacher's labels of the originals"):
        distill(student(), plain(), None, tmp_path, settings=settings)


def test_who_is_judged_by_the_teachers_classes_wants_a_teacher(tmp_path):
    settings = DistillSettings(epochs=1, labels="teacher")
    with pytest.raises(ValueError, match="a teacher whose classes the validation is judged by"):
        distill(student(), online(), held_out(), tmp_path, settings=settings)
    assert not any(tmp_path.iterdir())


def test_other_settings_or_students_than_those_begun_with_are_errors(tmp_path):
    distill(student(), plain(), None, tmp_path, settings=FEW)
    other = DistillSettings(epochs=3, lr=0.06, warmup_epochs=1, save_steps=2)
    with pytest.raises(ValueError, match=r"got others: lr 0\.05, now 0\.06"):
        distill(student(), plain(), None, tmp_path, settings=other)
    with pytest.raises(ValueError, match='got others: mix null, now "cutmix"'):
        distill(student(), plain(), None, tmp_path, settings=FEW, described={"mix": "cutmix"})
    normal = {"mean": [0.5], "std": [0.2]}
    with pytest.raises(ValueError, match=r"got others: mean null, now \[0\.5\]; std null, now"):
        distill(student(), plain(), None, tmp_path, settings=FEW, **normal)
    accelerator = accumulating(2)
    with pytest.raises(ValueError, match="got others: accumulate 1, now 2"):
        distill(student(), plain(), None, tmp_path, settings=FEW, accelerator=accelerator)
    with pytest.raises(ValueError, match="got others: batches_an_epoch 4, now 5"):
        distill(student(), plain(25), None, tmp_path, settings=FEW)
    other_net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 7, NUM_CLASSES))
    with pytest.raises(ValueError, match="expected the student that"):
        distill(other_net, plain(), None, tmp_path, settings=FEW)


def test_what_a_run_was_described_with_is_wanted_again(tmp_path):
    distill(student(), plain(), None, tmp_path, settings=FEW, described={"mix": "cutmix"})
    with pytest.raises(ValueError, match='got others: mix "cutmix", now null'):
        distill(student(), plain(), None, tmp_path, settings=FEW)


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (DataLoader(TensorDataset(*pictures(3)), 4, drop_last=True), "at least one batch, got"),
        (online(), r"validation: expected batches \(images, labels\), got mixes"),
        (online(output="tuple"), r"validation: expected batches \(images, labels\), got mixes"),
        (
            DataLoader(TensorDataset(pictures(4)[0], torch.full((4,), NUM_CLASSES)), 4),
            rf"validation: expected labels in 0\.\.{NUM_CLASSES - 1}, .* got {NUM_CLASSES}\.\.",
        ),
    ],
)
def test_a_validation_that_cannot_be_judged_is_an_error_before_training(
    tmp_path, validation, message
):
    steps = []
    with pytest.raises(ValueError, match=message):
        distill(
            student(),
            plain(),
            validation,
            tmp_path,
            settings=FEW,
            advance=lambda *at: steps.append(at),
        )
    assert not steps


def test_a_teacher_of_other_classes_than_those_judged_is_an_error(tmp_path):
    other = TeacherLabeler(lambda images: torch.zeros(len(images), NUM_CLASSES + 1))
    with pytest.raises(ValueError, match="the teacher's classes"):
        distill(student(), plain(), held_out(), tmp_path, settings=FEW, teacher=other)


def test_validation_without_torchmetrics_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(ImportError, match=r'pip install "supermix-transforms\[distill\]"'):
        distill(student(), plain(), held_out(), tmp_path, settings=FEW)
    assert not any(tmp_path.iterdir())


def test_loaders_that_are_none_of_torchs_are_errors(tmp_path):
    mixing = MixLoader(plain(), labeler=TeacherLabeler(colour_teacher()))
    with pytest.raises(TypeError, match=r"train: expected a torch\.utils\.data\.DataL.* got MixL"):
        distill(student(), mixing, None, tmp_path, settings=FEW)
    with pytest.raises(TypeError, match=r"validation: expected a .* got list"):
        distill(student(), plain(), [pictures(4)], tmp_path, settings=FEW)
    empty = DataLoader(TensorDataset(*pictures(3)), 4, drop_last=True)
    with pytest.raises(ValueError, match="train: expected at least one batch an epoch, got none"):
        distill(student(), empty, None, tmp_path, settings=FEW)
    assert not any(tmp_path.iterdir())


def test_mixes_of_another_dtype_than_the_originals_are_an_error(tmp_path):
    images, labels = pictures(12, dtype=torch.uint8)
    collate = SuperMixCollate(colour_teacher(), mix=lambda images, labels: (images / 255, labels))
    train = DataLoader(TensorDataset(images, labels), 6, collate_fn=collate)
    with pytest.raises(
        ValueError, match=r"expected mixes of the originals' torch\.uint8, got torch\.f"
    ):
        distill(student(), train, None, tmp_path, settings=FEW)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_checkpoint_that_is_damaged_is_an_error(tmp_path, content):
    (tmp_path / "last.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="expected a checkpoint of this version"):
        distill(student(), plain(), None, tmp_path, settings=FEW)


def test_a_student_with_other_classes_than_the_teacher_is_an_error(tmp_path):
    other = nn.Sequential(nn.Flatten(), nn.LazyLinear(NUM_CLASSES + 1))
    other(pictures(1)[0])
    message = rf"student: expected logits \(B, {NUM_CLASSES}, the teacher's classes\), got \(12, "
    with pytest.raises(ValueError, match=message):
        distill(other, online(target="hard"), None, tmp_path, settings=FEW)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    settings = DistillSettings(epochs=1, lr=1e30, warmup_epochs=0)
    with pytest.raises(ValueError, match="expected a finite loss, got"):
        distill(student(), plain(), None, tmp_path, settings=settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1"),
        ({"save_steps": 1.5}, "save_steps: expected an integer"),
        ({"lr": -1.0}, "lr: expected a number in 0..inf"),
        ({"lr": math.inf}, "lr: expected a number"),
        ({"ema": 1.5}, r"ema: expected a number in 0\.\.1"),
        ({"kd_weight": "x"}, "kd_weight: expected a number"),
        ({"temperature": 0}, "temperature: expected a positive number"),
        ({"schedule": "none"}, "schedule: expected"),
        ({"kd": "mixes"}, "kd: expected"),
        ({"learn": "mixes"}, "learn: expected"),
        ({"labels": "none"}, "labels: expected"),
        ({"milestones": (200, 300)}, r"milestones: expected parts of all steps, in 0\.\.1, got"),
    ],
)
def test_settings_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DistillSettings(**options)


def test_a_loss_that_is_not_finite_is_not_kept_in_a_checkpoint(tmp_path):
    settings = DistillSettings(epochs=1, lr=1e30, warmup_epochs=0, save_steps=2)
    with pytest.raises(ValueError, match="Begin in another folder"):
        distill(student(), plain(), None, tmp_path, settings=settings)
    assert not (tmp_path / "last.safetensors").exists()


@pytest.mark.parametrize("kd", ["none", "originals", "both"])
@pytest.mark.parametrize("mixed", [True, False])
def test_label_smoothing_is_of_the_originals_whatever_else_is_learned(kd, mixed):
    batch = next(iter(online(target="hard") if mixed else plain()))
    net = student().eval()
    losses = []
    for smoothing in (0.0, 0.3):
        settings = DistillSettings(kd=kd, label_smoothing=smoothing)
        loss, _ = loss_of(net, batch, settings, TeacherLabeler(colour_teacher()))
        losses.append(loss.item())
    images, labels = (batch.images, batch.labels) if mixed else batch
    logits = net(images)
    plainly, smoothed = (
        F.cross_entropy(logits, labels, label_smoothing=smoothing) for smoothing in (0.0, 0.3)
    )
    weight = 1.0 if kd == "none" else 0.9
    added = weight * (smoothed - plainly).item()
    assert losses[1] - losses[0] == pytest.approx(added, abs=1e-5)


def test_a_student_with_tied_weights_is_kept(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, NUM_CLASSES)
            self.second = self.first

        def forward(self, images):
            return self.second(images.mean(dim=(2, 3)))

    whole = distill(Tied(), plain(), held_out(), tmp_path, settings=FEW)
    kept = load_file(tmp_path / "best.safetensors")
    assert torch.equal(kept["first.weight"], kept["second.weight"])
    assert distill(Tied(), plain(), held_out(), tmp_path, settings=FEW).top1 == whole.top1


def test_a_checkpoint_holds_the_scale_of_half_precision(tmp_path):
    class Scaler:  # as torch's, which has a scale on CUDA alone
        scale = 4.0

        def state_dict(self):
            return {"scale": self.scale}

        def load_state_dict(self, state):
            self.scale = state["scale"]

    net = student()
    parts = (tmp_path, net, torch.optim.SGD(net.parameters(), 0.1), None, {})
    Checkpoint(*parts, Scaler()).save(Progress(step=3))
    other = Scaler()
    other.scale = 1.0
    assert Checkpoint(*parts, other).load().step == 3
    assert other.scale == 4.0
