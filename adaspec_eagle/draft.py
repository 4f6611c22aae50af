"""Grow a draft tree with a head: chain, static tree, dynamic tree (EAGLE-2).

Legend: B rows, T pairs, W nodes of a level, M candidates, H hidden, F H features, Vd draft vocab.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor

from adaspec_eagle.attention import hide, tree_mask
from adaspec_eagle.auto import Costs, Planner
from adaspec_eagle.cache import TreeCache
from adaspec_eagle.compiled import head_call
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import DraftHead
from adaspec_eagle.packed import packing
from adaspec_eagle.sampling import DRAFT, Sampler, draw
from adaspec_eagle.tree import DraftTree, node_depths, select_nodes

# Assumed acceptance by rank among a node's children, for the default static tree.
RANK_RATES = (0.55, 0.14, 0.07, 0.045, 0.03, 0.02)

LEAST_LOGP = -50.0  # of a token, so that in float32 every node has a place below its parent


@dataclass(frozen=True)
class Static:
    """A fixed tree: node n > 0 is the `ranks[n]`-th best child of `parents[n]`.

    EAGLE-1 (arXiv 2401.15077) and Medusa (arXiv 2401.10774) draft such trees.
    """

    parents: tuple[int, ...]  # [N], the root's is 0
    ranks: tuple[int, ...]  # [N], the root's is 0

    def __post_init__(self) -> None:
        _check_whole(self, *self.parents, *self.ranks)
        before = all(0 <= p < n for n, p in enumerate(self.parents[1:], 1))
        root = self.parents[:1] == self.ranks[:1] == (0,)
        if not (before and root) or len(self.parents) != len(self.ranks) or min(self.ranks) < 0:
            raise UserError(
                f"{self}: a static tree has a parent and a rank for each node; node 0 is the root "
                "(parent 0, rank 0), and parents come before their children"
            )

    @property
    def depths(self) -> list[int]:
        """Depth of each node."""
        return node_depths(self.parents)

    sampled: ClassVar[bool] = False

    @property
    def depth(self) -> int:
        """Depth of the deepest node."""
        return max(self.depths)


@dataclass(frozen=True)
class Dynamic:
    """Expand the `width` most probable nodes a level, verify the `nodes` best of all.

    Li et al., "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees", arXiv
    2406.16858, section 4.

    The default is the fastest of four sizes on held-back training prompts of the default target on
    two CPU cores, where every further node costs (results/LOG.md); published GPU settings are 60
    nodes, depth 8, width 10.
    """

    nodes: int = 8  # draft nodes verified, the root not counted
    depth: int = 4
    width: int = 4
    sampled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_sizes(self, self.nodes, self.depth, self.width)


@dataclass(frozen=True)
class Sampled:
    """A chain of `depth` tokens drawn from the head's distribution instead of its best ones.

    Accepted by the ratio test of speculative sampling, so that at temperature 1 a token passes with
    probability sum_v min(p_v, q_v): the overlap.
    """

    depth: int = 4
    sampled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_sizes(self, self.depth)


@dataclass(frozen=True)
class Auto:
    """A dynamic tree whose depth and size follow what pays, within these bounds (auto.py)."""

    nodes: int = 63
    depth: int = 10
    width: int = 8
    costs: Costs | None = None  # of another machine, whose trees are wanted; None: of this one
    sampled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_sizes(self, self.nodes, self.depth, self.width)


def _check_whole(shape: object, *numbers: int) -> None:
    if not all(isinstance(number, Integral) for number in numbers):
        raise UserError(f"{shape}: the numbers of a tree must be whole")


def _check_sizes(shape: object, *sizes: int) -> None:
    _check_whole(shape, *sizes)
    if min(sizes) < 1:
        raise UserError(f"{shape}: nodes, depth and width of a tree must be at least 1")


Shape = Static | Dynamic | Sampled | Auto


def check_shape(shape: Shape, head: DraftHead, context: int) -> None:
    """Raise UserError for a tree that the context has no room for, or deeper than the head drafts.

    Sizes of an auto tree are bounds, and so is a dynamic tree's depth for a head that drafts less
    deep.
    """
    if isinstance(shape, Auto):
        return
    nodes = shape.nodes if isinstance(shape, Dynamic) else shape.depth
    if isinstance(shape, Static):
        nodes = len(shape.parents) - 1
    if max(nodes, shape.depth) >= context:
        raise UserError(
            f"a tree of {nodes} nodes, {shape.depth} deep, has no room in a context of {context}"
        )
    ranks = max(shape.ranks) + 1 if isinstance(shape, Static) else 1
    if ranks > head.config.draft_vocab_size:
        raise UserError(
            f"a static tree with {ranks} children of one node, but this head's draft vocabulary "
            f"has {head.config.draft_vocab_size} tokens: ask for a narrower tree"
        )
    if isinstance(shape, Static | Sampled) and shape.depth > (head.deepest or shape.depth):
        raise UserError(
            f"this head drafts {head.deepest} tokens deep, the tree is {shape.depth} deep: ask for "
            "a smaller one"
        )


def chain(length: int) -> Static:
    """A chain of `length` draft tokens."""
    if length < 1:
        raise UserError(f"a chain of {length} draft tokens: the length must be at least 1")
    return Static((0, *range(length)), (0,) * (length + 1))


def static_tree(nodes: int = 8, rates: tuple[float, ...] = RANK_RATES) -> Static:
    """The `nodes` most probable nodes if the child of rank r is accepted with chance rates[r].

    The greedy choice maximises the expected accepted length under that assumption (Sequoia,
    arXiv 2402.12374; OPT-Tree, arXiv 2406.17276).
    """
    if nodes < 1:
        raise UserError(f"a tree of {nodes} nodes: it must have at least 1")
    found: list[tuple[float, int, tuple[int, ...]]] = []  # paths of ranks, as they are chosen
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-rates[0], 1, (0,))]
    while len(found) < nodes:
        chance, depth, path = heapq.heappop(heap)
        found.append((chance, depth, path))
        heapq.heappush(heap, (chance * rates[0], depth + 1, (*path, 0)))
        if path[-1] + 1 < len(rates):
            sibling = chance / rates[path[-1]] * rates[path[-1] + 1]
            heapq.heappush(heap, (sibling, depth, (*path[:-1], path[-1] + 1)))
    return static_paths([path for _, _, path in found])


def static_paths(paths: Sequence[tuple[int, ...]]) -> Static:
    """The tree with a node for each path of ranks from the root; a path's beginnings are in it."""
    ordered = sorted(paths, key=lambda p: (len(p), p))
    index = {(): 0} | {path: n for n, path in enumerate(ordered, 1)}
    parents = (0, *(index[path[:-1]] for path in ordered))
    return Static(parents, (0, *(path[-1] for path in ordered)))


