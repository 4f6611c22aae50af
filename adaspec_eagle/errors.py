"""Errors that a user can mend, and how a script reports them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

NO_MEMORY = ("out of memory", "can't allocate memory")  # CUDA's words and the CPU allocator's


class UserError(Exception):
    """Bad input. The message names the value that is wrong and the way out."""


def run_main(main: Callable[..., int], argv: Sequence[str] | None = None) -> int:
    """Call a script's `main(argv)`; a UserError becomes one line on stderr and exit status 2."""
    try:
        return main(argv)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


@contextmanager
def explain_out_of_memory(way_out: str) -> Iterator[None]:
    """Turn an allocation that fails inside the block into a UserError that ends with `way_out`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not any(words in text for words in NO_MEMORY):
            raise
        reason = text.splitlines()[0] if text else "no more to be had"
        raise UserError(f"out of memory: {reason}\n{way_out}") from error
