"""The decode loop: draft, verify, commit; lossless, for one row or several of unequal length.

Legend: B rows still running, T prompt columns, N nodes, P path length.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
)

from adaspec_eagle.attention import tree_mask
from adaspec_eagle.auto import Planner, costs_of
from adaspec_eagle.compiled import check_compiler, decoding_mode, target_call
from adaspec_eagle.draft import Auto, Drafter, Shape, check_shape, parse_shape, picked
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import DraftHead, check_head
from adaspec_eagle.packed import packing
from adaspec_eagle.sampling import Row, Sampler, warpers
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import Target
from adaspec_eagle.tree import DraftTree, ancestor_mask, lone_root
from adaspec_eagle.verify import Verdict, match
from adaspec_eagle.watch import synchronize

FIRST_CAPACITY = 4096  # columns that a cache begins with, or twice the prompt; it then doubles
KEEP_SHARE = 0.75  # a big batch is cut down to its running rows when fewer than this share run


@dataclass
class Generation:
    """The outcome of `generate`."""

    sequences: Tensor  # [B, T + new]: the prompt as given, the answer, then the pad id
    answers: list[list[int]]  # trimmed behind the first end token
    by_row: list[AcceptanceStats]  # each row's counts, without seconds
    stats: AcceptanceStats  # their sum, with the seconds of all


class Stopwatch:
    """Wall seconds by part.

    On CUDA a part is the time between two events in the stream, which nothing waits for; the whole
    begins and ends with all work done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []  # part, its begin, its end
        self.inner: list[tuple[Any, Any]] = []  # of forwards, within the parts
        self.begin = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as one of the part's."""
        begin = self._mark()
        yield
        self.marks.append((name, begin, self._mark()))

    def forward(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, timed as a forward of target or head."""

        def timed(*arguments: Any) -> Any:
            begin = self._mark()
            made = call(*arguments)
            self.inner.append((begin, self._mark()))
            return made

        return timed

    def stop(self) -> tuple[dict[str, float], float]:
        """Seconds of every part and of the rest; and of forwards, which are within the parts."""
        whole, seconds = self._now() - self.begin, dict[str, float]()
        for name, begin, end in self.marks:
            seconds[name] = seconds.get(name, 0.0) + self._between(begin, end)
        forwards = sum(self._between(*marks) for marks in self.inner)
        return seconds | {"rest": whole - sum(seconds.values())}, forwards

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self.on_cuda else end - begin

    def _mark(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


@dataclass
class Answers:
    """The rows' answers so far, and when a row has ended."""

    limit: int
    end_ids: frozenset[int]
    tokens: list[list[int]]
    seconds: dict[str, float] = field(default_factory=dict)  # of all rows, by part
    forward_seconds: float = 0.0  # of the rounds' forwards
    stops: Callable[[int, list[int]], bool] | None = None  # (row, its answer) -> whether to stop
    watch: Callable[[int, list[int], int], None] | None = None  # (row, new tokens, accepted drafts)
    watch_tree: Callable[[DraftTree, Verdict], None] | None = None  # called behind every round
    stopped: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.by_row = [AcceptanceStats() for _ in self.tokens]

    @property
    def stats(self) -> AcceptanceStats:
        """The counts of all rows together."""
        counts = sum(self.by_row, AcceptanceStats())
        return replace(counts, seconds=self.seconds, forward_seconds=self.forward_seconds)

    def ended(self, row: int) -> bool:
        """Whether a row is finished: an end token, the limit, or what `stops` says."""
        answer = self.tokens[row]
        at_end = len(answer) >= self.limit or (bool(answer) and answer[-1] in self.end_ids)
        return at_end or row in self.stopped

    def extend(self, row: int, new: list[int]) -> int:
        """Append what counts of `new`, whose last token is the target's own; how many that was."""
        taken = 0
        for token in new:
            if self.ended(row):
                break
            self.tokens[row].append(token)
            taken += 1
            if self.stops and self.stops(row, self.tokens[row]):
                self.stopped.add(row)
        self.by_row[row].new_tokens += taken
        if self.watch and taken:
            self.watch(row, new[:taken], min(taken, len(new) - 1))
        return taken

    def count_round(self, row: int, taken: int, accepted: int, depth: int, nodes: int) -> None:
        """Add one live (row, round) pair to the statistics."""
        stats = self.by_row[row]
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
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    stop_strings: str | Sequence[str] = (),
    seed: int = 0,
    row_keys: Sequence[int] | None = None,
    watch: Callable[[int, list[int], int], None] | None = None,
    watch_tree: Callable[[DraftTree, Verdict], None] | None = None,
    ignore_eos: bool = False,
    compiled: bool = False,
    allow_other_target: bool = False,
) -> Generation:
    """Generate with a draft head; the output is the target's own (README: lossless).

    input_ids `[B, T]` with padding on either side, attention_mask `[B, T]` (1 = token). head None:
    plain decoding by the same loop. tree: "auto", "dynamic", "static", "chain:K", "sampled:K" or a
    shape of `draft.py`. temperature 0 takes the most probable token; above it, top_k, top_p and
    min_p cut as in transformers. The token drawn at a place depends on (seed, row key, position)
    alone, not on the tree or the batch (under "sampled:K" its law alone does not depend on them);
    row_keys: one for each row, their numbers unless given.
    watch: is called as tokens come, with (row, new tokens, how many of them were drafted);
    watch_tree: behind every round, with the tree that was verified, scores included (but those of
    "sampled:K"), and what was accepted of it.
    compiled: forwards compiled on first use, some minutes' work (compiled.py).
    Raises UserError for a head that does not fit the target, for prompts that leave no room in the
    context and for values out of range.
    """
    whole = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "seed": seed}
    cut = {"temperature": temperature, "top_p": top_p, "repetition_penalty": repetition_penalty}
    for kind, names, given in (
        (Integral, "a whole number", whole | ({} if top_k is None else {"top_k": top_k})),
        (Real, "a number", cut | ({} if min_p is None else {"min_p": min_p})),
    ):
        for name, number in given.items():
            if not isinstance(number, kind):
                raise UserError(f"{name} {number!r}: must be {names}")
    max_new_tokens, min_new_tokens, seed = map(int, whole.values())
    rows = check_prompts(target, input_ids, attention_mask, max_new_tokens)
    shape = parse_shape(tree)
    if shape.sampled and temperature == 0:
        raise UserError(f"tree {tree!r} samples its drafts: give a temperature above 0")
    if not 0 <= min_new_tokens <= max_new_tokens or not 0 < repetition_penalty < math.inf:
        raise UserError(
            f"min_new_tokens {min_new_tokens} (from 0 to max_new_tokens), repetition_penalty "
            f"{repetition_penalty} (above 0)"
        )
    keys = range(len(rows)) if row_keys is None else row_keys
    keys = list(keys) if isinstance(keys, Iterable) else []
    if len(keys) != len(rows) or not all(isinstance(k, Integral) and 0 <= k < 2**63 for k in keys):
        raise UserError(
            f"row_keys {row_keys}: whole numbers from 0 to 2**63 - 1, one for each of the rows, "
            f"{len(rows)} here"
        )
    strings: list = [stop_strings] if isinstance(stop_strings, str) and stop_strings else []
    if not isinstance(stop_strings, str):
        strings = [*stop_strings] if isinstance(stop_strings, Iterable) else [stop_strings]
    if not all(isinstance(string, str) and string for string in strings):
        raise UserError(f"stop_strings {strings}: must be texts of at least one character")
    if stop_strings and target.tokenizer is None:
        raise UserError(f"stop strings need a tokenizer, and target {target.name!r} has none")
    if compiled:
        check_compiler(target.device)
    if head is not None:
        check_head(head).bind(target, allow_other_target)
    cuts = warpers(temperature, None if top_k is None else int(top_k), top_p, min_p)
    prompts = [row.tolist() for row in rows]
    end_ids = [] if ignore_eos else target.eos_token_ids
    sampler = Sampler(
        [
            Row(
                key,
                [*ids],
                len(ids),
                _processors(cuts, repetition_penalty, ids, min_new_tokens, end_ids, target.device),
            )
            for key, ids in zip(keys, prompts, strict=True)
        ],
        sample=temperature > 0,
        seed=seed,
    )
    answers = Answers(
        max_new_tokens, frozenset(end_ids), [[] for _ in rows], watch=watch, watch_tree=watch_tree
    )
    if stop_strings:
        criterion = StopStringCriteria(target.tokenizer, strings)
        answers.stops = lambda row, answer: bool(
            criterion(torch.tensor([prompts[row] + answer]), None).any()
        )
    decode(target, head, rows, shape, sampler, answers, compiled)
    sequences = padded_answers(input_ids, answers.tokens, target.pad_token_id)
    return Generation(sequences, answers.tokens, answers.by_row, answers.stats)


