"""Memory that is freed and taken again is not new to the system."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from adaspec_eagle.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(48 << 20, dtype=torch.uint8)  # more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
assert keep_freed_memory()
print(default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_freed_memory_is_kept():
    """In a process of its own: what is set cannot be taken back."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    default, kept = map(int, ran.stdout.split())
    assert default > 3 * kept
