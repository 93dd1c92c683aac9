"""Checkpoints of a training run: all that is needed to go on, in one file."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from supermix_transforms.files import write_atomically
from supermix_transforms.offline.ledger import check_same_settings

__all__ = ["Checkpoint", "Progress"]


@dataclass
class Progress:
    """Where a run stands; a checkpoint holds it beside the tensors."""

    epoch: int = 0
    batch: int = 0  # of the epoch, that are done
    step: int = 0
    loss: float = 0.0  # of these batches, together
    samples: int = 0
    calls: float = 0.0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"data": 0.0, "mixing": 0.0, "training": 0.0}
    )
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry an epoch
    best: float = -1.0


class Checkpoint:
    """All that is needed to go on, in one file that is there whole or not at all."""

    def __init__(
        self,
        folder: Path,
        network: nn.Module,
        optimiser: Any,
        average: Any,
        settings: dict[str, Any],
        scaler: Any = None,
    ) -> None:
        self._folder, self._network, self._optimiser = folder, network, optimiser
        self._average, self._settings, self._scaler = average, settings, scaler

    def load(self) -> Progress:
        """Put everything where it was, if there is a run to go on with."""
        from safetensors import SafetensorError, safe_open

        path = self._folder / "last.safetensors"
        if not path.exists():
            return Progress()
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            begun = json.loads(about["settings"])
            progress = Progress(**json.loads(about["progress"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"out: expected a checkpoint of this version, got {str(path)!r}: {error}. Remove "
                "it to begin anew, or choose another folder."
            ) from error
        check_same_settings(self._folder, begun, self._settings)
        try:
            self._network.load_state_dict(_part(tensors, "model"))
            if self._average is not None:
                self._average.load_state_dict(_part(tensors, "average"))
        except RuntimeError as error:
            raise ValueError(
                f"out: expected the student that {str(self._folder)!r} was begun with, got another "
                f"one: {str(error).splitlines()[0]} Choose another folder."
            ) from error
        state = self._optimiser.state_dict()
        momenta = _part(tensors, "momentum")
        weights = list(self._network.parameters())
        state["state"] = {
            int(i): {"momentum_buffer": torch.empty_like(weights[int(i)]).copy_(value)}
            for i, value in momenta.items()  # in the layout of the weights
        }
        self._optimiser.load_state_dict(state)
        if self._scaler is not None:
            self._scaler.load_state_dict(json.loads(about["scaler"]))
        return progress

    def save(self, progress: Progress) -> None:
        from safetensors.torch import save

        parts = {"model": self._network.state_dict()}
        if self._average is not None:
            parts["average"] = self._average.state_dict()
        parts["momentum"] = {
            str(i): each["momentum_buffer"]
            for i, each in self._optimiser.state_dict()["state"].items()
            if each.get("momentum_buffer") is not None
        }
        tensors = {
            f"{part}/{name}": _copy(value)
            for part, values in parts.items()
            for name, value in values.items()
        }
        about = {
            "settings": json.dumps(self._settings),
            "progress": json.dumps(asdict(progress)),
            "scaler": json.dumps(None if self._scaler is None else self._scaler.state_dict()),
        }
        write_atomically(self._folder / "last.safetensors", save(tensors, about))

    def save_best(self) -> None:
        """The student's weights as they are judged, under its own names.

        Beside them is how its pictures were normalised: `load_teacher` reads it.
        """
        from safetensors.torch import save

        judged: Any = self._network if self._average is None else self._average.module
        state = judged.network.state_dict()
        tensors = {name: _copy(value) for name, value in state.items()}
        about = {"normalisation": json.dumps(judged.normalisation)}
        write_atomically(self._folder / "best.safetensors", save(tensors, about))


def _copy(value: Tensor) -> Tensor:
    """Of its own, for weights that are tied share their memory, which safetensors refuses."""
    return value.detach().to("cpu", copy=True).contiguous()


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}/"
    return {
        key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)
    }
