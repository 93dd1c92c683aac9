"""The demo and what it is made of: mixing named pictures and writing them down."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from supermix_transforms.demo import (
    DEMO_FILES,
    demo,
    demo_pictures,
    mix_pictures,
    named_labeler,
    print_summary,
)
from supermix_transforms.models import NamedTeacher
from supermix_transforms.solver import SolverSettings
from supermix_transforms.teacher import TeacherLabeler

COLOURS = ("red", "green", "blue")


class MeanColour(nn.Module):
    """Three classes, the brightest colour on the average; has class maps."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(3, 3, bias=False)
        self.classifier.weight.data = 20 * torch.eye(3)

    def forward(self, images):
        return self.classifier(images.mean(dim=(2, 3)))


@pytest.fixture(autouse=True)
def _one_thread():
    """Pictures are tiny here: a second thread would cost more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def colours(count: int, side: int = 24) -> list[tuple[str, torch.Tensor]]:
    """Noisy pictures, red, green, blue and so on."""
    generator = torch.Generator().manual_seed(1)
    pictures = []
    for i in range(count):
        picture = torch.randint(0, 60, (3, side, side), dtype=torch.uint8, generator=generator)
        picture[i % 3] += 150
        pictures.append((f"{COLOURS[i % 3]}-{i}", picture))
    return pictures


def mix(out, pictures=None, teacher=None, **options):
    labeler = teacher or TeacherLabeler(MeanColour())
    return mix_pictures(colours(6) if pictures is None else pictures, labeler, out=out, **options)


def read_labels(out) -> dict:
    return json.loads((out / "labels.json").read_text(encoding="utf-8"))


def save(path, colour=(200, 30, 30), size=(24, 24), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


# -- mixing and writing ----------------------------------------------------------------------------


def test_every_mix_is_written_and_described(tmp_path):
    summary = mix(tmp_path / "new" / "out", class_names=COLOURS, name="mean-colour", seed=3)
    out = tmp_path / "new" / "out"
    files = sorted(path.name for path in out.iterdir())
    assert files == ["contact-sheet.png", *(f"k2-0000{i}.png" for i in range(6)), "labels.json"]
    labels = read_labels(out)
    assert labels["teacher"] == "mean-colour"
    assert labels["seed"] == 3
    assert [entry["file"] for entry in labels["mixes"]] == files[1:7]
    for entry in labels["mixes"]:
        assert len({source["name"] for source in entry["sources"]}) == 2
        for source in entry["sources"]:
            assert source["name"].startswith(source["class"])
            assert COLOURS[source["label"]] == source["class"]
        assert sum(entry["weights"]) == pytest.approx(1, abs=1e-5)
        assert sum(seen["probability"] for seen in entry["teacher"]) == pytest.approx(1, abs=1e-5)
        assert entry["outcome"] == "converged"
    row = summary.rows[0]
    assert (row.k, row.mixes, row.converged) == (2, 6, 6)
    assert row.sparsity == pytest.approx(np.mean([e["sparsity"] for e in labels["mixes"]]))
    assert row.forwards == pytest.approx(np.mean([e["forwards"] for e in labels["mixes"]]))
    assert row.ms_per_picture > 0


def test_the_teacher_says_of_a_written_file_what_the_labels_say(tmp_path):
    mix(tmp_path, class_names=COLOURS)
    labeler = TeacherLabeler(MeanColour())
    for entry in read_labels(tmp_path)["mixes"]:
        with Image.open(tmp_path / entry["file"]) as image:
            picture = torch.from_numpy(np.array(image)).movedim(-1, 0)
        indices, log_probs, _ = labeler(picture[None]).top(3)
        assert indices[0].tolist() == [seen["label"] for seen in entry["teacher"]]
        expected = [seen["probability"] for seen in entry["teacher"]]
        assert log_probs[0].exp().tolist() == pytest.approx(expected, abs=1e-5)
        wanted = {source["label"] for source in entry["sources"]}
        assert set(indices[0, :2].tolist()) == wanted


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        mix(tmp_path / name, seed=seed)
    contents = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two", "three")
    }
    assert contents["one"] == contents["two"]
    assert contents["one"].keys() == contents["three"].keys()
    assert contents["one"]["labels.json"] != contents["three"]["labels.json"]


def test_several_k_are_done_in_turn(tmp_path):
    summary = mix(tmp_path, k=(2, 3), count=2)
    assert [(row.k, row.mixes) for row in summary.rows] == [(2, 2), (3, 2)]
    assert [entry["k"] for entry in read_labels(tmp_path)["mixes"]] == [2, 2, 3, 3]
    assert len(read_labels(tmp_path)["mixes"][-1]["sources"]) == 3


@pytest.mark.parametrize("count", [1, 4, 5, 9, 14])
def test_count_is_met_with_other_mixes_each_time_around(tmp_path, count):
    mix(tmp_path, colours(4), count=count)
    entries = read_labels(tmp_path)["mixes"]
    assert len(entries) == count
    assert len({str(entry["weights"]) for entry in entries}) == count


@pytest.mark.parametrize(("pictures", "batch_size"), [(7, 3), (9, 3), (5, 4), (4, 4), (13, 4)])
def test_each_picture_has_its_mix_whatever_the_batch_size(tmp_path, pictures, batch_size):
    mix(tmp_path, colours(pictures), k=3, batch_size=batch_size)
    firsts = [entry["sources"][0]["name"] for entry in read_labels(tmp_path)["mixes"]]
    assert firsts == [name for name, _ in colours(pictures)]


def test_pictures_are_read_only_as_far_as_they_are_needed(tmp_path):
    taken = []

    def many():
        for number, picture in enumerate(colours(60)):
            taken.append(number)
            yield picture

    mix(tmp_path, many(), count=7, batch_size=4)
    assert len(taken) == 4 + 4 + 2


def test_matched_partners_come_from_the_class_maps(tmp_path):
    mix(tmp_path, partners="matched")
    for entry in read_labels(tmp_path)["mixes"]:
        assert len({source["label"] for source in entry["sources"]}) == 2


def test_the_contact_sheet_shows_eight_mixes(tmp_path, monkeypatch):
    shown = []

    def sheet(panels):
        shown.extend(panels)
        return contact_sheet(panels[:1])

    from supermix_transforms.plots import contact_sheet

    monkeypatch.setattr("supermix_transforms.demo.contact_sheet", sheet)
    mix(tmp_path, colours(12), k=(2, 3), batch_size=3)
    assert [len(panel.names) for panel in shown] == [2] * 4 + [3] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "k: expected an integer of at least 2"),
        ({"k": ()}, "k: expected at least one number of images a mix, got none"),
        ({"alpha": -1.0}, "alpha: expected a positive number"),
        ({"partners": "best"}, "partners: expected .* got 'best'"),
        ({"count": 0}, "count: expected at least 1 mix, or None, got 0"),
        ({"k": (2, 4), "batch_size": 3}, "batch_size: expected at least k = 4 pictures, got 3"),
        ({"k": 7}, "images: expected at least k = 7 pictures, got 6. Pass more pictures"),
        ({"pictures": []}, "images: expected at least k = 2 pictures, got 0"),
        (
            {"pictures": colours(2) + colours(2, 9)},
            r"of one size, got torch.uint8 \(3, 24, 24\), torch.uint8 \(3, 9, 9\). Resize",
        ),
        (
            {"pictures": [(name, picture / 255) for name, picture in colours(3)]},
            "expected uint8 pictures",
        ),
        (
            {"partners": "matched", "teacher": TeacherLabeler(lambda x: x.mean(dim=(2, 3)))},
            'partners="matched": expected a teacher whose logits are linear',
        ),
        (
            {"settings": SolverSettings(mask_size=25)},
            "mask_size: expected at most 24 cells for pictures of 24 x 24, got 25",
        ),
    ],
)
def test_bad_input_says_what_was_expected(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        mix(tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_an_output_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out: expected a folder, got the file"):
        mix(tmp_path / "file")


def test_labels_of_an_earlier_run_do_not_outlive_its_pictures(tmp_path):
    mix(tmp_path)
    assert (tmp_path / "labels.json").is_file()
    odd = ("odd", torch.zeros(3, 5, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="of one size"):
        mix(tmp_path, [*colours(6), odd], seed=1, batch_size=3)
    assert (tmp_path / "k2-00000.png").is_file()
    assert not (tmp_path / "labels.json").exists()


def test_a_link_in_the_output_folder_is_replaced_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "labels.json").symlink_to(outside)
    mix(tmp_path / "out", count=1)
    assert outside.read_text() == "mine"
    assert read_labels(tmp_path / "out")["mixes"]


def test_the_summary_is_a_table_with_a_row_for_each_k(tmp_path, capsys):
    print_summary(mix(tmp_path, k=(2, 3)))
    shown, errors = capsys.readouterr()
    assert shown.split()[:8] == [
        *("k", "mixes", "converged", "L_s", "steps", "forwards", "backwards", "ms/picture"),
    ]
    rows = [line.split() for line in shown.splitlines() if len(line.split()) == 8][1:]
    assert [row[:3] for row in rows] == [["2", "6", "100%"], ["3", "6", "100%"]]
    assert str(tmp_path / "contact-sheet.png") in shown
    assert errors == ""  # no progress where there is no terminal


# -- teachers by name ------------------------------------------------------------------------------


def test_a_named_teacher_keeps_its_normalisation_unless_told_otherwise():
    named = NamedTeacher(lambda images: images.mean(dim=(2, 3)), (0.5,) * 3, (0.25,) * 3, 8)
    images = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    assert named_labeler(named).logits(images).tolist() == [[2.0] * 3]
    other = named_labeler(named, mean=(0.0,) * 3, std=(0.5,) * 3)
    assert other.logits(images).tolist() == [[2.0] * 3]
    assert named_labeler(named, mean=(0.0,), std=(1.0,)).logits(images).tolist() == [[1.0] * 3]


def test_mean_without_std_is_an_error():
    named = NamedTeacher(lambda images: images, (0.5,) * 3, (0.5,) * 3, 8)
    with pytest.raises(ValueError, match="expected mean and std together"):
        named_labeler(named, mean=(0.5,) * 3)


def test_a_teacher_that_can_not_be_called_is_an_error():
    with pytest.raises(ValueError, match="teacher: expected a module or a callable, got dict"):
        named_labeler(NamedTeacher({}))


def test_demo_pictures_come_from_the_package_without_a_download():
    pictures = demo_pictures(32)
    assert [name for name, _ in pictures] == list(DEMO_FILES)
    assert all(picture.shape == (3, 32, 32) for _, picture in pictures)


def test_missing_scikit_image_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ImportError, match=r'pip install "supermix-transforms\[demo\]"'):
        demo_pictures()


@pytest.mark.slow
def test_demo_mixes_packaged_pictures_with_the_packaged_teacher(tmp_path):
    summary = demo(tmp_path)
    assert [(row.k, row.mixes) for row in summary.rows] == [(2, 5), (3, 5)]
    assert sum(row.converged for row in summary.rows) >= 9
    assert [row.sparsity <= limit for row, limit in zip(summary.rows, (0.071, 0.101), strict=True)]
    names = {
        "chelsea.png": "tiger cat",
        "coffee.png": "espresso",
        "rocket.jpg": "missile",
        "motorcycle_left.png": "moped",
        "camera.png": "tripod",
    }
    for entry in read_labels(tmp_path)["mixes"]:
        for source in entry["sources"]:
            assert source["class"] == names[source["name"]]
        if entry["outcome"] == "converged":
            top = {seen["label"] for seen in entry["teacher"][: entry["k"]]}
            assert top == {source["label"] for source in entry["sources"]}
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.width > 900
        assert sheet.height > 2000


def test_a_name_that_is_no_utf_8_is_written_as_well_as_it_can_be(tmp_path):
    (_, first), *rest = colours(6)
    mix(tmp_path, [("caf\udce9", first), *rest])
    names = {
        source["name"] for entry in read_labels(tmp_path)["mixes"] for source in entry["sources"]
    }
    assert "caf?" in names
