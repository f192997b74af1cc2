"""Decode programs: a decode step of a CPU rank as one native call, recorded for each number of sequences.

They are to CPU ranks what decode graphs (`execution.graphs`) are to GPUs, for another reason: the Python between two
hundred native calls is time in which the rank's cores compute nothing. A program takes its inputs from wherever they
are, and batches as they come, without padding. A step that runs as a program does what it does without, bit for bit,
so ranks need not agree on it.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seesaw.attention.base import AttentionBatch
from seesaw.execution.collectives import TensorParallelGroup
from seesaw.execution.slots import Inputs
from seesaw.models.rope import Rotation
from seesaw.native.build import load
from seesaw.native.program import LINE, SCRATCH, NotRecordable, Program, Recorder

if TYPE_CHECKING:
    from seesaw.execution.layers import PagedAttention
    from seesaw.models.decoder import Decoder
    from seesaw.ops.base import Operators

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """Who is told what the calls of a program took, after each step."""

    listeners: Sequence[Callable[[str, int, float], object]]
    """Called with a function's name, its calls, and the seconds they took."""
    clock: int = time.CLOCK_MONOTONIC
    """By which, as `time.clock_gettime` takes it."""


_MOST = 128
"""Programs that are kept: a program of 80 layers takes some 200 KB."""
_TABLE_WIDTH = "table_width"


class DecodePrograms:
    """Programs of one stage, for as long as its weights and its view of the pool last."""

    def __init__(
        self,
        library: ctypes.CDLL,
        decoder: Decoder,
        operators: Any,
        attention: PagedAttention,
        group: TensorParallelGroup,
        *,
        dtype: torch.dtype,
        timing: Timing | None = None,
    ) -> None:
        """See `of`."""
        self._library, self._decoder, self._operators = library, decoder, operators
        self._attention, self._group, self._dtype = attention, group, dtype
        self._timing = timing
        self._programs: OrderedDict[int, Program] = OrderedDict()
        self._seen: set[int] = set()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._off = False

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        operators: Operators,
        attention: PagedAttention,
        group: TensorParallelGroup,
        *,
        dtype: torch.dtype,
        timing: Timing | None = None,
    ) -> DecodePrograms | None:
        """Those of a stage with hidden states of `dtype`; None where what it calls cannot be recorded."""
        parts: list[object] = [operators, attention.backend]
        if len(group.view.tp_ranks) > 1:
            parts.append(group.transport)
        if not decoder.whole or not all(hasattr(part, "recorded_by") for part in parts):
            return None
        library = load()
        if library is None:
            return None
        return cls(library, decoder, operators, attention, group, dtype=dtype, timing=timing)

    def ready(self, inputs: Inputs) -> Program | None:
        """The program for a step of this shape; None if it is to run as it is.

        A number of sequences that has not come before runs so: recording takes about as long as it saves in a few
        steps, and while a batch thins out, each number comes once.
        """
        count = len(inputs.tokens)
        batch = inputs.attention
        if self._off or inputs.sampled_rows is not None or batch.max_query > 1 or batch.padded:
            return None
        program = self._programs.get(count)
        if program is not None:
            self._programs.move_to_end(count)
        elif count not in self._seen:
            self._seen.add(count)
        else:
            program = self._record(count)
        return program

    def run(self, program: Program, hidden: Tensor, inputs: Inputs) -> Tensor:
        """What leaves the stage, from what enters it or was embedded: `hidden`, `[N, hidden]`, changed in place."""
        turn, batch = self._decoder.turn(inputs.positions), inputs.attention
        delta = torch.empty_like(hidden)
        values = {name: tensor.data_ptr() for name, tensor in _tensors(hidden, turn, batch).items()}
        values["delta"] = delta.data_ptr()
        values[SCRATCH] = self._room(program.scratch_bytes)
        values[_TABLE_WIDTH] = batch.block_tables.shape[1]
        if self._timing is None:
            program.run(values)
        else:
            program.run(values, self._timing.clock)
            for label, calls, seconds in program.times():
                for listener in self._timing.listeners:
                    listener(label, calls, seconds)
        return hidden.add_(delta)

    def _record(self, count: int) -> Program | None:
        recorder, spec = Recorder(self._library), self._attention.spec
        hidden = recorder.input("hidden", (count, spec.hidden), self._dtype)
        angles = (count, spec.head_dim // 2)
        turn = Rotation(*(recorder.input(name, angles, torch.float32) for name in Rotation._fields))
        batch = AttentionBatch(
            query_starts=recorder.input("query_starts", (count + 1,), torch.int32),
            context_starts=recorder.input("context_starts", (count,), torch.int32),
            block_tables=recorder.input("block_tables", (count, 1), torch.int32),
            slot_mapping=recorder.input("slot_mapping", (count,), torch.int64),
            max_query=1,
        )
        backend: Any = self._attention.backend
        attention = replace(self._attention, backend=backend.recorded_by(recorder, _TABLE_WIDTH))
        tokens = torch.empty(count, dtype=torch.int64, device="meta")
        attend = attention.over(Inputs(tokens, tokens, batch, None, batch))
        operators, group = self._operators.recorded_by(recorder), self._recorded_group(recorder)
        try:
            delta = self._decoder.operations(operators, group, hidden, turn, attend)
        except NotRecordable as error:
            logger.info("decode programs: none, since %s", error)
            self._off = True
            return None
        recorder.output("delta", delta)
        if len(self._programs) == _MOST:
            self._programs.popitem(last=False)
        self._programs[count] = recorder.program()
        return self._programs[count]

    def _recorded_group(self, recorder: Recorder) -> TensorParallelGroup:
        transport: Any = self._group.transport
        if len(self._group.view.tp_ranks) > 1:
            transport = transport.recorded_by(recorder)
        return TensorParallelGroup(self._group.view, transport)

    def _room(self, size: int) -> int:
        """The address of scratch memory of `size` bytes, at the start of a cache line."""
        if len(self._scratch) < size + LINE:
            self._scratch = torch.empty(size + LINE, dtype=torch.uint8)
        return -(-self._scratch.data_ptr() // LINE) * LINE


def _tensors(hidden: Tensor, turn: Rotation, batch: AttentionBatch) -> dict[str, Tensor]:
    """A step's inputs by the names under which they are recorded."""
    tensors = {
        "hidden": hidden,
        "cos": turn.cos,
        "sin": turn.sin,
        "query_starts": batch.query_starts,
        "context_starts": batch.context_starts,
        "block_tables": batch.block_tables,
        "slot_mapping": batch.slot_mapping,
    }
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), (name, tensor.shape, tensor.stride())
    return tensors
