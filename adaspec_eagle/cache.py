"""TreeCache: keys and values with a length per row; scratch for trees, history once committed.

Legend: L layers, B rows, H key heads, C capacity in columns, D head size, P path length.
"""

import torch
from torch import Tensor
from transformers import Cache

from adaspec_eagle.errors import UserError


class TreeCache(Cache):
    """One preallocated buffer `[L, 2, B, H, C, D]`; a model's attention calls `update`.

    Columns [0, lengths[b]) of row b are its history. New tokens of every row go to the same scratch
    columns, from `start` (the longest history) on; `commit` moves those on the accepted path behind
    the row's history and forgets the rest. What lies between a row's history and `start` is stale:
    masks must hide it (`attention.tree_mask`). Nothing is copied for a round but the accepted
    columns. The capacity doubles when it is full.
    """

    def __init__(self, num_layers: int, capacity: int = 256) -> None:
        super().__init__(layers=[])
        self.num_layers = num_layers
        self.capacity = capacity
        self.buffer: Tensor | None = None  # [L, 2, B, H, C, D]
        self.lengths: Tensor  # [B], once there is a buffer
        self.start = 0
        self.used = 0  # scratch columns written since the last commit

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write `[B, H, N, D]` to the next scratch columns; return all columns up to their end."""
        if self.buffer is None:
            self._allocate(key_states, value_states)
        begin = self.start + self.used
        end = begin + key_states.shape[2]
        if end > self.capacity:
            self._grow(end)
        assert self.buffer is not None
        self.buffer[layer_idx, 0, :, :, begin:end] = key_states
        self.buffer[layer_idx, 1, :, :, begin:end] = value_states
        if layer_idx == self.num_layers - 1:
            self.used += key_states.shape[2]
        return self.buffer[layer_idx, 0, :, :, :end], self.buffer[layer_idx, 1, :, :, :end]

    def reserve(self, new: int, spare: int = 0) -> Tensor:
        """The next `new` scratch columns, which the caller writes itself, and some beyond them.

        The cache must hold something already. Returns the columns `[new + spare]`, all of them
        within the capacity; only the first `new` count as written.
        """
        assert self.buffer is not None
        begin = self.start + self.used
        if begin + new + spare > self.capacity:
            self._grow(begin + new + spare)
        self.used += new
        return torch.arange(begin, begin + new + spare, device=self.buffer.device)

    def commit(self, path: Tensor, length: Tensor, longest: int | None = None) -> None:
        """Append scratch columns `path[b, :length[b]]` to row b's history; drop all other scratch.

        path `[B, P]` counts scratch columns from 0; entries past a row's length may be any valid
        column. length `[B]`. longest: the largest history after this commit, if the caller knows
        it already (saves a read from the device).
        """
        assert self.buffer is not None
        if len(path) == 1:  # the history ends where the scratch begins: a plain copy forward
            self._move(path[0])
            return self._extend(length, longest)
        rows = torch.arange(path.shape[0], device=path.device)[:, None]  # [B, 1]
        steps = torch.arange(path.shape[1], device=path.device)[None]  # [1, P]
        source, target = self.start + path, self.lengths[:, None] + steps  # [B, P]
        moved = self.buffer[:, :, rows, :, source]  # [B, P, L, 2, H, D], a copy
        self.buffer[:, :, rows, :, target] = moved
        self._extend(length, longest)

    def commit_prefix(self, length: Tensor, longest: int | None = None) -> None:
        """Commit the first `length[b]` scratch columns; one row's, or a first history, in place."""
        if self.start and len(length) > 1:
            steps = torch.arange(self.used, device=length.device).expand(len(length), -1)
            return self.commit(steps, length, longest)
        self._extend(length, longest)

    def rollback(self) -> None:
        """Forget the scratch; history stays."""
        self.used = 0

    def wipe(self) -> None:
        """Forget the scratch, and write zeros to all that is not history.

        For scratch that holds NaN: a CUDA graph reads all columns, and NaN stays NaN when masked.
        """
        assert self.buffer is not None
        self.buffer[..., self.start :, :] = 0
        self.rollback()

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows `[B']` only, in that order."""
        assert self.buffer is not None
        self.buffer = self.buffer.index_select(2, rows)
        self.lengths = self.lengths.index_select(0, rows)
        self.start = int(self.lengths.max())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before the next written one."""
        return self.start + self.used

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(key columns, offset) as transformers' mask builders ask for them."""
        return self.start + self.used + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit: the cache grows."""
        return -1

    def _extend(self, length: Tensor, longest: int | None) -> None:
        self.lengths = self.lengths + length
        self.start = int(self.lengths.max()) if longest is None else longest
        self.used = 0

    def _move(self, path: Tensor) -> None:
        """Copy the only row's scratch columns `path` `[P]` to the first ones."""
        assert self.buffer is not None
        first = 0
        if path.device.type == "cpu":  # elsewhere a look at the path would wait for the device
            columns = path.tolist()
            first = next((i for i, column in enumerate(columns) if i != column), len(columns))
        if first < len(path):  # those before it are in place
            moved = self.buffer.index_select(-2, self.start + path[first:])
            self.buffer[..., self.start + first : self.start + len(path), :] = moved

    def _allocate(self, key: Tensor, value: Tensor) -> None:
        if key.shape != value.shape:
            raise UserError(
                f"keys of shape {tuple(key.shape)} but values of shape {tuple(value.shape)}: "
                "targets whose keys and values differ in size (such as multi-head latent "
                "attention) are not supported; use a target with equal sizes"
            )
        b, h, n, d = key.shape
        self.capacity = max(self.capacity, n)
        shape = (self.num_layers, 2, b, h, self.capacity, d)
        self.buffer = key.new_zeros(shape)
        self.lengths = torch.zeros(b, dtype=torch.long, device=key.device)

    def _grow(self, needed: int) -> None:
        assert self.buffer is not None
        old = self.capacity
        while self.capacity < needed:
            self.capacity *= 2
        shape = list(self.buffer.shape)
        shape[4] = self.capacity
        bigger = self.buffer.new_zeros(shape)
        bigger[:, :, :, :, :old] = self.buffer
        self.buffer = bigger
