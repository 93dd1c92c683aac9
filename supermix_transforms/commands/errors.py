"""What the command line says of an error, in one line where it can be said so."""

import torch

__all__ = ["in_words"]


def in_words(error: Exception) -> str | None:
    """What to tell whoever typed the command; None where a traceback is wanted instead."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        first = text.splitlines()[0]
        return f"out of memory: {first} Take a smaller --batch-size or --size."
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"{text} Take fewer --num-workers."  # it was killed, as a rule for want of memory
    if not isinstance(error, (ValueError, ImportError, OSError)):
        return None
    if text.startswith("Caught ") and "DataLoader worker process" in text:
        # torch hands on the worker's traceback, whose last line is "module.Class: message"
        return text.strip().splitlines()[-1].partition(": ")[2]
    return text
