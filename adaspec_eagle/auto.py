"""Trees that pay for themselves: how deep to draft and how many nodes to verify.

What the target and the head cost is measured once for each device, dtype and model. From these
seconds and the head's probabilities, corrected by what was accepted so far, a round is shaped so
that expected tokens per second is greatest, not the acceptance length. The greatest ratio tokens /
seconds is found as Dinkelbach does: with `rate` the tokens per second reached so far, a level or a
node is worth having if the tokens it is expected to add exceed rate x the seconds that it takes.
Nodes are verified in few numbers, those that were timed: a new one costs a CUDA graph or, on CPU,
some milliseconds in which oneDNN prepares its products.

On CPU a round is shaped while it is drafted, by its own probabilities. Elsewhere that would have
the device wait for the host at every level: there the probabilities of a round arrive with what was
accepted, in the round's one read, and shape the next rounds.

Legend: B rows, M candidates.
"""

import hashlib
import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from adaspec_eagle.attention import tree_mask
from adaspec_eagle.cache import TreeCache
from adaspec_eagle.compiled import Call, decoding_mode, head_call, target_call
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import DraftHead
from adaspec_eagle.packed import packing
from adaspec_eagle.paths import default_cache_dir
from adaspec_eagle.record import cpu_model, write_json
from adaspec_eagle.targets import Target
from adaspec_eagle.watch import synchronize

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # tokens of a target forward that are timed
FORWARDS = 3  # raised when forwards become faster or slower: costs on disk are measured again
MOST_TOKENS = 512  # of all rows in a forward that is timed; larger trees would hardly pay
HISTORY = 256  # tokens of history while timing
REPEATS, LONG = 7, 0.5  # the median of so many counts; of fewer once they took LONG seconds
PRIOR = 1.0  # rounds that the first guess of the rate is worth
TRUST = 32.0  # rounds that the head's own probabilities are worth against what was accepted
GUESS = 0.5  # acceptance of one more level
PATIENCE = 24  # rounds before drafting may be given up
FORGET = 0.97  # weight of a round's tokens and seconds one round later
RECENT = 0.7  # weight of a round's probabilities one round later, where trees are shaped ahead


@dataclass(frozen=True)
class Costs:
    """Median seconds of a forward, by how much it takes in."""

    sizes: list[int]
    target: list[float]  # of the target with sizes[i] new tokens a row, output layer included
    draft: float  # of one level of drafting

    def of_target(self, tokens: float) -> float:
        """Seconds of a target forward with so many new tokens, between what was measured."""
        spot = min(max(bisect_left(self.sizes, tokens), 1), len(self.sizes) - 1)
        (a, b), (x, y) = self.sizes[spot - 1 : spot + 1], self.target[spot - 1 : spot + 1]
        return max(x + (y - x) * (tokens - a) / (b - a), 1e-9)


def measure_costs(
    target: Target, head: DraftHead, rows: int, width: int, compiled: bool = False
) -> Costs:
    """Time both on this machine; some seconds. `head` is bound; `width` nodes a level."""
    forward = target_call(target, tuple(head.config.feature_layers), compiled)
    with decoding_mode(target.device, compiled):
        sizes = [size for size in SIZES if size <= 2 or rows * size <= MOST_TOKENS]
        times = [time_target(target, forward, rows, size) for size in sizes]
        level = time_draft(head, rows, width, compiled)
    times = [max(times[: i + 1]) for i in range(len(times))]  # noise must not make more cheaper
    return Costs(sizes, times, level)


def time_target(target: Target, forward: Call, rows: int, size: int) -> float:
    """Median seconds of a forward with `size` new tokens a row behind HISTORY; by `target_call`."""
    cache = target.new_cache(HISTORY + size)
    tokens = torch.zeros(rows, size, dtype=torch.long, device=target.device)
    shape = (rows, target.key_heads, 1, target.head_size)
    keys = torch.zeros(shape, dtype=target.dtype, device=target.device)
    history = keys.expand(-1, -1, HISTORY, -1)
    for layer in range(target.num_layers):
        cache.update(history, history, layer)
    lengths = torch.full((rows,), HISTORY, device=target.device)
    cache.commit_prefix(lengths, HISTORY)
    mask = _chain_mask(cache, rows, size, target.dtype)
    positions = HISTORY + torch.arange(size, device=target.device).expand_as(tokens)

    def once() -> None:
        forward(tokens, positions, mask, cache)
        cache.rollback()

    return _median(once, target.device)


