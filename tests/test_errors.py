"""What the command line says of errors."""

import pytest
import torch

from supermix_transforms.commands.errors import in_words


class Wrong(ValueError):
    """As torch hands an error of a worker on: of its class, with its traceback for a message."""


CAUGHT = """Caught Wrong in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "loader.py", line 1, in fetch
    raise Wrong(problem)
tests.test_errors.Wrong: images: expected a picture, got 'a.png': no picture.
"""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("k: expected 2"), "k: expected 2"),
        (Wrong(CAUGHT), "images: expected a picture, got 'a.png': no picture."),
        (
            torch.OutOfMemoryError("no room.\nMore."),
            "out of memory: no room. Take a smaller --batch",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed."),
            "DataLoader worker (pid 7) is killed.",
        ),
    ],
)
def test_errors_are_said_in_a_line(error, words):
    said = in_words(error)
    assert said.startswith(words)
    assert "\n" not in said


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), KeyError("x"), TypeError()])
def test_of_mistakes_in_the_code_the_traceback_is_wanted(error):
    assert in_words(error) is None