def parse_shape(tree: str | Shape) -> Shape:
    """A shape from what a user types: "auto", "dynamic", "static", "chain:K", "sampled:K".

    "chain" and "sampled" alone are of 4 tokens.
    """
    if isinstance(tree, Shape):
        return tree
    kind, colon, size = str(tree).partition(":")
    if kind in ("chain", "sampled") and (not colon or size.isdecimal()):
        made = chain(int(size or 4))
        return Sampled(made.depth) if kind == "sampled" else made
    if tree == "auto":
        return Auto()
    if tree == "dynamic":
        return Dynamic()
    if tree == "static":
        return static_tree()
    raise UserError(f"unknown tree {tree!r}; choose auto, dynamic, static, chain:K or sampled:K")


@dataclass(frozen=True)
class Level:
    """What growing one level of a static tree needs, as indices on the device."""

    nodes: Tensor  # [W] nodes of this level
    above: Tensor  # [W] their parents' places among the nodes that went through the head before
    ranks: Tensor  # [W] which of the parent's best tokens each takes
    widest: int  # tokens needed of each parent
    grown: Tensor  # nodes that have children
    grown_above: Tensor  # their parents' places


@dataclass(frozen=True)
class Plan:
    """A static shape, worked out once."""

    levels: list[Level]
    parents: Tensor  # [N]
    depths: Tensor  # [N]


