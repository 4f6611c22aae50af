"""Decoding that is not this package's, counted as ours is.

transformers' assisted decoding, and a decoder from a file with Spec-Bench's signature.

Legend: B rows, T prompt tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.generation.streamers import BaseStreamer

from adaspec_eagle.bench import Bench
from adaspec_eagle.errors import UserError
from adaspec_eagle.measure import Arm, plain_greedy, trim
from adaspec_eagle.plugins import function_of, is_function_path
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.watch import synchronize

Answered = tuple[list[list[int]], AcceptanceStats]

DEFINITIONS = {
    "tau of transformers' assisted decoding": "tokens / target forwards, the first forward left "
    "out of both: it takes in the prompt and verifies drafts at once; accepted tokens are counted "
    "as transformers cuts them, at the end token and the limit",
    "tau of a decoder from a file": "tokens after the first / entries of its accept_lengths, one a "
    "target forward behind prefill",
}


# ---- transformers' own ---------------------------------------------------------------------------


@dataclass
class Forwards:
    """What was seen of a model's forwards: tokens that each took in, and when the first ended."""

    sizes: list[int] = field(default_factory=list)
    first_end: float | None = None

    def prefill(self, start: float) -> float:
        """Seconds from `start` to the end of the first forward; 0 where none was seen."""
        return 0.0 if self.first_end is None else self.first_end - start


@contextmanager
def watched(model: nn.Module) -> Iterator[Forwards]:
    """Inside the block the model's forwards are noted."""
    seen = Forwards()

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        seen.sizes.append(0 if ids is None else ids.shape[1])

    def after(*_: Any) -> None:
        if seen.first_end is None:
            synchronize(next(model.parameters()).device)
            seen.first_end = perf_counter()

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True)]
    hooks.append(model.register_forward_hook(after))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Emitted(BaseStreamer):
    """Notes how many tokens each forward of assisted decoding brought."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def put(self, value: Tensor) -> None:
        """The prompt first, then the tokens of each forward."""
        self.counts.append(value.numel())

    def end(self) -> None:
        """Nothing to do."""


def by_row(answer: Callable[[Tensor], Answered], ids: Tensor, mask: Tensor) -> Answered:
    """Rows `[B, T]` one at a time, without their padding, as one outcome."""
    outcomes = [answer(row[keep.bool()][None]) for row, keep in zip(ids, mask, strict=True)]
    stats = sum((one for _, one in outcomes), AcceptanceStats())
    return [answers[0] for answers, _ in outcomes], stats


def assisted(bench: Bench, how: dict[str, Any], ids: Tensor, mask: Tensor) -> Answered:
    """transformers' assisted decoding, greedy; it takes no batches, so that rows go one by one."""
    return by_row(partial(_assisted_row, bench, how), ids, mask)


def _assisted_row(bench: Bench, how: dict[str, Any], ids: Tensor) -> Answered:
    model, emitted = bench.target.model, Emitted()
    with plain_greedy(bench.target), watched(model) as seen:
        start = perf_counter()
        sequence = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=bench.max_new_tokens, streamer=emitted, **how,
        )  # [1, T + new]  # fmt: skip
    answer = trim(sequence[0, ids.shape[1] :].tolist(), set(bench.target.eos_token_ids))
    came, drafted = emitted.counts[2:], [size - 1 for size in seen.sizes[1:]]
    stats = count_rounds(came, len(answer), seen.prefill(start))
    stats.tokens, stats.nodes = sum(came), sum(drafted)
    stats.offered = [sum(n > d for n in drafted) for d in range(max(drafted, default=0))]
    return [answer], stats


def count_rounds(came: Sequence[int], new_tokens: int, prefill: float) -> AcceptanceStats:
    """Counts of one answer of `new_tokens`, from what each target forward behind prefill brought.

    Seconds but those of prefill are left to the caller's clock.
    """
    often = Counter(max(count - 1, 0) for count in came)
    accepted = [often[n] for n in range(max(often, default=-1) + 1)]
    after = max(new_tokens - 1, 0)
    return AcceptanceStats(accepted, [], len(came), after, new_tokens, 0, {"prefill": prefill})


# ---- a decoder from a file -----------------------------------------------------------------------


def check_decoder(text: str) -> None:
    """Raise UserError where `text` names no function of a file."""
    if not is_function_path(text):
        raise UserError(f"--arm {text}: give a file and the function in it, my_decoder.py:forward")
    function_of(text)


def decoder_arm(bench: Bench, text: str) -> Arm:
    """The arm of `path.py:name`, a function with Spec-Bench's signature.

    `name(inputs, model, tokenizer, max_new_tokens) -> ids, new_tokens, steps, accept_lengths`, one
    prompt a call: inputs has input_ids and attention_mask `[1, T]`, model is transformers' own, ids
    are `[1, T + new]`, and accept_lengths says what each target forward behind prefill brought, the
    target's own token included. Raises UserError where there is no such function.
    """
    name, forward = text.rpartition(":")[2], function_of(text)

    def answer(ids: Tensor) -> Answered:
        return _decoder_row(bench, text, forward, ids)

    return Arm(name, "from a file", partial(by_row, answer))


@torch.no_grad()
def _decoder_row(bench: Bench, text: str, forward: Callable, ids: Tensor) -> Answered:
    target, prompt = bench.target, ids[0].tolist()
    inputs = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with plain_greedy(target), watched(target.model) as seen:
        start = perf_counter()
        made = forward(inputs, target.model, target.tokenizer, bench.max_new_tokens)
    if not isinstance(made, tuple) or len(made) != 4:
        raise UserError(f"{text} gave {type(made).__name__}, not (ids, new, steps, accept_lengths)")
    sequence, came = made[0][0].tolist(), [int(count) for count in made[3]]
    if sequence[: len(prompt)] != prompt or len(sequence) == len(prompt):
        raise UserError(f"{text}: its ids are not the prompt with an answer behind it")
    answer = trim(sequence[len(prompt) :][: bench.max_new_tokens], set(target.eos_token_ids))
    if sum(came) < len(answer) - 1:
        raise UserError(
            f"{text}: accept_lengths add up to {sum(came)}, but {len(answer)} tokens came; it has "
            "an entry for each target forward behind prefill"
        )
    if len(came) < len(seen.sizes) - 1:
        raise UserError(
            f"{text}: accept_lengths has {len(came)} entries for {len(seen.sizes) - 1} target "
            "forwards behind prefill, which would make its tau too high"
        )
    return [answer], count_rounds(came, len(answer), seen.prefill(start))
