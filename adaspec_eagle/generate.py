"""The decode loop: draft, verify, commit; lossless, for one row or several of unequal length.

Legend: B rows still running, T prompt columns, N nodes, P path length.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaspec_eagle.attention import tree_mask
from adaspec_eagle.draft import Drafter, Shape, parse_shape
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import DraftHead
from adaspec_eagle.packed import packing
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import Target
from adaspec_eagle.tree import DraftTree, ancestor_mask, lone_root
from adaspec_eagle.verify import emitted, match, pick

FIRST_CAPACITY = 4096  # columns a cache begins with at most; it doubles from there
KEEP_SHARE = 0.75  # a big batch is cut down to its running rows when fewer than this share run


@dataclass
class Generation:
    """The outcome of `generate`."""

    sequences: Tensor  # [B, T + new]: the prompt as given, the answer, then the pad id
    answers: list[list[int]]  # trimmed behind the first end token
    stats: AcceptanceStats


@dataclass
class Stopwatch:
    """Wall seconds by part; on CUDA each part waits for the device."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block's time to a part."""
        begin = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - begin

    def now(self) -> float:
        """Seconds on a clock that has waited for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass
class Answers:
    """The rows' answers so far, and when a row has ended."""

    limit: int
    end_ids: frozenset[int]
    tokens: list[list[int]]
    stats: AcceptanceStats = field(default_factory=AcceptanceStats)

    def ended(self, row: int) -> bool:
        """Whether a row is finished: an end token, or as many tokens as were asked for."""
        answer = self.tokens[row]
        return len(answer) >= self.limit or (bool(answer) and answer[-1] in self.end_ids)

    def extend(self, row: int, new: list[int]) -> int:
        """Append what counts of `new`: up to the limit and to the first end token."""
        taken = 0
        for token in new:
            if self.ended(row):
                break
            self.tokens[row].append(token)
            taken += 1
        self.stats.new_tokens += taken
        return taken

    def count_round(self, taken: int, accepted: int, depth: int, nodes: int) -> None:
        """Add one live (row, round) pair to the statistics."""
        stats = self.stats
        stats.rounds += 1
        stats.tokens += taken
        stats.nodes += nodes
        _bump(stats.accepted, accepted, accepted + 1)
        for d in range(depth):
            _bump(stats.offered, d, depth)


@torch.no_grad()
def generate(
    target: Target,
    head: DraftHead | None,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    tree: str | Shape = "dynamic",
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ignore_eos: bool = False,
    allow_other_target: bool = False,
) -> Generation:
    """Generate with a draft head; the greedy output is the target's own (README: lossless).

    input_ids `[B, T]` with padding on either side, attention_mask `[B, T]` (1 = token). head None:
    plain decoding by the same loop. tree: "dynamic", "static", "chain", "chain:K" or a shape of
    `draft.py`. temperature above 0 samples from the target, without a head only. Raises UserError
    for a head that does not fit the target and for prompts that leave no room in the context.
    """
    rows = _check(
        target,
        head,
        input_ids,
        attention_mask,
        max_new_tokens,
        temperature,
        top_p,
        allow_other_target,
    )
    shape = parse_shape(tree)
    end_ids = frozenset() if ignore_eos else frozenset(target.eos_token_ids)
    answers = Answers(max_new_tokens, end_ids, [[] for _ in rows])
    clock = Stopwatch(target.device)
    begin = clock.now()
    generator = torch.Generator(device=target.device).manual_seed(seed) if temperature else None
    run = _Run(target, head, shape, temperature, top_p, generator, clock)
    with clock.part("prefill"):
        first = run.prefill(rows, max_new_tokens)
    for row, token in enumerate(first):
        answers.extend(row, [token])
    live = list(range(len(rows)))  # live[b]: the row that stands at place b of the batch
    while True:
        running = [not answers.ended(row) for row in live]
        if not any(running):
            break
        if not all(running) and (len(live) <= 8 or sum(running) <= KEEP_SHARE * len(live)):
            places = [b for b, goes_on in enumerate(running) if goes_on]
            run.keep(places)
            live, running = [live[b] for b in places], [True] * len(places)
        for b, tokens in enumerate(run.round(running)):
            if running[b]:
                taken = answers.extend(live[b], tokens)
                answers.count_round(taken, len(tokens) - 1, run.depths[b], run.nodes)
    stats = answers.stats
    stats.seconds = clock.seconds
    stats.seconds["rest"] = clock.now() - begin - sum(clock.seconds.values())
    return Generation(_pad(input_ids, answers.tokens, target.pad_token_id), answers.tokens, stats)


