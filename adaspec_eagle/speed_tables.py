"""Tables of `eval/speedup.py`: arms, methods and files, for a terminal and for Markdown."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from adaspec_eagle.record import with_interval

Figures = dict[str, Any]


def terminal_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
) -> Table:
    """Rows of text under their header, the first `left` columns flush left, the others right."""
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def arms_table(result: Figures) -> Table:
    """One column an arm, one row a figure; square brackets hold 95 % intervals."""
    arms = result["arms"]
    header = [""]
    for key, arm in arms.items():
        header.append(key + ("" if arm["shape"] in (None, key) else f"\n{arm['shape']}"))
    return terminal_table(_title(result), header, figure_rows(result))


def figure_rows(result: Figures) -> list[list[str]]:
    """The label of a figure, and its cell of every arm; without those that no arm has."""
    labels = arm_rows(matched_with(result)).items()
    rows = [[label, *map(cell, result["arms"].values())] for label, cell in labels]
    return [row for row in rows if set(row[1:]) != {"-"}]


def _title(result: Figures) -> str:
    target, prompts = result["target"], sum(source["prompts"] for source in result["prompts"])
    what = f"{target['name']}, {target['dtype']}, {warmth(result)}{prompts} prompts"
    return f"{what} [dim](95 % interval)[/dim]"


def warmth(result: Figures) -> str:
    """`temperature T, ` of sampled answers; nothing of greedy ones (old records do not say)."""
    return f"temperature {result['temperature']:g}, " if result.get("temperature") else ""


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
        "outside forwards": _own,
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


def _own(arm: Figures) -> str:
    """The share of a round that is in no forward of target or head; old records do not say."""
    whole = sum(arm["seconds"][part] for part in ("draft", "verify", "rest"))
    forwards = arm.get("forward_seconds")
    return f"{1 - forwards / whole:.1%}" if forwards else "-"


def _list(values: list[float]) -> str:
    return " ".join(f"{value:.2f}".lstrip("0") for value in values) or "-"


METHOD_COLUMNS = ["arm", "draft", "tokens/s", "over generate", "over loop", "tau", "lossless"]


def methods_table(result: Figures) -> Table:
    """One row an arm: what is compared of many methods; those that lack something say what."""
    return terminal_table(_title(result), METHOD_COLUMNS, method_rows(result), left=2)


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
    verdict = f"{arm['matched']}/{arm['total']}"
    if "lossless" in arm:  # a rule for greedy answers
        gap = f", gap {arm['gap']:.2g}" if arm["gap"] else ""
        verdict = f"{'yes' if arm['lossless'] else 'NO'}, {verdict}{gap}"
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
    drafting = [key for key, arm in result["arms"].items() if arm["shape"]]
    header = ["prompts", "n", "generate tok/s", *drafting]
    title = "by file: speed-up over generate / over loop, tau"
    return terminal_table(title, header, file_rows(result, drafting))


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
