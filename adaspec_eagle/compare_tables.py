"""What a comparison prints: Markdown, CSV, LaTeX and a forest plot, all from one summary."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaspec_eagle.acceptance import stats_of
from adaspec_eagle.contrasts import DEFINITIONS, METRICS, Arm, compare, read_cells
from adaspec_eagle.grid import FLOPS, Plan
from adaspec_eagle.plots import forest_drawings, sheet
from adaspec_eagle.record import environment, markdown_table, with_interval, write_json, write_text
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.suite_tables import published

Summary = dict[str, Any]
FACTS = ("weights", "epochs", "steps", "answer_token_passes", "head_flops")
FORM = ("head", "unroll", "draft_vocab", "init", "gradient_checkpointing")  # of a cell's config
PASSES = {
    "passes": "answer tokens of the training records times epochs",
    "tokens/s": "answer tokens trained on a second, evaluation and reference stage left out, mean "
    "over cells: other work on a machine shows in it",
}
DIGITS = {"tau_sim": 2, "tau": 2}  # others: three


def summary(out: Path, plan: Plan, budget: str) -> Summary:
    """All figures of the cells under OUT/cells of one budget."""
    tasks = {
        task: {name: arm for name, arm in arms.items() if name in plan.arms}
        for task, arms in read_cells(out, budget).items()
    }
    figures = compare(tasks, plan.primary)
    facts = {
        task: {name: _facts(arms[name]) for name in plan.arms if name in arms}
        for task, arms in tasks.items()
    }
    for of_task in facts.values():
        base = of_task.get(plan.baseline)
        for arm in of_task.values():
            arm["equal_compute"] = base is None or _equal_compute(arm, base)
    return {
        "kind": "compare",
        "budget": budget,
        "primary": list(plan.primary),
        "baseline": plan.baseline,
        "arms": {name: asdict(arm) for name, arm in plan.arms.items()},
        "tasks": {
            task: {name: arm | {"metrics": figures[task][name]} for name, arm in arms.items()}
            for task, arms in facts.items()
        },
        "speed": [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((out / "speed" / budget).glob("*/*.json"))
        ],
        "definitions": DEFINITIONS | PASSES | {"head_flops": FLOPS},
        "environment": environment(),
    }


def _facts(arm: Arm) -> dict[str, Any]:
    """What one arm cost, means over its seeds, and its acceptance by depth."""
    cells, first = arm.cells, arm.cells[0]
    means = {}
    for name in ("train_seconds", "train_tokens_per_s", "held_back_tau_sim"):
        known = [cell[name] for cell in cells if cell[name] is not None]  # resumed: no seconds
        means[name] = sum(known) / len(known) if known else None
    prompts = [counts for cell in cells for counts in cell["per_prompt"]]
    return {
        "seeds": arm.seeds,
        "prompts": first["prompts"]["prompts"],
        **{name: first[name] for name in FACTS},
        **{name: first["config"].get(name) or None for name in FORM},  # older ones lack some
        **means,
        "alpha_by_depth": sum(stats_of(prompts, "greedy"), AcceptanceStats()).alpha_by_depth,
    }


# ---- tables --------------------------------------------------------------------------------------


def difference_text(found: dict[str, Any], metric: str) -> str:
    """`+0.012 [0.003, 0.021] *`, the star where it holds; empty for the baseline."""
    if "difference" not in found:
        return ""
    digits = DIGITS.get(metric, 3)
    bounds = ", ".join(f"{bound:+.{digits}f}" for bound in found["difference_ci95"])
    star = " *" if found["holds"] else ""
    return f"{found['difference']:+.{digits}f} [{bounds}]{star}"


def task_rows(arms: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a task's table: arms, what they cost, every metric with its difference."""
    header = ["arm", "seeds", "steps", "passes", "head FLOPs", "tokens/s"]
    for metric in METRICS:
        header += [metric, "difference"]
    rows = []
    for name, arm in arms.items():
        speed = arm["train_tokens_per_s"]
        row = [
            name,
            str(len(arm["seeds"])),
            str(arm["steps"]),
            f"{arm['answer_token_passes'] / 1e6:.2f} M",
            f"{arm['head_flops']:.1f}" + " †" * (not arm["equal_compute"]),
            f"{speed:,.0f}" if speed else "-",
        ]
        for metric in METRICS:
            one = arm["metrics"][metric]
            value = with_interval(one["value"], one["ci95"], DIGITS.get(metric, 3))
            row += [value, difference_text(one, metric)]
        rows.append(row)
    return header, rows


