"""A conversation in the terminal that streams its answers and shows what was drafted."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from adaspec_eagle.draft import Shape
from adaspec_eagle.errors import UserError
from adaspec_eagle.generate import check_prompts, generate
from adaspec_eagle.head import DraftHead
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import Target

DRAFTED = "green"
WARM_UP = 2  # tokens decoded once with the head and without: packs weights, measures costs
TRIAL = 16  # tokens decoded without a draft behind that, to have a speed to compare with


@dataclass
class Chat:
    """One conversation; `options` go to `generate`. head None: without a draft."""

    target: Target
    head: DraftHead | None
    tree: str | Shape
    console: Console
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    stats: AcceptanceStats = field(default_factory=AcceptanceStats)
    plain_speed: float = 0.0  # tokens/s without a draft; 0: not known yet

    def check(self) -> None:
        """Raise UserError where not even a short first question could be answered."""
        tokens = self.options.get("max_new_tokens", 1)
        check_prompts(self.target, self.prompt("Hello"), None, tokens)

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line; empty ones are passed over. Ctrl-C stops an answer only."""
        for line in lines:
            if line.strip():
                try:
                    self.answer(line.strip())
                except UserError as error:  # such as a conversation that fills the context
                    self.console.print(f"error: {error}", style="red", markup=False)

    def answer(self, question: str) -> None:
        """Stream the answer to one question, then a line of figures."""
        prompt, printer = self.prompt(question), Printer(self.target, self.console)
        self.messages.append({"role": "user", "content": question})
        try:
            if self.head is not None and not self.plain_speed:
                self.plain_speed = self._measure(prompt)
            begin = time.perf_counter()
            made = self._generate(prompt, self.head, watch=printer.watch)
            self._report(made.stats, time.perf_counter() - begin)
        except KeyboardInterrupt:
            self.console.print("\n[stopped]", style="dim", markup=False)
            if not printer.text:  # before the answer began
                self.messages.pop()
                return
        except UserError:
            self.messages.pop()  # the question that could not be asked
            raise
        self.messages.append({"role": "assistant", "content": printer.text})

    def prompt(self, question: str) -> torch.Tensor:
        """Token ids `[1, T]` of the conversation with a question behind it; raises UserError."""
        messages = [*self.messages, {"role": "user", "content": question}]
        ids = self.target.chat_ids(messages)
        return torch.tensor([ids], device=self.target.device)

    def _measure(self, prompt: torch.Tensor) -> float:
        """Tokens/s without a draft, all being warm; 0 if answers are too short to have a speed."""
        speed = 0.0
        for head, tokens in ((None, WARM_UP), (self.head, WARM_UP), (None, TRIAL)):
            most = min(tokens, self.options.get("max_new_tokens", tokens))
            made = self._generate(prompt, head, max_new_tokens=most, ignore_eos=True)
            speed = _speed(made.stats)
        return speed

    def _generate(self, prompt: torch.Tensor, head: DraftHead | None, **more: Any):
        return generate(self.target, head, prompt, tree=self.tree, **(self.options | more))

    def _report(self, stats: AcceptanceStats, wall: float) -> None:
        self.stats += stats
        figures = [f"{stats.new_tokens} tokens", f"{stats.new_tokens / wall:.1f} tokens/s"]
        if self.head is not None:
            figures = [f"tau {stats.tau:.2f}", *figures, f"so far tau {self.stats.tau:.2f}"]
            if self.plain_speed and self.stats.tokens:
                speedup = _speed(self.stats) / self.plain_speed
                figures.append(f"{speedup:.2f} times the decoding speed without a draft")
        self.console.print("\n" + ", ".join(figures), style="dim", highlight=False)


@dataclass
class Printer:
    """Prints an answer as its tokens come, drafted ones in colour."""

    target: Target
    console: Console
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def watch(self, row: int, tokens: list[int], drafted: int) -> None:
        """Take in the tokens of one round; what is no whole character yet waits."""
        for place, token in enumerate(tokens):
            self.ids.append(token)
            whole = self.target.tokenizer.decode(self.ids, skip_special_tokens=True)
            if whole.endswith("\ufffd"):
                continue
            style = DRAFTED if place < drafted else ""
            self.console.print(Text(whole[len(self.text) :], style), end="", soft_wrap=True)
            self.text = whole


def _speed(stats: AcceptanceStats) -> float:
    """Tokens a second behind the first one, prefill left out."""
    seconds = sum(stats.seconds.values()) - stats.seconds.get("prefill", 0.0)
    return stats.tokens / seconds if seconds else 0.0
