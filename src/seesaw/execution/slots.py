"""`SlotTables`: what a worker remembers of the sequences of its replica between Forwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seesaw.attention.base import AttentionBatch
from seesaw.core.actions import FEEDBACK, Forward

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class Inputs:
    """A Forward turned into arrays: token ids and positions `[N]`, and what attention needs."""

    tokens: IntArray
    positions: Tensor
    attention: AttentionBatch
    sampled_rows: Tensor | None
    """Packed index of the last token of each sampled item; None if every token is one."""
    sampled_attention: AttentionBatch
    """`attention` with the queries of `sampled_rows` only."""


class SlotTables:
    """Block tables and latest tokens by slot. Written from the actions alone."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks = np.zeros((16, 16), dtype=np.int32)
        self._counts = np.zeros(16, dtype=np.int64)
        self._latest = np.zeros(16, dtype=np.int64)

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

    def set_latest(self, slots: list[int], tokens: IntArray) -> None:
        """Note the latest sampled token of each slot."""
        self._latest[slots] = tokens

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
        mapping = places * self._block_size + positions % self._block_size
        tokens = np.asarray(forward.tokens, dtype=np.int64)
        if forward.feedback_from >= 0:
            tokens = np.where(tokens == FEEDBACK, self._latest[slots[rows]], tokens)
        query_starts = np.zeros(len(slots) + 1, dtype=np.int32)
        query_starts[1:] = ends
        attention = AttentionBatch(
            query_starts=torch.from_numpy(query_starts),
            context_starts=torch.from_numpy(starts.astype(np.int32)),
            block_tables=torch.from_numpy(np.ascontiguousarray(tables)),
            slot_mapping=torch.from_numpy(mapping),
            max_query=int(counts.max()),
            fresh=not starts.any(),
            host_lengths=(counts, starts),
        )
        if len(forward.sampled) == total:
            return Inputs(tokens, torch.from_numpy(positions), attention, None, attention)
        items = np.asarray(forward.sampled, dtype=np.int64)
        places = (starts + counts - 1)[items]
        asking = AttentionBatch(
            query_starts=torch.arange(len(items) + 1, dtype=torch.int32),
            context_starts=torch.from_numpy(places.astype(np.int32)),
            block_tables=torch.from_numpy(tables[items]),
            slot_mapping=attention.slot_mapping,
            max_query=1,
            host_lengths=(np.ones_like(places), places),
        )
        return Inputs(
            tokens, torch.from_numpy(positions), attention, torch.from_numpy(ends[items] - 1), asking
        )

    def _make_room(self, slot: int, blocks: int) -> None:
        rows, columns = self._blocks.shape
        if slot >= rows or blocks > columns:
            grown = np.zeros((max(rows, 2 * slot), max(columns, 2 * blocks)), dtype=np.int32)
            grown[:rows, :columns] = self._blocks
            self._blocks = grown
            self._counts = np.concatenate([self._counts, np.zeros(len(grown) - rows, dtype=np.int64)])
            self._latest = np.concatenate([self._latest, np.zeros(len(grown) - rows, dtype=np.int64)])