def _processors(
    cuts: LogitsProcessorList,
    penalty: float,
    prompt: list[int],
    least: int,
    end_ids: list[int],
    device: torch.device,
) -> LogitsProcessorList:
    """A row's processors in transformers' order; `cuts` itself where nothing depends on the row."""
    own: list = []
    if penalty != 1:
        own.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    if least and end_ids:
        own.append(MinNewTokensLengthLogitsProcessor(len(prompt), least, end_ids, str(device)))
    return LogitsProcessorList([*own, *cuts]) if own else cuts


def decode(
    target: Target,
    head: DraftHead | None,
    rows: list[Tensor],
    shape: Shape,
    sampler: Sampler,
    answers: Answers,
    compiled: bool = False,
) -> None:
    """The loop behind `generate`, for arguments that were checked: fills `answers`.

    rows: the prompts' ids without padding; head: bound, or None; `sampler` and `answers` have a row
    for each of them. Raises UserError for a tree that the context or the head has no room for.
    """
    if head is not None:
        check_shape(shape, head, target.context)
        if isinstance(shape, Auto) and shape.costs is None:  # before the clock runs
            found = costs_of(target, head, len(rows), shape.width, compiled)
            shape = replace(shape, costs=found)
    with decoding_mode(target.device, compiled):
        clock = Stopwatch(target.device)
        with clock.part("prefill"):
            run = _Run(target, head, shape, sampler, clock, compiled, answers.watch_tree)
            first = run.prefill(rows, answers.limit)
        for row, token in enumerate(first):
            answers.extend(row, [token])
        with run.packed():
            _rounds(run, answers, list(range(len(rows))))
        answers.seconds, answers.forward_seconds = clock.stop()


