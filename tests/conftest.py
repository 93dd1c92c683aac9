"""What every test gets: the same seeds, one thread a process (two without xdist), no network."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before torch and huggingface_hub are imported; processes that tests start inherit both.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

DATA = Path(__file__).parents[2] / "shared" / "data"

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
hypothesis.settings.register_profile("same every run", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same every run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "data" in getattr(item, "fixturenames", ()):
            item.add_marker("data")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of tiny tensors: on busy cores a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real pictures and teachers; the test is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data, which is not beside this checkout")
    return DATA


@pytest.fixture
def own_precision() -> Iterator[None]:
    """A process has one Accelerator's precision; here, many runs share the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
