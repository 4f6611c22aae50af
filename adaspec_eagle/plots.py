"""Figures, drawn once by matplotlib: SVG for a report's page, PNG and PDF for a paper, and sheets.

A figure is a function (axes, view); a view is a result of `eval/speedup.py`, or one temperature of
one of `eval/bench.py`. In the SVG the colours of text, lines and paper become variables of the
page, so that the same drawing serves light and dark.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from adaspec_eagle.record import write_bytes
from adaspec_eagle.speed_tables import warmth

Figures = dict[str, Any]
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
INK, MUTED, LINE, PAPER = "#24292f", "#6e7781", "#d0d7de", "#fefefe"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--card)"}
PARTS = {"draft": "#d9622b", "verify": "#3b7dd8", "rest": "#8a8f98"}
ACCEPTED = "#d9622b"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Drawing:
    """One figure: its file name, heading, what it shows, and how it is drawn."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any], None]  # takes the axes
    size: tuple[float, float] = (5.4, 3.3)  # inches


def drawings(view: Figures) -> list[Drawing]:
    """The figures of a measurement, those left out for which it has no data."""
    arms, costs = view["arms"], view.get("costs")
    drafting = {key: arm for key, arm in arms.items() if arm["acceptance_by_depth"]}
    rows = max(len(arms), 4)
    made = [
        Drawing(
            "speed", "Speed", "Tokens/s end to end, prefill included, and the speed-up over "
            "model.generate. Whiskers: 95 % bootstrap intervals over prompts.",
            lambda axes: draw_speed(axes, arms), (5.4, 0.9 + 0.6 * rows),
        ),
        Drawing(
            "round", "Where the time of a round goes", "Milliseconds of one round (one draft and "
            "one verify; without a draft one token), prefill left out. transformers' generate is "
            "not split.",
            lambda axes: draw_round(axes, arms), (5.4, 0.9 + 0.6 * rows),
        ),
    ]  # fmt: skip
    if drafting:
        made += [
            Drawing(
                "acceptance", "Acceptance by depth", "Share of rounds in which the draft token "
                "at depth d was accepted, with 95 % intervals. One plus the sum of a line is the "
                "acceptance length tau, but for what is cut off at an answer's end.",
                lambda axes: draw_acceptance(axes, drafting, arms),
            ),
            Drawing(
                "histogram", "Accepted lengths", "Share of rounds that accepted so many draft "
                "tokens; the target's own token comes on top.",
                lambda axes: draw_histogram(axes, drafting, arms),
            ),
        ]  # fmt: skip
    if costs:
        made.append(
            Drawing(
                "cost", "What a forward costs", "The target's forward with n new tokens behind "
                "256. Each arm's mark: the mean number that it verified a round; the dots on the "
                "axis: that mean for each prompt.",
                lambda axes: draw_cost(axes, costs, view),
            )
        )  # fmt: skip
    return made


def training_drawings(notes: Figures) -> list[Drawing]:
    """Curves of a train.json: the training loss, and what held-back answers say."""
    curves = notes.get("curves", [])
    steps = {n: f"step {n.rpartition('_')[2]}" for n in numbered(curves, "eval_match_")}
    panels = [
        ("loss", "Training loss", "Mean over the selected tokens, summed over unroll steps.",
         {"loss": "loss"}),
        ("match", "Held-back top-1 match", "How often the head's best token is the target's, "
         "teacher-forced, by unroll step.", steps),
        ("tau_sim", "Held-back tau_sim", "The simulated acceptance length that chooses the "
         "checkpoint.", {"eval_tau_sim": "tau_sim"}),
        ("throughput", "Training speed, tokens/s", "Answer tokens; evaluation is left out.",
         {"tokens_per_s": "tokens/s"}),
    ]  # fmt: skip
    return [
        Drawing(
            name,
            title,
            caption,
            partial(draw_curves, lines=curves, names=names, log=name == "loss"),
        )
        for name, title, caption, names in panels
        if any(key in line for line in curves for key in names)
    ]


def numbered(history: list[Figures], prefix: str) -> list[str]:
    """The keys with that prefix, by the number that they end with."""
    found = {name for line in history for name in line if name.startswith(prefix)}
    return sorted(found, key=lambda name: int(name.removeprefix(prefix)))


