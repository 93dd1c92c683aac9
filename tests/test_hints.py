"""Distillation of features: each loss against its formula, places, and what is left untouched."""

import copy
import math
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from supermix_transforms.training import hints as module
from supermix_transforms.training.hints import HINTS, WEIGHTS, HintLoss

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = torch.arange(12) % 3  # of 12 training samples


class Net(nn.Module):
    """A stem, three stages of halved sizes, and a classifier."""

    def __init__(self, width: int = 4, classes: int = 3, stages: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        for i in range(stages):
            layers = (
                nn.Conv2d(width * 2 ** max(0, i - 1), width * 2**i, 3, 1 + (i > 0), 1),
                nn.BatchNorm2d(width * 2**i),
                nn.ReLU(inplace=True),
            )
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width * 2 ** (stages - 1), classes)

    def forward(self, images):
        maps = self.bn1(self.conv1(images)).relu()
        for name, part in self.named_children():
            if name.startswith("layer"):
                maps = part(maps)
        return self.fc(self.drop(maps.mean(dim=(2, 3))))


class Normalised(nn.Module):
    """A network inside another module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Hardtanh()
        self.network = network

    def forward(self, images):
        return self.network(self.scale(images))


class Clumsy(nn.Module):
    """Of stages that have nothing in common with `Net`'s, and no linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(5, 3, 1), nn.Linear(8, 8))

    def forward(self, images):
        return self.head(self.body(images)).mean(dim=(2, 3))


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16)


def networks() -> tuple[nn.Module, nn.Module]:
    return Net(4), Net(6)


def hint(method: str, student: nn.Module, teacher: nn.Module, **options) -> HintLoss:
    if method == "crd":
        options.setdefault("labels", LABELS)
    return HintLoss(method, student, teacher, images(2), **options)


def loss_of(hints, student, batch, mixes=None, indices=None) -> torch.Tensor:
    if hints.method == "crd" and indices is None:
        indices = torch.arange(len(batch))
    with hints.watching(student) as seen:
        student(batch if mixes is None else torch.cat([batch, mixes]))
    return hints(seen, batch, indices)


def stages(net: Net, batch: torch.Tensor) -> list[torch.Tensor]:
    """What the three stages return, by hand."""
    maps, found = net.bn1(net.conv1(batch)).relu(), []
    for i in (1, 2, 3):
        maps = getattr(net, f"layer{i}")(maps)
        found.append(maps)
    return found


# -- each loss by its formula ----------------------------------------------------------------------


def test_fitnet_is_the_squared_error_of_the_regressed_middle_stage():
    student, teacher = networks()
    hints, batch = hint("fitnet", student, teacher), images()
    loss = loss_of(hints, student, batch)
    (regressor,) = hints.adapters
    ours = regressor[0](stages(student, batch)[1])
    mean, var = ours.mean(dim=(0, 2, 3)), ours.var(dim=(0, 2, 3), unbiased=False)
    ours = ((ours - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]).relu()
    theirs = stages(teacher.eval(), batch)[1]
    assert ours.shape == (5, 12, 8, 8)
    assert_close(loss, 100 * ((ours - theirs) ** 2).mean())


def test_at_is_the_squared_distance_of_normalised_attention_maps():
    student, teacher = networks()
    hints, batch = hint("at", student, teacher), images()
    loss, expected = loss_of(hints, student, batch), torch.tensor(0.0)
    for ours, theirs in zip(stages(student, batch), stages(teacher.eval(), batch), strict=True):
        one, two = ((maps**2).mean(dim=1).flatten(1) for maps in (ours, theirs))
        one, two = (each / (each**2).sum(dim=1, keepdim=True).sqrt() for each in (one, two))
        expected = expected + ((one - two) ** 2).mean()
    assert not list(hints.parameters())
    assert_close(loss, 1000 * expected)


