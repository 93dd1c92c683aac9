"""The page of a run: what is on it, and that it asks nothing of anybody."""

import html
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from colours import colour_teacher
from tars import write_colours
from torchvision.transforms import v2

from supermix_transforms import ShardDataset, TeacherLabeler, generate
from supermix_transforms.cli import main
from supermix_transforms.commands.report import report
from supermix_transforms.demo import mix_pictures

HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}"


class Parsed(HTMLParser):
    """Tags, their attributes, and the text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def parsed(path) -> Parsed:
    page = Parsed(path.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    for _, attributes in page.tags:
        assert all(value.startswith("data:") for name, value in attributes.items() if name == "src")
        assert "href" not in attributes
    policy = next(values for tag, values in page.tags if "http-equiv" in values)
    assert policy["content"].startswith("default-src 'none'")
    return page


def images(page: Parsed) -> list[str]:
    return [values["alt"] for tag, values in page.tags if tag == "img"]


@pytest.fixture
def mixed(tmp_path):
    """A folder of mixes whose names do their worst."""
    pictures = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    for number in range(4):
        pictures[number, number % 3] = 200 - number
    named = [(f"{HOSTILE}{number}", picture) for number, picture in enumerate(pictures)]
    mix_pictures(
        named,
        TeacherLabeler(colour_teacher()),
        out=tmp_path / "mixes",
        name=HOSTILE,
        class_names=[HOSTILE, "green", "blue", "dark"],
        batch_size=4,
    )
    return tmp_path / "mixes"


@pytest.fixture
def recipes(tmp_path):
    write_colours(tmp_path)
    dataset = ShardDataset(tmp_path, transform=v2.RandomCrop(16))
    generate(dataset, colour_teacher(), tmp_path / "recipes", batch_size=6, unit_batches=2)
    return tmp_path / "recipes"


def test_a_page_of_mixes_shows_what_names_say_and_does_not_obey_them(mixed):
    path = report(mixed)
    assert path == mixed / "report.html"
    page = parsed(path)
    assert HOSTILE in page.text
    assert html.escape(HOSTILE, quote=False)[:20] in path.read_text()
    assert "49" not in re.sub(r"[0-9.]{4,}", "", page.text)  # nothing in a name is a template
    assert "4 mixes in mixes" in page.text
    assert len(images(page)) == 3
    assert "converged" in page.text


def test_a_page_of_recipes_shows_steps_labels_and_settings(recipes, tmp_path):
    path = report(recipes, tmp_path / "elsewhere.html")
    assert not (recipes / "report.html").exists()
    page = parsed(path)
    assert "22 mixes in recipes" in page.text
    assert images(page) == ["steps of the search", "the teacher's labels"]
    for word in ("CONVERGED", "bytes a mix", "partner_cap", "versions that wrote it", "grid"):
        assert word in page.text


def test_a_page_of_mixed_shards_needs_no_recipes(tmp_path):
    write_colours(tmp_path)
    dataset = ShardDataset(tmp_path, transform=v2.RandomCrop(16))
    generate(dataset, colour_teacher(), tmp_path / "out", form="shards", batch_size=6)
    page = parsed(report(tmp_path / "out"))
    assert images(page) == []
    assert "22 mixes in out" in page.text


def test_a_page_of_a_student_shows_curves_and_results(tmp_path):
    history = [{"epoch": n, "loss": 3.0 - n, "top1": 0.1 * n, "top5": 0.2 * n} for n in range(3)]
    (tmp_path / "history.json").write_text(json.dumps(history))
    page = parsed(report(tmp_path))
    assert "supermix distill: 3 epochs, not finished" in page.text
    results = {"top1": 0.2, "teacher_calls": 3628.0, "settings": {"lr": 0.1, "mix": HOSTILE}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = parsed(report(tmp_path))
    assert "not finished" not in page.text
    assert "3,628" in page.text
    assert HOSTILE in page.text
    assert images(page) == ["loss and validation"]


def test_a_run_that_is_not_whole_says_so(recipes):
    last = sorted(recipes.glob("*.recipe"))[-1]
    manifest = (recipes / "manifest.jsonl").read_text().splitlines(keepends=True)
    (recipes / "manifest.jsonl").write_text(
        "".join(line for line in manifest if last.name not in line)
    )
    assert "1 of 2 units are there" in parsed(report(recipes)).text


def test_a_run_that_has_just_begun_has_a_page(recipes):
    (recipes / "manifest.jsonl").write_text("")
    page = parsed(report(recipes))
    assert "0 of 2 units are there" in page.text
    assert images(page) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "holds none of history.json, labels.json, settings.json"),
        ("history.json", "nonsense", "a file holds something else"),
        ("history.json", "{}", "expected at least one epoch"),
        ("labels.json", "[]", "a file holds something else"),
        ("labels.json", '{"mixes": [{}]}', "a file holds something else"),
    ],
)
def test_other_folders_are_errors(tmp_path, name, content, message):
    if name is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_command_says_where_the_page_is(recipes, tmp_path, capsys):
    assert main(["report", str(recipes), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(recipes / "report.html")}
    out = tmp_path / "page.html"
    assert main(["report", str(recipes), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "report: expected a folder of" in capsys.readouterr().err