def time_draft(head: DraftHead, rows: int, width: int, compiled: bool) -> float:
    """Median seconds of one level with `width` nodes a row, the best ones of each included."""
    weight = head.embed_rows
    config = head.config
    cache = TreeCache(head.cached_layers, HISTORY + width)
    tokens = torch.zeros(rows, HISTORY, dtype=torch.long, device=weight.device)
    features = weight.new_zeros(rows, HISTORY, len(config.feature_layers) * config.hidden_size)
    positions = torch.arange(HISTORY, device=weight.device).expand_as(tokens)
    hidden = head(head.fuse(features), tokens, positions, None, cache, 0)[:, :width]
    cache.commit_prefix(torch.full((rows,), HISTORY, device=weight.device), HISTORY)
    mask = _chain_mask(cache, rows, width, weight.dtype)
    step = 0 if head.deepest == 1 else 1
    tokens, positions = tokens[:, :width], torch.full_like(tokens[:, :width], HISTORY)

    forward = head_call(head, compiled)

    def level() -> None:
        _, out = forward(hidden, tokens, positions, mask, cache, step)
        out.float().topk(min(width, out.shape[-1]), dim=-1)
        cache.rollback()

    return _median(level, weight.device)


def _chain_mask(cache: TreeCache, rows: int, size: int, dtype: torch.dtype) -> Tensor:
    causal = torch.ones(size, size, dtype=torch.bool, device=cache.lengths.device).tril()
    return tree_mask(cache.lengths, cache.start, causal.expand(rows, -1, -1), dtype)


