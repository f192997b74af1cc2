"""Decode graphs: a decode step launched as one, captured for each of a ladder of batch sizes.

A decode step of a 70B model is a thousand small kernels, and launching them takes the host longer than a GPU takes to
run them. A CUDA graph launches them all at once. It is a recording: the same kernels on the same addresses, whatever
Python would do now. Hence

- inputs lie at addresses that stay (`StaticInputs`), filled on the compute stream before each replay;
- a batch is padded to the next size of the ladder (`core.workspace.graph_batches`) by rows that read and write no KV;
- what is not the same for every step stays outside: tokens that are fed back (their table may grow), messages between
  stages, the LM head and the sampler;
- a graph does not outlive the weights that it was captured over.

**All ranks of a tensor-parallel group decide alike**, since the collectives in a graph are those of the step without:
which Forward fits follows from the Forward and the config alone (`DecodeGraphs.prepare`); what one rank may find by
itself (its attention backend, the environment, that something cannot be captured) is agreed on through a collective,
once before the first capture and once after each, in the order of the Forwards, which all of them share.
"""

from __future__ import annotations

import logging
import os
import time
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seesaw.attention.base import AttentionBatch
from seesaw.core.errors import ConfigError
from seesaw.core.units import format_bytes
from seesaw.core.workspace import graph_batches
from seesaw.device.base import CaptureError
from seesaw.execution.slots import Inputs

if TYPE_CHECKING:
    from seesaw.core.actions import Forward
    from seesaw.device.base import Device, Graph, GraphPool
    from seesaw.execution.collectives import TensorParallelGroup
    from seesaw.execution.slots import SlotTables

logger = logging.getLogger(__name__)

VARIABLE = "SEESAW_CUDA_GRAPHS"
"""Environment variable: 0 for steps without graphs."""
_ALIGNED = 4
"""Words to which a field is aligned: 16 bytes, so that kernels read vectors, compiled once for all sizes."""


class Layers(Protocol):
    """A rank's part of the model over its pool."""

    def __call__(self, inputs: Inputs, received: Tensor | None) -> Tensor:
        """Hidden states of all rows: from the tokens of `inputs`, or from those `received`, changed in place."""
        ...


