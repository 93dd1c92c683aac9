"""Masks of recipes by docs/format.md alone, in plain Python, without the package."""

import math


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