def _rounds(run: "_Run", answers: Answers, live: list[int]) -> None:
    """Rounds until all rows have ended; live[b]: the row that stands at place b of the batch."""
    while True:
        running = [not answers.ended(row) for row in live]
        if not any(running):
            break
        if not all(running) and (len(live) <= 8 or sum(running) <= KEEP_SHARE * len(live)):
            places = [b for b, goes_on in enumerate(running) if goes_on]
            run.keep(places)
            live, running = [live[b] for b in places], [True] * len(places)
        given_up = run.head is not None and run.drafter is None
        for b, tokens in enumerate(run.round(running)):
            if running[b]:
                taken = answers.extend(live[b], tokens)
                answers.count_round(live[b], taken, len(tokens) - 1, run.depths[b], run.nodes)
                answers.by_row[live[b]].undrafted += given_up


class _Run:
    """The state of one `decode`: caches, the head's drafter, the last token of each row."""

    def __init__(
        self,
        target: Target,
        head: DraftHead | None,
        shape: Shape,
        sampler: Sampler,
        clock: Stopwatch,
        compiled: bool,
        watch_tree: Callable[[DraftTree, Verdict], None] | None = None,
    ) -> None:
        self.target = target
        self.head = head
        self.shape = shape
        self.sampler = sampler
        self.clock = clock
        self.watch_tree = watch_tree
        self.compiled = compiled
        self.layers = tuple(head.config.feature_layers) if head else ()
        self.forward = clock.forward(target_call(target, self.layers, compiled))
        self.drafter: Drafter | None = None
        self.nodes = 0  # draft nodes verified a row in the last round
        self.drafted: list[list] = []  # for the planner: candidates' scores and depths [B][K]
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
        capacity = min(longest + max_new_tokens + 64, max(FIRST_CAPACITY, 2 * longest))
        self.cache = target.new_cache(capacity)
        positions = torch.arange(longest, device=device).expand_as(tokens)
        out = target.forward(tokens, positions, None, self.cache, self.layers, logits=False)
        self.cache.commit_prefix(lengths, longest)
        last = (lengths - 1)[:, None, None].expand(-1, 1, out.hidden.shape[-1])
        logits = target.logits(out.hidden.gather(1, last))  # [B, 1, V]
        root = lone_root(tokens[:, 0])
        running = [True] * len(rows)
        itself = ancestor_mask(root.parents, 0)
        verdict, host, _ = self._judge(root, logits, itself, 0, running, [])
        self.last = verdict.bonus  # [B]
        self._check_finite(host, rows)
        if self.head:
            whole = functional.pad(tokens, (0, 1)).scatter(1, lengths[:, None], self.last[:, None])
            planner = None
            if isinstance(self.shape, Auto):
                assert self.shape.costs is not None
                ahead = device.type != "cpu"  # where reading scores would have the device wait
                planner = Planner(self.shape.costs, len(rows), self.shape.nodes, ahead)
            timed = self.clock.forward
            self.drafter = Drafter(self.head, self.shape, capacity, planner, self.compiled, timed)
            self.drafter.prefill(out.features, whole, lengths)
        first = [row[3] for row in host]
        for b, token in enumerate(first):
            self.sampler.extend(b, [token])
        return first

    def round(self, running: list[bool]) -> list[list[int]]:
        """One draft and one verify; the tokens that each row emits (rows at rest stand still)."""
        with self.clock.part("draft"):
            if self.drafter:
                if self.drafter.planner and self.drafter.planner.rows != sum(running):
                    self.drafter.planner.keep(sum(running))
                scored = self.watch_tree is not None
                tree, drafts = self.drafter.grow(self.last, self.sampler, scored)
            else:
                tree, drafts = lone_root(self.last), []
        verdict, host, features = self._check(tree, drafts, running)
        nodes, self.depths = self.nodes, [row[1] for row in host]
        if nodes and not all(row[2] for row in host):
            # What the target makes of one node reaches, as NaN, those that do not look at it.
            self.cache.wipe()
            tree = lone_root(self.last)
            verdict, host, features = self._check(tree, [], running)
            self.nodes = nodes
        self._check_finite(host)
        if self.watch_tree:
            self.watch_tree(tree, verdict)
        counts = [row[0] for row in host]
        gained = [count if go else 0 for count, go in zip(counts, running, strict=True)]
        self.lengths = [old + new for old, new in zip(self.lengths, gained, strict=True)]
        everyone = gained == counts
        moved = verdict.length if everyone else torch.tensor(gained, device=features.device)
        if self.drafter and self.drafter.planner:
            planner, rows = self.drafter.planner, [b for b, go in enumerate(running) if go]
            scores, depths = ([part[b] for b in rows] for part in self.drafted)
            accepted = [counts[b] - 1 for b in rows]
            planner.learn(scores, depths, accepted, self.drafter.depth, nodes)
            if not planner.pays():
                self.drafter = None
        self._commit(verdict, moved, max(counts), features)
        self.last = verdict.bonus if everyone else torch.where(moved > 0, verdict.bonus, self.last)
        new = [row[3 : 3 + count] for row, count in zip(host, counts, strict=True)]
        for b, goes_on in enumerate(running):
            if goes_on:
                self.sampler.extend(b, new[b])
        return new

    def _check(
        self, tree: DraftTree, drafts: list[Tensor], running: list[bool]
    ) -> tuple[Verdict, list[list[int]], Tensor]:
        """Verify a tree: the verdict, what the host needs (Sampler.walk), the nodes' features."""
        self.nodes = tree.tokens.shape[1] - 1
        limit = self.drafter.depth if self.drafter and self.nodes else 0
        ancestors = ancestor_mask(tree.parents, limit)
        with self.clock.part("verify"):
            logits, features = self._verify(tree, ancestors)
        planned = self.drafter.drafted if self.drafter and self.nodes else ()
        verdict, host, drafted = self._judge(
            tree, logits, ancestors, limit, running, drafts, planned
        )
        self.drafted = drafted or self.drafted
        return verdict, host, features

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Packed weights for many rounds, so that no round need put them in place."""
        with ExitStack() as stack:
            for module in () if self.compiled else filter(None, (self.target.model, self.head)):
                stack.enter_context(packing(module, look=False).active())
            yield

    def keep(self, places: list[int]) -> None:
        """Keep the rows at the given places of the batch only."""
        rows = torch.tensor(places, device=self.last.device)
        self.lengths = [self.lengths[place] for place in places]
        self.last = self.last[rows]
        self.cache.keep(rows)
        self.sampler.keep(places)
        if self.drafter:
            self.drafter.keep(rows)

    def _verify(self, tree: DraftTree, ancestors: Tensor) -> tuple[Tensor, Tensor]:
        """The target's logits at every node `[B, N, V]`, and the nodes' features."""
        cache = self.cache
        mask = tree_mask(cache.lengths, cache.start, ancestors, self.target.dtype)
        # Nodes past the context's end are never emitted: any position that exists will do.
        positions = (cache.lengths[:, None] + tree.depths).clamp(max=self.target.context - 1)
        return self.forward(tree.tokens, positions, mask, cache)

    def _judge(
        self,
        tree: DraftTree,
        logits: Tensor,
        ancestors: Tensor,
        depth: int,
        running: list[bool],
        drafts: list[Tensor],
        planned: Sequence[Tensor] = (),
    ) -> tuple[Verdict, list[list[int]], list[list]]:
        """What the target accepts; what the host needs (Sampler.walk); `planned` on the host."""
        sampler = self.sampler
        if logits.device.type == "cpu" or not (sampler.plain or sampler.of_one_kind):
            verdict, host = sampler.walk(tree, logits, depth, running, drafts or None)
            return verdict, host, [part.tolist() for part in planned]
        # Elsewhere a read is dear, and nodes are not: the target's tokens at all of them.
        best, picks = logits.max(-1)  # [B, N]; a NaN is its row's maximum
        finite = best.isfinite()
        if not sampler.plain:
            logits = logits.masked_fill(~finite[:, :, None], 0.0)
            picks = sampler.picks(tree, logits, depth, drafts or None)
        verdict = match(tree, picks, ancestors)
        fine = finite.gather(1, verdict.path).all(1)
        facts = torch.stack([verdict.length, tree.depths.amax(1), fine.long()], 1)
        few, more, *drafted = _read(facts, verdict.tokens, *planned)
        return verdict, [a + b for a, b in zip(few, more, strict=True)], drafted

    def _check_finite(self, host: list[list[int]], rows: list[Tensor] | None = None) -> None:
        """Raise UserError naming layer and token if a row's logits are NaN or infinite."""
        for place, (_, _, fine, *_) in enumerate(host):
            if not fine:
                row = self.sampler.rows[place]  # its history may begin with padding
                ids = row.history[-row.position :] if rows is None else rows[place].tolist()
                raise UserError(where_not_finite(self.target, ids))

    def _commit(self, verdict: Verdict, moved: Tensor, longest: int, features: Tensor) -> None:
        """Append the accepted nodes to the target's history, and their pairs to the head's."""
        path, tokens = verdict.path[:, :longest], verdict.tokens[:, :longest]  # [B, P]
        self.cache.commit(path, moved, max(self.lengths))
        if not self.drafter:
            return
        (pairs,) = picked(path, features)
        with self.clock.part("draft"):
            self.drafter.advance(pairs, tokens, moved, max(self.lengths))