def _median(call: Callable[[], None], device: torch.device) -> float:
    def once() -> float:
        begin = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - begin

    once()
    times: list[float] = []
    while len(times) < REPEATS and (len(times) < 2 or sum(times) < LONG):
        times.append(once())
    return sorted(times)[len(times) // 2]


_KNOWN: dict[str, Costs] = {}


def costs_of(
    target: Target, head: DraftHead, rows: int, width: int, compiled: bool = False
) -> Costs:
    """The costs from this process, from the user's cache, or measured now and kept there."""
    device = target.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    facts = {
        "forwards": FORWARDS,
        "device": place,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "target": target.fingerprint,
        "dtype": str(target.dtype),
        "head": asdict(head.config) | {"target": ""},
        "rows": rows,
        "width": width,
        "compiled": compiled,
        "packed": bool(packing(target.model, look=False).places),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = default_cache_dir() / "costs" / f"{key}.json"
    if key not in _KNOWN:
        try:
            _KNOWN[key] = Costs(**json.loads(path.read_text())["costs"])
        except (OSError, ValueError, KeyError, TypeError):
            _KNOWN[key] = measure_costs(target, head, rows, width, compiled)
            with suppress(UserError):  # what cannot be kept is measured again next time
                write_json(path, {"facts": facts, "costs": asdict(_KNOWN[key])})
    return _KNOWN[key]


@dataclass
class Planner:
    """Decides for one decode, round by round, what is worth drafting and verifying."""

    costs: Costs
    rows: int
    most_nodes: int
    ahead: bool = False  # shape rounds before they begin
    tokens: float = 0.0  # emitted and seconds modelled in the rounds so far, the last weigh most
    seconds: float = 0.0
    rounds: int = 0
    made: float = 0.0  # tokens and modelled seconds since the start, all rounds weighing alike
    spent: float = 0.0
    promised: list[float] = field(default_factory=list)  # by depth: what the head said would pass
    kept: list[float] = field(default_factory=list)  # by depth: what passed
    levels: int = 4  # of the next round, where it is shaped ahead; and its nodes
    count: int = 7
    reach: list[float] = field(default_factory=list)  # by depth: rows that get there, of late
    gains: list[float] = field(default_factory=list)  # by rank: tokens that a candidate brings

    def __post_init__(self) -> None:
        self.most_nodes = min(self.most_nodes, self.costs.sizes[-1] - 1)
        self.verify = [self.costs.of_target(n + 1) for n in range(1, self.most_nodes + 1)]
        span = self.costs.of_target(self.most_nodes + 1) - self.costs.of_target(2)
        self.node = span / max(1, self.most_nodes - 1)  # of one more, on average
        self.timed = {*self.costs.sizes, self.most_nodes + 1}  # tokens of a forward
        self.seconds = PRIOR * self.costs.of_target(1)
        self.tokens = PRIOR * self.rows * 1.5

    @property
    def rate(self) -> float:
        """Tokens a second, all rows together."""
        return self.tokens / self.seconds

    @property
    def plain_rate(self) -> float:
        """Tokens a second without a draft."""
        return self.rows / self.costs.of_target(1)

    def keep(self, rows: int) -> None:
        """Go on with fewer rows; costs stay those of all, with a draft and without alike."""
        share, self.rows = rows / self.rows, rows
        self.tokens *= share
        self.made *= share
        self.reach = [share * value for value in self.reach]
        self.gains = [share * value for value in self.gains]

    def trust(self, depth: int) -> float:
        """Accepted / promised at a depth so far: what the head's probabilities are worth."""
        if depth > len(self.kept):
            return 1.0
        prior = TRUST * self.rows * GUESS**depth
        return (self.kept[depth - 1] + prior) / (self.promised[depth - 1] + prior)

    def wide(self, depth: int, beam: Tensor) -> int:
        """How many nodes of the beam at `depth` to draft a level below; 0 where it does not pay.

        beam `[B, W]`: log p, the greatest first. Nodes that bring less than a node costs on average
        have no children drafted: those are less probable still.
        """
        if self.ahead:
            return beam.shape[1] if depth < self.levels else 0
        share, trust = self.rows / len(beam), self.trust(depth)  # other rows are at rest
        gains = [share * sum(map(math.exp, rank)) for rank in zip(*beam.tolist(), strict=True)]
        if not self._deeper(depth, sum(gains)):
            return 0
        least = self.rate * self.node
        return max(1, sum(trust * gain > least for gain in gains))

    def _deeper(self, depth: int, reach: float) -> bool:
        """Whether a level below `depth` pays, where so many rows are expected to get to `depth`."""
        passes = GUESS * self.trust(min(depth + 1, max(len(self.kept), 1)))
        return reach * passes > self.rate * (self.costs.draft + self.node)

    def nodes(self, scores: Tensor, depths: Tensor) -> int:
        """How many of each row's best candidates to verify: scores (log p) and depths `[B, K]`.

        They come best first, `most_nodes` of them at most.
        """
        if self.ahead:
            most = min(self.count, scores.shape[1])
            return max((n for n in range(1, most + 1) if n + 1 in self.timed), default=1)
        places = depths.tolist()
        trust = [1.0, *(self.trust(d) for d in range(1, max(map(max, places)) + 1))]
        gains = [0.0] * scores.shape[1]
        for chances, row in zip(scores.tolist(), places, strict=True):
            for rank, (score, depth) in enumerate(zip(chances, row, strict=True)):
                gains[rank] += math.exp(score) * trust[depth]
        share = self.rows / len(scores)
        return self._best([share * gain for gain in gains])

    def _best(self, gains: Sequence[float]) -> int:
        """The number of candidates that is worth most, from the tokens that each brings."""
        best, most, gain, rate = 1, -math.inf, 0.0, self.rate
        for count, (one_more, seconds) in enumerate(zip(gains, self.verify, strict=False), 1):
            gain += one_more
            if count + 1 in self.timed and gain - rate * seconds > most:
                best, most = count, gain - rate * seconds
        return best

    def learn(
        self,
        scores: Sequence[Sequence[float]],
        depths: Sequence[Sequence[int]],
        accepted: list[int],
        levels: int,
        nodes: int,
    ) -> None:
        """Take in a round: by row the candidates' scores and depths, and accepted tokens.

        Candidates come best first; the first `nodes` of them were verified.
        """
        promised = [0.0] * (max(max(row[:nodes]) for row in depths) + 1)
        for chances, places in zip(scores, depths, strict=True):
            for score, depth in zip(chances[:nodes], places[:nodes], strict=True):
                promised[depth] += math.exp(score)
        for depth, value in enumerate(promised[1:], 1):
            if len(self.kept) < depth:
                self.kept.append(0.0)
                self.promised.append(0.0)
            passed = sum(count >= depth for count in accepted)
            self.kept[depth - 1] += passed
            self.promised[depth - 1] += value
        # A forward a level, the first takes in what was accepted; other work is about one more.
        spent = (levels + 1) * self.costs.draft
        spent += self.costs.of_target(nodes + 1)
        tokens = sum(accepted) + len(accepted)
        self.rounds, self.made, self.spent = self.rounds + 1, self.made + tokens, self.spent + spent
        self.tokens = FORGET * self.tokens + tokens
        self.seconds = FORGET * self.seconds + spent
        if self.ahead:
            self._shape_next(scores, depths, levels)

    def _shape_next(
        self, scores: Sequence[Sequence[float]], depths: Sequence[Sequence[int]], levels: int
    ) -> None:
        """Levels and nodes of the next round, from the candidates of the last ones."""
        reach, gains = [0.0] * levels, [0.0] * len(scores[0])
        for chances, places in zip(scores, depths, strict=True):
            for rank, (score, depth) in enumerate(zip(chances, places, strict=True)):
                chance = math.exp(score)
                reach[depth - 1] += chance
                gains[rank] += chance * self.trust(depth)
        self.reach, self.gains = _recent(self.reach, reach), _recent(self.gains, gains)
        known = enumerate(self.reach[:levels], 1)  # one level more is tried where all of them pay
        self.levels = next((d for d, rows in known if not self._deeper(d, rows)), levels + 1)
        self.count = self._best(self.gains)

    def pays(self) -> bool:
        """Whether drafting is worth its time, as far as is known; never no at the beginning.

        What all rounds have brought is taken for too little by one in the square root of their
        number, about its standard error: an answer that has given up drafts no more.
        """
        most = self.made * (1 + max(self.rounds, 1) ** -0.5)
        return self.rounds < PATIENCE or most > self.plain_rate * self.spent


def _recent(earlier: list[float], now: list[float]) -> list[float]:
    """A moving average, entry by entry; what one of them lacks is taken from the other."""
    pairs = list(zip_longest(earlier, now))
    kept = [RECENT * a + (1 - RECENT) * b for a, b in pairs if a is not None and b is not None]
    return kept + [b if a is None else a for a, b in pairs[len(kept) :]]
