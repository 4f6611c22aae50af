"""Result folders as one HTML page that needs nothing else: figures, tables, an answer, a tree.

`eval/report.py` is its command line. Known results are those of `eval/speedup.py`,
`eval/bench.py` and `eval/compare.py`; of others their plain figures are listed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.resources import files as package_files
from pathlib import Path
from shlex import join
from typing import Any

from adaspec_eagle.callbacks import say
from adaspec_eagle.compare_tables import UNEQUAL, contrast_text, task_rows, tex
from adaspec_eagle.errors import UserError
from adaspec_eagle.plots import (
    Drawing,
    drawings,
    export,
    forest_drawings,
    svg,
    training_drawings,
    tree_drawing,
)
from adaspec_eagle.record import with_interval
from adaspec_eagle.speed_tables import figure_rows, matched_with
from adaspec_eagle.storage import read_json
from adaspec_eagle.suite_tables import TableData, suite_tables

Figures = dict[str, Any]
CITATIONS = """\
@article{hu2025adaspec,
  title   = {AdaSPEC: Selective Knowledge Distillation for Efficient Speculative Decoders},
  author  = {Hu, Yuezhou and others},
  journal = {arXiv preprint arXiv:2510.19779},
  year    = {2025}
}
@article{li2025eagle3,
  title   = {EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test},
  author  = {Li, Yuhui and Wei, Fangyun and Zhang, Chao and Zhang, Hongyang},
  journal = {arXiv preprint arXiv:2503.01840},
  year    = {2025}
}
@software{adaspec_eagle,
  title  = {adaspec\\_eagle: selectively distilled draft heads for Hugging Face models},
  author = {{adaspec\\_eagle developers}},
  year   = {2026}
}
"""  # noqa: E501 - titles stay whole


@dataclass
class Page:
    """The page as it grows: sections, figures by their unique names, entries of the contents."""

    parts: list[str] = field(default_factory=list)
    figures: dict[str, Drawing] = field(default_factory=dict)
    contents: list[tuple[str, str]] = field(default_factory=list)  # id, heading
    files: set[Path] = field(default_factory=set)  # that are on the page
    views: list[tuple[str, Figures]] = field(default_factory=list)  # measurements, for LaTeX

    def section(self, heading: str, about: str = "") -> str:
        """Begin a section; gives its id."""
        name = f"s{len(self.contents) + 1}"
        self.contents.append((name, heading))
        self.parts.append(f'<h2 id="{name}">{escape(heading)}</h2>')
        if about:
            self.parts.append(f'<p class="muted">{escape(about)}</p>')
        return name

    def card(self, drawing: Drawing, owner: str) -> str:
        """A figure with heading and caption, to be put into the page."""
        name = f"{owner}-{drawing.name}"
        self.figures[name] = drawing
        return (
            f'<figure class="card"><h3>{escape(drawing.title)}</h3>{svg(drawing, name)}'
            f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
        )

    def grid(self, chosen: Sequence[Drawing], owner: str) -> None:
        """Figures side by side."""
        cards = "".join(self.card(drawing, owner) for drawing in chosen)
        self.parts.append(f'<div class="grid">{cards}</div>')

    def add(self, *html: str) -> None:
        """Append finished HTML."""
        self.parts.extend(html)


def write_report(folders: Sequence[Path], figures: Path | None = None) -> str:
    """The page about these folders; with `figures` also each drawing as PNG and PDF there.

    A folder holds a result.json, a comparison's summaries or cells, or a head's train.json
    (itself, or in `head` and `reference`).
    Of several, those with none of them are named and left out. Raises UserError where no folder has
    one, for a folder that is not there, and for a record that is damaged.
    """
    page = Page()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
    held = [
        (
            folder,
            [path for path in result_files(folder) if path.is_file()],
            sorted((folder / "cells").rglob("*.json")),
        )
        for folder in folders
    ]
    empty = [str(folder) for folder, found, cells in held if not found and not cells]
    if empty:
        what = f"{', '.join(empty)}: no result.json and no head with a train.json"
        if len(empty) == len(folders):
            raise UserError(what)
        say(f"left out, {what}")
    for folder, found, cells in held:
        for path in found:
            try:
                add_file(page, path)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                why = f"{path} is damaged or of another version of this program ({error!r})"
                raise UserError(f"{why}: measure again, or leave it out") from error
        if cells:
            add_cells(page, folder, cells)
    page.section("To cite and to paste")
    if page.views:
        page.add(cite_card("latex", "LaTeX (booktabs)", latex(page.views)))
    page.add(cite_card("bibtex", "BibTeX", CITATIONS))
    if figures:
        for name, drawing in page.figures.items():
            export(drawing, figures, name)
    return document(page)


def result_files(folder: Path) -> list[Path]:
    """What a folder may hold, in the order of the page."""
    heads = [folder / stage / "train.json" for stage in ("", "reference", "head")]
    return [
        folder / "result.json",
        *sorted(folder.glob("summary-*.json"), key=lambda path: path.stem),
        *heads,
    ]


def add_file(page: Page, path: Path) -> None:
    """One section (a suite: one for each temperature) about one file; each file once."""
    if path.resolve() in page.files:
        return
    page.files.add(path.resolve())
    result, name = read_json(path), path.parent.as_posix()
    if path.name == "train.json":
        add_training(page, f"Training of {name}", result)
    elif result.get("kind") in ("speedup", "bench"):
        add_measurement(page, name, result)
    elif result.get("kind") == "compare":
        add_comparison(page, name, result)
    else:
        add_unknown(page, name, result)


# ---- measurements --------------------------------------------------------------------------------


def views_of(result: Figures) -> list[tuple[str, Figures]]:
    """(addition to the heading, figures in the form of a speed-up result) of a measurement."""
    if result["kind"] == "speedup":
        heat = result.get("temperature")  # of old records none: they are greedy
        return [(f", at temperature {heat:g}" if heat else "", result)]
    return [
        (f", {result['suite']} at temperature {run['temperature']:g}", result | run)
        for run in result["runs"]
    ]


def add_measurement(page: Page, name: str, result: Figures) -> None:
    """Everything about one result of speedup.py or bench.py."""
    tables = suite_tables(result) if result["kind"] == "bench" else [None] * len(views_of(result))
    traces = result.get("traces", {})  # of the same prompt for all: shown once
    for (more, view), data in zip(views_of(result), tables, strict=True):
        owner = page.section(name + more, _where(view))
        page.views.append((name + more, view))
        page.add(tiles(view), f'<p class="headline">{escape(view["headline"]["sentence"])}</p>')
        page.grid(drawings(view), owner)
        add_traces(page, owner, traces)
        traces = {}
        page.add(card("All arms", table(arms_data(view))))
        if data:
            page.add(card(data.title, table(data)))
        elif len(view["files"]) > 1:
            page.add(card("By set of prompts", table(files_data(view))))
    page.add(card("How it was run", run_facts(result)))
    notes = Path(result["head"]["folder"]) / "train.json"
    if notes.is_file():
        add_file(page, notes)


def _where(view: Figures) -> str:
    prompts = sum(source["prompts"] for source in view["prompts"])
    place, target = view["environment"], view["target"]
    machine = place["cuda"] or f"{place['cpu']}, {place['threads']} threads"
    facts = [f"target {target['name']}", f"head {view['head']['folder']}", target["dtype"], machine]
    facts += [f"{prompts} prompts", f"{view['arguments']['max_new_tokens']} new tokens at most"]
    return ", ".join([*facts, view["created"][:10]])


def tiles(view: Figures) -> str:
    """The three figures that matter most, large."""
    best = view["headline"]
    arm = view["arms"][best["arm"]]
    low, high = best["ci95"]
    bounds = f" ({low:.2f} to {high:.2f})" if low < high else ""  # of one prompt there is none
    reference = matched_with(view)
    shown = [
        (f"{best['speedup']:.2f} ×", f"over {best['over']}{bounds}"),
        (f"{arm['tokens_per_s']:.1f}", "tokens/s, end to end"),
        (f"{arm['tau']:.2f}", "tokens a round (tau)"),
        (f"{arm['matched']}/{arm['total']}", f"answers equal to {reference}'s"),
    ]  # fmt: skip
    cells = (f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in shown)
    return f'<div class="tiles">{"".join(cells)}</div>'


def arms_data(view: Figures) -> TableData:
    """One row an arm, one column a figure."""
    figures = figure_rows(view)
    header = ["arm", "draft", *(label for label, *_ in figures)]
    rows = [
        [key, arm["shape"] or "-", *(cells[place] for _, *cells in figures)]
        for place, (key, arm) in enumerate(view["arms"].items())
    ]
    lacking = view.get("baselines", {}).items()
    rows += [[key, f"lacks {facts['lacks']}"] for key, facts in lacking if facts.get("lacks")]
    note = "Brackets: 95 % bootstrap intervals over prompts. Definitions stand below."
    return TableData("", header, rows, note)


def files_data(view: Figures) -> TableData:
    """One row a set of prompts, one column a drafting arm and figure."""
    drafting = [key for key, arm in view["arms"].items() if arm["shape"]]
    header = ["prompts", "n", "generate tokens/s"]
    for key in drafting:
        header += [f"{key}: over generate", "over loop", "tau"]
    rows = []
    for name, one in view["files"].items():
        row = [Path(name).name, str(one["prompts"])]
        row.append(f"{one['arms']['generate']['tokens_per_s']:.1f}")
        for key in drafting:
            arm = one["arms"][key]
            fields = ("speedup_vs_generate", "speedup_vs_loop", "tau")
            row += [f"{arm[field]:.2f}" for field in fields]
        rows.append(row)
    return TableData("", header, rows, "Speed-ups are ratios of sums over the set's prompts.")


def add_traces(page: Page, owner: str, traces: Figures) -> None:
    """An answer with its drafted tokens in colour and a tree, for each arm that was traced."""
    for key, one in traces.items():
        pieces = "".join(
            f"<mark>{escape(text)}</mark>" if drafted else escape(text)
            for text, drafted in one["pieces"]
        )
        note = (
            f"Arm {key} on prompt {one['prompt']} (the first one, not shown), greedy, "
            f"tau {one['tau']:.2f}. "
        )
        legend = "<mark>Drafted by the head and accepted</mark>; the rest is the target's own."
        body = f'<p class="answer">{pieces}</p><p class="key">{escape(note)}{legend}</p>'
        page.add(card(f"An answer: {key}", body))
        drawing = tree_drawing(key, one)
        if drawing:
            width = drawing.size[0] * 96
            sizes = f"--least: {0.8 * width:.0f}px; --most: {1.1 * width:.0f}px"
            figure = page.card(drawing, owner)
            page.add(figure.replace('"card"', f'"card wide scroll" style="{sizes}"', 1))


def run_facts(result: Figures) -> str:
    """Command, versions, commit, machine, hashes, definitions."""
    place = result["environment"]
    git = place["git"] or {"commit": "unknown", "dirty": False}
    packages = ", ".join(f"{name} {version}" for name, version in place["packages"].items())
    facts = {
        "command": f"python {join(place['argv'])}",
        "created": result["created"],
        "commit": git["commit"] + (", with local changes" if git["dirty"] else ""),
        "machine": f"{place['cuda'] or place['cpu']}, {place['threads']} threads of "
        f"{place['cores']} cores, {place['platform']}",
        "packages": f"Python {place['python']}, {packages}",
        "target": f"{result['target']['name']}, weights {result['target']['fingerprint']}, "
        f"{result['target']['dtype']} on {result['target']['device']}",
        "head": f"{result['head']['folder']}, sha256 {result['head']['sha256']}",
        "seed": str(result["arguments"].get("seed")),
    }
    prompts = TableData(
        "",
        ["prompts", "n", "sha256"],
        [[one["file"], str(one["prompts"]), one["sha256"][:16]] for one in result["prompts"]],
        "The first 16 digits of each file's hash; per prompt, ids and hashes are in result.json.",
    )
    meanings = definition_list(result.get("definitions", {}))
    return (
        f"{definition_list(facts)}<details><summary>Prompts</summary>{table(prompts)}</details>"
        f"<details><summary>Definitions</summary>{meanings}</details>"
    )


# ---- training, and what is not known -------------------------------------------------------------


def add_training(page: Page, name: str, notes: Figures) -> None:
    """Curves and settings of a train.json."""
    owner = page.section(name, "How the head was trained.")
    page.grid(training_drawings(notes), owner)
    objective, data = notes.get("objective", {}), notes.get("data", {})
    facts = {
        "stage": notes.get("stage"),
        "objective": ", ".join(f"{key} {value}" for key, value in objective.items()),
    }
    if {"records", "answer_tokens"} <= data.keys():
        facts["data"] = f"{data['records']:,} records, {data['answer_tokens']:,} answer tokens"
    if {"answer_token_passes", "steps"} <= notes.keys():
        passes, steps = notes["answer_token_passes"], notes["steps"]
        facts["passes"] = f"{passes:,} answer tokens in {steps:,} steps"
    if {"best_tau_sim", "best_step"} <= notes.keys():
        facts["best tau_sim"] = f"{notes['best_tau_sim']:.3f} at step {notes['best_step']}"
    settings = definition_list({k: json.dumps(v) for k, v in notes.get("config", {}).items()})
    body = definition_list({key: value for key, value in facts.items() if value})
    body += f"<details><summary>Settings</summary>{settings}</details>"
    page.add(card("What it learnt from", body))


def add_comparison(page: Page, name: str, found: Figures) -> None:
    """The summary of `eval/compare.py`: differences drawn, a table a task."""
    about = (
        f"Arms trained on {found['budget']} epochs and compared. {contrast_text(found)} * holds; "
        f"† {UNEQUAL}."
    )
    other = "" if found["primary"][0] else f", against {found['baseline']}"
    owner = page.section(name + other, about)
    page.grid(forest_drawings(found), owner)
    for task, arms in found["tasks"].items():
        page.add(card(task, table(TableData("", *task_rows(arms), ""))))
    page.add(card("Definitions", definition_list(found["definitions"])))


def add_unknown(page: Page, name: str, result: Figures) -> None:
    """The plain figures of a result that this page has no form for."""
    kind = result.get("kind", "no kind")
    page.section(name, f"A result of another kind ({kind}): its plain figures.")
    page.add(card("Figures", definition_list({k: v for k, v in result.items() if _plain(v)})))
    for key, value in result.items():
        data = plain_table(value)
        if data:
            page.add(card(key, table(data)))


def add_cells(page: Page, folder: Path, cells: Sequence[Path]) -> None:
    """The cells of `eval/compare.py`, one row each."""
    page.section(f"{folder.as_posix()}: cells", f"{len(cells)} training runs, each measured.")
    rows = {}
    for path in cells:
        cell = read_json(path)
        rows[path.relative_to(folder / "cells").as_posix()] = cell | cell.get("figures", {})
    data = plain_table(rows)
    if data:
        page.add(card("All cells", table(data)))


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def plain_table(value: Any) -> TableData | None:
    """A dict of dicts, or a list of them, as rows of their plain fields; None for anything else."""
    if not isinstance(value, dict | list) or not value:
        return None
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    rows = [(str(key), one) for key, one in items if isinstance(one, dict)]
    fields = list(dict.fromkeys(k for _, one in rows for k, v in one.items() if _plain(v)))
    if len(rows) != len(value) or not fields:
        return None
    cells = [[key, *(_short(one.get(name, "")) for name in fields)] for key, one in rows]
    return TableData("", ["", *fields], cells, "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value) if _plain(value) else ""


# ---- pieces of HTML ------------------------------------------------------------------------------


def card(heading: str, body: str) -> str:
    """A panel."""
    return f'<section class="card"><h3>{escape(heading)}</h3>{body}</section>'


def definition_list(facts: Figures) -> str:
    """Names and values."""
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    return f"<dl>{rows}</dl>"


def table(data: TableData) -> str:
    """A table that sorts by the column whose head is pressed; words to the left."""
    width = len(data.header)
    rows = [row + [""] * (width - len(row)) for row in data.rows]
    words = [_is_text([row[n] for row in rows]) for n in range(width)]
    kinds = [' class="text"' if word else "" for word in words]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{escape(name)}</button></th>'
        for name, kind in zip(data.header, kinds, strict=True)
    )
    body = "".join(
        f"<tr{_theirs(row)}>"
        + "".join(f"<td{kind}>{escape(c)}</td>" for c, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    note = f'<p class="note">{escape(data.note)}</p>' if data.note else ""
    frame = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{frame}</div>{note}'


def _theirs(row: list[str]) -> str:
    return ' class="theirs"' if row[0] == "published" else ""


def _is_text(cells: list[str]) -> bool:
    firsts = [cell.lstrip("+-")[:1] for cell in cells]
    return not any(first.isdigit() or first == "." for first in firsts)


def latex(page_views: Sequence[tuple[str, Figures]]) -> str:
    """A booktabs table of all measured arms."""
    lines = [r"\begin{tabular}{llrrr}", r"\toprule"]
    lines.append(r"method & draft & tokens/s & speed-up & $\tau$ \\")
    for name, view in page_views:
        base = view["headline"]["over"]
        lines.append(r"\midrule")
        lines.append(rf"\multicolumn{{5}}{{l}}{{{tex(name)}, over \texttt{{{base}}}}} \\")
        for key, arm in view["arms"].items():
            speed, gain, tau = (
                with_interval(arm[name], arm[f"{name}_ci95"], digits)
                for name, digits in (("tokens_per_s", 1), (f"speedup_vs_{base}", 2), ("tau", 2))
            )
            shape = tex(arm["shape"] or "--")
            lines.append(rf"{tex(key)} & {shape} & {speed} & {gain} & {tau} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def cite_card(name: str, heading: str, text: str) -> str:
    """A block of text with a button that copies it."""
    button = f'<button type="button" data-copy="{name}">Copy</button>'
    top = f'<div class="cite"><h3>{escape(heading)}</h3>{button}</div>'
    return f'<section class="card">{top}<pre id="{name}">{escape(text)}</pre></section>'


def document(page: Page) -> str:
    """The whole HTML text."""
    css, js = (
        (package_files("adaspec_eagle") / f"report.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js")
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += "script-src 'unsafe-inline'"
    links = "".join(f'<li><a href="#{n}">{escape(text)}</a></li>' for n, text in page.contents)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>Draft heads, measured</title>
<style>
{css}</style>
</head>
<body>
<header><div><h1>Draft heads, measured</h1>
<p class="muted">Speculative decoding with draft heads: what it brings, and with what certainty.</p>
<nav aria-label="Contents"><ul>{links}</ul></nav></div>
<button type="button" id="theme">Light or dark</button></header>
<main>
{"".join(page.parts)}
</main>
<footer>Written {made} by eval/report.py of adaspec_eagle.</footer>
<script>
{js}</script>
</body>
</html>
"""
