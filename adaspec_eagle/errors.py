"""Errors that a user can mend, how a script reports them, and its command line."""

import errno
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# The words of the system, of safetensors and of torch.save for a disk without room.
DISK_FULL = ("No space left on device", "os error 28", "PytorchStreamWriter failed writing")
NO_MEMORY = ("out of memory", "can't allocate memory")  # CUDA's words and the CPU allocator's


class UserError(Exception):
    """Bad input. The message names the value that is wrong and the way out."""


def command_line(doc: str | None) -> ArgumentParser:
    """A parser without options yet, whose help begins with the script's docstring as it is."""
    return ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)


def run_main(main: Callable[..., int], argv: Sequence[str] | None = None) -> int:
    """Call a script's `main(argv)`; what a user can mend becomes a line on stderr and status 2."""
    try:
        return main(argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was written is whole, the same command goes on\n")
        return 130
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        return 2


def explain(error: BaseException) -> str | None:
    """A message for an error that the user can do something about, None for all others."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if any(words in text for words in DISK_FULL) or getattr(error, "errno", None) == errno.EDQUOT:
        return f"the disk is full ({first_line(error)}); what was written before is whole"
    if is_out_of_memory(error):
        return f"out of memory: {first_line(error)}\nUse a smaller --batch-size or --max-length"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None


@contextmanager
def explain_out_of_memory(way_out: str) -> Iterator[None]:
    """Turn an allocation that fails inside the block into a UserError that ends with `way_out`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {first_line(error)}\n{way_out}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on a GPU."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