def make_plan(shape: Static, device: torch.device, reads_tokens: bool = True) -> Plan:
    """The levels of a static shape; of a head that reads no tokens one node stands for a level."""

    def on_device(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    depths, inner, levels = shape.depths, [0], []
    for depth in range(1, shape.depth + 1):
        nodes = [n for n, d in enumerate(depths) if d == depth]
        place = {n: inner.index(shape.parents[n]) if reads_tokens else 0 for n in nodes}
        ranks = [shape.ranks[n] for n in nodes]
        inner = [n for n in nodes if n in shape.parents[1:]]
        inner = inner if reads_tokens else inner[:1]
        levels.append(
            Level(
                nodes=on_device(nodes),
                above=on_device([place[n] for n in nodes]),
                ranks=on_device(ranks),
                widest=max(ranks) + 1,
                grown=on_device(inner),
                grown_above=on_device([place[n] for n in inner]),
            )
        )
    return Plan(levels, on_device(shape.parents), on_device(depths))


class Drafter:
    """A head at work: its cache, and what it knows at each row's last committed pair."""

    def __init__(
        self,
        head: DraftHead,
        shape: Shape,
        capacity: int = 256,
        planner: Planner | None = None,
        compiled: bool = False,
        timed: Callable[[Callable], Callable] = lambda call: call,
    ) -> None:
        """timed: makes a callable that is called in place of each of the head's forwards."""
        self.head = head
        self.shape = shape
        self.planner = planner  # of an Auto shape
        self.drafted: tuple[Tensor, ...] = ()  # for the planner: candidates' scores, depths [B, K]
        self.depth = 0  # of the last tree
        self.packing = packing(head)
        self.fuse, self.call = timed(head.fuse), timed(head_call(head, compiled))
        self.least = torch.full((), LEAST_LOGP, device=head.embed_rows.device)
        self.cache = TreeCache(head.cached_layers, capacity)
        self.plan: Plan | None = None  # of a static shape, made once
        # What new columns see of each other, so far: themselves alone, or those before them, too.
        self.itself = self.causal = self.least.new_zeros(1, 1, 0, 0)
        self.hidden: Tensor  # [B, H] at the last pair, from the prefill on
        self.logits: Tensor  # [B, Vd] for the first draft token

    def prefill(self, features: Tensor, tokens: Tensor, lengths: Tensor) -> None:
        """Take in the prompt, features `[B, T, F H]`, lengths `[B]`, and the token behind it.

        tokens `[B, T + 1]`: those of the prompt and, at each row's length, that token.
        """
        hidden = self.head.prefill(features, tokens, self.cache)
        self.cache.commit_prefix(lengths + self.head.leading)
        (last,) = _at_last(lengths, hidden)
        self.hidden = last.clone()  # a view would keep the whole prompt's, until a round frees them
        self.logits = self.head.logits(self.hidden)

    def advance(self, features: Tensor, tokens: Tensor, length: Tensor, longest: int) -> None:
        """Take in accepted pairs: features `[B, P, F H]`, next tokens `[B, P]`, counts `[B]`."""
        count = tokens.shape[1]
        with self.packing.active():
            fused = self.fuse(features)
        if count > self.causal.shape[-1]:
            before = torch.ones(count, count, dtype=torch.bool, device=fused.device).tril()
            self.causal = hide(fused.new_zeros(1, 1, count, count), before[None])
        past, none = self._masks()
        mask = _beside(past, none.expand(-1, count, -1), self.causal[:, :, :count, :count])
        hidden, logits = self._forward(fused, tokens, _up_to(count, fused.device), mask, 0)
        self.cache.commit_prefix(length, longest + self.head.leading)
        self.hidden, self.logits = _at_last(length, hidden, logits)

    def grow(
        self, root: Tensor, sampler: Sampler | None = None, scored: bool = False
    ) -> tuple[DraftTree, list[Tensor]]:
        """A tree of this drafter's shape below the root tokens `[B]`; the cache is as before.

        scored: static trees have their nodes' scores, too (dynamic ones always do).

        For a sampled chain (which needs the sampler) also the distributions `[B, V]` its tokens
        were drawn from, one a depth; else an empty list.
        """
        drafts: list[Tensor] = []
        self.depth = self.shape.depth
        if isinstance(self.shape, Dynamic | Auto):
            tree = self._grow_dynamic(self.shape, root)
        elif isinstance(self.shape, Sampled):
            assert sampler is not None
            tree, drafts = self._grow_sampled(self.shape, root, sampler)
        else:
            reads = self.head.reads_tokens
            self.plan = self.plan or make_plan(self.shape, self.hidden.device, reads)
            tree = self._grow_static(self.plan, root, scored)
        self.cache.rollback()
        return tree, drafts

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows `[B']` only."""
        self.cache.keep(rows)
        self.hidden, self.logits = self.hidden[rows], self.logits[rows]

    def _grow_static(self, plan: "Plan", root: Tensor, scored: bool) -> DraftTree:
        """Level by level; only nodes that have children go through the head."""
        b, device = self.logits.shape[0], self.logits.device
        tokens = root[:, None].repeat(1, len(plan.depths))
        scores = torch.zeros(b, len(plan.depths), device=device) if scored else None
        hidden, logits = self.hidden[:, None], self.logits[:, None]  # [B, W, H], [B, W, Vd]
        past, seen = self._masks()
        for depth, level in enumerate(plan.levels, 1):
            best = logits.topk(level.widest, dim=-1).indices  # [B, W, R]
            tokens[:, level.nodes] = self.head.to_target(best[:, level.above, level.ranks])
            if scores is not None:
                own = logits.float().log_softmax(-1).gather(-1, best)[:, level.above, level.ranks]
                scores[:, level.nodes] = own + scores[:, plan.parents[level.nodes]]
            if depth == len(plan.levels):
                break
            mask, seen = self._level_masks(past, seen[:, level.grown_above])
            hidden, grown = hidden[:, level.grown_above], tokens[:, level.grown]
            hidden, logits = self._forward(hidden, grown, depth - 1, mask, depth)
        return DraftTree(tokens, plan.parents.expand(b, -1), plan.depths.expand(b, -1), scores)

    def _grow_sampled(
        self, shape: Sampled, root: Tensor, sampler: Sampler
    ) -> tuple[DraftTree, list[Tensor]]:
        """Token by token, each drawn from what the head says behind the one before."""
        b, device = self.logits.shape[0], self.logits.device
        places, ids = list(range(b)), self.head.draft_ids
        tokens = [root]
        drafts: list[Tensor] = []
        hidden, logits = self.hidden[:, None], self.logits
        past, seen = self._masks()
        for depth in range(1, shape.depth + 1):
            q = (logits.double() / sampler.temperature).softmax(-1)  # [B, Vd]
            # A head of NaN drafts something, as in other trees; no emitted token depends on it.
            q = torch.where(q.isfinite().all(-1, keepdim=True), q, 1 / q.shape[-1])
            drawn = draw(q, sampler.numbers(places, depth - 1, DRAFT))
            tokens.append(self.head.to_target(drawn))
            whole = q.new_zeros(b, self.head.config.vocab_size)
            drafts.append(q if ids is None else whole.index_copy_(1, ids, q))
            if depth == shape.depth:
                break
            mask, seen = self._level_masks(past, seen)
            token = tokens[-1][:, None]
            hidden, level = self._forward(hidden, token, depth - 1, mask, depth)
            logits = level[:, 0]
        steps = torch.arange(shape.depth + 1, device=device)
        tree = DraftTree(
            torch.stack(tokens, 1), (steps - 1).clamp(min=0).expand(b, -1), steps.expand(b, -1)
        )
        return tree, drafts

    def _grow_dynamic(self, shape: Dynamic | Auto, root: Tensor) -> DraftTree:
        """Keep a beam of the most probable paths; rerank all candidates at the end (EAGLE-2).

        A planner stops growing where a further level does not pay, and says how many nodes do.
        """
        width = min(shape.width, self.logits.shape[-1])
        deepest = min(shape.depth, self.head.deepest or shape.depth)
        none = torch.zeros_like(root)[:, None]  # the root is candidate 0
        # Of the V nodes whose children come next: hidden states, logits, scores, places.
        hidden, logits = self.hidden[:, None], self.logits[:, None]
        score, index = none.float(), none
        tokens, scores, parents = [root[:, None]], [score], list[Tensor]()
        past, seen = self._masks()
        for depth in range(1, deepest + 1):
            logp, best = self._top(logits, width)  # [B, V, W] each
            first = sum(part.shape[1] for part in tokens)  # of the level's candidates
            parents.append(index)
            tokens.append(best.flatten(1))
            scores.append((score[:, :, None] + logp).flatten(1))  # [B, V * W]
            if depth == deepest:
                break
            # The next beam, [B, W]; the children of one node come in order.
            if depth == 1:
                score, place = scores[-1], _up_to(width, root.device).expand_as(scores[-1])
            else:
                score, place = scores[-1].topk(width, dim=1)
            if self.planner:
                wide = self.planner.wide(depth, score)  # it narrows to so many
                if not wide:
                    break
                if wide < width:
                    score, place = score[:, :wide], place[:, :wide]
            token, index = tokens[-1].gather(1, place), place + first
            above = torch.div(place, width, rounding_mode="floor")
            hidden, seen = picked(above, hidden, seen)
            mask, seen = self._level_masks(past, seen)
            hidden, logits = self._forward(hidden, token, depth - 1, mask, depth)
        self.depth = len(parents)
        depths, lower = _depths(tuple(part.shape[1] for part in tokens), root.device)  # [M] each
        # A child stays strictly below its parent, so that a chosen node's parent is chosen too.
        ranked = torch.cat(scores, 1) - lower  # [B, M]
        values, chosen = ranked.topk(min(shape.nodes + 1, len(depths)), dim=1)
        if self.planner:
            self.drafted = (values[:, 1:], depths.take(chosen[:, 1:]))
            chosen = chosen[:, : 1 + self.planner.nodes(*self.drafted)]
        above = torch.cat(parents, 1)[:, :, None].expand(-1, -1, width)  # of all but the root
        above = torch.cat([none, above.flatten(1)], 1)  # [B, M]
        return select_nodes(torch.cat(tokens, 1), above, depths, ranked, chosen)

    def _top(self, logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and target ids of the `width` best: `[..., Vd]` -> `[..., W]` each."""
        logp, ids = logits.log_softmax(-1, dtype=torch.float32).topk(width, dim=-1)
        # What a head that gives no numbers drafts is a tree all the same, and may be rejected.
        return logp.fmax(self.least), self.head.to_target(ids)

    def _masks(self) -> tuple[Tensor, Tensor]:
        """What all nodes of a tree see of the history, and of those above: nothing yet.

        Additive masks: `[B, 1, 1, T]`, and `[B, 1, 0]` for the root.
        """
        none = self.hidden[:, None, :0]
        past = tree_mask(self.cache.lengths, self.cache.start, none, none.dtype)
        return past, none

    def _level_masks(self, past: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The additive mask of a level's nodes: history, nodes above, the level's own columns.

        past `[B, 1, 1, T]`, seen `[B, W, M]`; `[B, 1, W, T + M + W]`, and what of it is no history,
        `[B, W, M + W]`: `seen` for the level below.
        """
        w = seen.shape[1]
        if w > self.itself.shape[-1]:
            eye = torch.eye(w, dtype=torch.bool, device=seen.device)
            self.itself = hide(seen.new_zeros(1, 1, w, w), eye[None])
        mask = _beside(past, seen, self.itself[:, :, :w, :w])
        return mask, mask[:, 0, :, past.shape[-1] :]

    def _forward(
        self, hidden: Tensor, tokens: Tensor, ahead: Tensor | int, mask: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """One head forward in scratch; `ahead` `[N]` counts positions from the history's end.

        mask: additive, `[B, 1, N, T]`. The next hidden states `[B, N, H]`, logits `[B, N, Vd]`.
        """
        positions = (self.cache.lengths[:, None] + ahead).expand_as(tokens)
        return self.call(hidden, tokens, positions, mask, self.cache, step)


def _at_last(length: Tensor, *states: Tensor) -> list[Tensor]:
    """Each row's states at its last pair: `[B]`, `[B, T, X]` each -> `[B, X]` each."""
    if len(length) == 1:  # the only row is padded by none
        return [part[:, -1] for part in states]
    last = (length - 1).clamp(min=0)  # rows at rest take in nothing; what they hold is unused
    return [part[:, 0] for part in picked(last[:, None], *states)]


def picked(index: Tensor, *states: Tensor) -> list[Tensor]:
    """Each row's states at these places: `[B, W]`, `[B, T, X]` each -> `[B, W, X]` each."""
    b, t, _ = states[0].shape
    if b == 1:
        return [x.index_select(1, index[0]) for x in states]
    index = (index + torch.arange(0, b * t, t, device=index.device)[:, None]).flatten()
    return [x.flatten(0, 1).index_select(0, index).unflatten(0, (b, -1)) for x in states]


def _beside(past: Tensor, seen: Tensor, own: Tensor) -> Tensor:
    """One additive mask of what new nodes see: history, earlier scratch, and of each other.

    past `[B, 1, 1, T]`, seen `[B, W, M]`, own `[1, 1, W, W]`: `[B, 1, W, T + M + W]`.
    """
    b, w, _ = seen.shape
    parts = past.expand(-1, -1, w, -1), seen[:, None], own.expand(b, -1, -1, -1)
    return torch.cat(parts, dim=-1)


@lru_cache(maxsize=64)
def _up_to(count: int, device: torch.device) -> Tensor:
    """0, 1, ... `[count]`. Not to be written to."""
    return torch.arange(count, device=device)


@lru_cache(maxsize=64)
def _depths(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The depth of each candidate, 0 for the first `sizes[0]` and so on, and what ranks it lower.

    Not to be written to.
    """
    depths = torch.cat([torch.full((n,), d) for d, n in enumerate(sizes)]).to(device)
    return depths, 1e-4 * depths
