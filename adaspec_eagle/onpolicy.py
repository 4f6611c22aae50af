"""On-policy answers: between epochs the head rewrites a share of the answers that it is trained on.

The mixture of DistillSpec (Zhou et al., arXiv 2310.08461, Algorithm 1), epoch by epoch: at the
start of every epoch but the first, in which a fresh head would write noise, a fraction lambda of
the records, drawn anew, gets an answer by the head at temperature 1,

    y_t ~ q_s( . | f_{< b - 1}, y_b, ..., y_{t - 1}),   b = S floor(t / S),   s = t - b,

with t counted from the answer's first token and S the unroll steps: q_s is step s of the head
behind the target's features f of the prompt and of all blocks before (but the last token's, which
no pair needs) and behind its own hidden states inside the block. No token is verified. It is the
distribution that step s of the unroll has there on the text that comes out. A head that reads no
features (lm) draws all tokens from one distribution, whatever S.

An answer ends with an end token, or where the one that it replaces ended, so that an epoch costs no
more. All answers are scored by the target as ever; lambda = 0 is offline. What was written is kept
in the run's folder: a resumed run reads the same.

Cost of a rewritten token: two passes of the head (one draws it, one takes it in behind the target's
features), and one of the target, beside those of training.

Legend: B rows, P prompt columns, S tokens of a block, F H features.
"""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from adaspec_eagle.attention import tree_mask
from adaspec_eagle.callbacks import say
from adaspec_eagle.data import read_jsonl
from adaspec_eagle.distill import AnswerSet
from adaspec_eagle.draft import Drafter, Sampled
from adaspec_eagle.features import length_batches, make_table
from adaspec_eagle.head import DraftHead, new_head
from adaspec_eagle.packed import packing
from adaspec_eagle.processes import main_first
from adaspec_eagle.record import write_text
from adaspec_eagle.sampling import Row, Sampler
from adaspec_eagle.targets import Target
from adaspec_eagle.watch import Watch

TEXT_BLOCK = 8  # tokens a head that reads no features draws before its cache takes them in
BATCH_TOKENS = 8192  # prompts and answers that are written together


@torch.no_grad()
def draft_answers(
    target: Target,
    head: DraftHead,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    keys: Sequence[int],
    steps: int,
    seed: int,
) -> list[list[int]]:
    """The head's own answers to prompts of at least two tokens, up to `limits` tokens each.

    head: bound, in evaluation mode. The random numbers of a row follow from (seed, its key, place).
    """
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=target.device)
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(prompt) for prompt in prompts], batch_first=True
    ).to(target.device)  # [B, P]
    block = steps if head.config.feature_layers else TEXT_BLOCK
    text = _Text(target, head.config.feature_layers, tokens, sizes)
    drafter = Drafter(head, Sampled(block), tokens.shape[1] + max(limits) + 2 * block)
    drafter.prefill(text.features[:, :-1], tokens, sizes - 1)
    rows = [Row(key, [], len(prompt)) for key, prompt in zip(keys, prompts, strict=True)]
    sampler = Sampler(rows, sample=True, seed=seed)
    while True:
        tree, _ = drafter.grow(tokens[:, 0], sampler)
        drawn = tree.tokens[:, 1:]  # [B, S]
        going = []
        for place, (row, new) in enumerate(zip(live, drawn.tolist(), strict=True)):
            answers[row] = cut(answers[row] + new, limits[row], target.eos_token_ids)
            sampler.extend(place, new)
            if len(answers[row]) < limits[row] and answers[row][-1] not in target.eos_token_ids:
                going.append(place)
        if not going:
            return answers
        live, drawn = [live[place] for place in going], drawn[going]
        chosen = torch.tensor(going, device=target.device)
        tokens = tokens[chosen]
        for part in (text, drafter):
            part.keep(chosen)
        sampler.keep(going)
        pairs = text.read(drawn)  # features of the token before the block and of all but its last
        taken = torch.full((len(going),), block, device=target.device)
        drafter.advance(pairs, drawn, taken, text.longest - 1)


def cut(answer: list[int], limit: int, end_ids: Sequence[int]) -> list[int]:
    """The answer up to its first end token and at most `limit` tokens."""
    ends = [place + 1 for place, token in enumerate(answer) if token in end_ids]
    return answer[: min([limit, *ends])]