def forest_drawings(found: Figures) -> list[Drawing]:
    """Differences of a comparison to its baseline: a figure a metric, a line a task and arm."""
    lines = [
        (f"{task}: {name}" + " †" * (not arm["equal_compute"]), arm["metrics"])
        for task, arms in found["tasks"].items()
        for name, arm in arms.items()
        if "difference" in arm["metrics"]["tau"]
    ]
    colour = "; in colour: the primary contrast" if found["primary"][0] else ""
    return [
        Drawing(
            f"forest-{metric}", f"{metric}: difference to {found['baseline']}",
            f"95 % intervals over seeds and prompts. Filled: holds after correction{colour}. "
            "†: other head FLOPs or form.",
            partial(draw_forest, lines=[(name, metrics[metric]) for name, metrics in lines]),
            (5.4, 1.0 + 0.34 * max(len(lines), 2)),
        )
        for metric in ("greedy_alpha", "alpha_t1")
        if lines
    ]  # fmt: skip


# ---- files ---------------------------------------------------------------------------------------


def canvas(drawing: Drawing) -> Any:
    """The finished matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=drawing.size, layout="constrained")
    drawing.draw(figure.subplots())
    return figure


def svg(drawing: Drawing, salt: str) -> str:
    """The figure as an SVG element whose colours and letters are the page's; salt: its id there."""
    import matplotlib

    image = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        about = {"Date": None, "Creator": None, "Type": None, "Format": None}
        canvas(drawing).savefig(image, format="svg", transparent=True, metadata=about)
    text = image.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans)", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    label = f'<svg id="{escape(salt)}" role="img" aria-label="{escape(drawing.title)}"'
    return text.replace("<svg", label, 1)


def export(drawing: Drawing, folder: Path, name: str) -> None:
    """NAME.png and NAME.pdf in the folder."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = canvas(drawing)
        for ending in ("png", "pdf"):
            image = io.BytesIO()
            figure.savefig(image, format=ending, dpi=200)
            write_bytes(folder / f"{name}.{ending}", image.getvalue())


def sheet(panels: Sequence[Drawing], path: Path, title: str = "", note: str = "") -> None:
    """Figures two in a row as one PNG, with a title above and a note below; none: no file."""
    import matplotlib
    from matplotlib.figure import Figure

    if not panels:
        return
    width, height = (max(panel.size[axis] for panel in panels) for axis in (0, 1))
    columns, rows = min(len(panels), 2), -(-len(panels) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure((width * columns, height * rows + 0.4), layout="constrained")
        spots = figure.subplots(rows, columns, squeeze=False).flat
        for axes, panel in zip_longest(spots, panels):
            if panel is None:
                axes.set_axis_off()
                continue
            panel.draw(axes)
            axes.set_title(panel.title, fontsize=10)
        figure.suptitle(title, fontsize=11)
        figure.supxlabel(note, fontsize=8, color=MUTED)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
    write_bytes(path, image.getvalue())


def speedup_png(result: Figures, path: Path) -> None:
    """tokens/s of each arm with its interval; acceptance by depth of the drafts."""
    target, prompts = result["target"], sum(source["prompts"] for source in result["prompts"])
    panels = [one for one in drawings(result) if one.name in ("speed", "acceptance")]
    title = f"{target['name']}, {target['dtype']}, {warmth(result)}{prompts} prompts"
    sheet(panels, path, title, "× over generate; whiskers and bands: 95 % intervals over prompts")


# ---- measurements --------------------------------------------------------------------------------


def arm_color(key: str, arms: Figures) -> str:
    """An arm's own colour, or the next of OTHERS."""
    others = [name for name in arms if name not in COLORS]
    return COLORS[key] if key in COLORS else OTHERS[others.index(key) % len(OTHERS)]


def arm_label(key: str, arm: Figures) -> str:
    """`tree (auto)`; the key alone where there is no draft."""
    shape = arm["shape"]
    return f"{key} ({shape.removeprefix('chain:')})" if shape and shape != key else key


def _name_rows(axes: Any, arms: Figures) -> None:
    """Arms from top to bottom along the vertical axis."""
    labels = [arm_label(key, arm) for key, arm in arms.items()]
    axes.set_yticks(range(len(arms)), labels)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()


def draw_speed(axes: Any, arms: Figures) -> None:
    """Bars of tokens/s with intervals."""
    for place, (key, arm) in enumerate(arms.items()):
        speed, (low, high) = arm["tokens_per_s"], arm["tokens_per_s_ci95"]
        axes.barh(place, speed, color=arm_color(key, arms), height=0.58)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.1)
        note = f"{speed:.1f}" + (f" ({arm['speedup_vs_generate']:.2f} ×)" if arm["shape"] else "")
        axes.annotate(note, (max(high, speed), place), (6, 0), textcoords="offset points",
                      va="center")  # fmt: skip
    axes.set_xlim(0, 1.3 * max(arm["tokens_per_s_ci95"][1] for arm in arms.values()))
    axes.set_xlabel("tokens/s")
    _name_rows(axes, arms)


