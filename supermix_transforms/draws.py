"""What a mix draws: who is mixed with whom, by which weights, and every other random number.

Draws come from (seed, epoch, sample identities) on the CPU: the same for any number of workers,
ranks or batches before this one.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum, unique
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Draw",
    "Purpose",
    "draw_ring",
    "draw_weights",
    "generator",
    "seeded",
    "set_epoch_of",
]

PASSES = 5  # of swaps around the ring


@unique
class Purpose(IntEnum):
    """What a random number is for; each has a stream of its own."""

    RING = 0
    WEIGHTS = 1
    RECTANGLES = 2  # CutMix's
    ORDER = 3  # in which matched partners are assigned
    CHANCE = 4  # of partners that match equally well
    TURN = 5  # the epoch in which a picture must be a partner
    AUGMENT = 6
    VIEW = 7
    FOREIGN = 8  # somebody else's transform
    AFTER = 9
    FILES = 10  # the order of a folder's
    OTHERS = 11  # pictures that take the place of mixes


class Draw(NamedTuple):
    """What all random choices for a batch depend on."""

    seed: int
    epoch: int
    ids: Tensor  # (B,) int64, identities of the samples
    attempt: int = 0  # of redrawing tuples that did not converge

    def digest(self, *values: int) -> int:
        """64 bits that depend on the draw's seed, epoch and attempt, and on `values`."""
        numbers = [v & 0xFFFFFFFFFFFFFFFF for v in (self.seed, self.epoch, self.attempt, *values)]
        packed = struct.pack(f"<{len(numbers)}Q", *numbers)
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")

    def order(self, purpose: Purpose) -> list[int]:
        """Rows of the batch in a random order that is the samples' own, whatever the batch's."""
        ids = self.ids.tolist()
        return sorted(range(len(ids)), key=lambda row: (self.digest(purpose, ids[row]), row))


def generator(draw: Draw, ids: Sequence[int], purpose: Purpose) -> np.random.Generator:
    """A stream of random numbers of its own for the samples `ids` and one purpose."""
    return np.random.Generator(np.random.Philox(key=draw.digest(purpose, *ids)))


@contextmanager
def seeded(draw: Draw, purpose: Purpose, device: torch.device) -> Iterator[None]:
    """Torch's global generators depend on the draw inside, and are as they were afterwards."""
    seed = draw.digest(purpose, *draw.ids.tolist()) & 0x7FFFFFFFFFFFFFFF
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        # torch.manual_seed would seed every device, also those that are not put back
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif devices:
            torch.get_device_module(device).manual_seed(seed)
        yield


def draw_ring(draw: Draw, classes: Tensor | None, k: int) -> Tensor:
    """Random tuples: each sample with its next k - 1 neighbours in a ring, (B, k) int64.

    The ring is ordered by hash(seed, epoch, identity), so it does not depend on places in the
    batch; k samples in a row have different classes wherever the batch allows it.

    Args:
        draw: seed, epoch and the B identities.
        classes: (B,) int64, or None if they are not known.
        k: images a tuple, at most B.

    Returns:
        Rows of the batch; row i starts with i.
    """
    ring = draw.order(Purpose.RING)
    if classes is not None:
        ring = _separate(ring, classes.tolist(), k)
    order = torch.tensor(ring)
    tuples = torch.stack([order.roll(-i) for i in range(k)], dim=1)  # row j starts with ring[j]
    return tuples[order.argsort()]


def _separate(ring: list[int], classes: list[int], k: int) -> list[int]:
    """A ring in which classes within k places differ: by few swaps, else by dealing the classes."""
    count = len(ring)
    sizes = Counter(classes)
    reach = range(1, min(k, count))

    def clashes(ring: list[int], place: int) -> int:
        """How many neighbours within reach have the class of this place."""
        own = classes[ring[place]]
        return sum(
            (classes[ring[(place + d) % count]] == own) + (classes[ring[place - d]] == own)
            for d in reach
        )

    def total(ring: list[int]) -> int:
        return sum(clashes(ring, place) for place in range(count))

    swapped = list(ring)
    curable = max(sizes.values()) * k <= count  # else each place tries all others in vain
    for place in list(range(count)) * PASSES if curable else ():
        if not clashes(swapped, place):
            continue
        for other in (o % count for o in range(place + 1, place + count)):
            before = clashes(swapped, place) + clashes(swapped, other)
            swapped[place], swapped[other] = swapped[other], swapped[place]
            if clashes(swapped, place) + clashes(swapped, other) < before:
                break  # it may help without curing; the next pass goes on
            swapped[place], swapped[other] = swapped[other], swapped[place]

    # Deal the classes, most frequent first, to every k-th place: right whenever k divides the
    # count and no class has more than its k-th part.
    first: dict[int, int] = {}
    for place, row in enumerate(swapped):
        first.setdefault(classes[row], place)
    by_class = sorted(swapped, key=lambda row: (-sizes[classes[row]], first[classes[row]]))
    dealt = [0] * count
    places = (place for start in range(k) for place in range(start, count, k))
    for place, row in zip(places, by_class, strict=True):
        dealt[place] = row
    return min((swapped, dealt), key=total)


def draw_weights(draw: Draw, sources: Tensor, alpha: float) -> Tensor:
    """Mixing weights Dirichlet(alpha) of each tuple, from its identities: (M, k) float32."""
    tuples = draw.ids[sources].tolist()
    k = sources.shape[1]
    rows = [generator(draw, ids, Purpose.WEIGHTS).dirichlet([alpha] * k) for ids in tuples]
    return torch.from_numpy(np.asarray(rows, dtype=np.float32).reshape(-1, k))


def set_epoch_of(part: Any, epoch: int) -> None:
    """Tell the epoch to a loader, data set or transform that wants to know."""
    if callable(set_epoch := getattr(part, "set_epoch", None)):
        set_epoch(epoch)
