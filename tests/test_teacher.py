"""The teacher: asked politely, labelled right, its class maps found and checked."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from colours import colour_teacher, pictures
from torch import Tensor, nn
from torch.testing import assert_close

from supermix_transforms.mixing import supermix
from supermix_transforms.results import TeacherLabels
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler, as_labeler

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(classes: int = 5) -> nn.Sequential:
    """Batch norm and dropout, so that train mode would show; some weights frozen."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, classes),
    )
    net[1].running_mean.uniform_(-1, 1)
    net[0].weight.requires_grad_(False)
    net[1].eval()
    return net


class Functional(nn.Module):
    """A head made of functions: mean over the map, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean(dim=(2, 3)))


class TwoLayers(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))


class Normed(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.body(images).mean(dim=(2, 3))))


class Shared(Functional):
    """Calls one ReLU on the map and on its average."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        features = self.act(self.body[0](images))
        return self.head(self.act(features.mean(dim=(2, 3))))


class Reused(Functional):
    """Calls one module on its map and then on another, which the classifier does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        features = self.act(self.body[0](images))
        logits = self.head(features.mean(dim=(2, 3)))
        self.act(features + 1)
        return logits


class Turning(Functional):
    """Has class maps for bright pictures only."""

    def forward(self, images: Tensor) -> Tensor:
        average = self.body(images).mean(dim=(2, 3))
        return self.head(average if images.mean() > 0 else average.square() + 1)


class Scale(nn.Module):
    """Returns a tensor of no dimension."""

    def forward(self) -> Tensor:
        return torch.tensor(2.0)


class Scaled(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * self.scale())


class Viewing(Functional):
    """Calls .view on a feature map, which a channels_last one does not allow."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        flat = features.view(len(images), -1)
        return self.head(flat.unflatten(1, (8, -1)).mean(dim=2))


def noise(batch: int = 5, size: tuple[int, int] = (9, 7)) -> Tensor:
    return torch.rand(batch, 3, *size)


# -- class maps ------------------------------------------------------------------------------------


NETS = {
    "Sequential": (plain, 9),
    "functional mean": (Functional, 9),
    "view": (Viewing, 9),
    "a module called twice": (Shared, 9),
    "a number in between": (Scaled, 9),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), 64),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25), 64),
    "densenet": (
        lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=5),
        64,
    ),
    "squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(num_classes=5), 64),
    "timm resnet": (lambda: timm.create_model("test_resnet", num_classes=5), 64),
    "timm efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=5), 64),
}


@pytest.mark.parametrize("name", NETS)
def test_class_maps_are_found_and_explain_the_logits(name):
    make, side = NETS[name]
    net, images = make(), noise(5, (side, side))
    with torch.no_grad():  # statistics of a trained net, so that random weights pass a signal on
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = 1.0
        net.train()(images)
    net.eval()
    labeler = TeacherLabeler(net)
    for batch in (images, images[:2]):  # the search, and the batches after it
        logits, maps = labeler.examine(batch)
        with torch.no_grad():
            assert_close(logits, net(batch), atol=1e-4, rtol=1e-3)
        assert maps is not None
        assert maps.features.shape[2] * maps.features.shape[3] > 1
        explained = maps.features.mean(dim=(2, 3)) @ maps.weight.T + maps.bias
        assert_close(explained, logits, atol=1e-4, rtol=1e-3)
        assert_close(maps.maps().mean(dim=(2, 3)) + maps.bias, logits, atol=1e-4, rtol=1e-3)
    assert logits.std(dim=0).max() > 1e-3  # not all the same, so the comparison says something


@pytest.mark.parametrize(
    "teacher",
    [
        pytest.param(TwoLayers, id="two layers"),
        pytest.param(Normed, id="LayerNorm"),
        pytest.param(lambda: timm.create_model("test_vit", num_classes=5), id="ViT"),
        pytest.param(lambda: [plain(), plain()], id="list"),
        pytest.param(lambda: plain().forward, id="callable"),
        pytest.param(lambda: nn.Sequential(nn.Flatten(), nn.Linear(189, 5)), id="no map"),
    ],
)
def test_other_heads_have_no_class_maps(teacher):
    net = teacher()
    size = (160, 160) if isinstance(net, timm.models.VisionTransformer) else (9, 7)
    labeler = TeacherLabeler(net)
    for _ in range(2):
        logits, maps = labeler.examine(noise(3, size))
        assert logits.shape == (3, 5)
        assert maps is None
    assert labeler.class_maps(noise(3, size)) is None