def _read(*parts: Tensor) -> list[list[list]]:
    """Rows of numbers `[B, X]` each, on the host: the round's one read from the device."""
    # What are whole numbers stay so in float64.
    rows = torch.cat([part.double() for part in parts], 1).tolist()
    read, begin = [], 0
    for part in parts:
        end = begin + part.shape[1]
        whole = not part.is_floating_point()
        read.append([[*map(int, row[begin:end])] if whole else row[begin:end] for row in rows])
        begin = end
    return read


def where_not_finite(target: Target, ids: list[int]) -> str:
    """Which hidden state of the target is the first that is no number, and at which token."""
    tokens = torch.tensor([ids], device=target.device)
    out = target.model(input_ids=tokens, output_hidden_states=True)
    states = [(f"hidden state {i}", state) for i, state in enumerate(out.hidden_states)]
    for name, state in [*states, ("the logits", out.logits)]:
        wrong = (~state[0].isfinite()).any(-1).nonzero()[:, 0]
        if len(wrong):
            place = int(wrong[0])
            return (
                f"target {target.name!r} gives NaN or infinite values: first in {name}, at token "
                f"{place} (id {ids[place]}); check the weights, or load them with --dtype float32"
            )
    return (
        f"target {target.name!r} gave NaN or infinite logits behind {len(ids)} tokens, but not "
        "when they were computed again; load it with --dtype float32"
    )


