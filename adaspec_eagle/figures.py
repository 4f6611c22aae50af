"""From what the arms did to figures: ratios of sums, their intervals, and the result.

Legend: P units, A arms, R bootstrap resamples.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from adaspec_eagle.auto import Costs, costs_of
from adaspec_eagle.bench import Bench, describe_bench
from adaspec_eagle.draft import Auto
from adaspec_eagle.measure import Arm, Outcome, Unit
from adaspec_eagle.record import interval, resampled_sums
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.trace import trace_arms

BASELINES = ("generate", "loop", "generate-compiled")  # the last only where it was measured
DEFINITIONS = {
    "tokens_per_s": "emitted tokens, trimmed at the end token, / wall seconds, prefill of target "
    "and head included; sums over prompts",
    "decode_tokens_per_s": "emitted tokens but the first of each answer / (wall - prefill) seconds",
    "speedup_vs_X": "tokens_per_s of the arm / tokens_per_s of arm X; same prompts, dtype, process",
    "decode_speedup_vs_X": "the same with decode_tokens_per_s",
    "tau": "acceptance length: tokens after the first / live (row, round) pairs; bonus token "
    "included, no drafting = 1",
    "alpha_by_depth": "chains only: P(depth d accepted | depth d-1 accepted), d = 1, 2, ...",
    "acceptance_by_depth": "P(depth d accepted) over live (row, round) pairs, d = 1, 2, ...",
    "greedy_alpha": "chains only: accepted / (accepted + rejected) draft tokens",
    "histogram": "histogram[a]: live (row, round) pairs that accepted a draft tokens",
    "ci95": "95 % percentile bootstrap, 2,000 resamples of units (batches of prompts), paired "
    "between arms, ratio of sums in each resample",
    "matched": "answers equal to those of arm `matched_with`, token by token, of `total`",
    "sha256": "of a prompt: the texts of its turns as a JSON list, UTF-8; of a source: its file",
    "seconds": "wall seconds by part, prefill with all that comes before it; their sum is the "
    "arm's wall time; transformers' generate is split into prefill and rest only",
    "forward_seconds": "arms of this package: seconds inside forwards of target and head, those of "
    "prefill left out; what else there is of draft, verify and rest is the loop's own work",
    "peak_memory_bytes": "CUDA: peak allocated while the arm ran; CPU: peak resident set of the "
    "process while the arm ran",
    "generate": "transformers' model.generate, no penalties or cuts, stock attention; "
    "do_sample=False, with a temperature do_sample=True and torch's random numbers",
    "efficiency": "arms of this package: decode_speedup_vs_loop / (tau t(1) / t(n)): what drafting "
    "leaves of the gain that tau promises; t(n): the target's forward with n tokens, from `costs`, "
    "n: the mean number of tokens that the arm verifies a round",
    "costs": "median seconds of a forward behind 256 tokens: of the target with `sizes` new ones, "
    "and of one level of drafting, 8 wide",
    "loop": "this package's decoding loop without a draft",
    "compiled": "with --compile: forwards of all arms but `generate` are compiled; `seconds`: of "
    "each arm's first decode, before the timed ones, which compiles what no arm before it did; "
    "`graphs`: made by then; `graphs_while_timed`: made later, which slowed something down",
    "traces": "one prompt's answer as [text, drafted] pieces, and the first of the rounds that "
    "accepted most: path_probabilities are the head's, `accepted` the nodes on the accepted path",
}


def summarize(
    units: Sequence[Unit], arms: Sequence[Arm], seed: int, reference: str = "generate"
) -> dict[str, dict[str, Any]]:
    """Arm key -> its figures over these units: ratios of sums, each with its interval.

    reference: the arm whose answers the others' are compared with.
    """
    keys = [arm.key for arm in arms]
    rows = [[_columns(unit.outcomes[key]) for key in keys] for unit in units]
    table = np.array(rows)  # [P, A, 5]
    points = ratios(table.sum(0), keys)
    draws = resampled_sums(table.reshape(len(units), -1), seed=seed)  # [R, A * 5]
    spread = ratios(draws.reshape(len(draws), *table.shape[1:]), keys)
    return {
        arm.key: _counts(units, arm, reference)
        | _ratio_fields({n: points[n][i] for n in points}, {n: spread[n][:, i] for n in points})
        | draft_figures([unit.outcomes[arm.key].stats for unit in units], arm.key == "chain", seed)
        for i, arm in enumerate(arms)
    }


def _columns(outcome: Outcome) -> list[float]:
    """What ratios are made of: new tokens, wall, tokens after the first, decode time, rounds."""
    stats = outcome.stats
    decode = outcome.wall - stats.seconds["prefill"]
    return [stats.new_tokens, outcome.wall, stats.tokens, decode, stats.rounds]


def ratios(sums: np.ndarray, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Ratios by name, `[..., A]`, from sums `[..., A, 5]` of `_columns`; nan where undefined.

    Speeds, tau, and the speed-ups over those of BASELINES that are among the keys.
    """
    new, wall, after, decode, rounds = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)  # [..., A]
    with np.errstate(divide="ignore", invalid="ignore"):
        speed, decode_speed = new / wall, after / decode
        made = {"tokens_per_s": speed, "decode_tokens_per_s": decode_speed}
        made["tau"] = np.where(rounds > 0, after / rounds, 1.0)
        for base in (base for base in BASELINES if base in keys):
            at = [keys.index(base)]
            made[f"speedup_vs_{base}"] = speed / speed[..., at]
            made[f"decode_speedup_vs_{base}"] = decode_speed / decode_speed[..., at]
    return made


