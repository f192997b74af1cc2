"""`KvCopies`: what of a rank's KV goes to the host buffer and comes back, beside computation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch

from seesaw.kv.copy_engine import CopyEngine
from seesaw.kv.registered import HostRegistration
from seesaw.kv.transfers import block_table, swap_in, swap_out

if TYPE_CHECKING:
    from seesaw.device.base import Device
    from seesaw.kv.device_pool import DevicePool
    from seesaw.kv.host_buffer import HostBuffer
    from seesaw.weights.sharding import RankView

Pairs = list[tuple[int, int]]
"""(device block, host block)."""
Table = Callable[[], torch.Tensor]
"""Gives them as a tensor `[n, 2]`."""
OnDone = Callable[[int, float], None]
"""Takes the bytes moved and the seconds they took."""


class KvCopies:
    """The copies of one rank, under one sharding after the other.

    Owns its mapping of the host buffer, which a GPU must be told of before it can reach it.
    """

    def __init__(self, device: Device, pool: DevicePool, host: HostBuffer | None, view: RankView) -> None:
        self._pool, self._host, self._view = pool, host, view
        self._engine = CopyEngine(device)
        self._registration: HostRegistration | None = None
        if host is not None and host.bytes and device.torch.type == "cuda":
            self._registration = HostRegistration(host.tensor)
        self._copy = None if self._registration is None else self._registration.copy_slabs
        staged = self._registration is not None and not self._registration.registered
        self._by_device = device.runs_behind and not staged
        """Whether the device reads block numbers itself; else whoever copies checks them as well."""

    @property
    def host(self) -> HostBuffer | None:
        """The host buffer, if the plan has one."""
        return self._host

    def change_view(self, view: RankView) -> None:
        """From here on the pool holds the slabs of `view`; what is launched later comes behind copies of the old
        view."""
        self._engine.fence()
        self._view = view

    def write_through(
        self, pairs: Pairs, on_layer: OnDone | None, on_done: OnDone
    ) -> tuple[Callable[[int], None], Callable[[], None]]:
        """Copies of the blocks that a Forward fills, layer by layer behind the layers that follow.

        Returns what to call when a layer's K and V are in the pool, and what to call after the last one: then
        `on_done` is told of all of them together, `on_layer` of each.
        """
        table, moved = self._table(pairs), [0]

        def copy(layer: int) -> int:
            copied = self._out(table, layer)
            moved[0] += copied
            return copied

        def after_layer(layer: int) -> None:
            self._engine.to_host(lambda: copy(layer), on_layer)

        return after_layer, lambda: self._engine.to_host(lambda: moved[0], on_done)

    def swap_out(self, pairs: Pairs, on_done: OnDone) -> None:
        """Copy whole blocks out."""
        table = self._table(pairs)
        self._engine.to_host(lambda: self._out(table, None), on_done)

    def swap_in(self, pairs: Pairs, on_done: OnDone) -> None:
        """Copy whole blocks in."""
        table = self._table(pairs)
        self._engine.to_device(lambda: self._in(table), on_done)

    def close(self) -> None:
        """Give the host memory back to the system. Nothing may be under way."""
        if self._registration is not None:
            self._registration.close()

    def _table(self, pairs: Pairs) -> Table:
        """Makes the tensor at its first use, on the stream of the copies, once for all layers.

        Made there it is uploaded before the first copy reads it, and its memory is used again behind the last one.
        """

        def make() -> torch.Tensor:
            return block_table(pairs, self._pool.blocks, self._host_blocks())

        return cache(make if self._by_device else lambda: torch.tensor(pairs))

    def _out(self, table: Table, layer: int | None) -> int:
        """Of ranks that share a replicated KV head only one copies."""
        if not self._view.owns_kv:
            return 0
        return swap_out(
            self._pool.blocks,
            self._host_blocks(),
            table(),
            layers=self._view.layers,
            kv_heads=self._view.kv_heads,
            layer=layer,
            copy=self._copy,
        )

    def _in(self, table: Table) -> int:
        return swap_in(
            self._pool.blocks,
            self._host_blocks(),
            table(),
            layers=self._view.layers,
            kv_heads=self._view.kv_heads,
            copy=self._copy,
        )

    def _host_blocks(self) -> torch.Tensor:
        assert self._host is not None, "a copy to the host without a host buffer"
        return self._host.tensor
