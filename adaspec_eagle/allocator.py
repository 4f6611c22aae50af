"""The C library's allocator, told to keep what training frees at every step and takes again."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names, malloc.h of glibc
LARGE = 1 << 30


def keep_freed_memory() -> bool:
    """Let the process keep freed blocks of up to 1 GiB; whether the C library can (glibc).

    By default glibc returns large blocks to the system at once, so that each step's tensors are
    new pages, which the system clears one by one: 7 % of a training step on CPU (results/LOG.md).
    The process then stays as large as it was at its largest. Calling it again changes nothing.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(set_option(MMAP_THRESHOLD, LARGE) and set_option(TRIM_THRESHOLD, LARGE))