def _ratio_fields(points: dict[str, Any], spread: dict[str, np.ndarray]) -> dict[str, Any]:
    """`name` and `name_ci95` for each ratio; None where it is not a number."""
    fields: dict[str, Any] = {}
    for name, value in points.items():
        finite = spread[name][np.isfinite(spread[name])]
        fields[name] = float(value) if np.isfinite(value) else None
        fields[f"{name}_ci95"] = interval(finite) if len(finite) and np.isfinite(value) else None
    return fields


def _counts(units: Sequence[Unit], arm: Arm, reference: str) -> dict[str, Any]:
    """An arm's sums: tokens, rounds, seconds by part, matches, memory."""
    outcomes = [unit.outcomes[arm.key] for unit in units]
    stats = total([outcome.stats for outcome in outcomes])
    pairs = [(unit.outcomes[reference].answers, unit.outcomes[arm.key].answers) for unit in units]
    return {
        "shape": arm.shape,
        "new_tokens": stats.new_tokens,
        "tokens_after_first": stats.tokens,
        "rounds": stats.rounds,
        "nodes": stats.nodes,
        "undrafted_rounds": stats.undrafted,
        "wall_s": sum(outcome.wall for outcome in outcomes),
        "seconds": stats.seconds,
        "forward_seconds": stats.forward_seconds,
        "matched": sum(a == b for left, right in pairs for a, b in zip(left, right, strict=True)),
        "total": sum(len(left) for left, _ in pairs),
        "peak_memory_bytes": max(outcome.peak_bytes for outcome in outcomes),
    }


def draft_figures(stats: Sequence[AcceptanceStats], chain: bool, seed: int) -> dict[str, Any]:
    """Acceptance by depth, and for chains alpha, each with intervals over the units' counts.

    What is no chain has an empty `alpha_by_depth`: alpha is defined on chains.
    """
    names = ["acceptance_by_depth"]
    if chain:
        names += ["alpha_by_depth", "greedy_alpha"]
    summed = total(stats)
    fields: dict[str, Any] = {"histogram": summed.accepted, "alpha_by_depth": []}
    draws = resampled_stats(stats, seed)
    for name in names:
        value = getattr(summed, name)
        fields[name] = value
        if not isinstance(value, list):
            fields[f"{name}_ci95"] = interval([getattr(draw, name) for draw in draws])
            continue
        lists = [getattr(draw, name) for draw in draws]
        depths = range(len(value))
        fields[f"{name}_ci95"] = [interval([v[d] for v in lists if len(v) > d]) for d in depths]
    return fields


def resampled_stats(stats: Sequence[AcceptanceStats], seed: int) -> list[AcceptanceStats]:
    """Bootstrap draws of the units' counts, summed; only the counts of acceptance are set."""
    wide = total(stats)
    split = len(wide.accepted)
    columns = np.zeros((len(stats), split + len(wide.offered) + 1))  # [P, accepted + offered + 1]
    for row, one in zip(columns, stats, strict=True):
        row[: len(one.accepted)] = one.accepted
        row[split : split + len(one.offered)] = one.offered
        row[-1] = one.rounds
    draws = resampled_sums(columns, seed=seed).tolist()
    return [AcceptanceStats(d[:split], d[split:-1], d[-1]) for d in draws]


