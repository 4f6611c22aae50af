"""From the cells of a grid to differences that survive review.

Legend: S seeds, P prompts, C counts of a prompt, R bootstrap draws. The bootstrap draws seeds and,
apart from them, prompts (crossed, since all seeds answer the same ones), with replacement; arms of
a task share the draws, so that their differences are paired. A few seeds tell a bootstrap too
little about how seeds differ, so that a p-value is never below that of a paired t-test over seeds.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaspec_eagle.alike import Facts, check_alike, facts
from adaspec_eagle.errors import UserError
from adaspec_eagle.record import interval
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.storage import read_json

Cells = list[dict[str, Any]]
DRAWS = 20_000
FEWEST, FEWEST_PRIMARY = 3, 5  # seeds from which on a contrast can hold

METRICS: dict[str, str] = {  # name -> definition
    "greedy_alpha": "accepted / (accepted + rejected) draft tokens on greedy chains, temperature 0",
    "alpha_t1": "the same on chains sampled from the head, ratio test, temperature 1",
    "overlap": "mean of sum_v min(p_v, q_v), first step, teacher-forced on the greedy answers",
    "tau_sim": "1 + mean of sum_s prod_{j<=s} match_j over all positions, teacher-forced on the "
    "greedy answers; above tau, whose rounds begin more often where drafts fail",
    "tau": "acceptance length of greedy chains, the target's own token included",
}
DEFINITIONS = METRICS | {
    "value": "ratio of sums over all seeds and prompts",
    "ci95": "95 % percentile interval of a bootstrap, 20,000 draws of seeds and of prompts; too "
    "narrow where seeds are few, and with one seed over prompts alone",
    "difference": "value minus that of the baseline arm, over the seeds that both have, paired by "
    "seed and prompt",
    "p": "two-sided, the larger of two: twice the smaller share of draws in which the difference "
    "is on either side of 0 (at least 2 / (draws + 1)), and that of a paired t-test over seeds; "
    f"none with fewer than {FEWEST} seeds",
    "p_holm": "p after Holm's correction over the contrasts of this metric that this table has a p "
    "for, all arms and tasks, so that an arm or a task more can change it; the primary contrast, "
    "fixed beforehand, is one test a task and metric and is not corrected",
    "holds": f"at least {FEWEST} seeds ({FEWEST_PRIMARY} for the primary contrast) and p_holm "
    "below 0.05",
}


@dataclass(frozen=True)
class Arm:
    """One arm on one task."""

    cells: Cells  # by seed, ascending
    seeds: list[int]
    counts: np.ndarray  # [S, P, C]

    def of(self, seeds: Sequence[int]) -> np.ndarray:
        """The counts of some of its seeds."""
        return self.counts[[self.seeds.index(seed) for seed in seeds]]


def read_cells(out: Path, budget: str | None = None) -> dict[str, dict[str, Arm]]:
    """Task -> arm -> its cells under OUT/cells, of one budget (None: the only one there is)."""
    budgets = sorted(path.name for path in (out / "cells").glob("*") if path.is_dir())
    if not budgets:
        raise UserError(f"{out} holds no cells yet")
    if budget is None and len(budgets) > 1:
        raise UserError(f"{out} holds cells of several budgets ({', '.join(budgets)}); name one")
    found: dict[str, dict[str, Cells]] = defaultdict(lambda: defaultdict(list))
    made: dict[str, list[tuple[str, Facts]]] = defaultdict(list)
    for path in sorted((out / "cells" / (budget or budgets[0])).glob("*/*.json")):
        cell = read_json(path)
        found[cell["task"]][cell["arm"]].append(cell)
        made[cell["task"]].append((str(path), facts(cell)))
    if not found:
        raise UserError(
            f"{out} holds no cells of --epochs {budget or budgets[0]} (there are folders for "
            f"{', '.join(budgets)}); its tables stay as they are"
        )
    for of_task in made.values():
        check_alike(of_task)
    return {
        task: {name: _arm(cells) for name, cells in arms.items()} for task, arms in found.items()
    }


def _arm(cells: Cells) -> Arm:
    cells = sorted(cells, key=lambda cell: cell["seed"])
    counts = [[_row(prompt) for prompt in cell["per_prompt"]] for cell in cells]
    return Arm(cells, [cell["seed"] for cell in cells], np.array(counts, dtype=float))


# ---- counts and metrics --------------------------------------------------------------------------


def _row(prompt: dict[str, Any]) -> list[float]:
    """A prompt's counts: accepted and judged tokens greedy and sampled, and so on."""
    row: list[float] = []
    for way in ("greedy", "sampled"):
        stats = AcceptanceStats.from_dict(prompt[way])
        row += [stats.accepted_tokens, stats.judged_tokens]
    greedy, forced = prompt["greedy"], prompt["greedy_forced"]
    row += [greedy["tokens"], greedy["rounds"]]
    row += [forced["sums"][1][0], forced["counts"][0], forced["products"], forced["indices"]]
    return row


