"""`SlotTables`: what a worker remembers of the sequences of its replica between Forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from seesaw.attention.base import AttentionBatch, IntArray
from seesaw.core.actions import FEEDBACK, Forward

if TYPE_CHECKING:
    from seesaw.device.base import Array, Device
    from seesaw.execution.graphs import StaticInputs

Lengths = tuple[IntArray, IntArray]
"""New tokens and cached ones, by sequence."""


@dataclass(slots=True)
class Inputs:
    """A Forward turned into tensors on the device: token ids and positions `[N]`, and what attention needs."""

    tokens: Tensor
    positions: Tensor
    attention: AttentionBatch
    sampled_rows: Tensor | None
    """Packed index of the last token of each sampled item; None if every token is one, or prompts are scored:
    then all rows leave the model."""
    sampled_attention: AttentionBatch
    """`attention` with the queries of `sampled_rows` only."""


class SlotTables:
    """Block tables and latest tokens by slot. Written from the actions alone; the tokens stay on the device."""

    def __init__(self, block_size: int, device: Device) -> None:
        self._block_size, self._device = block_size, device
        self._blocks = np.zeros((16, 16), dtype=np.int32)
        self._counts = np.zeros(16, dtype=np.int64)
        self._latest = torch.zeros(16, dtype=torch.int64, device=device.torch)

    def update(self, forward: Forward) -> None:
        """Open slots and append blocks as the action says."""
        for opened in forward.open:
            self._make_room(opened.slot, len(opened.blocks))
            self._blocks[opened.slot, : len(opened.blocks)] = opened.blocks
            self._counts[opened.slot] = len(opened.blocks)
        for slot, block in forward.new_blocks:
            count = int(self._counts[slot])
            self._make_room(slot, count + 1)
            self._blocks[slot, count] = block
            self._counts[slot] = count + 1

    def set_latest(self, slots: list[int], tokens: Tensor) -> None:
        """Note the latest sampled token of each slot: `tokens` `[len(slots)]` on the device."""
        (places,) = self._device.upload([np.asarray(slots, dtype=np.int64)])
        self._latest.index_copy_(0, places, tokens)

    def inputs(self, forward: Forward) -> Inputs:
        """Token ids (FEEDBACK replaced by the latest token of its slot), positions and block tables."""
        slots = np.asarray(forward.slots, dtype=np.int64)
        counts = np.asarray(forward.counts, dtype=np.int64)
        starts = np.asarray(forward.starts, dtype=np.int64)
        ends = np.cumsum(counts)
        total = int(ends[-1])
        rows = np.repeat(np.arange(len(slots)), counts)
        positions = np.arange(total) - (ends - counts)[rows] + starts[rows]
        width = -(-int((starts + counts).max()) // self._block_size)
        tables = self._blocks[slots, :width]
        places = tables[rows, positions // self._block_size].astype(np.int64)
        query_starts = np.zeros(len(slots) + 1, dtype=np.int32)
        query_starts[1:] = ends
        arrays: list[Array] = [
            np.asarray(forward.tokens, dtype=np.int64),
            positions,
            query_starts,
            starts.astype(np.int32),
            np.ascontiguousarray(tables),
            places * self._block_size + positions % self._block_size,
        ]
        if forward.feedback_from >= 0:
            arrays.append(slots[rows])
        asking = None
        if len(forward.sampled) < total and not forward.scores:
            items = np.asarray(forward.sampled, dtype=np.int64)
            asking = np.ones_like(items), (starts + counts - 1)[items]
            arrays += [
                np.arange(len(items) + 1, dtype=np.int32),
                asking[1].astype(np.int32),
                tables[items],
                ends[items] - 1,
            ]
        tensors = self._device.upload(arrays)
        return self._inputs(tensors, (counts, starts), asking, fed_back=forward.feedback_from >= 0)

    def fill(self, forward: Forward, static: StaticInputs, size: int, *, tokens: bool) -> None:
        """Put a decode step, padded to `size` sequences, where captured graphs read it; FEEDBACK is replaced, if
        anybody reads the `tokens`."""
        slots = np.asarray(forward.slots, dtype=np.int64)
        positions = np.asarray(forward.starts, dtype=np.int64)
        width = int(positions.max()) // self._block_size + 1
        ids, places = static.fill(size, forward.tokens, positions, self._blocks[slots, :width], slots)
        if tokens and forward.feedback_from >= 0:
            # outside of the graph, since `_latest` moves when it grows
            torch.where(ids == FEEDBACK, self._latest.index_select(0, places), ids, out=ids)

    def _inputs(
        self, tensors: list[Tensor], lengths: Lengths, asking: Lengths | None, *, fed_back: bool
    ) -> Inputs:
        """From the tensors, in the order in which `inputs` makes them, and what the host knows of all sequences and
        of those that are sampled, unless every token is."""
        tokens, positions, query_starts, context_starts, tables, mapping, *rest = tensors
        if fed_back:
            tokens = torch.where(tokens == FEEDBACK, self._latest.index_select(0, rest.pop(0)), tokens)
        attention = AttentionBatch(
            query_starts=query_starts,
            context_starts=context_starts,
            block_tables=tables,
            slot_mapping=mapping,
            max_query=int(lengths[0].max()),
            fresh=not lengths[1].any(),
            host_lengths=lengths,
        )
        if asking is None:
            return Inputs(tokens, positions, attention, None, attention)
        sampled = AttentionBatch(
            query_starts=rest[0],
            context_starts=rest[1],
            block_tables=rest[2],
            slot_mapping=mapping,
            max_query=1,
            host_lengths=asking,
        )
        return Inputs(tokens, positions, attention, rest[3], sampled)

    def _make_room(self, slot: int, blocks: int) -> None:
        rows, columns = self._blocks.shape
        if slot >= rows or blocks > columns:
            grown = np.zeros((max(rows, 2 * slot), max(columns, 2 * blocks)), dtype=np.int32)
            grown[:rows, :columns] = self._blocks
            self._blocks = grown
            self._counts = np.concatenate([self._counts, np.zeros(len(grown) - rows, dtype=np.int64)])
            self._latest = torch.cat([self._latest, self._latest.new_zeros(len(grown) - rows)])