def check_prompts(
    target: Target, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int
) -> list[Tensor]:
    """The prompts without their padding; UserError for those that cannot be answered."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        what = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise UserError(f"input_ids of type {what}; expected a tensor of int64 or int32")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise UserError(f"input_ids of shape {tuple(input_ids.shape)}; expected [rows, tokens]")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not isinstance(attention_mask, Tensor):
        raise UserError(
            f"attention_mask of type {type(attention_mask).__name__}; expected a tensor"
        )
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask of shape {tuple(attention_mask.shape)} for input_ids of shape "
            f"{tuple(input_ids.shape)}: they must be the same"
        )
    rows = [ids[keep.bool()] for ids, keep in zip(input_ids, attention_mask, strict=True)]
    for b, row in enumerate(rows):
        if not len(row):
            raise UserError(f"prompt {b} is empty; every prompt needs at least one token")
        least, most = int(row.min()), int(row.max())
        if least < 0 or most >= len(target.embedding):
            raise UserError(
                f"prompt {b} has ids from {least} to {most}; target {target.name!r} knows those "
                f"from 0 to {len(target.embedding) - 1}"
            )
        if len(row) + max_new_tokens > target.context:
            raise UserError(
                f"prompt {b} has {len(row)} tokens; with {max_new_tokens} new ones it does not fit "
                f"the context of {target.context}; shorten it or lower max_new_tokens"
            )
    return rows


def _bump(counts: list[int], index: int, size: int) -> None:
    """Add one to counts[index], in a list that has at least `size` entries afterwards."""
    counts.extend([0] * (size - len(counts)))
    counts[index] += 1


def padded_answers(input_ids: Tensor, answers: list[list[int]], pad: int) -> Tensor:
    """The prompt as given, then the answers, padded on the right: `[B, T + new]`."""
    width = max(len(answer) for answer in answers)
    padded = [answer + [pad] * (width - len(answer)) for answer in answers]
    return torch.cat([input_ids, torch.tensor(padded).to(input_ids)], dim=1)