def test_vid_is_the_gaussian_likelihood_of_the_teachers_maps():
    student, teacher = networks()
    hints, batch = hint("vid", student, teacher), images()
    with torch.no_grad():
        for adapter in hints.adapters:
            assert_close(
                F.softplus(adapter.soft_plus_param),
                torch.tensor(5.0).expand(len(adapter.soft_plus_param)),
            )
            adapter.soft_plus_param.normal_()
    loss, expected = loss_of(hints, student, batch), torch.tensor(0.0)
    both = zip(hints.adapters, stages(student, batch), stages(teacher.eval(), batch), strict=True)
    for adapter, ours, theirs in both:
        scale = (F.softplus(adapter.soft_plus_param) + 1e-5).sqrt()[:, None, None]
        normal = torch.distributions.Normal(adapter.regressor(ours), scale)
        expected = expected - (normal.log_prob(theirs) + 0.5 * math.log(2 * math.pi)).mean()
    assert_close(loss, expected)


def slow_crd(ours, theirs, memories, chosen, samples, scales):
    """Noise-contrastive estimation, row by row: chosen (B, 1 + K), the row itself first."""
    negatives, total, used = chosen.shape[1] - 1, 0.0, []
    noise = negatives / samples
    for side, (rows, memory) in enumerate(zip((ours, theirs), memories[::-1], strict=True)):
        scores = (torch.einsum("bd,bkd->bk", rows, memory[chosen]) / 0.07).exp()
        used.append(scales[side] if scales else float(scores.detach().mean() * samples))
        for first, *others in scores / used[-1]:
            total = total - (first / (first + noise)).log() / len(rows)
            for other in others:
                total = total - (noise / (other + noise)).log() / len(rows)
    return total, used


def test_crd_is_noise_contrastive_estimation_of_given_memories_and_negatives(monkeypatch):
    student, teacher = networks()
    hints = hint("crd", student, teacher)
    contrast, crd = hints.contrast, hints.contrast.loss
    student.eval()
    teacher.eval()
    indices, scales = torch.tensor([7, 0, 3, 11, 5]), None
    for _ in range(2):  # the scales of the scores are the first batch's
        batch, memories = images(), (crd.memory_v1.clone(), crd.memory_v2.clone())
        negatives = contrast.draw(indices)
        monkeypatch.setattr(contrast, "draw", lambda _, kept=negatives: kept)
        loss = loss_of(hints, student, batch, indices=indices)
        monkeypatch.undo()
        features = [stages(net, batch)[2].mean(dim=(2, 3)) for net in (student, teacher)]
        linears = contrast.student.linear, contrast.teacher.linear
        embedded = [F.normalize(f(x)) for f, x in zip(linears, features, strict=True)]
        chosen = torch.cat([indices[:, None], negatives], dim=1)
        expected, scales = slow_crd(*embedded, memories, chosen, len(LABELS), scales)
        assert_close(loss, 0.8 * expected)
        for memory, before, rows in zip(
            (crd.memory_v1, crd.memory_v2), memories, embedded, strict=True
        ):
            after = before.clone()
            after[indices] = F.normalize((before[indices] + rows.detach()) / 2)
            assert_close(memory, after)


def test_negatives_are_of_all_other_classes_and_repeat_with_the_seed():
    labels = torch.tensor([5, 9, 5, 2, 9, 5, 2, 5])  # 4 of class 5: the fewest others are 4
    contrast = hint("crd", *networks(), labels=labels).contrast
    assert contrast.negatives == 4
    indices = torch.arange(8).repeat(200)
    torch.manual_seed(1)
    drawn = contrast.draw(indices)
    assert drawn.shape == (1600, 4)
    assert (labels[drawn] != labels[indices][:, None]).all()
    counts = torch.stack([drawn[indices == i].flatten().bincount(minlength=8) for i in range(8)])
    others = labels[:, None] != labels
    assert (counts[others] > 0).all()
    expected = 800 / others.sum(dim=1, keepdim=True) * others
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()
    torch.manual_seed(1)
    assert torch.equal(contrast.draw(indices), drawn)


