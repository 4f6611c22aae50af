"""Is an answer the target's own? First differences, and emitted tokens rescored one at a time.

float64: every answer must be equal. float32: equal, or at the first difference the target's own top
two logits lie within TIE of each other, and behind it every token lies within TIE of the largest
logit. Half precision: every token of every answer within a margin of it. Tokens are rescored by the
target one at a time; an answer that stops short counts as if it had an end token there.

Legend: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache

from adaspec_eagle.bench import Bench, Prompt
from adaspec_eagle.errors import explain_out_of_memory
from adaspec_eagle.measure import Unit, decode, greedy_baseline
from adaspec_eagle.targets import Target, left_padded

TIE = 1e-4  # float32: top-two logits closer than this are a tie that rounding decides
MARGIN = 0.5  # four units in the last place of a bfloat16 logit between 16 and 32
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Difference:
    """Where an answer leaves the reference's for the first time; logits by one plain forward."""

    id: str
    source: str
    position: int
    reference_token: int
    token: int
    margin: float  # top-two margin of the target's logits
    gap: float  # largest logit minus that of `token`

    @property
    def tie(self) -> bool:
        """Whether both tokens are as good as each other in float32."""
        return self.margin < TIE and self.gap < TIE


def compare(bench: Bench, shapes: dict[str, str], margin: float) -> dict[str, dict]:
    """Mode -> its record by `judge`.

    Rescored are the tokens of answers that differ, in half precision those of all answers.
    """
    found: dict[str, list[Difference]] = {key: [] for key in shapes}
    gaps: dict[str, list[float]] = {key: [] for key in shapes}
    units = track(bench.units(), "comparing", console=Console(stderr=True))
    with explain_out_of_memory("Use a smaller --batch-size or --max-new-tokens"):
        for prompts in units:
            ids, mask = left_padded(bench.target, [prompt.ids for prompt in prompts])
            new = bench.max_new_tokens
            wanted, _ = greedy_baseline(bench.target, new, ids, mask)
            made = {key: decode(bench, shape, ids, mask)[0] for key, shape in shapes.items()}
            for row, (prompt, one) in enumerate(zip(prompts, wanted, strict=True)):
                for key, answers in made.items():
                    if one != answers[row]:
                        first = difference(bench.target, prompt, one, answers[row])
                        found[key].append(first)
                        if first.position >= len(answers[row]):  # there it stops short
                            gaps[key].append(first.gap)
                half = bench.target.dtype in HALF
                mine = {key: answers[row] for key, answers in made.items()}
                mine = {key: answer for key, answer in mine.items() if half or answer != one}
                scored = token_gaps(bench.target, prompt.ids, list(mine.values()))
                for key, values in zip(mine, scored, strict=True):
                    gaps[key] += values
    total = sum(len(source.prompts) for source in bench.sources)
    dtype = bench.target.dtype
    return {k: judge(s, dtype, found[k], gaps[k], total, margin) for k, s in shapes.items()}


def judge(
    shape: str,
    dtype: torch.dtype,
    found: list[Difference],
    gaps: list[float],
    total: int,
    margin: float,
) -> dict[str, Any]:
    """One mode's record; `passed` by the rule of its dtype (see the top of this file)."""
    ties = sum(one.tie for one in found)
    rescored = rescoring(gaps, margin) if dtype in HALF else None
    if rescored:
        passed = rescored["gap_max"] <= margin
    else:
        passed = not found or (dtype == torch.float32 and ties == len(found) and max(gaps) < TIE)
    return {
        "shape": shape,
        "matched": total - len(found),
        "total": total,
        "ties": ties,
        "rescored": rescored,
        "passed": passed,
        "differences": [asdict(one) for one in found],
    }


def rescoring(gaps: list[float], margin: float) -> dict[str, Any]:
    """How far emitted tokens lie below the largest logit when the target rescores them."""
    values = np.array(gaps)
    return {
        "tokens": len(gaps),
        "match": float((values == 0).mean()),
        "gap_p99": float(np.percentile(values, 99)),
        "gap_max": float(values.max()),
        "margin": margin,
    }