class StepFields:
    """A batch of `size` decoding sequences as one run of 32-bit words, so that one copy moves all of it.

    Fields are views of `words`, a flat int32 array of numpy or torch. `long` is that library's int64.
    """

    def __init__(self, words: Any, size: int, long: Any) -> None:
        places = [0]
        for width in (2, 2, 2, 1):
            places.append(places[-1] + -(-width * size // _ALIGNED) * _ALIGNED)
        self.tokens = words[places[0] : places[0] + 2 * size].view(long)
        """int64 `[size]`; those of padding are 0."""
        self.positions = words[places[1] : places[1] + 2 * size].view(long)
        """int64 `[size]`."""
        self.mapping = words[places[2] : places[2] + 2 * size].view(long)
        """int64 `[size]`, see `AttentionBatch.slot_mapping`: -1 for padding, which writes nothing."""
        self.contexts = words[places[3] : places[3] + size]
        """int32 `[size]`."""
        self.query_starts = words[places[4] : places[4] + size + 1]
        """int32 `[size + 1]`; padding has no query, and so reads nothing."""
        self.words = words[: places[4] + size + 1]


class StaticInputs:
    """Inputs of decode steps of up to `most` sequences at addresses that stay. One size is in use at a time.

    Everything that reads or writes them is launched on the compute stream, and so are replays: what is put in for a
    step comes behind the replay of the step before, and its hidden states are read before the next one.
    """

    def __init__(
        self, device: Device, most: int, blocks: int, hidden: int, dtype: torch.dtype, block_size: int
    ) -> None:
        """For sequences of up to `blocks` KV blocks; hidden states are `hidden` wide."""
        self._device, self._block_size = device, block_size
        where = device.torch
        words = len(StepFields(np.empty(8 * most + 64, dtype=np.int32), most, np.int64).words)
        self._words = torch.zeros(words, dtype=torch.int32, device=where)
        self._tables = torch.zeros(most, blocks, dtype=torch.int32, device=where)
        self.hidden = torch.zeros(most, hidden, dtype=dtype, device=where)
        """`[most, hidden]`: what a later stage receives; after a replay, what leaves the stage."""

    def inputs(self, size: int) -> Inputs:
        """A batch of `size` sequences over this memory, whatever it holds."""
        fields = StepFields(self._words, size, torch.int64)
        batch = AttentionBatch(
            query_starts=fields.query_starts,
            context_starts=fields.contexts,
            block_tables=self._tables[:size],
            slot_mapping=fields.mapping,
            max_query=1,
            padded=True,
        )
        return Inputs(fields.tokens, fields.positions, batch, None, batch)

    def clear(self, size: int) -> None:
        """Make all of a batch of `size` padding."""
        self._put(_padding(size, 0), np.zeros((0, 1), dtype=np.int32), np.zeros(0, dtype=np.int64))

    def fill(
        self,
        size: int,
        tokens: list[int],
        positions: npt.NDArray[np.int64],
        tables: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int64],
    ) -> tuple[Tensor, Tensor]:
        """Put a step into a batch of `size`: for each sequence its token, its position, its blocks up to the longest
        sequence's (`[B, blocks]`), and its slot. Returns where the tokens lie, `[B]`, and the slots on the device."""
        count = len(slots)
        fields = _padding(size, count)
        places = tables[np.arange(count), positions // self._block_size].astype(np.int64)
        fields.tokens[:count] = tokens
        fields.positions[:count] = positions
        fields.mapping[:count] = places * self._block_size + positions % self._block_size
        fields.contexts[:count] = positions
        return StepFields(self._words, size, torch.int64).tokens[:count], self._put(fields, tables, slots)

    def _put(self, fields: StepFields, tables: npt.NDArray[np.int32], slots: npt.NDArray[np.int64]) -> Tensor:
        count, width = tables.shape
        assert width <= self._tables.shape[1], (width, self._tables.shape)
        # what a table held beyond the sequences and blocks of this step is not read
        words, blocks, where = self._device.upload([fields.words, np.ascontiguousarray(tables), slots])
        self._words[: len(words)].copy_(words)
        self._tables[:count, :width].copy_(blocks)
        return where


def _padding(size: int, count: int) -> StepFields:
    """A batch on the host whose first `count` sequences have a query each."""
    fields = StepFields(np.zeros(8 * size + 64, dtype=np.int32), size, np.int64)
    fields.mapping.fill(-1)
    np.minimum(np.arange(size + 1), count, out=fields.query_starts, casting="unsafe")
    return fields


@dataclass(slots=True)
class Step:
    """A decode step whose inputs are in place."""

    hidden: Tensor
    """`[B, hidden]`: on a later stage to be received into; what leaves the stage once the step was run. Read it, or
    copy it, by work of the compute stream that is launched before the next step is prepared."""
    graph: Graph

    def run(self) -> Tensor:
        """Launch it."""
        self.graph.replay()
        return self.hidden


class DecodeGraphs:
    """Decode steps of a rank under one sharding.

    The largest batch is captured when the first step comes, since it makes the pool: what smaller ones compute on the
    way fits into its memory. The others are captured when a step first needs them: between two transitions a job uses
    but some of the ladder, and a transition that is not `resident` ends all graphs.
    """

    def __init__(
        self, rank: RankGraphs, pool: GraphPool, layers: Layers, group: TensorParallelGroup, *, willing: bool
    ) -> None:
        """`willing`: whether this rank can; the ranks of `group` agree on it before the first step."""
        self._rank, self._pool, self._layers, self._group = rank, pool, layers, group
        self._willing = willing
        self._ladder = graph_batches(rank.most)
        self._static: StaticInputs | None = None
        self._graphs: dict[int, Graph] = {}
        self._off = False

    def prepare(self, forward: Forward, slots: SlotTables) -> Step | None:
        """Make `forward`, whose slots are open, ready to be run as a graph; None if it is to run as it is.

        Graphs serve steps of one new token for each sequence, all of them sampled, nothing written through, of as
        many sequences as the ladder has. That follows from the Forward alone.
        """
        count = len(forward.slots)
        fits = forward.decodes and len(forward.sampled) == count <= self._ladder[-1]
        if self._off or not fits:
            return None
        size = self._ladder[bisect_left(self._ladder, count)]
        if size not in self._graphs and not self._make(size):
            return None
        assert self._static is not None
        slots.fill(forward, self._static, size, tokens=self._group.view.first_stage)
        return Step(self._static.hidden[:count], self._graphs[size])

    def finish(self) -> None:
        """Wait until no replay is under way, so that graphs may go, unless they stay.

        That takes as long as the steps that the host is ahead: next to nothing of the change of weights that follows.
        """
        if self._graphs and not self._rank.keep:
            self._rank.device.compute.record().wait()

    def _make(self, size: int) -> bool:
        """Capture what a step of `size` needs; whether the whole group could."""
        if self._static is None:
            if not self._group.agree(self._willing, self._rank.device.torch):
                self._off = True
                if self._willing:
                    logger.info("decode graphs: none, another rank of the group has none")
                return False
            self._static = self._rank.static_inputs()
            if not self._capture(self._ladder[-1]):
                return False
        return size in self._graphs or self._capture(size)

    def _capture(self, size: int) -> bool:
        """By all ranks of the group in the same order: `capture` does the step once, with its collectives."""
        assert self._static is not None
        started, static, before = time.perf_counter(), self._static, self._pool.bytes
        static.clear(size)
        inputs, hidden = static.inputs(size), static.hidden[:size]

        def work() -> None:
            result = self._layers(inputs, None if self._group.view.first_stage else hidden)
            if result.data_ptr() != hidden.data_ptr():
                hidden.copy_(result)

        graph, said = None, ""
        try:
            graph = self._pool.capture(work)
        except CaptureError as error:
            said = str(error)
        if not self._group.agree(graph is not None, self._rank.device.torch):
            self._give_up(size, said)
            return False
        assert graph is not None
        level = logging.DEBUG if self._graphs else logging.INFO
        self._graphs[size] = graph
        seconds, took = time.perf_counter() - started, format_bytes(self._pool.bytes - before)
        logger.log(
            level, "decode graph of %d sequences: captured in %.2f s, %s of memory", size, seconds, took
        )
        return True

    def _give_up(self, size: int, said: str) -> None:
        """Run without graphs from here on, under later shardings as well."""
        self._rank.device.compute.record().wait()  # a replay of the step before may be under way
        self._graphs.clear()
        self._static, self._off = None, True
        self._rank.wanted = False
        if said:
            logger.warning(
                "decode graphs: a step of %d sequences cannot be captured (%s); decode runs without graphs, and "
                "may wait for the host, which then launches every kernel; %s=0 tries none",
                size,
                said,
                VARIABLE,
            )
        else:
            logger.info("decode graphs: none from here on, another rank of the group could not capture one")


class RankGraphs:
    """What of a rank's decode graphs outlives a stage: its settings, and graphs over weights that stay resident."""

    def __init__(
        self,
        device: Device,
        *,
        most: int,
        blocks: int,
        block_size: int,
        hidden: int,
        dtype: torch.dtype,
        keep: bool,
    ) -> None:
        """For up to `most` sequences of `blocks` KV blocks each. With `keep` the weights of the decode sharding stay
        where they are while another one is in use, and so do its graphs. Raises `ConfigError` if the environment
        variable makes no sense."""
        self.device, self.most = device, most
        self.wanted = _wanted()
        """Whether to try: not if the user does not want to, nor when it failed once."""
        self._static = blocks, hidden, dtype, block_size
        self.keep = keep
        self._kept: DecodeGraphs | None = None

    def of(
        self, layers: Layers, group: TensorParallelGroup, *, attention_capturable: bool
    ) -> DecodeGraphs | None:
        """Those of the decode sharding, which a new stage of it is to use; None where there cannot be any.

        That is the same on all ranks of the group: it follows from the kinds of device and transport.
        """
        if self._kept is not None:
            return self._kept
        parallel = len(group.view.tp_ranks) > 1
        if parallel and not group.transport.capturable:
            return None
        pool = self.device.graph_pool()
        if pool is None:
            return None
        graphs = DecodeGraphs(self, pool, layers, group, willing=self.wanted and attention_capturable)
        if self.keep:
            self._kept = graphs
        return graphs

    def static_inputs(self) -> StaticInputs:
        """New ones."""
        return StaticInputs(self.device, graph_batches(self.most)[-1], *self._static)

    def close(self) -> None:
        """Give up graphs that were kept; no replay is under way."""
        self._kept = None


def _wanted() -> bool:
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ConfigError(
            f"{VARIABLE}={value!r}: 0 is for decode steps without CUDA graphs, 1 for the default"
        )
    return value == "1"