def test_negatives_are_no_more_than_published():
    labels = torch.arange(2).repeat_interleave(17_000)
    assert hint("crd", *networks(), labels=labels).contrast.negatives == 16_384


def test_the_other_processes_rows_are_remembered(monkeypatch):
    student, teacher = networks()
    hints = hint("crd", student, teacher)
    crd, others = hints.contrast.loss, F.normalize(torch.randn(2, 128))
    before = crd.memory_v1.clone(), crd.memory_v2.clone()
    alone, batch = copy.deepcopy(hints), images()
    loss_of(alone, student.eval(), batch)

    def gather(every, own):
        assert [value.shape for value in own] == [(5,), (5, 128), (5, 128)]
        every[:] = [[torch.tensor([10, 8]), others, -others], own]

    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(module.dist, "all_gather_object", gather)
    loss_of(hints, student, batch)
    for memory, old, rows in zip(
        (crd.memory_v1, crd.memory_v2), before, (others, -others), strict=True
    ):
        assert_close(memory[[10, 8]], F.normalize((old[[10, 8]] + rows) / 2))
        changed = (memory != old).any(dim=1).nonzero().flatten().tolist()
        assert changed == [0, 1, 2, 3, 4, 8, 10]
    for name in ("memory_v1", "memory_v2"):  # its own rows, once
        assert torch.equal(getattr(crd, name)[:5], getattr(alone.contrast.loss, name)[:5])


# -- what is trained, and what is not --------------------------------------------------------------


@pytest.mark.parametrize("method", HINTS)
def test_gradients_reach_the_student_and_what_the_loss_owns_and_never_the_teacher(method):
    student, teacher = networks()
    hints = hint(method, student, teacher)
    loss = loss_of(hints, student, images(), images(3))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    loss.backward()
    assert student.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in hints.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    owned = {id(p) for p in hints.parameters()}
    assert not owned & {id(p) for net in (student, teacher) for p in net.parameters()}
    assert bool(owned) == (method != "at")


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("fitnet", {"adapters.0.0", "adapters.0.1"}),  # convolution, batch norm
        ("at", set()),
        ("vid", {f"adapters.{i}" for i in range(3)}),
        ("crd", {"contrast.student.linear", "contrast.teacher.linear", "contrast.loss"}),
    ],
)
def test_a_checkpoint_holds_what_the_loss_owns_and_neither_network(method, parts):
    state = hint(method, *networks()).state_dict()
    owners = {name: [part for part in parts if name.startswith(f"{part}.")] for name in state}
    assert all(owners.values())
    assert {part for found in owners.values() for part in found} == parts
    assert sum("loss" in name for name in state) == 3 * (method == "crd")  # two memories, scales


@pytest.mark.parametrize("method", HINTS)
def test_both_networks_are_left_as_they_were(method):
    student, teacher = networks()
    teacher.layer2.eval()
    modes = [[part.training for part in net.modules()] for net in (student, teacher)]
    states = [copy.deepcopy(net.state_dict()) for net in (student, teacher)]
    hints = hint(method, student, teacher)
    for net, state in zip((student, teacher), states, strict=True):
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    loss_of(hints, student, images())
    assert [[part.training for part in net.modules()] for net in (student, teacher)] == modes
    after = teacher.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in states[1].items())
    assert not any(part._forward_hooks for net in (student, teacher) for part in net.modules())


@pytest.mark.parametrize("method", HINTS)
def test_mixes_behind_the_originals_are_left_aside(method):
    student, teacher = networks()
    student.eval()  # else, they count in its batch norm
    hints, batch = hint(method, student, teacher), images()
    state = copy.deepcopy(hints.state_dict())
    losses = []
    for mixes in (None, images(3)):
        hints.load_state_dict(state)
        torch.manual_seed(0)
        losses.append(loss_of(hints, student, batch, mixes))
    assert_close(*losses)


