"""The target's next token under sampling and logits processors, whatever was drafted before it.

Every random number belongs to a place (seed, row, position, purpose), so that the token which the
target draws there does not depend on the tree, on the round, or on what else is in the batch:
decoding with trees gives token for token what sampling without a draft gives. (A chain whose tokens
are drawn from the head keeps the law alone: its ratio test takes numbers of its own.)

Legend: B rows of the batch, A rows still walking, N nodes, V vocabulary, Vd draft vocabulary,
D depth, K draws of a place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adaspec_eagle.attention import exact_dtype
from adaspec_eagle.errors import UserError
from adaspec_eagle.tree import DraftTree, node_depths
from adaspec_eagle.verify import Verdict

ANY_HISTORY = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
OWN_HISTORY = (
    RepetitionPenaltyLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)
PICK, DRAFT, ACCEPT, RESIDUAL, RETRY = range(5)  # what a random number is for; RETRY and beyond
TRIES = 16  # draws from the whole vocabulary before a nucleus is sorted out
LEAST_TEMPERATURE = 1e-6  # logits divided by less may leave float32
MAX_SEED = 2**64
MAX_BLOCK = 256  # logits of a block whose greatest is found at once
Ints = Sequence[int] | np.ndarray


def uniforms(seed: int, rows: Ints, positions: Ints, purpose: int | Ints = PICK) -> Tensor:
    """One number of [0, 1) for each (row, position, purpose), float64 `[B]`, always the same.

    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014) over one key after the other.
    """
    state = np.full(len(rows), seed, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in (purpose, rows, positions):
            state = state + (np.asarray(key, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """The ids at which the running sum of `[A, V]` weights passes the shares `[A]` or `[A, K]`."""
    sums = weights.double().cumsum(-1)
    total = sums[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not reach the end
    shares = numbers.to(sums.device, non_blocking=True).view(len(sums), -1)  # [A, K]
    spots = torch.minimum(shares * total, below)
    return torch.searchsorted(sums, spots, right=True).view(numbers.shape)


def check_processors(processors: LogitsProcessorList) -> None:
    """Raise UserError for a logits processor that drafting does not support."""
    for processor in processors:
        if type(processor) not in ANY_HISTORY + OWN_HISTORY:
            known = ", ".join(kind.__name__ for kind in ANY_HISTORY + OWN_HISTORY)
            raise UserError(
                f"logits processor {type(processor).__name__} is not supported with drafting; "
                f"supported: {known}. Leave it out, or generate without a head"
            )
        if isinstance(processor, TemperatureLogitsWarper):
            check_temperature(processor.temperature)


def check_temperature(temperature: float) -> None:
    """Raise UserError for a temperature that logits cannot be divided by."""
    if not LEAST_TEMPERATURE <= temperature < math.inf:
        raise UserError(
            f"temperature {temperature}: 0 for the most probable token, else at least "
            f"{LEAST_TEMPERATURE:g} and finite"
        )


@dataclass
class Row:
    """What the next token of a row depends on beside its logits."""

    key: int  # the row's own number: alone or in a batch, it draws the same
    history: list[int]  # what processors see: the prompt and what was emitted
    position: int  # tokens before the next one, padding not counted
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)


@dataclass
class Sampler:
    """Picks tokens for the rows of a batch; `rows` is kept in step with the batch's places."""

    rows: list[Row]
    sample: bool = False  # else the most probable token
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < MAX_SEED:
            raise UserError(f"seed {self.seed}: must be at least 0 and below 2**64")
        for row in self.rows:
            check_processors(row.processors)

    @property
    def plain(self) -> bool:
        """Whether a token is the argmax of the target's logits and nothing else."""
        return not self.sample and not any(row.processors for row in self.rows)

    @property
    def of_one_kind(self) -> bool:
        """Whether rows sample alike, whatever their history: nodes need no walk to be judged."""
        first = self.rows[0].processors
        alike = all(row.processors is first for row in self.rows)
        return self.sample and alike and not any(isinstance(p, OWN_HISTORY) for p in first)

    @property
    def temperature(self) -> float:
        """The rows' temperature, which sampled drafts take over; 1 where none is set."""
        found = [p for p in self.rows[0].processors if isinstance(p, TemperatureLogitsWarper)]
        return found[0].temperature if found else 1.0

    def keep(self, places: Sequence[int]) -> None:
        """Keep the rows at the given places only."""
        self.rows = [self.rows[place] for place in places]

    def extend(self, place: int, tokens: list[int]) -> None:
        """A row has emitted tokens."""
        self.rows[place].history += tokens
        self.rows[place].position += len(tokens)

    def numbers(self, places: Sequence[int], ahead: int, purpose: int = PICK) -> Tensor:
        """The random numbers of the tokens `ahead` positions behind what was emitted, `[A]`."""
        keys = [self.rows[place].key for place in places]
        positions = [self.rows[place].position + ahead for place in places]
        return uniforms(self.seed, keys, positions, purpose)

    def walk(
        self,
        tree: DraftTree,
        logits: Tensor,
        depth: int,
        running: Sequence[bool],
        drafts: list[Tensor] | None = None,
    ) -> tuple[Verdict, list[list[int]]]:
        """Choose the target's token node by node, and follow the child that equals it.

        logits `[B, N, V]` at every node; depth: of the deepest node. Only the nodes that the walk
        comes to are looked at: processors are applied to them, with the history that they have
        there. drafts: for a chain whose tokens were *sampled*, the distributions `[B, V]` they came
        from, one a depth; then token x is accepted with probability min(1, p(x) / q(x)) and
        replaced by a draw from the rest max(p - q, 0) otherwise (Leviathan et al., arXiv
        2211.17192, algorithm 1). Gives the verdict, and of each row what the host needs: how many
        tokens it emits, the depth of its draft, whether its logits were numbers (where they are
        not, its walk ends), the tokens.
        """
        tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
        paths, bonus = [[0] for _ in tokens], [row[0] for row in tokens]
        finite = [True] * len(tokens)
        live = [place for place, goes_on in enumerate(running) if goes_on]
        for d in range(depth + 1):
            if not live:
                break
            nodes = [paths[place][-1] for place in live]
            alone = len(live) == 1  # then a view will do
            raw = logits[live[0], nodes[0]][None] if alone else logits[live, nodes]  # [A, V]
            drafted = [[tokens[place][n] for n in paths[place][1:]] for place in live]  # [A][d]
            drawn = (tree.tokens[live, d + 1], drafts[d][live]) if drafts and d < depth else None
            chosen, best = self._target_tokens(live, raw, drafted, drawn)
            ahead = []
            for place, token, top in zip(live, chosen.tolist(), best.tolist(), strict=True):
                finite[place], bonus[place] = math.isfinite(top), token
                child = _child(tokens[place], parents[place], paths[place][-1], token)
                if child and finite[place]:
                    paths[place].append(child)
                    ahead.append(place)
            live = ahead
        rows, found = [], []
        for place, path in enumerate(paths):
            new = [*(tokens[place][n] for n in path[1:]), bonus[place]]
            rows.append([len(path), max(node_depths(parents[place])), finite[place], *new])
            rest = [0] * (depth + 1 - len(path))
            found.append([len(path), bonus[place], *path, *rest, *new, *rest])
        made = torch.tensor(found, device=logits.device)
        length, own, *both = made.split([1, 1, depth + 1, depth + 1], 1)
        return Verdict(both[0], length[:, 0], own[:, 0], both[1]), rows

    def _target_tokens(
        self,
        places: list[int],
        logits: Tensor,
        drafted: list[list[int]],
        drawn: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """The target's own tokens behind `drafted`, and the greatest logit there: `[A]` each.

        drawn: the next draft tokens `[A]` and the distributions `[A, V]` that they were drawn from.
        """
        best, tokens = greatest(logits)
        if self.plain:
            return tokens, best
        finite = best.isfinite()
        if not bool(finite.all()):
            logits = logits.masked_fill(~finite[:, None], 0.0)
        scores, ahead = self._process(places, logits, drafted), len(drafted[0])
        if drawn:
            return self._ratio_test(places, scores, *drawn, ahead), best
        return self._choose(places, scores, ahead), best

    def picks(
        self, tree: DraftTree, logits: Tensor, depth: int, drafts: list[Tensor] | None = None
    ) -> Tensor:
        """The tokens that `walk` would choose at every node `[B, N]`, for rows of one kind.

        Arguments as `walk`'s. Nothing waits for the device, as a walk does at each of its steps.
        """
        b, n = tree.tokens.shape
        scores = logits.flatten(0, 1).to(exact_dtype(logits.dtype))  # [B N, V]
        scores = self._applied(self.rows[0].processors, tree.tokens.view(-1, 1), scores)
        nucleus = self._nuclei([0]).item()
        retries = range(RETRY, RETRY + TRIES + 1) if nucleus < 1 else ()
        numbers = self._numbers_of_all(depth, (PICK, ACCEPT, RESIDUAL, *retries), scores.device)
        numbers = numbers.gather(1, tree.depths[:, :, None].expand(-1, -1, numbers.shape[2]))
        first, accept, residual, *again = numbers.flatten(0, 1).unbind(1)  # [B N] each
        probs = scores.softmax(-1)
        if nucleus < 1:
            kept = within_nucleus(scores, nucleus)
            tokens = draw(probs, torch.stack([first, *again[:-1]], 1))  # [B N, K]
            tokens = torch.cat([tokens, draw(kept, again[-1])[:, None]], 1)  # the last is inside
            place = (kept.gather(1, tokens) > 0).long().argmax(1)
            picks = tokens.gather(1, place[:, None]).view(b, n)
        else:
            kept = scores.double().softmax(-1) if drafts else probs
            picks = draw(probs, first).view(b, n)
        if not drafts:
            return picks
        tested = len(drafts)  # of a chain's nodes, all but the last
        p = kept.view(b, n, -1)[:, :tested]
        ahead = (x.view(b, n)[:, :tested].flatten() for x in (accept, residual))
        q = torch.stack(drafts, 1).flatten(0, 1)
        tokens = tested_tokens(p.flatten(0, 1), q, tree.tokens[:, 1:].flatten(), *ahead)
        return torch.cat([tokens.view(b, tested), picks[:, tested:]], 1)

    def _numbers_of_all(self, depth: int, purposes: Sequence[int], device: torch.device) -> Tensor:
        """The numbers of all rows, of 0 to `depth` positions ahead: `[B, D + 1, purposes]`."""
        shape = (len(self.rows), depth + 1, len(purposes))
        keys = np.array([row.key for row in self.rows], dtype=np.uint64)[:, None, None]
        positions = np.array([row.position for row in self.rows])[:, None, None]
        positions = positions + np.arange(depth + 1)[:, None]
        places = [np.broadcast_to(x, shape).ravel() for x in (keys, positions, np.array(purposes))]
        made = uniforms(self.seed, *places)
        return made.view(shape).to(device, non_blocking=True)

    def _process(self, places: list[int], logits: Tensor, drafted: list[list[int]]) -> Tensor:
        """Scores after the rows' processors, in float32 (float64 for float64): `[A, V]`."""
        scores = logits.to(exact_dtype(logits.dtype))
        lists = [self.rows[place].processors for place in places]
        own = any(isinstance(p, OWN_HISTORY) for processors in lists for p in processors)
        if not own and all(processors is lists[0] for processors in lists):
            return self._applied(lists[0], torch.tensor(drafted), scores)  # no ids are looked at
        done = []
        for a, place in enumerate(places):
            ids = torch.tensor([self.rows[place].history + drafted[a]])
            done.append(self._applied(lists[a], ids.to(scores.device), scores[a : a + 1]))
        return torch.cat(done)

    def _applied(self, processors: LogitsProcessorList, ids: Tensor, scores: Tensor) -> Tensor:
        """All processors but a last top-p, which `_choose` sees to without sorting."""
        last = len(processors) - 1
        for place, processor in enumerate(processors):
            if place < last or self._nucleus(processor) == 1:
                scores = processor(ids, scores)
        return scores

    def _nucleus(self, processor: object) -> float:
        """The top-p of a processor that need not sort, 1 of others."""
        if not isinstance(processor, TopPLogitsWarper) or processor.min_tokens_to_keep != 1:
            return 1.0
        return processor.top_p if self.sample else 1.0

    def _nuclei(self, places: list[int]) -> Tensor:
        """The top-p that is still to be applied, 1 where there is none: `[A]`."""
        lasts = [([None, *self.rows[place].processors])[-1] for place in places]
        return torch.tensor([self._nucleus(processor) for processor in lasts])

    def _choose(self, places: list[int], scores: Tensor, ahead: int) -> Tensor:
        """The target's token `[A]`: the best, or a draw.

        A nucleus is drawn from without sorting the vocabulary: a draw from all tokens is kept if
        those above it do not reach top_p, and repeated with the next number otherwise; from the
        sorted vocabulary if that fails TRIES times. Tokens that tie at the nucleus's border are all
        in it (transformers takes some of them, as its sort happens to order them).
        """
        if not self.sample:
            return scores.argmax(-1)
        probs = scores.softmax(-1)  # [A, V]
        token = draw(probs, self.numbers(places, ahead))
        nuclei = self._nuclei(places)
        if bool((nuclei >= 1).all()):
            return token
        top_p = nuclei.to(probs.device)
        for purpose in range(RETRY, RETRY + TRIES + 1):
            above = (probs * (scores > scores.gather(1, token[:, None]))).sum(-1)
            again = ((top_p < 1) & (above > 0) & (above >= top_p)).nonzero()[:, 0]
            if not len(again):
                break
            some = [places[a] for a in again.tolist()]
            last = purpose == RETRY + TRIES
            weights = self.distribution(some, scores[again]) if last else probs[again]
            token[again] = draw(weights, self.numbers(some, ahead, purpose))
        return token

    def distribution(self, places: list[int], scores: Tensor) -> Tensor:
        """What `_choose` draws from, `[A, V]` in float64."""
        nuclei = self._nuclei(places)
        if bool((nuclei >= 1).all()):
            return scores.double().softmax(-1)
        return within_nucleus(scores, nuclei.to(scores.device)[:, None])

    def _ratio_test(
        self, places: list[int], scores: Tensor, drafted: Tensor, q: Tensor, ahead: int
    ) -> Tensor:
        """The drafted token `[A]` where it passes, else a draw from the rest."""
        numbers = (self.numbers(places, ahead, purpose) for purpose in (ACCEPT, RESIDUAL))
        return tested_tokens(self.distribution(places, scores), q, drafted, *numbers)


def greatest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`logits.max(-1)` of `[A, V]`: the greatest, a NaN if there is one, and its place; `[A]` each.

    On CPU a search for places is no vector code, so that one block is searched, not all. Of tokens
    that tie it is the first, there as in `max`.
    """
    a, v = logits.shape
    if logits.device.type != "cpu" or v % MAX_BLOCK:
        return logits.max(-1)
    blocks = logits.reshape(-1, MAX_BLOCK)
    best, block = blocks.amax(-1).view(a, -1).max(-1)
    row = block if a == 1 else block + torch.arange(0, len(blocks), v // MAX_BLOCK)
    return best, block * MAX_BLOCK + blocks.index_select(0, row).argmax(-1)


def _child(tokens: list[int], parents: list[int], node: int, token: int) -> int:
    """The child of a tree's node that has this token; 0 where there is none."""
    later = range(node + 1, len(tokens))
    return next((n for n in later if parents[n] == node and tokens[n] == token), 0)


def within_nucleus(scores: Tensor, top_p: Tensor | float) -> Tensor:
    """The distribution of `[A, V]` scores cut to its nucleus of top_p (`[A, 1]`), in float64.

    The most probable tokens above which there is less than top_p; those that tie at the border are
    all in it.
    """
    probs = scores.double().softmax(-1)
    ranked, ids = scores.sort(-1, descending=True)
    ordered = probs.gather(1, ids)
    begins = functional.pad(ranked[:, 1:] < ranked[:, :-1], (1, 0), value=True)  # of each tie
    above = ((ordered.cumsum(-1) - ordered) * begins).cummax(-1).values  # of all in a tie
    outside = (above > 0) & (above >= top_p) & (top_p < 1)
    probs = probs.masked_fill(outside.gather(1, ids.argsort(-1)), 0.0)
    return probs / probs.sum(-1, keepdim=True)


def tested_tokens(
    p: Tensor, q: Tensor, drafted: Tensor, accept: Tensor, residual: Tensor
) -> Tensor:
    """Speculative sampling's ratio test (Leviathan et al., arXiv 2211.17192, algorithm 1): `[A]`.

    The drafted token where it passes, with probability min(1, p / q), else a draw from what p has
    more than q. p, q `[A, V]`: distributions of the target and the draft; drafted `[A]`, from q;
    accept, residual `[A]`: random numbers.
    """
    q, spot = q.double(), drafted[:, None]
    passes = accept.to(p.device) * q.gather(1, spot)[:, 0] < p.gather(1, spot)[:, 0]
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p = q: nothing is rejected
    return torch.where(passes, drafted, draw(rest, residual))


def warpers(
    temperature: float, top_k: int | None = None, top_p: float = 1.0, min_p: float | None = None
) -> LogitsProcessorList:
    """transformers' own warpers in its own order; raises UserError for values out of range."""
    if temperature != 0:
        check_temperature(temperature)
    if not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: must be within (0, 1]")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k}: must be at least 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise UserError(f"min_p {min_p}: must be within [0, 1]")
    made = LogitsProcessorList()
    if temperature == 0:
        return made
    if temperature != 1:
        made.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        made.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        made.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        made.append(MinPLogitsWarper(min_p))
    return made
