"""What people watch while a head trains: speed, memory, and what the selection keeps.

And what every measurement asks of a device: to have finished, and its peak memory.
"""

import resource
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

BANDS = {"top_100": 100, "to_1000": 1000, "to_10000": 10_000}  # by rank; above them: "rest"


def token_counts(answers: Iterable[Sequence[int]], vocab_size: int) -> Tensor:
    """How often each token id stands in the answers `[V]`."""
    ids = torch.tensor(list(chain.from_iterable(answers)), dtype=torch.long)
    return torch.bincount(ids, minlength=vocab_size)


def frequency_bands(answers: Iterable[Sequence[int]], vocab_size: int) -> Tensor:
    """Band of every token id `[V]`, by its rank among the answers' tokens: 0 the most frequent."""
    counts = token_counts(answers, vocab_size)
    rank = torch.empty_like(counts)
    rank[counts.argsort(descending=True, stable=True)] = torch.arange(vocab_size)
    return torch.bucketize(rank, torch.tensor(list(BANDS.values())), right=True)


class Watch:
    """Counts between two lines of the log.

    `take` gives tokens_per_s (supervised target positions of this process, evaluation left out),
    memory_gb (highest so far), and, where something is selected, the share of the kept tokens that
    each unroll step has (kept_step_0, ...) and that each frequency band has (kept_top_100, ...),
    the latter beside the band's share of all supervised tokens (all_top_100, ...).
    """

    def __init__(self, bands: Tensor, steps: int) -> None:
        self.bands = bands  # [V]
        self.steps = steps
        self._clear()

    def _clear(self) -> None:
        shape, device = (self.steps, len(BANDS) + 1), self.bands.device
        self.seen = torch.zeros(shape, dtype=torch.long, device=device)  # [S, bands]
        self.kept = torch.zeros(shape, dtype=torch.long, device=device)
        self.began = time.perf_counter()

    def add(self, tokens: Tensor, mask: Tensor, chosen: Tensor) -> None:
        """One micro-batch: the target's tokens `[M]`, which count and which are kept `[S, M]`."""
        bands = self.bands[tokens]  # [M]
        for step in range(len(mask)):  # fewer than all where an optimiser step unrolls less
            for sums, marks in ((self.seen, mask), (self.kept, chosen)):
                sums[step] += torch.bincount(bands[marks[step]], minlength=sums.shape[1])

    def pause(self, seconds: float) -> None:
        """Leave out time that was spent otherwise."""
        self.began += seconds

    def take(self) -> dict[str, float]:
        """The figures since the last time."""
        seconds = time.perf_counter() - self.began
        seen, kept = self.seen.cpu(), self.kept.cpu()
        found = {
            "tokens_per_s": float(seen[0].sum()) / seconds,
            "memory_gb": peak_bytes(self.bands.device) / 1e9,
        }
        if 0 < int(kept.sum()) < int(seen.sum()):
            by_step = kept.sum(1) / kept.sum()
            found |= {f"kept_step_{s}": float(share) for s, share in enumerate(by_step)}
            for prefix, counts in (("kept", kept.sum(0)), ("all", seen.sum(0))):
                shares = (counts / counts.sum()).tolist()
                names = [f"{prefix}_{name}" for name in (*BANDS, "rest")]
                found |= dict(zip(names, shares, strict=True))
        self._clear()
        return found


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: CUDA's allocated bytes, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