def _equal_compute(arm: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether two arms took the same head FLOPs, which only heads of the same form can."""
    near = abs(arm["head_flops"] / base["head_flops"] - 1) <= 0.02
    return near and all(arm[key] == base[key] for key in ("weights", *FORM))


def contrast_text(found: Summary) -> str:
    """What differences are to, and which one was fixed beforehand."""
    one, other = found["primary"]
    fixed = f"Primary contrast: {one} against {other}"
    if not one:
        fixed = "No contrast was fixed beforehand: a table to look at, corrected on its own"
    return f"{fixed}. Differences are to {found['baseline']};"


UNEQUAL = (
    "other head FLOPs than that arm's, or a head of another form or start, so that its difference "
    "is not one of methods alone"
)


def markdown(found: Summary) -> str:
    """All tables of a comparison."""
    parts = [
        f"Budget: {found['budget']} epochs. {contrast_text(found)} * holds (see the definitions "
        f"below); † {UNEQUAL}."
    ]
    for task, arms in found["tasks"].items():
        parts += [f"### {task}", markdown_table(*task_rows(arms))]
    if found["speed"]:
        parts += ["### Speed, once for each kind of head", speed_table(found)]
    parts += ["### Greedy alpha, % (the layout of AdaSPEC's Table 1)", paper_table(found)]
    parts += [f"* **{name}**: {text}" for name, text in found["definitions"].items()]
    return "\n\n".join(parts) + "\n"


def speed_table(found: Summary) -> str:
    """Speed-up over `generate` / over our loop, and tau, of chain and tree."""
    header = ["task", "head", "prompts", "generate tokens/s", "chain", "tree"]
    rows = []
    for one in found["speed"]:
        arms = one["arms"]
        row = [one["task"], f"{one['head']} ({one['arm']})", one["prompts"]["prompts"]]
        row.append(f"{arms['generate']['tokens_per_s']:.1f}")
        for key in ("chain", "tree"):
            arm = arms[key]
            ratios = (arm["speedup_vs_generate"], arm["speedup_vs_loop"])
            row.append(f"{ratios[0]:.2f} / {ratios[1]:.2f}, tau {arm['tau']:.2f}")
        rows.append(row)
    return markdown_table(header, rows)


def paper_table(found: Summary) -> str:
    """AdaSPEC's Table 1 in layout: published rows first, then ours, tasks across."""
    facts = published("adaspec")
    names = list(dict.fromkeys([*facts["rows"][0]["sets"], *found["tasks"]]))
    rows = [
        ["published", row["target"], row["method"], *(_percent(row["sets"].get(n)) for n in names)]
        for row in facts["rows"]
    ]
    for arm in found["arms"]:
        values = [
            found["tasks"].get(n, {}).get(arm, {}).get("metrics", {}).get("greedy_alpha")
            for n in names
        ]
        if any(values):
            cells = [_percent(100 * value["value"] if value else None) for value in values]
            rows.append(["here", "", f"{arm}, {found['budget']} epochs", *cells])
    note = (
        "Published figures are of stand-alone draft models for other targets, trained on the data "
        "sets' own or the target's answers; ours of the heads and data that the records name: only "
        "the order of methods can be compared."
    )
    return markdown_table(["", "target", "method", *names], rows) + "\n\n" + note


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def csv_text(found: Summary) -> str:
    """One line a task, arm and metric."""
    buffer = io.StringIO()
    fields = ["value", "low", "high", "difference", "diff_low", "diff_high", "p", "p_holm", "holds"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["task", "arm", "seeds", *FACTS, "equal_compute", "metric", *fields])
    for task, arms in found["tasks"].items():
        for name, arm in arms.items():
            for metric, one in arm["metrics"].items():
                lead = [task, name, len(arm["seeds"]), *(arm[fact] for fact in FACTS)]
                lead += [arm["equal_compute"], metric]
                bounds = one.get("difference_ci95", ["", ""])
                rest = [one.get(key, "") for key in ("p", "p_holm", "holds")]
                values = [one["value"], *one["ci95"], one.get("difference", ""), *bounds, *rest]
                writer.writerow(lead + values)
    return buffer.getvalue()


def latex(found: Summary) -> str:
    """Greedy alpha and its difference, arms by tasks, for booktabs."""
    tasks = list(found["tasks"])
    lines = [
        "% needs \\usepackage{booktabs}; generated from the summary of the comparison",
        f"% greedy alpha, {found['budget']} epochs. {contrast_text(found)} * holds, corrected",
        f"% \\dagger: {UNEQUAL}",
        f"\\begin{{tabular}}{{l{'rr' * len(tasks)}}}",
        "\\toprule",
        " & ".join(["", *(f"\\multicolumn{{2}}{{c}}{{{tex(task)}}}" for task in tasks)]) + " \\\\",
        " & ".join(["arm", *(["$\\alpha$ (\\%)", "$\\Delta$"] * len(tasks))]) + " \\\\",
        "\\midrule",
    ]
    for arm in found["arms"]:
        cells = [tex(arm)]
        for task in tasks:
            made = found["tasks"][task].get(arm)
            if made is None:
                cells += ["--", ""]
                continue
            one = made["metrics"]["greedy_alpha"]
            cells += [f"{100 * one['value']:.1f}", _delta(one, made["equal_compute"])]
        if any(cell not in ("--", "") for cell in cells[1:]):
            lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def tex(text: str) -> str:
    """Text as LaTeX takes it."""
    return "".join(f"\\{c}" if c in "_%&#$" else c for c in text)


def _delta(one: dict[str, Any], equal: bool) -> str:
    if "difference" not in one:
        return ""
    marks = "*" * one["holds"] + "\\dagger" * (not equal)
    return f"${100 * one['difference']:+.1f}{f'^{{{marks}}}' if marks else ''}$"


# ---- files ---------------------------------------------------------------------------------------


def write_tables(found: Summary, out: Path) -> None:
    """summary-NAME.json, table-NAME.md, .csv, .tex and, if there is a difference, forest.

    NAME is the budget, and the baseline where another one was asked for.
    """
    name = found["budget"] + ("" if found["primary"][0] else f"-against-{found['baseline']}")
    write_json(out / f"summary-{name}.json", found)
    write_text(out / f"table-{name}.md", markdown(found))
    write_text(out / f"table-{name}.csv", csv_text(found))
    write_text(out / f"table-{name}.tex", latex(found))
    if panels := forest_drawings(found):
        sheet(panels, out / f"forest-{name}.png", note=panels[0].caption)
