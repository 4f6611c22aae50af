"""What happened while decoding, as counts; every acceptance figure is derived from them here.

A *round* is one draft and one verify. A (row, round) pair counts while the row is live, that is
until its answer has ended. Counts of different rows, prompts and files are added (`a + b`), so that
a figure over a corpus is a ratio of sums and never a mean of ratios.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate, zip_longest
from typing import Any


@dataclass
class AcceptanceStats:
    """Counts of one decode, or of several added together.

    accepted    accepted[a]: live (row, round) pairs in which exactly `a` draft tokens were accepted
    offered     offered[d]: pairs whose draft reached depth d + 1
    rounds      live (row, round) pairs
    tokens      tokens emitted after the first one, trimmed at the end token
    new_tokens  all emitted tokens, trimmed, the first one (which prefill gives) included
    nodes       draft nodes verified, summed over pairs
    undrafted   pairs decoded plainly, with a head at hand that did not pay (trees "auto")
    seconds     wall seconds by part: prefill, draft, verify, rest
    forward_seconds  of the rounds' seconds, those inside forwards of target and head; 0 if unknown
    """

    accepted: list[int] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)
    rounds: int = 0
    tokens: int = 0
    new_tokens: int = 0
    nodes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    undrafted: int = 0
    forward_seconds: float = 0.0

    @property
    def tau(self) -> float:
        """Acceptance length: `tokens / rounds`, the target's own bonus token included.

        No drafting gives 1.0, and so does a decode without a round (it emitted its first token
        only), so that tau is always a number.
        """
        return self.tokens / self.rounds if self.rounds else 1.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """P(depth d accepted) over all live pairs, for d = 1, 2, ..., as deep as a draft went.

        A draft too short to reach d counts as not accepted there, so 1 + the sum of this list is
        the accepted length per round before trimming: tau, but for what was cut off each answer's
        last round at the end token or the token limit.
        """
        reached = self._reached()
        return [reached[d] / self.rounds for d in range(1, self.depth + 1)] if self.rounds else []

    @property
    def alpha_by_depth(self) -> list[float]:
        """alpha_d = P(depth d accepted | depth d - 1 accepted) for d = 1, 2, ...; for chain drafts.

        The denominator counts drafts accepted to d - 1 that offered a token at depth d. It is exact
        where the drafts are equally long; where they differ it is the smaller of "accepted to
        d - 1" and "offered at d", which can only be too large, so alpha_d is then a lower bound.
        The list ends where no draft was accepted deep enough to be asked.
        """
        reached, judged = self._reached(), self._judged()
        return [reached[d] / judged[d - 1] for d in range(1, len(judged) + 1)]

    @property
    def greedy_alpha(self) -> float:
        """The AdaSPEC paper's alpha: accepted / (accepted + rejected) draft tokens, greedy chains.

        A round rejects at most one token; the tokens behind it are judged by nobody and count
        neither way. It is therefore alpha_d pooled over depths. 0.0 where nothing was drafted.
        """
        return self.accepted_tokens / self.judged_tokens if self.judged_tokens else 0.0

    @property
    def judged_tokens(self) -> int:
        """Draft tokens that were accepted or rejected."""
        return sum(self._judged())

    @property
    def accepted_tokens(self) -> int:
        """Draft tokens accepted, before trimming at the end token."""
        return sum(length * count for length, count in enumerate(self.accepted))

    @property
    def depth(self) -> int:
        """The deepest depth that a draft reached."""
        return max(len(self.offered), len(self.accepted) - 1, 0)

    def _reached(self) -> list[int]:
        """reached[d]: pairs in which at least d draft tokens were accepted; [depth + 1]."""
        padded = self.accepted + [0] * (self.depth + 1 - len(self.accepted))
        return list(accumulate(reversed(padded)))[::-1]

    def _judged(self) -> list[int]:
        """judged[d - 1]: pairs accepted to d - 1 with a token at depth d; stops before a zero."""
        reached = self._reached()
        counts = [min(have, asked) for have, asked in zip(reached, self.offered, strict=False)]
        return counts[: counts.index(0)] if 0 in counts else counts

    def __add__(self, other: AcceptanceStats) -> AcceptanceStats:
        """The counts of both, as if they had been one run."""
        parts = list(self.seconds) + [part for part in other.seconds if part not in self.seconds]
        return AcceptanceStats(
            accepted=_add(self.accepted, other.accepted),
            offered=_add(self.offered, other.offered),
            rounds=self.rounds + other.rounds,
            tokens=self.tokens + other.tokens,
            new_tokens=self.new_tokens + other.new_tokens,
            nodes=self.nodes + other.nodes,
            undrafted=self.undrafted + other.undrafted,
            forward_seconds=self.forward_seconds + other.forward_seconds,
            seconds={p: self.seconds.get(p, 0.0) + other.seconds.get(p, 0.0) for p in parts},
        )

    def to_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON; `from_dict` gives an equal object back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AcceptanceStats:
        """Counts from `to_dict`; other keys of `data` are left alone."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


def _add(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]