@pytest.mark.parametrize("method", HINTS)
def test_a_run_goes_on_from_its_state_bit_by_bit(method):
    batches = [images() for _ in range(3)]

    def made():
        torch.manual_seed(len(batches))
        student, teacher = networks()
        hints = hint(method, student, teacher)
        parameters = [*student.parameters(), *hints.parameters()]
        return student, hints, torch.optim.SGD(parameters, 1e-3)

    def step(student, hints, optimiser, number):
        torch.manual_seed(number)
        loss = loss_of(hints, student, batches[number])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.detach()

    whole = made()
    for number in (0, 1):
        step(*whole, number)
    states = [copy.deepcopy(part.state_dict()) for part in whole]
    torch.rand(3)
    other = made()
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    assert torch.equal(step(*whole, 2), step(*other, 2))
    for one, two in zip(whole[:2], other[:2], strict=True):
        after = two.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("method", HINTS)
def test_copies_neither_disturb_nor_record(method):
    student, teacher = networks()
    hints, batch = hint(method, student, teacher), images()
    loss_of(hints, student, batch)
    copied, twin = copy.deepcopy(student), copy.deepcopy(hints)
    with hints.watching(student) as seen:
        student(batch)
    before = {name: dict(io) for name, io in seen.items()}
    copied(images())
    assert {name: {k: id(v) for k, v in io.items()} for name, io in seen.items()} == {
        name: {k: id(v) for k, v in io.items()} for name, io in before.items()
    }
    losses = []
    for each in (hints, twin):
        torch.manual_seed(0)
        losses.append(each(seen, batch, torch.arange(5)))
    assert torch.equal(*losses)


@pytest.mark.parametrize("method", HINTS)
def test_the_loss_falls_and_is_computed_in_float32_under_autocast(method):
    student, teacher = networks()
    hints, batch = hint(method, student, teacher), images(12)
    rate = {"fitnet": 1e-3, "at": 1e-2, "vid": 5e-2, "crd": 5e-2}[method]
    optimiser = torch.optim.SGD([*student.parameters(), *hints.parameters()], rate, 0.9)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(hints, student, batch)
        assert loss.dtype == torch.float32
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


# -- places ----------------------------------------------------------------------------------------


def test_stages_of_one_name_and_one_size_are_paired_through_wrappers():
    student, teacher = Net(4, stages=2), Net(6)
    paths = [("layer1", "layer1"), ("layer2", "layer2")]
    assert hint("at", student, teacher)._pairs == paths
    wrapped = hint("at", student, Normalised(Normalised(teacher)))
    assert wrapped._pairs == [(name, f"network.network.{name}") for name, _ in paths]
    assert hint("fitnet", student, teacher)._pairs == paths[:1]
    teacher.layer2[0].stride = (1, 1)
    assert hint("vid", student, teacher)._pairs == paths[:1]
    crd = hint("crd", Normalised(student), teacher)
    assert crd._pairs == [("network.fc", "fc")]


def test_torchvision_stages_are_paired():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    student, teacher = resnet18(num_classes=3), resnet18()
    batch = torch.randn(2, 3, 64, 64)
    hints = HintLoss("at", student, teacher, batch)
    assert hints._pairs == [(f"layer{i}", f"layer{i}") for i in (1, 2, 3, 4)]
    assert HintLoss("fitnet", student, teacher, batch)._pairs == [("layer2", "layer2")]
    assert loss_of(hints, student, batch) > 0
    crd = HintLoss("crd", student, teacher, batch, labels=LABELS)
    assert crd._pairs == [("fc", "fc")]
    assert crd.contrast.student.linear.in_features == 512


def test_layers_name_pairs_of_other_names_and_sizes():
    student, teacher = networks()
    batch = images()
    hints = hint("at", student, teacher, layers=("layer3", "layer1:layer2"))
    loss = loss_of(hints, student, batch)
    ours, theirs = stages(student, batch), stages(teacher.eval(), batch)
    pooled = ours[0].unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean(dim=(3, 5))
    expected = 0
    for one, two in ((ours[2], theirs[2]), (pooled, theirs[1])):
        one, two = (F.normalize((maps**2).mean(dim=1).flatten(1)) for maps in (one, two))
        expected = expected + ((one - two) ** 2).mean()
    assert_close(loss, 1000 * expected)
    both = hint("fitnet", student, teacher, layers=["layer1", "layer2.0"])
    assert len(both.adapters) == 2
    assert loss_of(both, student, batch) > 0
    assert hint("vid", student, teacher, layers="layer2")._pairs == [("layer2", "layer2")]


