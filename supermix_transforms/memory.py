"""How much memory a search takes, how many tuples fit a budget, how many a teacher sees at a time.

At its peak a search of R tuples has allocated, besides what the caller holds::

    shared + max(R * start, R * row + G * (graph + activations))

*shared* are the class maps of all pictures; a tuple takes *start* bytes while the surrogate is
optimised, *row* while it is searched, *graph* and *activations* more while the graph through its
mix and the teacher is alive. That holds G tuples at a time: on a GPU all, on the CPU a few. The
teacher's *activations* are measured (`activation_bytes`), all else is counted from shapes.

What the profiler counts was within 5 % of it for eight networks (tests/test_memory.py has one). Not
in it are weights that a CPU's convolutions lay out anew, 19 MB for a ResNet-18: with 12 pictures of
64 px that is 1.7 to 3.1 times the formula.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Footprint", "activation_bytes", "footprint", "group_size"]

FLOAT = 4
GROUP_VALUES = 4 * 3 * 224 * 224  # of pictures that a CPU is given at a time
# How often the surrogate's optimiser has something alive of the size of: a tuple's mask logits, its
# coarse masks, its logits, its class maps (while they are laid out for the product)
STARTS = 12, 8, 16, 2
# What a search keeps of a tuple: mask logits (now, next, best, momentum, step, gradient), logits
ROWS = 10, 5


class Footprint(NamedTuple):
    """Bytes a search allocates; see the module for how they add up."""

    shared: int
    start: int
    row: int
    graph: int  # without
    activations: int  # the teacher's

    def peak(self, rows: int, graph_rows: int | None = None) -> int:
        """For `rows` tuples at a time, `graph_rows` of them in a graph (None: all)."""
        asked = rows if graph_rows is None else min(rows, graph_rows)
        return self.shared + max(
            rows * self.start, rows * self.row + asked * (self.graph + self.activations)
        )

    def rows_within(self, memory: int, graph_rows: int | None = None) -> int:
        """How many tuples at a time stay within `memory` bytes; 1 where none do."""
        free, graph = memory - self.shared, self.graph + self.activations
        searched = free // (self.row + graph)
        if graph_rows is not None and searched > graph_rows:
            searched = (free - graph_rows * graph) // self.row
        return max(1, min(searched, free // self.start))


def footprint(
    images: Tensor,
    *,
    k: int,
    num_classes: int,
    mask_size: int,
    coarse: tuple[int, int],
    map_cells: int,
    activations: int,
) -> Footprint:
    """From shapes, what a search of the pictures (P, C, H, W) allocates.

    Args:
        images: uint8 or floating.
        k: pictures a tuple.
        num_classes: N.
        mask_size: w.
        coarse: where masks are rendered while the surrogate is optimised.
        map_cells: h * w of a surrogate's maps; 0 without one.
        activations: bytes that the teacher keeps for a backward, a picture.
    """
    picture, pixels = images[0].numel(), images.shape[-2] * images.shape[-1]
    own = images.element_size()
    grid, maps = k * mask_size**2, num_classes * map_cells
    start = STARTS[0] * grid + STARTS[1] * k * coarse[0] * coarse[1]
    start += STARTS[2] * num_classes + STARTS[3] * k * maps
    row = ROWS[0] * grid + ROWS[1] * num_classes
    # kept: the k pictures, the masks, the mix and what the teacher is given; for a moment: the mix
    # rounded, in the pictures' dtype, and beside the best one
    graph = (k + 3) * picture + k * pixels
    return Footprint(
        shared=len(images) * maps * FLOAT,
        start=FLOAT * start,
        row=FLOAT * row + picture * own,
        graph=FLOAT * graph + 3 * picture * own,
        activations=activations,
    )


def group_size(images: Tensor) -> int | None:
    """How many pictures a teacher is given at a time: on a GPU all, on the CPU a few large ones.

    More than fit its caches cost a CPU more a picture: docs/results/groups.json has 37 ms a forward
    and backward for 8 pictures of 224 px, 84 for 64.
    """
    return max(1, GROUP_VALUES // images[0].numel()) if images.device.type == "cpu" else None


def activation_bytes(teacher: Callable[[Tensor], Tensor], image: Tensor) -> int:
    """What a teacher keeps for a backward of one picture more, in bytes.

    It is asked for one and for two pictures: what does not grow is weights.

    Args:
        teacher: images -> logits.
        image: (C, H, W), floating, as the teacher takes it.
    """
    kept = []
    for count in (1, 2):
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # an output that its own graph held would never be freed

        images = image.detach().expand(count, *image.shape).clone().requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            logits = teacher(images)
        kept.append(sum(storages.values()))
        del logits
    return max(0, kept[1] - kept[0])