def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """METRICS from summed counts `[..., C]`: `[...]` each.

    Where there is nothing to count, as in answers shorter than the chains, they are what
    `AcceptanceStats` and `Forced` say of it: 0, and 1 for the two lengths.
    """
    columns = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    accepted, judged, accepted_t1, judged_t1, tokens, rounds, shared, places, run, indices = columns
    return {
        "greedy_alpha": accepted / np.maximum(judged, 1),
        "alpha_t1": accepted_t1 / np.maximum(judged_t1, 1),
        "overlap": shared / np.maximum(places, 1),
        "tau_sim": 1 + run / np.maximum(indices, 1),
        "tau": np.where(rounds > 0, tokens / np.maximum(rounds, 1), 1.0),
    }


def draws(counts: np.ndarray, resamples: int = DRAWS) -> np.ndarray:
    """Sums of counts `[S, P, C]` over drawn seeds and prompts: `[R, C]`.

    The same S and P draw the same seeds and prompts, whatever the counts.
    """
    seeds, prompts, _ = counts.shape
    rng = np.random.default_rng(0)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # [R, S]
    rng = np.random.default_rng(1)
    of_prompts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)  # [R, P]
    by_seed = np.einsum("rp,spc->rsc", of_prompts, counts)
    return np.einsum("rs,rsc->rc", of_seeds, by_seed)


# ---- contrasts -----------------------------------------------------------------------------------


def arm_figures(arm: Arm) -> dict[str, Any]:
    """Value, interval and values by seed of every metric."""
    points, spread = metrics(arm.counts.sum((0, 1))), metrics(draws(arm.counts))
    by_seed = metrics(arm.counts.sum(1))
    return {
        name: {
            "value": float(points[name]),
            "ci95": interval(spread[name]),
            "by_seed": by_seed[name].tolist(),
        }
        for name in METRICS
    }


def difference(arm: Arm, baseline: Arm) -> dict[str, dict[str, Any]] | None:
    """By metric the paired difference to another arm; None where they share no seed.

    p is None where they share too few to say anything of how seeds differ.
    """
    seeds = [seed for seed in arm.seeds if seed in baseline.seeds]
    if not seeds:
        return None
    mine, theirs = arm.of(seeds), baseline.of(seeds)
    points = [metrics(counts.sum((0, 1))) for counts in (mine, theirs)]
    spread = [metrics(draws(counts)) for counts in (mine, theirs)]
    by_seed = [metrics(counts.sum(1)) for counts in (mine, theirs)]
    found = {}
    for name in METRICS:
        drawn = spread[0][name] - spread[1][name]
        tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
        of_draws = min(1.0, 2 * (tail + 1) / (len(drawn) + 1))
        of_seeds = t_test(by_seed[0][name] - by_seed[1][name])
        found[name] = {
            "difference": float(points[0][name] - points[1][name]),
            "difference_ci95": interval(drawn),
            "seeds": len(seeds),
            "p": float(max(of_draws, of_seeds)) if len(seeds) >= FEWEST else None,
        }
    return found


def t_test(gaps: np.ndarray) -> float:
    """Two-sided p of a t-test that the mean of `gaps [S]` is 0; 0 for one gap, which says nothing.

    Student's distribution as a finite sum: Abramowitz and Stegun 26.7.3 (odd), 26.7.4 (even).
    """
    free = len(gaps) - 1
    if free < 1:
        return 0.0
    error = gaps.std(ddof=1) / len(gaps) ** 0.5
    if not error:
        return 0.0 if gaps.any() else 1.0
    angle = math.atan(abs(gaps.mean()) / error / free**0.5)
    odd = free % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for n in range(odd, free - 1 + odd, 2):
        total += term
        term *= (n + 1) / (n + 2) * math.cos(angle) ** 2
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction: step-down, monotone, at most 1, in the order given."""
    order = np.argsort(values)
    corrected, least = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = float(least)
    return corrected


def compare(
    tasks: dict[str, dict[str, Arm]], primary: tuple[str, str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Task -> arm -> metric -> figures, with corrected differences to the primary's second arm."""
    baseline = primary[1]
    made: dict[str, dict[str, dict[str, Any]]] = {}
    others: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for task, arms in tasks.items():
        made[task] = {name: arm_figures(arm) for name, arm in arms.items()}
        for name, arm in arms.items():
            first = name == primary[0]
            if name == baseline or baseline not in arms:
                continue
            for metric, found in (difference(arm, arms[baseline]) or {}).items():
                made[task][name][metric] |= found | {"primary": first, "p_holm": found["p"]}
                if not first and found["p"] is not None:
                    others[metric].append(made[task][name][metric])
    for family in others.values():
        for found, p in zip(family, holm([f["p"] for f in family]), strict=True):
            found["p_holm"] = p
    for found in (one for arms in made.values() for by in arms.values() for one in by.values()):
        if "p" in found:
            enough = found["seeds"] >= (FEWEST_PRIMARY if found["primary"] else FEWEST)
            found["holds"] = bool(enough and found["p_holm"] < 0.05)
    return made