def draw_round(axes: Any, arms: Figures) -> None:
    """Stacked bars: milliseconds of a round by part."""
    longest = 0.0
    for place, arm in enumerate(arms.values()):
        begin, whole = 0.0, arm["seconds"]["verify"] > 0
        for part, color in PARTS.items():
            width = 1000 * arm["seconds"][part] / max(arm["rounds"], 1)
            axes.barh(place, width, left=begin, height=0.58, linewidth=0,
                      color=color if whole else LINE, label=part if whole else None)  # fmt: skip
            begin += width
        axes.annotate(f"{begin:.1f} ms", (begin, place), (6, 0), textcoords="offset points",
                      va="center")  # fmt: skip
        longest = max(longest, begin)
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handle for handle, label in zip(handles, labels, strict=True)}
    axes.set_xlim(0, 1.22 * longest)
    axes.set_xlabel("milliseconds")
    _name_rows(axes, arms)
    axes.legend(first.values(), first.keys(), ncols=3, loc="lower left", bbox_to_anchor=(0, 1),
                borderaxespad=0.2, handlelength=1)  # fmt: skip


def draw_acceptance(axes: Any, arms: Figures, palette: Figures) -> None:
    """A line for each drafting arm, in its colour among all arms, the palette."""
    for key, arm in arms.items():
        shares, color = arm["acceptance_by_depth"], arm_color(key, palette)
        depths = range(1, len(shares) + 1)
        bounds = list(zip(*arm["acceptance_by_depth_ci95"], strict=True))
        axes.fill_between(depths, *bounds, color=color, alpha=0.16, linewidth=0)
        label = f"{arm_label(key, arm)}, tau {arm['tau']:.2f}"
        axes.plot(depths, shares, "o-", color=color, markersize=4.5, label=label)
    deepest = max(len(arm["acceptance_by_depth"]) for arm in arms.values())
    axes.set_xticks(range(1, deepest + 1))
    axes.set_ylim(0, 1)
    axes.set_xlabel("depth")
    axes.set_ylabel("share of rounds")
    axes.legend()


def draw_histogram(axes: Any, arms: Figures, palette: Figures) -> None:
    """Bars side by side, one a drafting arm and length; palette: all arms."""
    width = 0.8 / len(arms)
    for place, (key, arm) in enumerate(arms.items()):
        total = sum(arm["histogram"])
        shares = [count / total for count in arm["histogram"]]
        spots = [length + width * (place - (len(arms) - 1) / 2) for length in range(len(shares))]
        axes.bar(spots, shares, width=0.92 * width, color=arm_color(key, palette),
                 label=arm_label(key, arm))  # fmt: skip
    axes.set_xticks(range(max(len(arm["histogram"]) for arm in arms.values())))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("draft tokens accepted")
    axes.set_ylabel("share of rounds")
    axes.legend()


def draw_cost(axes: Any, costs: Figures, view: Figures) -> None:
    """The target's milliseconds by tokens, with the arms' tree sizes on the curve."""
    sizes, times = costs["sizes"], [1000 * seconds for seconds in costs["target"]]
    axes.plot(sizes, times, ".-", color=MUTED, label="target")
    axes.axhline(1000 * costs["draft"], color=LINE, linestyle="--", label="one level of drafting")
    for key, arm in view["arms"].items():
        if not arm["nodes"]:
            continue
        color = arm_color(key, view["arms"])
        mean = 1 + arm["nodes"] / arm["rounds"]
        runs = [unit["arms"][key] for unit in view.get("per_prompt", [])]
        each = [1 + run["nodes"] / run["rounds"] for run in runs if run["rounds"]]
        axes.plot(each, [0] * len(each), "o", color=color, markersize=3.5, alpha=0.5,
                  clip_on=False)  # fmt: skip
        label = f"{arm_label(key, arm)}: {mean:.1f}"
        axes.plot([mean], [float(np.interp(mean, sizes, times))], "o", color=color, markersize=9,
                  markeredgecolor=PAPER, label=label)  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens verified at once, n")
    axes.set_ylabel("milliseconds")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08))