def test_class_maps_follow_the_weights():
    net = plain()
    labeler = TeacherLabeler(net)
    labeler.examine(noise())
    nn.init.normal_(net[6].weight)
    logits, maps = labeler.examine(noise())
    assert_close(maps.features.mean(dim=(2, 3)) @ maps.weight.T + maps.bias, logits)


def test_a_first_batch_that_is_not_finite_does_not_end_the_search():
    labeler = TeacherLabeler(plain())
    assert labeler.class_maps(torch.full((5, 3, 9, 7), torch.nan)) is None
    assert labeler.class_maps(noise()) is not None


def test_maps_that_do_not_explain_a_batch_are_not_handed_out():
    labeler = TeacherLabeler(Turning())
    for sign in (1, -1, 1):
        images = sign * noise()
        logits, maps = labeler.examine(images)
        assert logits.isfinite().all()
        assert (maps is not None) == (sign == 1)
    assert TeacherLabeler(Reused()).class_maps(noise()) is None  # its map is not the last one


def test_a_row_that_is_not_finite_leaves_the_others_their_maps():
    labeler = TeacherLabeler(plain())
    labeler.examine(noise())
    images = noise()
    images[2] = torch.nan
    logits, maps = labeler.examine(images)
    assert not logits[2].isfinite().any()
    assert maps is not None
    rows = torch.tensor([0, 1, 3, 4])
    assert_close(maps.maps()[rows].mean(dim=(2, 3)) + maps.bias, logits[rows])


@pytest.mark.parametrize("way", ["around", "in place", "inside"])
def test_compiled_teachers_have_class_maps(way):
    net, images = plain().eval(), noise(4)
    expected = net(images)
    if way == "in place":
        net.compile(backend="eager")
    else:
        net = torch.compile(net, backend="eager")
    teacher = nn.Sequential(nn.Identity(), net) if way == "inside" else net
    labeler = TeacherLabeler(teacher)
    labeler(images)  # compiled, without hooks, before it is searched
    for _ in range(2):
        logits, maps = labeler.examine(images)
        assert_close(logits, expected)
        assert maps is not None
        assert_close(maps.maps().mean(dim=(2, 3)) + maps.bias, logits)
    assert_close(labeler.logits(images), expected)


# -- as found afterwards ---------------------------------------------------------------------------


def state(net: nn.Module) -> dict[str, object]:
    return {
        "training": [part.training for part in net.modules()],
        "hooks": [len(part._forward_hooks) for part in net.modules()],
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "grads": [p.grad for p in net.parameters()],
        "versions": [value._version for value in net.state_dict().values()],
        "values": [value.sum().item() for value in net.state_dict().values()],
    }


