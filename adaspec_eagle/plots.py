"""Show results: tables and a picture of `eval/speedup.py`, and the curves of a training run."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from adaspec_eagle.record import with_interval, write_bytes

COLORS = {  # of arms; others take OTHERS in turn
    "generate": "#8a8f98",
    "loop": "#b9bec6",
    "chain": "#3b7dd8",
    "tree": "#d9622b",
    "auto": "#d9622b",
    "dynamic": "#7a4fbf",
    "static": "#2f9e6e",
}
OTHERS = ("#c2a02b", "#7a8f2f", "#2f9e6e", "#1f8fa3", "#5b5fc7", "#a14fa8", "#c23b5e", "#7d5a3c")
Figures = dict[str, Any]


# ---- tables --------------------------------------------------------------------------------------


def arms_table(result: Figures) -> Table:
    """One column an arm, one row a figure; square brackets hold 95 % intervals."""
    arms = result["arms"]
    table = Table(title=_title(result), title_justify="left")
    table.add_column("")
    for key, figures in arms.items():
        shape = "" if figures["shape"] in (None, key) else f"\n{figures['shape']}"
        table.add_column(key + shape, justify="right")
    for label, cell in arm_rows(matched_with(result)).items():
        table.add_row(label, *(cell(figures) for figures in arms.values()))
    return table


def _title(result: Figures) -> str:
    target, prompts = result["target"], sum(source["prompts"] for source in result["prompts"])
    return f"{target['name']}, {target['dtype']}, {prompts} prompts [dim](95 % interval)[/dim]"


def arm_rows(reference: str = "generate") -> dict[str, Callable[[Figures], str]]:
    """Label -> cell of the table of arms, from one arm's figures.

    reference: the arm that answers were compared with, a result's `matched_with`.
    """
    rows = {
        "tokens/s, end to end": ratio("tokens_per_s", 1),
        "speed-up over generate": ratio("speedup_vs_generate"),
        "speed-up over loop": ratio("speedup_vs_loop"),
        "decode only: over generate": ratio("decode_speedup_vs_generate"),
        "decode only: over loop": ratio("decode_speedup_vs_loop"),
        "acceptance length tau": ratio("tau"),
        "alpha by depth (chain)": lambda arm: _list(arm["alpha_by_depth"]),
        "acceptance by depth": lambda arm: _list(arm["acceptance_by_depth"]),
        "tokens verified a round": _verified,
        "efficiency": lambda arm: f"{arm['efficiency']:.2f}" if arm.get("efficiency") else "-",
        "outside draft and verify": _rest,
    }
    for part in ("prefill", "draft", "verify", "rest"):
        rows[f"seconds: {part}"] = seconds(part)
    rows["peak memory, MB"] = lambda arm: f"{arm['peak_memory_bytes'] / 1e6:.0f}"
    rows[f"answers equal to {reference}'s"] = lambda arm: f"{arm['matched']}/{arm['total']}"
    rows["largest gap of a token, logits"] = lambda arm: (
        f"{arm['gap']:.2g}" if "gap" in arm else "-"
    )
    return rows


def matched_with(result: Figures) -> str:
    """The arm that a result's answers were compared with; old records do not say."""
    return result.get("matched_with", "generate")


def ratio(name: str, digits: int = 2) -> Callable[[Figures], str]:
    """A cell with the ratio `name` and its interval (a baseline against itself has none)."""

    def cell(arm: Figures) -> str:
        value, bounds = arm[name], arm[f"{name}_ci95"]
        if value is None:
            return "-"
        return with_interval(value, bounds, digits)

    return cell


def seconds(part: str) -> Callable[[Figures], str]:
    """A cell with the wall seconds of one part."""
    return lambda arm: f"{arm['seconds'][part]:.2f}"


def _verified(arm: Figures) -> str:
    return f"{1 + arm['nodes'] / arm['rounds']:.1f}" if arm["nodes"] and arm["rounds"] else "-"


def _rest(arm: Figures) -> str:
    """The share of a round of our own loop that is in neither part (their own work is in them)."""
    parts = [arm["seconds"][part] for part in ("draft", "verify", "rest")]
    return f"{parts[2] / sum(parts):.1%}" if parts[1] else "-"