class _Run:
    """The state of one `generate` call: caches, the head's drafter, the last token of each row."""

    def __init__(
        self,
        target: Target,
        head: DraftHead | None,
        shape: Shape,
        temperature: float,
        top_p: float,
        generator: torch.Generator | None,
        clock: Stopwatch,
    ) -> None:
        self.target = target
        self.head = head
        self.shape = shape
        self.sampling = (temperature, top_p, generator)
        self.clock = clock
        self.packing = packing(target.model)
        self.layers = head.config.feature_layers if head else ()
        self.drafter: Drafter | None = None
        self.nodes = 0  # draft nodes verified a row in the last round
        self.depths: list[int] = []  # depth of each row's draft in the last round
        self.lengths: list[int] = []  # each row's history, as the caches have it

    def prefill(self, rows: list[Tensor], max_new_tokens: int) -> list[int]:
        """Take in the prompts; give each row's first token."""
        target, device = self.target, self.target.device
        self.lengths = [len(row) for row in rows]
        lengths = torch.tensor(self.lengths, device=device)
        longest = max(len(row) for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
        room = longest + max_new_tokens + 64
        self.cache = target.new_cache(min(room, FIRST_CAPACITY))
        positions = torch.arange(longest, device=device).expand_as(tokens)
        out = target.forward(tokens, positions, None, self.cache, self.layers, logits=False)
        self.cache.commit_prefix(lengths, longest)
        last = (lengths - 1)[:, None, None].expand(-1, 1, out.hidden.shape[-1])
        logits = target.logits(out.hidden.gather(1, last))  # [B, 1, V]
        self.last = pick(logits, *self.sampling)[:, 0]  # [B]
        if self.head:
            assert out.features is not None
            following = torch.roll(tokens, -1, dims=1)
            following.scatter_(1, lengths[:, None] - 1, self.last[:, None])
            self.drafter = Drafter(self.head, self.shape, min(room, FIRST_CAPACITY))
            self.drafter.prefill(out.features, following, lengths)
        return self.last.tolist()

    def round(self, running: list[bool]) -> list[list[int]]:
        """One draft and one verify; the tokens that each row emits (rows at rest stand still)."""
        with self.clock.part("draft"):
            tree = self.drafter.grow(self.last) if self.drafter else lone_root(self.last)
        self.nodes = tree.tokens.shape[1] - 1
        ancestors = ancestor_mask(tree.parents, self._depth())
        with self.clock.part("verify"):
            picks, features = self._verify(tree, ancestors)
        verdict = match(tree, picks, ancestors)
        tokens = emitted(tree, verdict)  # [B, N]
        depth = tree.depths.amax(1)
        host = torch.cat([verdict.length[:, None], depth[:, None], tokens], 1).tolist()
        counts = [row[0] for row in host]  # the round's one read from the device
        self.depths = [row[1] for row in host]
        gained = [count if go else 0 for count, go in zip(counts, running, strict=True)]
        self.lengths = [old + new for old, new in zip(self.lengths, gained, strict=True)]
        moved = torch.tensor(gained, device=tokens.device)
        self._commit(verdict.path, tokens, moved, max(counts), features)
        self.last = torch.where(moved > 0, verdict.bonus, self.last)
        return [row[2 : 2 + count] for row, count in zip(host, counts, strict=True)]

    def keep(self, places: list[int]) -> None:
        """Keep the rows at the given places of the batch only."""
        rows = torch.tensor(places, device=self.last.device)
        self.lengths = [self.lengths[place] for place in places]
        self.last = self.last[rows]
        self.cache.keep(rows)
        if self.drafter:
            self.drafter.keep(rows)

    def _depth(self) -> int:
        return self.shape.depth if self.drafter else 0

    def _verify(self, tree: DraftTree, ancestors: Tensor) -> tuple[Tensor, Tensor | None]:
        """The target's own token at every node `[B, N]`, and the nodes' features."""
        cache = self.cache
        assert cache.lengths is not None
        mask = tree_mask(cache.lengths, cache.start, ancestors, self.target.dtype)
        # Nodes past the context's end are never emitted: any position that exists will do.
        positions = (cache.lengths[:, None] + tree.depths).clamp(max=self.target.context - 1)
        with self.packing.active():
            out = self.target.forward(tree.tokens, positions, mask, cache, self.layers)
        assert out.logits is not None
        return pick(out.logits, *self.sampling), out.features

    def _commit(
        self, path: Tensor, tokens: Tensor, moved: Tensor, longest: int, features: Tensor | None
    ) -> None:
        """Append the accepted nodes to the target's history, and their pairs to the head's."""
        path = path[:, :longest]  # [B, P]
        self.cache.commit(path, moved, max(self.lengths))
        if not self.drafter:
            return
        assert features is not None
        pairs = features.gather(1, path[:, :, None].expand(-1, -1, features.shape[-1]))
        with self.clock.part("draft"):
            self.drafter.advance(pairs, tokens[:, :longest], moved, max(self.lengths))


def _check(
    target: Target,
    head: DraftHead | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    allow_other_target: bool,
) -> list[Tensor]:
    """Check the arguments and bind the head; the prompts without their padding."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise UserError(f"input_ids of shape {tuple(input_ids.shape)}; expected [rows, tokens]")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature {temperature} (at least 0), top_p {top_p} (within (0, 1])")
    if head is not None and temperature > 0:
        raise UserError("drafting is greedy only: use temperature 0, or head None to sample")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    rows = [ids[keep.bool()] for ids, keep in zip(input_ids, attention_mask, strict=True)]
    for b, row in enumerate(rows):
        if not len(row):
            raise UserError(f"prompt {b} is empty; every prompt needs at least one token")
        if len(row) + max_new_tokens > target.context:
            raise UserError(
                f"prompt {b} has {len(row)} tokens; with {max_new_tokens} new ones it does not fit "
                f"the context of {target.context}; shorten it or lower max_new_tokens"
            )
    if head is not None:
        head.bind(target, allow_other_target)
    return rows


def _bump(counts: list[int], index: int, size: int) -> None:
    """Add one to counts[index], in a list that has at least `size` entries afterwards."""
    counts.extend([0] * (size - len(counts)))
    counts[index] += 1


def _pad(input_ids: Tensor, answers: list[list[int]], pad: int) -> Tensor:
    """The prompt as given, then the answers, padded on the right: `[B, T + new]`."""
    width = max(len(answer) for answer in answers)
    padded = [answer + [pad] * (width - len(answer)) for answer in answers]
    return torch.cat([input_ids, torch.tensor(padded).to(input_ids)], dim=1)