def draw_curves(axes: Any, lines: list[Figures], names: dict[str, str], log: bool = False) -> None:
    """Curves over the steps of training, by name of the field."""
    colors = ("#3b7dd8", "#d9622b", *OTHERS)
    for (name, label), color in zip(names.items(), cycle(colors), strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        marker = "o-" if len(points) < 20 else "-"
        axes.plot(*zip(*points, strict=True), marker, color=color, label=label, markersize=4.5)
    if log:
        axes.set_yscale("log", subs=[])
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
    if len(names) > 1:
        axes.legend()
    axes.set_xlabel("optimizer step")


def draw_forest(axes: Any, lines: list[tuple[str, Figures]]) -> None:
    """Intervals of differences around zero."""
    axes.axvline(0, color=MUTED, linewidth=1)
    for place, (_, one) in enumerate(lines):
        color = ACCEPTED if one["primary"] else "#3b7dd8"
        axes.plot(one["difference_ci95"], [place, place], color=color, linewidth=1.8)
        face = color if one["holds"] else PAPER
        axes.plot(one["difference"], place, "o", color=color, markerfacecolor=face)
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(max(len(lines), 1) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)  # long numbers


# ---- one round's tree ----------------------------------------------------------------------------


def tree_drawing(key: str, trace: Figures) -> Drawing | None:
    """The round of a trace, from left to right; None where nothing was drafted."""
    found = trace["round"]
    if found is None:
        return None
    places, deepest = tree_places(found["parents"])
    leaves = 1 + max(y for _, y in places)
    accepted = len(found["accepted"]) - 1
    caption = (
        f"Round {found['number']} of {found['of']}, the one that accepted most ({accepted} draft "
        "tokens): what the head guessed behind the last token, from left to right, each with the "
        "head's probability of the path to it in percent. In colour what the target accepted; "
        "framed the target's own next token."
    )
    size = (max(1.25 * (deepest + 2), 5.4), max(0.42 * leaves + 0.5, 1.1))
    return Drawing(
        f"tree-{key}",
        f"One round's tree: {key}",
        caption,
        lambda axes: draw_tree(axes, found, places),
        size,
    )


def tree_places(parents: list[int]) -> tuple[list[tuple[float, float]], int]:
    """(depth, height) of each node, leaves one apart and parents amid their children; the depth."""
    children: dict[int, list[int]] = {}
    depths = [0] * len(parents)
    for node, parent in enumerate(parents[1:], 1):
        children.setdefault(parent, []).append(node)
        depths[node] = depths[parent] + 1
    heights = [0.0] * len(parents)
    leaves = 0

    def place(node: int) -> None:
        nonlocal leaves
        below = children.get(node, [])
        for child in below:
            place(child)
        if below:
            heights[node] = (heights[below[0]] + heights[below[-1]]) / 2
        else:
            heights[node] = leaves
            leaves += 1

    place(0)
    return list(zip(map(float, depths), heights, strict=True)), max(depths)


def draw_tree(axes: Any, found: Figures, places: list[tuple[float, float]]) -> None:
    """Nodes as words, edges to their parents; the accepted path in colour."""
    path, tokens = found["accepted"], [*found["tokens"], found["next"]]
    parents, spots = [*found["parents"], path[-1]], [*places, _behind(places, path[-1])]
    for node in range(1, len(tokens)):
        (x0, y0), (x1, y1) = spots[parents[node]], spots[node]
        on_path = node in path or node == len(tokens) - 1
        middle = (x0 + x1) / 2
        axes.plot([x0, middle, middle, x1], [y0, y0, y1, y1], solid_joinstyle="round",
                  color=ACCEPTED if on_path else LINE, linewidth=1.8 if on_path else 1.1,
                  zorder=2 if on_path else 1)  # fmt: skip
    chances = found["path_probabilities"]
    for node, text in enumerate(tokens):
        own = node == len(tokens) - 1
        color = ACCEPTED if node in path[1:] else INK if own or not node else MUTED
        frame = {"boxstyle": "round,pad=0.3", "facecolor": PAPER, "linewidth": 1.1,
                 "edgecolor": INK if own else PAPER}  # fmt: skip
        axes.text(*spots[node], _visible(text), color=color, ha="center", va="center", bbox=frame,
                  fontsize=10, zorder=3, parse_math=False)  # fmt: skip
        if chances and 0 < node < len(chances):
            axes.annotate(f"{100 * chances[node]:.0f}", spots[node], (0, -11), ha="center",
                          va="center", textcoords="offset points", fontsize=7.5, color=MUTED,
                          zorder=4)  # fmt: skip
    heights = [y for _, y in spots]
    axes.set_xlim(-0.5, max(x for x, _ in spots) + 0.5)
    axes.set_ylim(max(heights) + 0.6, min(heights) - 0.6)
    axes.axis("off")


def _behind(places: list[tuple[float, float]], last: int) -> tuple[float, float]:
    """A free spot for the target's own token, one to the right of the last accepted node."""
    x, y = places[last]
    taken = {height for depth, height in places if depth == x + 1}
    while any(abs(y - height) < 0.9 for height in taken):
        y -= 1
    return x + 1, y


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace(" ", "␣").replace("\t", "⇥") or "∅"