class Breaking(nn.Module):
    """Raises from its call number `call` on."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.net, self.call, self.calls = plain(), call, 0

    def forward(self, images: Tensor) -> Tensor:
        assert not any(part.training for part in self.modules())
        self.calls += 1
        if self.calls >= self.call:
            raise RuntimeError("out of luck")
        return self.net(images)


def use_all(labeler: TeacherLabeler) -> None:
    """Everything a labeler and the solver do."""
    images = noise()
    labeler(images)
    labeler.examine(images)
    supermix(
        images,
        labeler,
        sources=torch.tensor([[0, 1], [2, 3]]),
        weights=torch.full((2, 2), 0.5),
        settings=SolverSettings(margin=1e6, max_steps=2),
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_teacher_is_as_found_afterwards(training):
    net = plain().train(training)
    net[1].eval()
    net[6].weight.grad = torch.ones_like(net[6].weight)
    net[0].register_forward_hook(lambda *_: None)
    before = state(net)
    use_all(TeacherLabeler(net))
    assert state(net) == before
    assert not any(m.training for m in net.modules()) if not training else net.training


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_a_teacher_is_as_found_after_an_exception(call):
    net = Breaking(call).train()
    net.net[1].eval()
    before = state(net)
    with pytest.raises(RuntimeError, match="out of luck"):
        use_all(TeacherLabeler(net))
    assert state(net) == before


def test_train_mode_does_not_change_the_answer():
    net, images = plain(), noise()
    expected = net.eval()(images)
    assert_close(TeacherLabeler(net.train()).logits(images), expected)


def test_a_teacher_is_never_a_submodule():
    net = plain()

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = TeacherLabeler(net)

    holder = Holder()
    assert list(holder.parameters()) == []
    assert holder.state_dict() == {}
    assert net not in list(holder.modules())
    holder.to(torch.float64)
    assert net[0].weight.dtype == torch.float32


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: SimpleNamespace(logits=logits, hidden=None),
        lambda logits: {"logits": logits},
        lambda logits: logits.half(),
    ],
)
def test_logits_may_come_in_an_object(wrap):
    net, images = plain().eval(), noise()
    logits = TeacherLabeler(lambda x: wrap(net(x))).logits(images)
    assert logits.dtype == torch.float32
    assert_close(logits, net(images), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda x: x, r"\(5, 3, 9, 7\)"),
        (lambda x: x[:2].mean(dim=(2, 3)), r"\(2, 3\)"),
        (lambda x: (x.mean(dim=(2, 3)), None), "tuple"),
        (lambda x: None, "NoneType"),
    ],
)
def test_other_answers_are_named(answer, got):
    message = rf"teacher: expected logits \(5, N\) for 5 pictures.*got {got}. Wrap it"
    with pytest.raises(ValueError, match=message):
        TeacherLabeler(answer)(noise())


def test_a_list_gives_its_mean_probability():
    nets, images = [plain().eval() for _ in range(3)], noise()
    expected = torch.stack([net(images).softmax(dim=1) for net in nets]).mean(dim=0)
    labels = TeacherLabeler(nets)(images)
    assert_close(labels.probs, expected)
    assert_close(TeacherLabeler(nets).examine(images)[0].softmax(dim=1), expected)
    assert_close(TeacherLabeler(nets[:1]).logits(images), nets[0](images))


def test_members_keep_their_own_normalisation():
    nets, images = [plain().eval() for _ in range(2)], noise()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    first = TeacherLabeler(nets[0], mean=mean, std=std)
    labels = TeacherLabeler([first, nets[1]])(images)
    shifted = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = (nets[0](shifted).softmax(dim=1) + nets[1](images).softmax(dim=1)) / 2
    assert_close(labels.probs, expected)


def test_members_of_different_data_sets_are_named():
    with pytest.raises(ValueError, match=r"the same number of classes from all, got \[4, 5\]"):
        TeacherLabeler([plain(5), plain(4)])(noise())


# -- what the teacher is given ---------------------------------------------------------------------


class Seen:
    def __init__(self) -> None:
        self.images = torch.empty(0)

    def __call__(self, images: Tensor) -> Tensor:
        self.images = images
        return images.mean(dim=(2, 3))


def test_uint8_arrives_as_float_in_0_to_1():
    seen, images = Seen(), torch.randint(256, (5, 3, 9, 7), dtype=torch.uint8)
    TeacherLabeler(seen)(images)
    assert_close(seen.images, images / 255)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    TeacherLabeler(seen, mean=mean, std=std)(images)
    expected = torchvision.transforms.v2.functional.normalize(images / 255, mean, std)
    assert_close(seen.images, expected)


def test_floats_arrive_as_they_are():
    seen, images = Seen(), torch.randn(5, 3, 9, 7)
    TeacherLabeler(seen)(images)
    assert_close(seen.images, images, rtol=0, atol=0)


def test_pictures_that_were_normalised_before_are_told_of_once():
    labeler = TeacherLabeler(plain(), mean=[0.5], std=[0.25])
    images = torch.randn(5, 3, 9, 7)
    with pytest.warns(UserWarning, match=r"in 0\.\.1, .* got -.*normalised already"):
        labeler(images)
    labeler(images)  # the next one is an error here


def test_a_little_overshoot_is_no_news():
    images = torch.rand(5, 3, 9, 7).mul(1.6).sub(0.3)  # as bicubic resizing leaves it
    TeacherLabeler(plain(), mean=[0.5], std=[0.25])(images)


def test_some_of_the_teachers_classes_in_the_order_of_the_labels():
    net, images = plain().eval(), noise()
    some = TeacherLabeler(net, classes=[4, 1])
    logits, maps = some.examine(images)
    assert_close(logits, net(images)[:, [4, 1]])
    assert_close(some(images).probs, net(images)[:, [4, 1]].softmax(dim=1))
    assert_close(maps.maps().mean(dim=(2, 3)) + maps.bias, logits)
    assert some.digest != TeacherLabeler(net).digest


@pytest.mark.parametrize(("classes", "got"), [([], r"\[\]"), ([1, 1], r"\[1, 1\]")])
def test_classes_that_are_none_or_twice_are_named(classes, got):
    with pytest.raises(ValueError, match=f"classes: expected each class once, .*got {got}"):
        TeacherLabeler(plain(), classes=classes)


def test_classes_that_the_teacher_does_not_have_are_named():
    message = r"classes: expected some of the teacher's, 0\.\.4, got 3\.\.5"
    with pytest.raises(ValueError, match=message):
        TeacherLabeler(plain(), classes=[3, 5])(noise())


def test_size_is_for_the_teacher_only():
    seen, images = Seen(), noise()
    for size, expected in ((12, (12, 12)), ((6, 5), (6, 5))):
        labeler = TeacherLabeler(seen, size=size)
        labeler(images)
        assert seen.images.shape[2:] == expected
        mixed = supermix(
            images,
            labeler,
            sources=torch.tensor([[0, 1]]),
            weights=torch.tensor([[0.5, 0.5]]),
            settings=SolverSettings(max_steps=2),
        )
        assert mixed.images.shape == (1, 3, 9, 7)
    labeler(images)
    resize = torchvision.transforms.v2.functional.resize
    assert_close(seen.images, resize(images, [6, 5], antialias=True))


def test_one_channel_meets_a_mean_of_three_and_others_are_named():
    seen = Seen()
    labeler = TeacherLabeler(seen, mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    labeler(torch.rand(5, 1, 9, 7))
    assert seen.images.shape == (5, 3, 9, 7)
    with pytest.raises(ValueError, match=r"pictures of 3 channels, as its mean has, got 4"):
        labeler(torch.rand(5, 4, 9, 7))


def test_mean_and_std_made_under_inference_mode_serve_gradients_later():
    labeler = TeacherLabeler(plain(), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    with torch.inference_mode():
        expected = labeler.logits(noise()[:0].new_full((5, 3, 9, 7), 0.3))
    images = torch.full((5, 3, 9, 7), 0.3, requires_grad=True)
    logits = labeler.logits(images)
    assert_close(logits, expected.clone())
    logits.sum().backward()
    assert images.grad.isfinite().all()


def test_mean_and_std_are_made_once_a_device(monkeypatch):
    labeler = TeacherLabeler(Seen(), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    labeler(noise())
    monkeypatch.setattr(torch, "tensor", None)
    labeler(noise())


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"device: expected one of this machine, got 'cuda:99'"):
        TeacherLabeler(plain(), device="cuda:99")


def test_the_device_is_named_as_tensors_name_it():
    labeler = TeacherLabeler(lambda x: x.mean(dim=(2, 3)), device="cpu:0")
    assert labeler.device == noise().device
    supermix(
        noise(),
        labeler,
        sources=torch.tensor([[0, 1]]),
        weights=torch.tensor([[0.5, 0.5]]),
        settings=SolverSettings(max_steps=1),
    )


# -- labels ----------------------------------------------------------------------------------------


def test_temperature_divides_the_logits():
    net, images = plain().eval(), noise()
    labels = TeacherLabeler(net, temperature=4.0)(images)
    assert_close(labels.probs, (net(images) / 4).softmax(dim=1))
    assert labels.probs.dtype == torch.float32
    assert_close(labels.hard, net(images).argmax(dim=1))


@pytest.mark.parametrize("n", [1, 3, 19])
def test_sparse_labels_hold_the_largest_probabilities(n):
    logits = 3 * torch.randn(5, 20)
    dense, sparse = (TeacherLabels.from_logits(logits, top=top) for top in (None, n))
    probs = logits.softmax(dim=1)
    assert sparse.indices.shape == sparse.log_probs.shape == (5, n)
    assert (sparse.log_probs.dtype, sparse.indices.dtype) == (torch.float16, torch.int64)
    assert_close(sparse.indices, probs.topk(n).indices)
    assert_close(sparse.rest, 1 - probs.topk(n).values.sum(dim=1), atol=1e-6, rtol=0)
    assert_close(sparse.hard, dense.hard)
    assert sparse.hard.dtype == torch.int64
    # dense on demand: a distribution, exact but for float16, the rest spread evenly
    assert sparse.probs.shape == (5, 20)
    assert sparse.probs.dtype == torch.float32
    assert_close(sparse.probs.sum(dim=1), torch.ones(5))
    kept = sparse.probs.gather(1, sparse.indices)
    assert_close(kept, probs.topk(n).values, atol=2e-3, rtol=5e-3)
    others = sparse.probs.scatter(1, sparse.indices, 0)
    assert_close(others.sum(dim=1), sparse.rest, atol=1e-6, rtol=1e-5)
    assert (others.amax(dim=1) <= kept.amin(dim=1) + 1e-6).all()


def test_top_n_of_dense_and_of_sparse_labels_agree():
    logits = 3 * torch.randn(5, 20)
    dense, sparse = (TeacherLabels.from_logits(logits, top=top) for top in (None, 6))
    for n in (1, 4, 6):
        for one, other in zip(dense.top(n), sparse.top(n), strict=True):
            assert_close(other, one, atol=2e-3, rtol=2e-3)
    assert_close(sparse.top(6)[2], sparse.rest)  # what was left out is known exactly
    indices, log_probs, rest = dense.top(3)
    assert (indices.dtype, log_probs.dtype) == (torch.int64, torch.float32)
    assert_close(log_probs.exp().sum(dim=1) + rest, torch.ones(5))
    for labels, most in ((dense, 20), (sparse, 6)):
        for n in (0, most + 1):
            with pytest.raises(ValueError, match=rf"top: expected n in 1..{most}, got {n}. Make"):
                labels.top(n)


def test_softened_labels_are_those_of_a_higher_temperature():
    logits = 3 * torch.randn(6, 8)
    for temperature in (1.0, 4.0):
        labels = TeacherLabels.from_logits(logits, temperature=2.0)
        expected = (logits / (2 * temperature)).softmax(dim=1)
        assert torch.allclose(labels.softened(temperature), expected, atol=1e-6)
    sparse = TeacherLabels.from_logits(logits, top=5)
    softened = sparse.softened(4.0)
    assert torch.allclose(softened.sum(dim=1), torch.ones(6), atol=1e-6)
    assert torch.allclose(sparse.softened(1.0), sparse.probs, atol=1e-6)
    assert (softened.max(dim=1).values < sparse.probs.max(dim=1).values).all()
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        labels.softened(0)


@pytest.mark.parametrize("slope", [0.0, 0.05, 0.8])
def test_a_tail_that_falls_geometrically_is_softened_exactly(slope):
    log_probs = (-slope * torch.arange(40.0)).log_softmax(dim=0)[None]
    sparse = TeacherLabels.from_logits(log_probs, top=6)
    expected = (log_probs / 4).softmax(dim=1)
    softened = sparse.softened(4.0)
    stored = torch.zeros(40, dtype=torch.bool).index_fill(0, sparse.indices[0], True)
    assert torch.allclose(softened[0, stored], expected[0, stored], atol=1e-3)
    left = expected[0, ~stored].sum()
    assert float(softened[0, ~stored].sum()) == pytest.approx(float(left), abs=2e-3)
    assert softened[0, ~stored].unique().numel() == 1  # which class has how much is not known


def test_softened_labels_without_a_rest_are_those_that_are_stored():
    certain = TeacherLabels(
        torch.tensor([[-0.5, -1.0]]).half(), 5, torch.tensor([[3, 1]]), torch.zeros(1)
    )
    softened = certain.softened(4.0)
    assert softened.isfinite().all()
    assert float(softened[0, [3, 1]].sum()) > 0.999
    all_kept = TeacherLabels(
        torch.tensor([[-0.5, -1.0]]).half(), 2, torch.tensor([[1, 0]]), torch.zeros(1)
    )
    assert torch.allclose(all_kept.softened(4.0).sum(), torch.ones(()))


def test_sparse_labels_of_all_classes_are_dense():
    labels = TeacherLabeler(plain(), top=5)(noise())
    assert labels.indices is None
    assert TeacherLabeler(plain(), top=4)(noise()).indices.shape == (5, 4)


def test_labels_can_be_indexed_and_moved():
    logits = torch.randn(5, 20)
    for top in (None, 3):
        labels = TeacherLabels.from_logits(logits, top=top)
        part = labels[torch.tensor([4, 1])].to("cpu")
        assert len(part) == 2
        assert_close(part.probs, labels.probs[[4, 1]])
    assert_close(TeacherLabels.from_probs(logits.softmax(dim=1)).probs, logits.softmax(dim=1))


# -- precision -------------------------------------------------------------------------------------


def test_autocast_is_for_the_search_and_not_for_the_originals():
    net, images = plain().eval(), noise()
    labeler = TeacherLabeler(net, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = net(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = net(images.contiguous(memory_format=torch.channels_last)).float()
    assert not torch.equal(exact, rough)
    assert_close(labeler.logits(images).detach(), rough, rtol=0, atol=0)
    assert_close(labeler.examine(images)[0], exact, rtol=1e-5, atol=1e-5)
    pair = TeacherLabeler([labeler, labeler])
    assert_close(pair.examine(images)[0].softmax(dim=1), exact.softmax(dim=1))


def test_precise_logits_have_a_gradient_and_no_autocast():
    net, images = plain().eval(), noise().requires_grad_()
    labeler = TeacherLabeler(net, dtype=torch.bfloat16)
    for teacher in (labeler, TeacherLabeler([labeler, labeler])):
        logits = teacher.logits(images, precise=True)
        assert_close(logits.softmax(dim=1), net(images).softmax(dim=1), rtol=1e-5, atol=1e-5)
        assert torch.autograd.grad(logits[:, 0].sum(), images)[0].abs().sum() > 0


def test_the_readers_autocast_and_inference_mode_do_not_leak_in():
    net, images = plain(), noise()
    labeler = TeacherLabeler(net)
    expected = labeler.examine(images)[0]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        labels = labeler(images.clone())
        logits, maps = labeler.examine(images.clone())
    for value in (labels.log_probs, logits, *maps):
        assert not value.is_inference()
    assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert_close(labels.probs, expected.softmax(dim=1), rtol=1e-6, atol=1e-6)
    assert not labels.log_probs.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["functional mean", "Sequential", "resnet18"])
def test_half_precision_modules_have_class_maps(name, dtype):
    make, side = NETS[name]
    net = make().to(dtype).eval()
    labeler = TeacherLabeler(net)
    images = torch.randint(256, (5, 3, side, side), dtype=torch.uint8)
    for _ in range(2):
        logits, maps = labeler.examine(images)
        assert logits.dtype == torch.float32
        assert_close(logits, net((images / 255).to(dtype)).float(), atol=2e-2, rtol=2e-2)
        assert maps is not None
        assert maps.features.dtype == maps.weight.dtype == maps.bias.dtype == torch.float32
        explained = maps.maps().mean(dim=(2, 3)) + maps.bias
        scale = float(logits.abs().max())
        assert_close(explained, logits, atol=torch.finfo(dtype).eps * scale, rtol=0)
    mixed = supermix(
        images,
        labeler,
        sources=torch.tensor([[0, 1], [2, 3]]),
        weights=torch.full((2, 2), 0.5),
        settings=SolverSettings(max_steps=3),
    )
    assert mixed.logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [TwoLayers, Normed])
def test_half_precision_does_not_make_maps_of_other_heads(make, dtype):
    assert TeacherLabeler(make().to(dtype)).class_maps(noise()) is None


def test_channels_last_maps_may_be_viewed():
    net, images = Viewing(), noise()
    with pytest.raises(RuntimeError, match="view"):
        net(images.contiguous(memory_format=torch.channels_last))
    labeler = TeacherLabeler(net)
    assert_close(labeler.logits(images), net(images))
    use_all(labeler)

    def fail(_):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        TeacherLabeler(fail)(images)


# -- travelling and bad input ----------------------------------------------------------------------


def test_pickling_drops_the_teacher_and_says_so_on_use():
    labeler = TeacherLabeler(lambda x: x.mean(dim=(2, 3)), temperature=2.0, top=2)
    copied = pickle.loads(pickle.dumps(labeler))  # a lambda would not pickle
    assert (copied.temperature, copied.top) == (2.0, 2)
    assert "pickled" in repr(copied)
    for use in (copied, copied.logits, copied.examine, copied.class_maps):
        with pytest.raises(RuntimeError, match=r"this teacher was pickled.*Build the transform"):
            use(noise())


def test_deepcopy_shares_the_teacher():
    labeler = TeacherLabeler(plain())
    assert copy.deepcopy({"teacher": labeler})["teacher"] is labeler


def test_a_labeler_is_used_as_it_is():
    labeler = TeacherLabeler(plain())
    assert as_labeler(labeler) is labeler
    assert isinstance(as_labeler(plain()), TeacherLabeler)
    assert "Sequential" in repr(labeler)


def test_weights_that_are_inference_tensors_are_named():
    with torch.inference_mode():
        net = plain()
    with pytest.raises(ValueError, match=r"ordinary weights, got inference tensors.*Build or load"):
        TeacherLabeler(net)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature: expected a positive number, got nan"),
        ({"top": 0}, "top: expected at least 1 class, or None for all, got 0"),
        ({"mean": [0.5]}, r"expected mean and std together, got mean=\[0.5\] and std=None"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TeacherLabeler(plain(), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"mean": [0.5] * 3, "std": [0.5] * 3},
        {"size": 8},
        {"classes": [1, 0]},
        {"dtype": torch.bfloat16},
        {"device": "cpu"},
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_settings_beside_a_labeler_are_named(settings, several):
    labeler = TeacherLabeler(plain())
    message = rf"{next(iter(settings))}: expected None beside a labeler, .*, got .* Pass it where"
    with pytest.raises(ValueError, match=message):
        TeacherLabeler([plain(), labeler] if several else labeler, **settings)
    assert TeacherLabeler(labeler, temperature=2.0, top=2).top == 2  # of the mean, not the member


def test_what_is_no_teacher_is_named():
    with pytest.raises(TypeError, match=r"teacher: expected a module or a callable.*got str"):
        TeacherLabeler("resnet18")
    with pytest.raises(ValueError, match=r"teacher: expected at least one, got an empty list"):
        TeacherLabeler([])


def test_pictures_that_can_not_be_labelled_are_named():
    labeler = TeacherLabeler(plain())
    for images, message in (
        (torch.zeros(3, 9, 7), r"images: expected a batch \(B, C, H, W\)"),
        (torch.zeros(5, 3, 9, 7, dtype=torch.int64), "images: expected uint8 or a floating dtype"),
        ("cat.png", "images: expected a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            labeler(images)


def test_inputs_are_unchanged():
    images = noise()
    before, copied = images._version, images.clone()
    use_all(TeacherLabeler(plain(), mean=[0.5] * 3, std=[0.5] * 3))
    TeacherLabeler(plain())(images)
    TeacherLabeler(plain()).examine(images)
    assert images._version == before
    assert torch.equal(images, copied)


def test_half_is_whether_any_teacher_answers_in_half_precision():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    half = copy.deepcopy(net).bfloat16()
    assert not TeacherLabeler(net).half
    assert not TeacherLabeler(copy.deepcopy(net).double()).half
    assert not TeacherLabeler(lambda x: x.flatten(1)).half
    assert TeacherLabeler(net, dtype=torch.bfloat16).half
    assert TeacherLabeler(half).half
    assert TeacherLabeler([net, half]).half


def test_mean_and_std_are_one_of_each_channel():
    with pytest.raises(ValueError, match="mean, std: expected one of each channel"):
        TeacherLabeler(plain(), mean=[0.5] * 3, std=[0.2] * 2)
    with pytest.raises(ValueError, match="all of std above 0"):
        TeacherLabeler(plain(), mean=[0.5], std=[0.0])


def test_the_digest_does_not_ask_how_the_mean_was_written():
    net = plain()
    one = TeacherLabeler(net, mean=[0.5] * 3, std=[0.2] * 3)
    assert one.digest == TeacherLabeler(net, mean=(0.5,) * 3, std=(0.2,) * 3).digest


def test_class_maps_are_float32_under_autocast():
    maps = TeacherLabeler(plain()).class_maps(noise())
    with torch.autocast("cpu", torch.bfloat16):
        assert maps.maps().dtype == torch.float32


def test_a_teacher_that_waits_for_other_ranks_is_asked_without_them():
    net = colour_teacher()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        labeler = TeacherLabeler(wrapped)
        wrapped.register_forward_pre_hook(lambda *_: pytest.fail("it was asked itself"))
        images, labels = pictures(6)
        assert torch.equal(labeler(images).hard, labels)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # TorchScript is on its way out
def test_a_frozen_torchscript_teacher_is_asked():
    images, labels = pictures(6)
    traced = torch.jit.freeze(torch.jit.trace(colour_teacher().eval(), images))
    assert torch.equal(TeacherLabeler(traced)(images).hard, labels)


def test_a_teacher_of_one_logit_is_an_error():
    with pytest.raises(ValueError, match=r"at least two classes, got \(3, 1\)\. Of one logit"):
        TeacherLabeler(lambda images: images.mean(dim=(1, 2, 3))[:, None])(torch.rand(3, 3, 4, 4))