def _list(values: list[float]) -> str:
    return " ".join(f"{value:.2f}".lstrip("0") for value in values) or "-"


METHOD_COLUMNS = ["arm", "draft", "tokens/s", "over generate", "over loop", "tau", "lossless"]


def methods_table(result: Figures) -> Table:
    """One row an arm: what is compared of many methods; those that lack something say what."""
    table = Table(title=_title(result), title_justify="left")
    for name in METHOD_COLUMNS:
        table.add_column(name, justify="left" if name in ("arm", "draft") else "right")
    for row in method_rows(result):
        table.add_row(*row)
    return table


def method_rows(result: Figures) -> list[list[str]]:
    """Rows under METHOD_COLUMNS: our arms and those from files, then the baselines in order."""
    arms, baselines = result["arms"], result["baselines"]
    keys = [key for key in arms if key not in baselines] + list(baselines)
    return [
        _method_row(key, arms[key]) if key in arms else _lacking_row(key, baselines[key]["lacks"])
        for key in keys
    ]


def _method_row(key: str, arm: Figures) -> list[str]:
    ratios = [ratio(name)(arm) for name in ("speedup_vs_generate", "speedup_vs_loop", "tau")]
    gap = f", gap {arm['gap']:.2g}" if arm["gap"] else ""
    verdict = f"{'yes' if arm['lossless'] else 'NO'}, {arm['matched']}/{arm['total']}{gap}"
    return [key, arm["shape"] or "-", f"{arm['tokens_per_s']:.1f}", *ratios, verdict]


def _lacking_row(key: str, reason: str) -> list[str]:
    """The reason in short; `baseline_lines` has all of it."""
    return [key, f"lacks {reason.split(':')[0]}"] + ["-"] * (len(METHOD_COLUMNS) - 2)


def baseline_lines(baselines: Figures) -> list[str]:
    """A line for each baseline: its paper and head, or what it lacks."""
    lines = []
    for name, facts in baselines.items():
        line = f"not measured, it lacks {facts['lacks']}" if facts["lacks"] else facts["paper"]
        if head := facts.get("head"):
            select = f" (selection {head['select']})" if "select" in head else ""
            line += f"; head {head['folder']}{select}"
        lines.append(f"{name}: {line}")
    return lines


def files_table(result: Figures) -> Table:
    """One row a prompt file, and one for all; speed-ups over both baselines, and tau."""
    table = Table(title="by file: speed-up over generate / over loop, tau", title_justify="left")
    drafting = [key for key, arm in result["arms"].items() if arm["shape"]]
    table.add_column("prompts")
    for name in ("n", "generate tok/s", *drafting):
        table.add_column(name, justify="right")
    for row in file_rows(result, drafting):
        table.add_row(*row)
    return table


def file_rows(result: Figures, drafting: list[str]) -> list[list[str]]:
    """Rows of the table by file; the last is the ratio of sums over all files."""
    count = sum(source["prompts"] for source in result["prompts"])
    files = result["files"].items()
    parts = [(Path(name).name, one["prompts"], one["arms"]) for name, one in files]
    parts.append(("all (ratio of sums)", count, result["arms"]))
    return [
        [name, str(prompts), f"{arms['generate']['tokens_per_s']:.1f}"]
        + [_file_cell(arms[key]) for key in drafting]
        for name, prompts, arms in parts
    ]


def _file_cell(arm: Figures) -> str:
    over = " / ".join(f"{arm[f'speedup_vs_{base}']:.2f}" for base in ("generate", "loop"))
    return f"{over}, {arm['tau']:.2f}"


# ---- the picture ---------------------------------------------------------------------------------


