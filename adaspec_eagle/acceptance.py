"""How much of a head's drafts the target accepts, by every definition, with each prompt's counts.

Legend: P prompts, S depth of the chains and steps of the unroll.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from adaspec_eagle.data import Record
from adaspec_eagle.distill import Forced, forced_counts
from adaspec_eagle.generate import generate
from adaspec_eagle.head import DraftHead
from adaspec_eagle.record import with_interval
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import Target, by_length, left_padded

WAYS = {"greedy": ("chain", 0.0), "sampled": ("sampled", 1.0)}  # -> (tree, temperature)
ALPHAS = ("greedy_alpha", "alpha_t1")
DEFINITIONS = {
    "greedy_alpha": "accepted / (accepted + rejected) draft tokens, greedy chains",
    "alpha_t1": "the same for chains sampled from the head, verified by the ratio test at "
    "temperature 1: its mean at depth d is the overlap there",
    "alpha_by_depth": "P(depth d accepted | depth d-1 accepted), d = 1, 2, ..., greedy chains",
    "overlap": "mean over positions of sum_v min(p_v, q_v), p over the target's full vocabulary, "
    "by unrolled step, teacher-forced on the greedy answers decoded here",
    "match": "share of positions where the head's top token is the target's, by unrolled step",
    "tau_sim": "1 + mean over positions of sum_s prod_{j<=s} match_j, teacher-forced",
    "X_t1": "X on the target's answers at temperature 1",
}


def acceptance_figures(
    target: Target,
    head: DraftHead,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    depth: int = 5,
    seed: int = 0,
    batch_size: int = 32,
    allow_other_target: bool = False,
) -> dict[str, Any]:
    """Acceptance of a head on prompts (token ids), by every definition in DEFINITIONS.

    Two passes over the prompts, both lossless: greedy chains of `depth` at temperature 0, and
    chains sampled from the head at temperature 1, the random numbers of prompt i following from
    (seed, i) alone. Both passes' answers are then scored teacher-forced. The figures are those of
    `summarized`, all ratios of sums; `per_prompt` has the counts that they are sums of, so that any
    of them can be had again for a resample of the prompts. Raises UserError as `generate` does.
    """
    batches = by_length([len(prompt) for prompt in prompts], batch_size)
    found: list[dict[str, Any]] = [{} for _ in prompts]
    for way, (tree, temperature) in WAYS.items():
        answers: list[list[int]] = [[] for _ in prompts]
        for batch in track(batches, f"{way} chains", console=Console(stderr=True), transient=True):
            ids, mask = left_padded(target, [list(prompts[i]) for i in batch])
            made = generate(
                target,
                head,
                ids,
                mask,
                tree=f"{tree}:{depth}",
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                row_keys=batch,
                allow_other_target=allow_other_target,
            )
            for i, answer, stats in zip(batch, made.answers, made.by_row, strict=True):
                answers[i], found[i][way] = answer, stats.to_dict()
        records = [
            Record(str(i), "", [], list(prompt), answer, target.name, target.fingerprint, None)
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        forced = forced_counts(target, head, records, depth, batch_size)
        for i, counts in enumerate(found):
            row = {f.name: getattr(forced, f.name)[i].tolist() for f in fields(Forced)}
            counts[f"{way}_forced"] = row
    return summarized(found) | {"per_prompt": found}


def summarized(per_prompt: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of these prompts, of any resample of them, or of several tasks' together."""
    made: dict[str, Any] = {"prompts": len(per_prompt)}
    for way, suffix in (("greedy", ""), ("sampled", "_t1")):
        stats = sum(stats_of(per_prompt, way), AcceptanceStats())
        rows = [counts[f"{way}_forced"] for counts in per_prompt]
        sums = [torch.tensor([row[f.name] for row in rows]).double() for f in fields(Forced)]
        made |= {
            f"new_tokens{suffix}": stats.new_tokens,
            f"rounds{suffix}": stats.rounds,
            f"tau{suffix}": stats.tau,
            "alpha_t1" if suffix else "greedy_alpha": stats.greedy_alpha,
            f"alpha_by_depth{suffix}": stats.alpha_by_depth,
            f"acceptance_by_depth{suffix}": stats.acceptance_by_depth,
        }
        figures = Forced(*sums).figures()
        made |= {f"{name}{suffix}": figures[name] for name in ("overlap", "match", "tau_sim")}
    return made


def stats_of(per_prompt: Sequence[dict[str, Any]], way: str) -> list[AcceptanceStats]:
    """Each prompt's counts of one of WAYS."""
    return [AcceptanceStats.from_dict(counts[way]) for counts in per_prompt]


HEADER = ("task", "n", "tau", "greedy alpha", "alpha by depth", "alpha_t1", "overlap", "tau_sim")


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """A row of HEADER's cells for each task of an acceptance result."""
    rows = []
    for name, one in [*result["tasks"].items(), ("all", result["all"])]:
        cells = [Path(name).name, str(one["prompts"]), f"{one['tau']:.2f}"]
        alphas = [with_interval(one[key], one[f"{key}_ci95"], 3) for key in ALPHAS]
        lists = [[f"{value:.2f}" for value in one[key]] for key in ("alpha_by_depth", "overlap")]
        by_depth, overlap = map(" ".join, lists)
        rows.append([*cells, alphas[0], by_depth, alphas[1], overlap, f"{one['tau_sim']:.2f}"])
    return rows
