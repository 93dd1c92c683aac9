"""One HTML page of what a command made: pictures, distributions, curves, settings.

It holds all that it shows, asks nothing of any network, and is readable in light and dark, on a
narrow screen and on paper.
"""

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from supermix_transforms.charts import histogram, training_curves
from supermix_transforms.commands.environment import environment
from supermix_transforms.files import write_atomically
from supermix_transforms.offline.inspection import inspect_mixes
from supermix_transforms.offline.ledger import Ledger
from supermix_transforms.offline.reading import open_unit
from supermix_transforms.offline.recipes import Group
from supermix_transforms.results import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["report"]

MIXES_AT_MOST = 100_000  # of recipes, that are looked at
KINDS = "a folder of `supermix demo`, mix, replay, generate or distill"
TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --faint: #777; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p.about { color: var(--faint); margin-top: .2rem; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; max-width: 100%; }
figure img { background: #fff; border-radius: 6px; max-width: 100%; height: auto; display: block; }
figcaption { color: var(--faint); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem 1rem .2rem 0; text-align: left;
         vertical-align: top; }
td { overflow-wrap: anywhere; }
th { white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
<p class="about">{{ page.about }}</p>
{% if page.figures %}
<div class="figures">
{% for caption, source in page.figures %}
<figure><img src="{{ source }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% for title, rows in page.tables.items() %}
<h2>{{ title }}</h2>
<div class="scroll"><table>
{% for name, value in rows %}
<tr><th scope="row">{{ name }}</th><td class="number">{{ value }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
</body>
</html>
"""


@dataclass
class _Page:
    """What is shown, as text: the template escapes it."""

    title: str
    about: str
    figures: list[tuple[str, str]] = field(default_factory=list)  # caption, data URI
    tables: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def draw(self, caption: str, figure: "Figure") -> None:
        content = io.BytesIO()
        figure.savefig(content, format="svg")
        self.figures.append((caption, _data_uri("image/svg+xml", content.getvalue())))

    def table(self, title: str, rows: Mapping[str, Any]) -> None:
        if rows:
            self.tables[title] = [(name, _text(value)) for name, value in rows.items()]


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: a folder that `supermix demo`, `mix`, `replay`, `generate` or `distill` wrote.
        out: the page; None is ``report.html`` in the folder.

    Returns:
        The page's path.

    Raises:
        ValueError: for another folder, or one that is damaged.
        ImportError: if matplotlib is not installed.
    """
    from jinja2 import Environment

    folder = Path(run)
    kinds: dict[str, Callable[[Path], _Page]] = {
        "history.json": _of_distill,
        "labels.json": _of_mixes,
        "settings.json": _of_generate,
    }
    make = next((make for name, make in kinds.items() if (folder / name).is_file()), None)
    if make is None:
        raise ValueError(
            f"report: expected {KINDS}, got {str(run)!r}, which holds none of {', '.join(kinds)}."
        )
    try:
        page = make(folder)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"report: expected {KINDS}, got {str(run)!r}, of which a file holds something else: "
            f"{type(error).__name__} {error}. Run that command again."
        ) from error
    page.table("made with", environment())
    html = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE).render(page=page)
    path = folder / "report.html" if out is None else Path(out)
    write_atomically(path, html.encode())
    return path


# -- the kinds of runs -----------------------------------------------------------------------------


def _of_mixes(folder: Path) -> _Page:
    content = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    mixes = content.pop("mixes")
    made = f"supermix mix: {content['teacher']}" if "teacher" in content else "supermix replay"
    page = _Page(f"{len(mixes)} mixes in {folder.name}", made)
    sheet = folder / "contact-sheet.png"
    if sheet.is_file():
        uri = _data_uri("image/png", sheet.read_bytes())
        page.figures.append(("what was mixed, under which masks, and what the teacher sees", uri))
    _steps_of(page, [mix["steps"] for mix in mixes])
    if all("teacher" in mix for mix in mixes):
        likeliest = [seen["probability"] for mix in mixes for seen in mix["teacher"][:1]]
        page.draw("the likeliest class", histogram({"mixes": likeliest}, label="probability"))
    page.table("outcomes", _counted(mix["outcome"] for mix in mixes))
    page.table("settings", _flat(content))
    return page


def _of_generate(folder: Path) -> _Page:
    inspection = inspect_mixes(folder)
    page = _Page(
        f"{inspection.mixes:,} mixes in {folder.name}",
        f"supermix generate: {inspection.form}, {inspection.finished} of {inspection.units} units",
    )
    page.table("problems", {str(n): text for n, text in enumerate(inspection.problems, 1)})
    groups = list(_groups(Ledger(folder))) if inspection.form == "recipes" else []
    if groups:
        outcomes = np.concatenate([group.outcome for group in groups])
        _steps_of(page, np.concatenate([group.steps for group in groups]).tolist())
        entropies = {
            "mixes": [_entropy(group.log_prob, group.rest) for group in groups],
            "originals": [
                _entropy(group.original_log_prob, group.original_rest) for group in groups
            ],
        }
        drawn = {name: np.concatenate(parts).tolist() for name, parts in entropies.items()}
        page.draw("the teacher's labels", histogram(drawn, label="entropy of the stored, nats"))
        page.table("outcomes", _counted(Outcome(int(value)).name for value in outcomes))
    share = inspection.converged / max(1, inspection.mixes)
    figures = {"mixes": inspection.mixes, "converged": f"{share:.1%}", "bytes": inspection.bytes}
    page.table("in all", figures)
    each = {name: f"{value:.1f}" for name, value in inspection.bytes_by_field.items()}
    page.table("bytes a mix", each)
    page.table("settings", _flat(inspection.settings))
    page.table("versions that wrote it", inspection.versions)
    return page


def _of_distill(folder: Path) -> _Page:
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    page = _Page(f"A student in {folder.name}", f"supermix distill: {len(history)} epochs")
    page.draw("loss and validation", training_curves(history))
    path = folder / "results.json"
    if not path.is_file():
        page.about += ", not finished"
        page.table("last epoch", history[-1])
        return page
    results = json.loads(path.read_text(encoding="utf-8"))
    settings = results.pop("settings")
    page.table("results", _flat(results))
    page.table("settings", _flat(settings))
    return page


# -- parts -----------------------------------------------------------------------------------------


def _steps_of(page: _Page, steps: Sequence[float]) -> None:
    page.draw("steps of the search", histogram({"mixes": steps}, label="steps"))


def _groups(ledger: Ledger) -> Iterable[Group]:
    """Groups of recipes, until enough mixes are seen."""
    seen = 0
    for _, entry in sorted(ledger.entries().items()):
        try:
            reader = open_unit(ledger.path(entry))
        except ValueError:
            continue  # it is among the problems
        for number in range(len(reader)):
            if seen < MIXES_AT_MOST:
                group = reader.group(number)
                seen += len(group.outcome)
                yield group


def _entropy(log_prob: Any, rest: Any) -> Any:
    """Of stored labels (M, n), in nats, what was left out as one class; (M,)."""
    logs, rest = log_prob.astype(np.float64), rest.astype(np.float64)
    left = np.where(rest > 0, -rest * np.log(np.maximum(rest, 1e-12)), 0)
    return -(np.exp(logs) * logs).sum(axis=1) + left


def _counted(names: Iterable[str]) -> dict[str, str]:
    found, counts = np.unique(list(names), return_counts=True)
    return {
        str(name): f"{count:,} ({count / counts.sum():.1%})"
        for name, count in zip(found, counts, strict=True)
    }


def _flat(content: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Nested objects with their names joined by a dot."""
    rows: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            rows |= _flat(value, f"{start}{name}.")
        else:
            rows[f"{start}{name}"] = value
    return rows


def _text(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.6g}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:,.0f}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