class _Text:
    """The target's features of texts that grow; of no use, and not computed, without layers."""

    def __init__(
        self, target: Target, layers: Sequence[int], tokens: Tensor, sizes: Tensor
    ) -> None:
        self.target, self.layers, self.sizes = target, layers, sizes
        self.features = tokens.new_zeros((*tokens.shape, 0), dtype=target.dtype)  # [B, P, F H]
        self.cache = target.new_cache(tokens.shape[1])
        if layers:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            out = target.forward(tokens, positions, None, self.cache, layers, logits=False)
            self.cache.commit_prefix(sizes)
            self.features = out.features
        last = (sizes - 1)[:, None, None].expand(-1, 1, self.features.shape[-1])
        self.last = self.features.gather(1, last)  # [B, 1, F H], of each text's last token

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.sizes.max())

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows `[B']` only."""
        self.sizes, self.last = self.sizes[rows], self.last[rows]
        if self.layers:
            self.cache.keep(rows)

    def read(self, block: Tensor) -> Tensor:
        """Append a block `[B, S]`; features of the token before it and of its first S - 1."""
        steps = torch.arange(block.shape[1], device=block.device)
        positions = self.sizes[:, None] + steps
        self.sizes = self.sizes + block.shape[1]
        if not self.layers:
            return self.last.expand(-1, block.shape[1], -1)
        causal = (steps[None, :] <= steps[:, None]).expand(len(block), -1, -1)
        cache, target = self.cache, self.target
        mask = tree_mask(cache.lengths, cache.start, causal, target.dtype)
        with packing(target.model).active():
            out = target.forward(block, positions, mask, cache, self.layers, logits=False)
        cache.commit_prefix(torch.full_like(self.sizes, len(steps)), self.longest)
        pairs = torch.cat([self.last, out.features[:, :-1]], 1)
        self.last = out.features[:, -1:]
        return pairs


class OnPolicy(TrainerCallback):
    """At the start of each epoch but the first, a fraction of the answers by the head as it is.

    folder: where `epoch-E.jsonl` is kept, an object with `record` (its number) and `answer_ids` a
    line.
    """

    def __init__(
        self,
        target: Target,
        head: DraftHead,
        answers: AnswerSet,
        fraction: float,
        steps: int,
        folder: Path,
        watch: Watch,
    ) -> None:
        self.target, self.head, self.answers = target, head, answers
        self.fraction, self.steps, self.folder, self.watch = fraction, steps, folder, watch

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rewrite, or read again what was written before the run was stopped."""
        epoch, began = int(state.epoch or 0), time.perf_counter()
        if not epoch:
            return
        path = self.folder / f"epoch-{epoch}.jsonl"
        with main_first():
            if not path.exists():
                lines = [json.dumps(item) + "\n" for item in self.write(args.seed, epoch)]
                write_text(path, "".join(lines))
        found = {item["record"]: item["answer_ids"] for item in read_jsonl(path)}
        self.answers.rewrite(found, self._rows(found))
        count = sum(map(len, found.values()))
        say(f"epoch {epoch + 1}: {len(found)} answers of {count:,} tokens are the head's own")
        self.watch.pause(time.perf_counter() - began)

    def write(self, seed: int, epoch: int) -> list[dict[str, Any]]:
        """The answers of this epoch."""
        records = self.answers.records
        able = [i for i, record in enumerate(records) if len(record.prompt_ids) > 1]
        count = min(round(self.fraction * len(records)), len(able))
        # A stream of its own: drawn as the order of the batches is, whole batches would be chosen.
        chosen = random.Random(f"on-policy {seed} {epoch}").sample(able, count)
        writer = copy_of(self.head, self.target)
        lengths = [len(records[i].ids) for i in chosen]
        found = []
        for batch in length_batches(lengths, BATCH_TOKENS):
            keys = [chosen[place] for place in batch]
            prompts = [records[i].prompt_ids for i in keys]
            limits = [len(records[i].answer_ids) for i in keys]
            made = draft_answers(
                self.target, writer, prompts, limits, keys, self.steps, 1_000_003 * seed + epoch
            )
            found += [
                {"record": i, "answer_ids": answer} for i, answer in zip(keys, made, strict=True)
            ]
        return sorted(found, key=lambda item: item["record"])

    def _rows(self, found: dict[int, list[int]]) -> dict[int, Tensor]:
        """The target's rows of these answers, if those of the others are kept."""
        if self.answers.table is None or not found:
            return {}
        ids = [[*self.answers.records[i].prompt_ids, *answer] for i, answer in found.items()]
        *_, (_, table) = make_table(self.target, ids, self.head.config.feature_layers)
        return {i: table[place] for place, i in enumerate(found)}


def copy_of(head: DraftHead, target: Target) -> DraftHead:
    """The same head in evaluation mode and in the target's dtype; the one in training stays."""
    made = new_head(head.config)
    made.load_state_dict(head.state_dict())
    return made.eval().bind(target, allow_other_target=True)