def speedup_png(result: Figures, path: Path) -> None:
    """Two panels: tokens/s of each arm with its interval; acceptance by depth of the drafts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    extra = max(len(result["arms"]) - 4, 0)
    figure = Figure(figsize=(9.6 + extra, 4.0 + extra / 5), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=(1 + extra / 5, 1.15))
    _speed_panel(left, result["arms"])
    _acceptance_panel(right, result["arms"])
    target = result["target"]
    prompts = sum(source["prompts"] for source in result["prompts"])
    figure.suptitle(f"{target['name']}, {target['dtype']}, {prompts} prompts", fontsize=11)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_bytes(path, image.getvalue())


def curves_png(history: list[Figures], path: Path) -> None:
    """Four panels over the steps of a training stage: loss, match, tau_sim, speed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.0), layout="constrained", dpi=150)
    panels = {
        "training loss": ["loss"],
        "held-back top-1 match by unroll step": numbered(history, "eval_match_"),
        "held-back tau_sim": ["eval_tau_sim"],
        "tokens/s": ["tokens_per_s"],
    }
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in history if name in line]
            axes.plot(*zip(*points, strict=True) if points else ((), ()), ".-", label=name)
        if len(names) > 1:
            axes.legend(frameon=False)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        _bare(axes)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_bytes(path, image.getvalue())


def numbered(history: list[Figures], prefix: str) -> list[str]:
    """The keys with that prefix, by the number that they end with."""
    found = {name for line in history for name in line if name.startswith(prefix)}
    return sorted(found, key=lambda name: int(name.removeprefix(prefix)))


def _speed_panel(axes: Any, arms: dict[str, Figures]) -> None:
    """Bars of tokens/s; a drafting arm carries its speed-up over generate."""
    tops = []
    for place, (key, arm) in enumerate(arms.items()):
        speed, (low, high) = arm["tokens_per_s"], arm["tokens_per_s_ci95"]
        axes.bar(place, speed, color=arm_color(key, arms), width=0.65)
        spread = [[max(speed - low, 0.0)], [max(high - speed, 0.0)]]
        axes.errorbar(place, speed, yerr=spread, color="black", capsize=4, linewidth=1)
        note = f"\n{arm['speedup_vs_generate']:.2f} ×" if arm["shape"] else ""
        top = max(high, speed)
        axes.annotate(f"{speed:.1f}{note}", (place, top), (0, 4), textcoords="offset points",
                      ha="center", fontsize=9)  # fmt: skip
        tops.append(top)
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(arms) > 5 else {}
    labels = [_label(key, arm) for key, arm in arms.items()]
    axes.set_xticks(range(len(arms)), labels, **slanted)
    axes.set_ylim(0, 1.22 * max(tops))
    axes.set_ylabel("tokens/s, end to end")
    axes.set_title("Speed (× over generate; whiskers: 95 % interval)", fontsize=10)
    _bare(axes)


def _acceptance_panel(axes: Any, arms: dict[str, Figures]) -> None:
    """Share of rounds that accepted at least d draft tokens, a line for each drafting arm."""
    deepest = 1
    for key, arm in arms.items():
        shares = arm["acceptance_by_depth"]
        if not shares:
            continue
        depths = range(1, len(shares) + 1)
        bounds, color = arm["acceptance_by_depth_ci95"], arm_color(key, arms)
        axes.fill_between(depths, *zip(*bounds, strict=True), color=color, alpha=0.15, lw=0)
        label = f"{_label(key, arm).replace(chr(10), ' ')}, tau {arm['tau']:.2f}"
        axes.plot(depths, shares, "o-", color=color, label=label, markersize=4)
        deepest = max(deepest, len(shares))
    axes.set_xticks(range(1, deepest + 1))
    axes.set_ylim(0, 1)
    axes.set_xlabel("depth d")
    axes.set_ylabel("share of rounds")
    axes.set_title("Rounds that accepted d or more draft tokens", fontsize=10)
    axes.legend(frameon=False)
    _bare(axes)


def arm_color(key: str, arms: dict[str, Figures]) -> str:
    """An arm's own colour, or the next of OTHERS."""
    others = [name for name in arms if name not in COLORS]
    return COLORS[key] if key in COLORS else OTHERS[others.index(key) % len(OTHERS)]


def _label(key: str, arm: Figures) -> str:
    """`tree` with `dynamic` below it; `chain` with its length."""
    shape = arm["shape"] or ""
    detail = shape.removeprefix("chain:")
    return f"{key}\n{f'of {detail}' if key == 'chain' else detail}" if shape else key


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