@torch.no_grad()
def difference(target: Target, prompt: Prompt, wanted: list[int], answer: list[int]) -> Difference:
    """The first token in which two unequal answers differ, judged on their common prefix.

    An answer that stops short differs where it ends, and counts as if it had an end token there.
    """
    longer = max(len(wanted), len(answer))
    end = (target.eos_token_ids or [target.pad_token_id])[0]
    wanted, answer = (row + [end] * (longer - len(row)) for row in (wanted, answer))
    pairs = enumerate(zip(wanted, answer, strict=True))
    place = next((i for i, (reference, token) in pairs if reference != token), longer - 1)
    prefix = torch.tensor([prompt.ids + wanted[:place]], device=target.device)
    logits = target.model(prefix, logits_to_keep=1, use_cache=False).logits[0, -1]  # [V]
    logits = logits.to(torch.float64)
    first, second = logits.topk(2).values.tolist()
    gap = first - logits[answer[place]].item()
    tokens = (wanted[place], answer[place])
    return Difference(prompt.id, prompt.source, place, *tokens, first - second, gap)


@torch.no_grad()
def token_gaps(target: Target, prompt: list[int], answers: list[list[int]]) -> list[list[float]]:
    """Of every token of every answer: the target's largest logit minus that token's.

    Tokens are fed one at a time; what an answer has in common with the one before it is not fed
    again.
    """
    cache = DynamicCache(config=target.model.config)
    fed: list[int] = []  # tokens of an answer that the cache holds, behind the prompt
    logits: list[Tensor] = []  # [V] each, behind the first 0, 1, ... of them
    found = []
    for answer in answers:
        same = len(commonprefix([fed, answer]))
        if same < len(fed):
            cache.crop(same - len(fed))
        fed, logits = fed[:same], logits[: same + 1]
        while len(logits) < len(answer):
            new = answer[len(fed) : len(fed) + 1] if logits else prompt
            fed += new if logits else []
            ids = torch.tensor([new], device=target.device)
            out = target.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits.append(out.logits[0, -1].float())
        pairs = zip(logits, answer, strict=False)
        found.append([(scores.max() - scores[token]).item() for scores, token in pairs])
    return found


def agreement(target: Target, units: Sequence[Unit], keys: Sequence[str]) -> dict[str, dict]:
    """Arm key -> whether its answers are those of arm `generate`, by the rule of the dtype.

    `lossless`, `gap` (the greatest) and `differences`. An answer that differs is judged where it
    first does and at all of its tokens; equal answers are not rescored.
    """
    differences: dict[str, list[Difference]] = {key: [] for key in keys}
    gaps: dict[str, list[float]] = {key: [0.0] for key in keys}
    for unit in units:
        for place, prompt in enumerate(unit.prompts):
            wanted = unit.outcomes["generate"].answers[place]
            answers = {key: unit.outcomes[key].answers[place] for key in keys}
            other = {key: answer for key, answer in answers.items() if answer != wanted}
            for key, answer in other.items():
                differences[key].append(difference(target, prompt, wanted, answer))
                gaps[key].append(differences[key][-1].gap)
            if other:
                each = [list(one) for one in sorted({tuple(row) for row in other.values()})]
                found = token_gaps(target, prompt.ids, each)  # neighbours begin alike: fed once
                for key, answer in other.items():
                    gaps[key] += found[each.index(answer)]
    made = {}
    for key in keys:
        fine = all(target.dtype == torch.float32 and one.tie for one in differences[key])
        fine = fine and max(gaps[key]) < TIE
        if target.dtype in HALF:
            fine = max(gaps[key]) <= MARGIN
        shown = [asdict(one) for one in differences[key]]
        made[key] = {"lossless": fine, "gap": max(gaps[key]), "differences": shown}
    return made
