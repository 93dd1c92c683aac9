"""A decoder of recipes by docs/format.md alone, in plain Python, without the package."""

import hashlib
import json
import lzma
import math
import struct

FIELDS = """sample I G|crop h G 4|flip B G|original_index c G n|original_log_prob e G n
original_rest e G|source H M k|weight H M k-1|outcome B M|steps H M|index c M n|log_prob e M n
rest e M|kind B M|grid b L k-1 w w|share H C k-1|box H B k-1 4|digest B D"""
FILTER = {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0}


def decode(content):
    """Layout and groups; a group's field is a flat list in C order."""
    magic, version, size = struct.unpack_from("<8sII", content)
    assert (magic, version) == (b"supermix", 1)
    assert hashlib.sha256(content[: 16 + size]).digest() == content[16 + size : 48 + size]
    header = json.loads(content[16 : 16 + size])
    at, groups = 48 + size, []
    for entry in header["groups"]:
        block = content[at : at + sum(entry["bytes"])]
        assert hashlib.sha256(block).hexdigest() == entry["sha256"]
        groups.append(read_group(block, entry, header["layout"]))
        at += len(block)
    assert at == len(content)
    return header["layout"], groups


def read_group(block, entry, layout):
    sizes = {"G": entry["originals"], "M": entry["mixes"], "D": 8 if entry["mixes"] else 0}
    sizes |= {"n": layout["top"], "w": layout["mask_size"], "4": 4}
    sizes |= {"k": layout["k"], "k-1": layout["k"] - 1}
    sizes |= zip("LCB", entry["kinds"], strict=True)
    group, at = {}, 0
    for field, length in zip(FIELDS.replace("\n", "|").split("|"), entry["bytes"], strict=True):
        name, kind, *axes = field.split()
        kind = kind if kind != "c" else "H" if layout["num_classes"] <= 65536 else "I"
        first, rest = sizes[axes[0]], math.prod(sizes[axis] for axis in axes[1:])
        count, each = first * rest, struct.calcsize(kind)
        data = lzma.decompress(block[at : at + length], lzma.FORMAT_RAW, filters=[FILTER])
        assert len(data) == count * each
        data = bytes(byte for i in range(count) for byte in data[i::count])
        flat = struct.unpack(f"<{count}{kind}", data)
        if name == "grid":
            group[name] = add_guesses(list(flat), layout["mask_size"])
        else:  # the first axis varies fastest
            group[name] = [value for i in range(first) for value in flat[i::first]]
        at += length
    return group


def add_guesses(flat, w):
    for i in range(len(flat)):
        a = flat[i - 1] if i % w else 0
        b = flat[i - w] if i // w % w else 0
        c = flat[i - w - 1] if i % w and i // w % w else 0
        flat[i] += sorted([a, b, a + b - c])[1]
    return flat
