"""A decoder of recipes by docs/format.md alone, in plain Python, without the package."""

import hashlib
import json
import lzma
import math
import struct

FIELDS = [
    ("sample", "I", "G"), ("crop", "h", "G 4"), ("flip", "B", "G"),
    ("original_index", "H", "G n"), ("original_log_prob", "e", "G n"), ("original_rest", "e", "G"),
    ("source", "H", "M k"), ("weight", "H", "M k-1"), ("outcome", "B", "M"), ("steps", "H", "M"),
    ("index", "H", "M n"), ("log_prob", "e", "M n"), ("rest", "e", "M"), ("kind", "B", "M"),
    ("grid", "b", "0 k-1 w w"), ("share", "H", "1 k-1"), ("box", "H", "2 k-1 4"),
    ("digest", "B", "D"),
]  # fmt: skip
FILTER = {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0}


def decode(content):
    """Header and groups; a group's field is a flat list in C order."""
    magic, version, size = struct.unpack_from("<8sII", content)
    assert (magic, version) == (b"supermix", 1)
    header = json.loads(content[16 : 16 + size])
    assert hashlib.sha256(content[: 16 + size]).digest() == content[16 + size : 48 + size]
    at, groups, layout = 48 + size, [], header["layout"]
    for entry in header["groups"]:
        whole = content[at : at + sum(entry["bytes"])]
        assert hashlib.sha256(whole).hexdigest() == entry["sha256"]
        known = {"G": entry["originals"], "M": entry["mixes"], "n": layout["top"]}
        known |= {"k": layout["k"], "k-1": layout["k"] - 1, "w": layout["mask_size"], "4": 4}
        known |= {str(kind): count for kind, count in enumerate(entry["kinds"])}
        known["D"] = 8 if known["M"] else 0
        group = {}
        for (name, kind, dims), length in zip(FIELDS, entry["bytes"], strict=True):
            kind = "I" if name.endswith("index") and layout["num_classes"] > 65536 else kind
            shape, each = [known[d] for d in dims.split()], struct.calcsize(kind)
            data = lzma.decompress(content[at : at + length], lzma.FORMAT_RAW, filters=[FILTER])
            count = math.prod(shape)
            assert len(data) == count * each
            raw = b"".join(bytes(data[b * count + i] for b in range(each)) for i in range(count))
            flat = list(struct.unpack(f"<{count}{kind}", raw))
            if name == "grid":
                undo_differences(flat, layout["mask_size"])
            else:  # the first axis varied fastest
                rest = count // max(1, shape[0])
                flat = [flat[j * shape[0] + i] for i in range(shape[0]) for j in range(rest)]
            group[name] = flat
            at += length
        groups.append(group)
    assert at == len(content)
    return layout, groups


def undo_differences(flat, w):
    for i in range(len(flat)):
        y, x = i // w % w, i % w
        a = flat[i - 1] if x else 0
        b = flat[i - w] if y else 0
        c = flat[i - w - 1] if x and y else 0
        flat[i] += sorted([a, b, a + b - c])[1]


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
