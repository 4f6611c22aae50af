"""Training in several processes (`accelerate launch`): who goes first, and what all agree on.

Without a launcher there is one process, and nothing here does anything.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from adaspec_eagle.errors import UserError

Value = TypeVar("Value")
PATIENCE = timedelta(days=2)  # others wait while the first one writes data or fills a table


def process_count() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes files and talks."""
    return int(os.environ.get("RANK", "0")) == 0


def join_processes(device: str | None) -> str | None:
    """Meet the other processes; the device of this one (`device` says cpu or nothing).

    Raises UserError for FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError(
            "FSDP is not supported; launch with a config of scripts/accelerate (data parallel, "
            "ZeRO 1, 2, 3)"
        )
    if process_count() == 1:
        return device
    cpu = device == "cpu" or not torch.cuda.is_available()
    PartialState(cpu=cpu, timeout=PATIENCE)
    return "cpu" if cpu else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block, then all others do."""
    if process_count() > 1 and not is_main_process():
        distributed.barrier()
    yield
    if process_count() > 1 and is_main_process():
        distributed.barrier()


def all_meet() -> None:
    """Wait for all processes."""
    if process_count() > 1:
        distributed.barrier()


def agreed(value: Value) -> Value:
    """The main process's value, in all of them."""
    if process_count() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if process_count() == 1:
        return flag
    found: list[bool] = [flag] * process_count()
    distributed.all_gather_object(found, flag)
    return any(found)
