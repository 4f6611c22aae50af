"""The C library's allocator, told to keep what training frees at every step and takes again."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names, malloc.h of glibc
LARGE, OLD_LARGE = 1 << 30, 1 << 25  # the second: the most that glibc before 2.35 takes


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, in blocks of up to 1 GiB; whether the C library can.

    By default glibc returns large blocks to the system at once, so that each step's tensors are
    new pages, which the system clears one by one: 7 % of a training step on CPU (results/LOG.md).
    The process then stays as large as it was at its largest. Calling it again changes nothing.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    mapped = set_option(MMAP_THRESHOLD, LARGE) or set_option(MMAP_THRESHOLD, OLD_LARGE)
    return bool(set_option(TRIM_THRESHOLD, LARGE) and mapped)
