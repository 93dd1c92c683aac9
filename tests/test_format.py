"""docs/format.md against the code, a folder that generate wrote, and plain programs of the page."""

import hashlib
import io
import itertools
import json
import re
import tarfile
from dataclasses import asdict
from pathlib import Path

import plain_decoder
import plain_pixels
import pytest
import torch
from colours import NUM_CLASSES, colour_teacher
from PIL import Image, ImageOps
from tars import write_colours
from test_generation import COUNT, SMALL, VIEW
from test_recipes import LAYOUT, read_all, reader
from test_recipes import group as made_up

from supermix_transforms import ShardDataset, generate, replay
from supermix_transforms.offline.recipes import FIELDS, MOST, VERSION, Group, Kind, Layout, encode
from supermix_transforms.quantised import exact_parts, quantise
from supermix_transforms.results import Outcome

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "format.md"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("num_classes", [40, 70_000])
@pytest.mark.parametrize(("k", "w"), [(2, 8), (4, 3)])
def test_a_decoder_that_knows_the_page_alone_reads_the_same(num_classes, k, w):
    layout = Layout(k, w, num_classes, 4, 9, 7, "b" * 64)
    check_plainly_read(encode(layout, [made_up(layout), made_up(layout, seed=3)]))


def check_plainly_read(content: bytes) -> list[Group]:
    layout, groups = plain_decoder.decode(content)
    assert layout == asdict(reader(content).layout)
    ours = read_all(content)
    for plain, each in zip(groups, ours, strict=True):
        assert list(plain) == list(FIELDS)
        for name, values in plain.items():
            assert values == vars(each)[name].flatten().tolist(), name
    return ours


def test_that_decoder_is_short_and_knows_nothing_of_the_package():
    text = Path(plain_decoder.__file__).read_text()
    assert len(text.splitlines()) <= 60
    assert re.findall(r"^ *(?:import|from) (\S+)", text, re.MULTILINE) == [
        "hashlib",
        "json",
        "lzma",
        "math",
        "struct",
    ]


@pytest.mark.parametrize(("k", "w", "size"), [(2, 5, (11, 8)), (3, 4, (6, 13)), (2, 1, (3, 2))])
def test_a_decoder_that_knows_the_page_alone_renders_the_same_masks(k, w, size):
    steps = quantise(4 * torch.randn(1, k, w, w))
    planes = [plane.flatten().tolist() for plane in steps[0]]
    assert plain_pixels.parts(planes, w, *size) == exact_parts(steps, size)[0].tolist()


def page_table(first: str) -> list[list[str]]:
    """Rows of the table of docs/format.md whose head begins with that word, without marks."""
    lines = iter(PAGE.read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows]


def test_the_page_has_the_fields_that_are_written():
    types = {"<u2": "uint16", "<u4": "uint32", "<i2": "int16", "<f2": "float16"}
    types |= {"u1": "uint8", "i1": "int8", "class": "class"}
    short = {"LOGITS": "L", "CONSTANT": "C", "BOXES": "B", "k - 1": "k − 1"}
    written = [
        [name, types[dtype], ", ".join(str(short.get(size, size)) for size in shape)]
        for name, (dtype, shape) in FIELDS.items()
    ]
    assert [row[:3] for row in page_table("field")] == written


def test_the_page_has_the_limits_that_are_checked():
    rows = [
        (
            name.strip(" `")
            .removeprefix("bytes of the ")
            .removeprefix("bytes of a ")
            .split(",")[0],
            int(low),
            int(high.split(", and")[0].replace(",", "")),
        )
        for names, low, high in page_table("number")
        for name in (names.split("`, `") if "`" in names else [names])
    ]
    assert {name: high for name, _, high in rows} == {"version": VERSION, **MOST}
    with pytest.raises(ValueError, match="expected 1"):
        Layout(**{**asdict(LAYOUT), "top": 0})
    empty = {"version", *asdict(LAYOUT)}
    assert all(low == (name in empty) for name, low, _ in rows)


def test_the_page_has_the_outcomes_and_kinds():
    meaning = {row[0]: row[3] for row in page_table("field")}
    outcomes = ["converged", "steps used up", "teacher not finite", "not mixed"]
    names = [Outcome.CONVERGED, Outcome.MAX_STEPS, Outcome.NOT_FINITE, Outcome.UNMIXED]
    assert list(Outcome) == names
    assert meaning["outcome"] == ", ".join(f"{n} {text}" for n, text in enumerate(outcomes))
    assert list(Kind) == [Kind.LOGITS, Kind.CONSTANT, Kind.BOXES]
    assert meaning["kind"] == "of the masks: 0 logits, 1 constant, 2 boxes"


def test_the_page_has_the_size_that_was_measured():
    results = json.loads((ROOT / "docs" / "results" / "offline.json").read_text())["results"]
    found = next(each for each in results if each["part"] == "recipes")
    mix, png = round(found["bytes_a_mix"], -1), round(found["png_bytes"], -4)
    text = " ".join(PAGE.read_text().split())
    assert f"some {mix:.0f} bytes a mix where a PNG has {png:,}" in text


