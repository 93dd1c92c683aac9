"""Pixels of recipes by docs/format.md alone, in plain Python, without the package."""

import math


def masks(layout, group, row):
    """m of a mix of a decoded group: [k][y][x]."""
    k, w, height, width = (layout[name] for name in ("k", "mask_size", "height", "width"))
    kind = group["kind"][row]
    place = group["kind"][:row].count(kind)  # among those of its kind
    if kind == 0:
        planes = [place * (k - 1) + i for i in range(k - 1)]
        planes = [group["grid"][w * w * i : w * w * (i + 1)] for i in planes]
        return parts(planes, w, height, width)
    if kind == 1:
        shares = group["share"][(k - 1) * place : (k - 1) * (place + 1)]
        shares += [255 - sum(shares)]
        return [[[share] * width for _ in range(height)] for share in shares]
    owner = [[0] * width for _ in range(height)]
    for i in range(1, k):
        first = 4 * (place * (k - 1) + i - 1)
        top, left, bottom, right = group["box"][first : first + 4]
        for y in range(top, bottom):
            owner[y][left:right] = [i] * (right - left)
    return [[[255 * (each == i) for each in line] for line in owner] for i in range(k)]


def mix(pictures, masks):
    """Red, then green, then blue of k pictures, bytes RGB RGB ..., under their masks."""
    flat = [[m for line in mask for m in line] for mask in masks]
    return bytes(
        (2 * sum(x[3 * p + c] * m[p] for x, m in zip(pictures, flat, strict=True)) + 255) // 510
        for c in range(3)
        for p in range(len(flat[0]))
    )


def parts(planes, w, height, width):
    """m of each picture, [k][y][x], from k - 1 planes of w * w steps."""

    def taps(p, pixels):
        s = min(max((2 * p + 1) * w - pixels, 0), 2 * pixels * (w - 1))
        c = max(0, min(s // (2 * pixels), w - 2))
        return c, (16 * (s - 2 * pixels * c) + pixels) // (2 * pixels)

    masks = [[[0] * width for _ in range(height)] for _ in range(len(planes) + 1)]
    for y in range(height):
        for x in range(width):
            (cy, ty), (cx, tx) = taps(y, height), taps(x, width)
            corners = [(dy, dx) for dy in (0, 1) for dx in (0, 1)]
            z = [0] * len(masks)
            for i, plane in enumerate(planes):
                for dy, dx in corners:
                    share = (ty if dy else 16 - ty) * (tx if dx else 16 - tx)
                    z[i] += share * plane[(cy + dy) * w + cx + dx] if share else 0
            e = [round(2**20 * math.exp((v - max(z)) / 512)) for v in z]
            total, upto, before = sum(e), 0, 0
            for i, each in enumerate(e):
                upto += each
                u = (2 * 255 * upto + total) // (2 * total)
                masks[i][y][x], before = u - before, u
    return masks
