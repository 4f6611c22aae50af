"""Tables of a suite in the layout that its field knows, with published figures beside ours.

EAGLE-3's Table 1 (speed-up / tau by set), Spec-Bench's leaderboard (speed-up by category), and
AdaSPEC's Table 1 (greedy alpha by task).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files as package_files
from typing import Any

from adaspec_eagle.record import with_interval
from adaspec_eagle.suites import SUITES

IN_MEAN = ("mt_bench", "humaneval", "gsm8k", "alpaca", "sum")  # the five of EAGLE-3's Table 1
Figures = dict[str, Any]


@dataclass(frozen=True)
class TableData:
    """A table for any medium; published rows begin with "published"."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str


def published(suite: str) -> Figures:
    """What papers report on a suite, with source and hardware (published_figures.json)."""
    text = (package_files("adaspec_eagle") / "published_figures.json").read_text(encoding="utf-8")
    return json.loads(text)[suite]


def suite_tables(result: Figures) -> list[TableData]:
    """One table for each temperature of an `eval/bench.py` result."""
    return [LAYOUTS[result["suite"]](result, run) for run in result["runs"]]


def _layout(
    result: Figures,
    run: Figures,
    columns: dict[str, str],
    rows: list[list[str]],
    cell: Callable[[Any], str],
    note: str,
) -> TableData:
    """Our rows, then the published ones of the same temperature."""
    facts, heat = published(result["suite"]), run["temperature"]
    theirs = [
        [
            "published",
            row["method"],
            row["target"],
            row.get("hardware", facts.get("hardware", "")),
            *(cell(row["sets"].get(name)) for name in columns),
        ]
        for row in facts["rows"]
        if row["temperature"] == heat
    ]
    prompts = sum(source["prompts"] for source in result["prompts"])
    title = f"{SUITES[result['suite']].title}, temperature {heat:g}, {prompts} prompts"
    header = ["", "method", "target", "hardware", *columns.values()]
    source = f" Published: {facts['source']}; {facts['cells']}." if theirs else ""
    length = f" {result['arguments']['max_new_tokens']} new tokens a turn at most."
    return TableData(title, header, rows + theirs, note + length + source)


def _who(result: Figures, method: str) -> list[str]:
    """The first four cells of a row of ours."""
    where, dtype = result["environment"], result["target"]["dtype"]
    machine = where["cuda"] or f"{where['cpu']}, {where['threads']} threads"
    return ["here", method, result["target"]["name"], f"{machine}, {dtype}"]


def _method(result: Figures, key: str, arm: Figures) -> str:
    if not arm["shape"]:
        return {"generate": "model.generate", "loop": "our loop"}.get(key, key)
    return f"{result['head']['config']['head']} head, {arm['shape']}"


def _labels(result: Figures) -> dict[str, str]:
    return {one.name: one.label for one in SUITES[result["suite"]].sets}


def eagle_table(result: Figures, run: Figures) -> TableData:
    """EAGLE-3's Table 1: speed-up / tau by set; the mean is over its five sets, as in the paper."""
    base, labels = run["headline"]["over"], _labels(result)
    columns = {name: labels[name] for name in IN_MEAN} | {"mean": "Mean"}
    columns |= {name: label for name, label in labels.items() if name not in IN_MEAN}

    def pair(arm: Figures) -> list[float]:
        return [arm[f"speedup_vs_{base}"], arm["tau"]]

    rows = []
    for key, arm in run["arms"].items():
        sets = {name: one["arms"][key] for name, one in run["files"].items()}
        if arm["shape"]:
            found = {name: pair(one) for name, one in sets.items()}
            five = [found[name] for name in IN_MEAN if name in found]
            if len(five) == len(IN_MEAN):
                found["mean"] = [sum(values) / len(five) for values in zip(*five, strict=True)]
            cells = [_speed_and_tau(found.get(name)) for name in columns]
        else:
            cells = [f"{sets[n]['tokens_per_s']:.1f} tok/s" if n in sets else "" for n in columns]
        rows.append([*_who(result, _method(result, key, arm)), *cells])
    note = f"Cells: speed-up over `{base}`, the faster baseline / acceptance length tau."
    return _layout(result, run, columns, rows, _speed_and_tau, note)


def _speed_and_tau(value: list[float] | None) -> str:
    return f"{value[0]:.2f}x / {value[1]:.2f}" if value else ""


def specbench_table(result: Figures, run: Figures) -> TableData:
    """Spec-Bench's leaderboard: speed-up by category, mean accepted tokens, overall."""
    base = run["headline"]["over"]
    columns = _labels(result) | {"tau": "Mean accepted tokens", "overall": "Overall"}
    rows = []
    for key, arm in run["arms"].items():
        sets = {name: one["arms"][key] for name, one in run["files"].items()} | {"overall": arm}
        cells = {name: f"{one[f'speedup_vs_{base}']:.2f}" for name, one in sets.items()}
        if not arm["shape"]:
            cells = {name: f"{one['tokens_per_s']:.1f} tok/s" for name, one in sets.items()}
        cells["tau"] = f"{arm['tau']:.2f}"
        row = [cells.get(name, "") for name in columns]
        rows.append([*_who(result, _method(result, key, arm)), *row])
    note = (
        f"Speed-up over `{base}`, the faster baseline. Mean accepted tokens is tau, the target's "
        "own token included; overall is a ratio of sums over all prompts."
    )
    return _layout(result, run, columns, rows, lambda v: f"{v:.2f}" if v else "", note)


def adaspec_table(result: Figures, run: Figures) -> TableData:
    """AdaSPEC's Table 1: accepted / (accepted + rejected) draft tokens of chains, in percent."""
    columns = _labels(result)
    rows = []
    for key, arm in run["arms"].items():
        sets = {name: one["arms"][key] for name, one in run["files"].items()}
        if "greedy_alpha" in arm:
            cells = [_percent(sets[name]) if name in sets else "" for name in columns]
            rows.append([*_who(result, _method(result, key, arm)), *cells])
    kind = "greedy " if run["temperature"] == 0 else ""
    note = f"Cells: {kind}alpha in percent, from chains; brackets: 95 % bootstrap intervals."
    return _layout(result, run, columns, rows, lambda v: f"{v:.2f}" if v else "", note)


def _percent(arm: Figures) -> str:
    bounds = [100 * bound for bound in arm["greedy_alpha_ci95"]]
    return with_interval(100 * arm["greedy_alpha"], bounds, 2)


LAYOUTS = {"eagle": eagle_table, "specbench": specbench_table, "adaspec": adaspec_table}