# -- a folder that generate wrote ------------------------------------------------------------------

KINDS = {
    "supermix": ({}, Kind.LOGITS, "grid"),
    "three": ({"k": 3}, Kind.LOGITS, "grid"),
    "mixup": ({"mix": "mixup"}, Kind.CONSTANT, "share"),
    "cutmix": ({"mix": "cutmix", "k": 3}, Kind.BOXES, "box"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_colours(folder, COUNT)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def written(request, shards, tmp_path_factory):
    """A folder, and the kind of its masks and their field."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    options, kind, field = KINDS[request.param]
    dataset = ShardDataset(shards, transform=VIEW)
    generate(dataset, colour_teacher(), out, **SMALL, passes=2, **options)
    return out, kind, field


def test_a_decoder_that_knows_the_page_alone_reads_what_generate_wrote(written):
    out, kind, field = written
    units = sorted(out.glob("*.recipe"))
    groups = [group for unit in units for group in check_plainly_read(unit.read_bytes())]
    assert [len(group.kind) for group in groups] == 2 * [5, 5, 5, 5, 2]
    full = [group for group in groups if len(group.kind) == 5]  # 2 are too few for k of 3
    assert all((group.kind == kind).all() for group in full)
    for name in ("grid", "share", "box"):
        assert all((len(vars(group)[name]) > 0) == (name == field) for group in full)


def test_the_folder_is_as_the_page_says(written, shards):
    out, *_ = written
    content = json.loads((out / "settings.json").read_text())
    assert set(content) == {"format", "version", "settings", "versions"}
    assert (content["format"], content["version"]) == ("supermix-mixes", 1)
    settings = content["settings"]
    assert (settings["form"], settings["num_classes"]) == ("recipes", NUM_CLASSES)
    assert (settings["temperature"], settings["units"]) == (1.0, 6)
    for shard, path in zip(settings["shards"], sorted(shards.glob("*.tar")), strict=True):
        with tarfile.open(path) as tar:
            pictures = sum(name.endswith(".png") for name in tar.getnames())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard == {"name": path.name, "samples": pictures, "sha256": digest}
    assert settings["view"] == {
        "size": [16, 16],
        "resize": None,
        "max_size": None,
        "resize_interpolation": "bilinear",
        "crop_interpolation": "bilinear",
    }
    words = json.dumps(settings, sort_keys=True, separators=(",", ":")).encode("ascii")
    *lines, rest = (out / "manifest.jsonl").read_bytes().split(b"\n")
    assert (len(lines), rest) == (6, b"")
    names = [f"{epoch:03}-{unit:06}" for epoch in range(2) for unit in range(3)]
    assert sorted(json.loads(line)["unit"] for line in lines) == names
    for line in map(json.loads, lines):
        unit = (out / f"{line['unit']}.recipe").read_bytes()
        layout, groups = plain_decoder.decode(unit)
        outcomes = [outcome for group in groups for outcome in group["outcome"]]
        assert line == {
            "unit": line["unit"],
            "file": f"{line['unit']}.recipe",
            "mixes": len(outcomes),
            "converged": outcomes.count(0),
            "bytes": len(unit),
            "sha256": hashlib.sha256(unit).hexdigest(),
            "settings": hashlib.sha256((out / "settings.json").read_bytes()).hexdigest(),
        }
        assert layout["settings"] == hashlib.sha256(words).hexdigest()
        assert [layout["height"], layout["width"]] == settings["view"]["size"]
        assert (layout["top"], layout["num_classes"]) == (NUM_CLASSES, NUM_CLASSES)


def test_programs_that_know_the_page_alone_make_the_same_pixels(written, shards):
    out, *_ = written
    originals = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".png")]
            files = [tar.extractfile(name).read() for name in names]
        originals += [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    mixes = replay(out, ShardDataset(shards))
    made = []
    for unit in sorted(out.glob("000-*.recipe")):
        layout, groups = plain_decoder.decode(unit.read_bytes())
        k, height, width = layout["k"], layout["height"], layout["width"]
        for group in groups:
            for row in range(len(group["kind"])):
                pictures = []
                for place in group["source"][k * row : k * row + k]:
                    top, left, *size = group["crop"][4 * place : 4 * place + 4]
                    assert size == [height, width]  # no resize follows
                    picture = originals[group["sample"][place]]
                    picture = picture.crop((left, top, left + width, top + height))
                    picture = ImageOps.mirror(picture) if group["flip"][place] else picture
                    pictures.append(picture.tobytes())
                masks = plain_pixels.masks(layout, group, row)
                made.append(plain_pixels.mix(pictures, masks))
                if row == 0:
                    digest = hashlib.blake2b(made[-1], digest_size=8).digest()
                    assert digest == bytes(group["digest"])
    assert len(made) == COUNT
    for pixels, mix in zip(made, mixes.__getitems__(range(COUNT)), strict=True):
        assert pixels == mix.mixed.numpy().tobytes()