# -- what can go wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("kd", {}, "expected one of fitnet, at, vid, crd, got 'kd'"),
        ("at", {"layers": ()}, r"got layer1 \(4, 16, 16\), layer2 \(8, 8, 8\)"),
        ("at", {"layers": ("layer9",)}, r"Net that return maps .* got 'layer9'.*layer3 \(16, 4, 4"),
        ("vid", {"layers": ("layer1:layer7", "layer2:fc")}, "got 'layer7', 'fc'. Its stages are"),
        ("fitnet", {"layers": ("",)}, "got ''"),
        ("crd", {"labels": None}, "crd expected labels and no layers"),
        ("crd", {"layers": ("layer1",)}, "crd expected labels and no layers"),
        ("crd", {"labels": torch.zeros(9)}, r"two classes at least, got \(9,\) of 1"),
        ("crd", {"labels": torch.eye(3)}, r"expected \(N,\)"),
    ],
)
def test_settings_that_do_not_fit_are_errors(method, options, message):
    with pytest.raises(ValueError, match=message):
        hint(method, *networks(), **options)


def test_networks_without_common_places_are_errors():
    with pytest.raises(ValueError, match=r"in the student and body \(5, 8, 8\), head .* Pass lay"):
        hint("at", Net(), Clumsy())
    with pytest.raises(ValueError, match=r"a Clumsy whose linear layers \(head\.1\) do not"):
        hint("crd", Net(), Clumsy())


@pytest.mark.parametrize("wrong", [torch.rand(3, 16, 16), torch.zeros(2, 3, 16, 16).byte()])
def test_what_is_no_batch_of_float_images_is_an_error(wrong):
    student, teacher = networks()
    with pytest.raises(ValueError, match="images: expected normalised float images"):
        HintLoss("at", student, teacher, wrong)
    with pytest.raises(ValueError, match="images: expected normalised float images"):
        hint("at", student, teacher)({}, wrong)


def test_features_that_are_missing_or_too_few_are_errors():
    student, teacher = networks()
    hints = hint("at", student, teacher)
    with pytest.raises(ValueError, match="features of 'layer1' for 5 images, got 0"):
        hints({}, images())
    with hints.watching(student) as seen:
        pass
    with pytest.raises(ValueError, match="features of 'layer1' for 5 images, got 0"):
        hints(seen, images())
    with hints.watching(student) as seen:
        student(images(4))
    with pytest.raises(ValueError, match="features of 'layer1' for 5 images, got 4"):
        hints(seen, images())


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (None, r"expected 5 integers \(B,\) in 0\.\.11, got none"),
        (torch.arange(8, 13), r"got 5 in 8\.\.12"),
        (torch.arange(-1, 4), r"got 5 in -1\.\.3"),
        (torch.arange(4), r"got 4 in 0\.\.3"),
    ],
)
def test_indices_out_of_range_are_errors(indices, message):
    student, teacher = networks()
    hints, batch = hint("crd", student, teacher), images()
    with hints.watching(student) as seen:
        student(batch)
    with pytest.raises(ValueError, match=message):
        hints(seen, batch, indices)


def test_the_extra_is_named_where_torchdistill_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchdistill"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchdistill", None)
    runpy.run_path(module.__file__)  # loads without it
    with pytest.raises(ImportError, match=r'pip install "supermix-transforms\[distill\]"'):
        hint("at", *networks())


def test_the_weights_are_the_published_ones():
    assert tuple(WEIGHTS) == HINTS
    assert WEIGHTS == {"fitnet": 100, "at": 1000, "vid": 1, "crd": 0.8}