def total(stats: Sequence[AcceptanceStats]) -> AcceptanceStats:
    """The sum of several counts."""
    return sum(stats, AcceptanceStats())


# ---- the result ----------------------------------------------------------------------------------


def speedup_result(
    bench: Bench, args: argparse.Namespace, arms: Sequence[Arm], units: Sequence[Unit]
) -> dict[str, Any]:
    """Everything that `eval/speedup.py` reports, ready for JSON."""
    return {
        "kind": "speedup",
        **describe_bench(bench, args),
        **measured_figures(bench, arms, units),
        "traces": trace_arms(bench, arms),
        "definitions": DEFINITIONS,
    }


def measured_figures(bench: Bench, arms: Sequence[Arm], units: Sequence[Unit]) -> dict[str, Any]:
    """The figures of all arms, together and by source, and every prompt's raw counts.

    Sampled answers are compared with the loop's: the same random numbers, the same answer, up to
    rounding; transformers' generate draws with its own.
    """
    reference, seed = "loop" if bench.temperature else "generate", bench.seed
    figures = summarize(units, arms, seed, reference)
    costs = costs_of(bench.target, bench.head, bench.batch_size, Auto().width, bench.compiled)
    for arm in figures.values():
        arm["efficiency"] = efficiency(arm, costs)
    files = {
        source.name: source.describe()
        | {"arms": summarize(units_of(units, source.name), arms, seed, reference)}
        for source in bench.sources
    }
    return {
        "headline": headline(figures),
        "arms": figures,
        "costs": asdict(costs),
        "files": files,
        "temperature": bench.temperature,
        "matched_with": reference,
        "per_prompt": [_raw(unit, reference) for unit in units],
    }


def efficiency(arm: dict[str, Any], costs: Costs) -> float | None:
    """What drafting leaves of the speed-up that an arm's tau promises.

    None without drafts, and for arms of other loops, whose seconds of verifying are not known.
    """
    if not arm["nodes"] or not arm["seconds"].get("verify"):
        return None
    if not arm["rounds"] or arm["decode_speedup_vs_loop"] is None:
        return None
    verified = 1 + arm["nodes"] / arm["rounds"]
    promised = arm["tau"] * costs.of_target(1) / costs.of_target(verified)
    return arm["decode_speedup_vs_loop"] / promised


def units_of(units: Sequence[Unit], source: str) -> list[Unit]:
    """The units whose prompts come from the source of that name."""
    return [unit for unit in units if unit.prompts[0].source == source]


def _raw(unit: Unit, reference: str) -> dict[str, Any]:
    """One unit's raw counts and seconds, arms in the order in which they ran."""
    wanted = unit.outcomes[reference].answers
    return {
        "ids": [prompt.id for prompt in unit.prompts],
        "sha256": [prompt.sha256 for prompt in unit.prompts],
        "file": unit.prompts[0].source,
        "prompt_tokens": [len(prompt.ids) for prompt in unit.prompts],
        "arms": {
            key: outcome.stats.to_dict()
            | {
                "answer_tokens": [len(answer) for answer in outcome.answers],
                "matched": [a == b for a, b in zip(outcome.answers, wanted, strict=True)],
            }
            for key, outcome in unit.outcomes.items()
        },
    }


def headline(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The speed-up over the fastest way without a draft, of the tree if there is one."""
    arm = "tree" if "tree" in figures else "chain"
    bases = [key for key in BASELINES if key in figures]
    base = max(bases, key=lambda key: figures[key]["tokens_per_s"])
    name = f"speedup_vs_{base}"
    value, bounds = figures[arm][name], figures[arm][f"{name}_ci95"]
    speeds = ", ".join(f"{key} {figures[key]['tokens_per_s']:.1f}" for key in (*bases, arm))
    low, high = bounds
    interval = f"95 % interval {low:.2f} to {high:.2f}" if low < high else "one prompt, no interval"
    sentence = (
        f"End to end, {arm} is {value:.2f} times ({interval}) as fast as `{base}`, the fastest "
        f"way without a draft (tokens/s: {speeds})."
    )
    return {"arm": arm, "over": base, "speedup": value, "ci95": bounds, "sentence": sentence}


def without_prompts(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its per-prompt data."""
    return {key: value for key, value in result.items() if key not in ("per_prompt", "traces")}
