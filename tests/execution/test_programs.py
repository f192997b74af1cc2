"""Decode programs do what the calls they were recorded from do, bit for bit."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seesaw.attention.base import AttentionBatch
from seesaw.attention.cpu import CpuAttention
from seesaw.core.layout import Layout
from seesaw.core.model_spec import ModelSpec
from seesaw.execution import programs as programs_module
from seesaw.execution.collectives import TensorParallelGroup
from seesaw.execution.layers import PagedAttention, StageLayers
from seesaw.execution.profiling import Profile
from seesaw.execution.programs import DecodePrograms, Timing
from seesaw.execution.slots import Inputs
from seesaw.execution.tracing import RankTrace
from seesaw.kv.device_pool import DevicePool
from seesaw.models.decoder import Decoder
from seesaw.models.hf_config import load_spec
from seesaw.native.pointers import TensorPointer
from seesaw.native.program import SCRATCH, NotRecordable, Recorder
from seesaw.ops.cpu import CpuOperators
from seesaw.ops.cpu_linear import CpuLinear
from seesaw.ops.torch_ops import TorchOperators
from seesaw.transport.base import Transport
from seesaw.weights.sharding import RankView
from tests.checkpoints import make_checkpoint, reference_model
from tests.models.shards import sliced, views
from tests.transport.ranks import Setup, run_ranks

BLOCKS, BLOCK_SIZE = 200, 16
_VIEWS = frozenset(("aten::empty", "aten::new_empty"))
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "llama-biases": ("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"hidden_size": 144}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class _NothingComputed(TorchDispatchMode):
    """Tensors may be allocated and looked at in other shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(arg, Tensor) and arg.is_meta for arg in args):
            assert func.is_view or func._schema.name in _VIEWS, func
        return func(*args, **(kwargs or {}))


class Rank:
    """A rank's layers over pools of their own, filled alike: with programs, and without."""

    def __init__(
        self,
        library: ctypes.CDLL,
        spec: ModelSpec,
        view: RankView,
        state: dict[str, Tensor],
        transport: Transport | None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.spec, self.dtype = spec, dtype
        operators = CpuOperators(library)
        weights = {name: tensor.to(dtype) for name, tensor in sliced(spec, view, state).items()}
        group = TensorParallelGroup(view, cast(Transport, transport))
        decoder = Decoder(spec, view, weights, group, operators)
        self.pools = [self._pool(view) for _ in range(2)]
        with_it, without = (
            PagedAttention(CpuAttention(library), pool, spec, view.layers.start) for pool in self.pools
        )
        self.programs = DecodePrograms.of(decoder, operators, with_it, group, dtype=dtype, **options)
        self._layers = StageLayers(decoder, with_it, self.programs), StageLayers(decoder, without)
        self.native = CpuLinear(library).is_native(dtype)

    def _pool(self, view: RankView) -> DevicePool:
        spec, dtype = self.spec, self.dtype
        planes = len(view.layers) * 2 * len(view.kv_heads) * BLOCK_SIZE * spec.head_dim
        pool = DevicePool(BLOCKS * planes * dtype.itemsize, torch.device("cpu"))
        pool.view(BLOCKS, len(view.layers), len(view.kv_heads), BLOCK_SIZE, spec.head_dim, dtype)
        made = torch.Generator().manual_seed(5)
        for layer in range(len(view.layers)):
            kv = pool.layer(layer)
            kv.copy_(torch.randn(kv.shape, generator=made).to(dtype))
        return pool

    def step(self, positions: list[int], seed: int) -> None:
        """A step of sequences at these positions, both ways: the same bits leave the stage and lie in the pool."""
        made = torch.Generator().manual_seed(seed)
        hidden = torch.randn(len(positions), self.spec.hidden, generator=made).to(self.dtype)
        inputs = batch(positions, seed)
        with torch.inference_mode():
            found, expected = (layers(inputs, hidden.clone()) for layers in self._layers)
        assert torch.equal(found, expected)
        ours, theirs = (pool.layer(0) for pool in self.pools)
        assert torch.equal(ours, theirs)

    @property
    def sizes(self) -> list[int]:
        """Of the programs there are."""
        return [] if self.programs is None else list(self.programs._programs)


def batch(positions: list[int], seed: int) -> Inputs:
    """Sequences whose next tokens are at `positions`, in blocks that are nobody else's."""
    order = np.random.default_rng(seed).permutation(BLOCKS).astype(np.int32)
    width = max(positions) // BLOCK_SIZE + 1
    tables = order[: len(positions) * width].reshape(len(positions), width)
    slots = [
        int(row[at // BLOCK_SIZE]) * BLOCK_SIZE + at % BLOCK_SIZE
        for row, at in zip(tables, positions, strict=True)
    ]
    attention = AttentionBatch(
        query_starts=torch.arange(len(positions) + 1, dtype=torch.int32),
        context_starts=torch.tensor(positions, dtype=torch.int32),
        block_tables=torch.from_numpy(np.ascontiguousarray(tables)),
        slot_mapping=torch.tensor(slots),
        max_query=1,
    )
    where = torch.tensor(positions)
    return Inputs(torch.zeros_like(where), where, attention, None, attention)


def model(folder: Path, variant: str = "llama", **more: Any) -> tuple[ModelSpec, dict[str, Tensor]]:
    family, overrides = _VARIANTS[variant]
    path = make_checkpoint(folder, family, seed=2, **overrides, **more)
    return load_spec(path), reference_model(path).state_dict()


def steps(rank: Rank, many: int = 0) -> None:
    """Contexts that grow, batches that come again, one that does not, and `many` sequences twice."""
    for seed, positions in enumerate(
        (
            [3, 40, 17],
            [4, 41, 18],
            [160, 0, 3],
            [5],
            [9, 9],
            [31, 32],
            [3, 40, 170],
            *[[7] * many] * (2 if many else 0),
        )
    ):
        rank.step(positions, seed)
    assert rank.sizes == ([2, 3, *([many] if many else [])] if rank.native else [])


@pytest.mark.parametrize("variant", _VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_program_does_what_the_decoder_does(
    library: ctypes.CDLL, variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    spec, state = model(tmp_path, variant)
    layout = Layout(pp=2)
    for stage in views(spec, layout, (range(1), range(1, spec.layers))):
        with _NothingComputed():  # type: ignore[no-untyped-call]
            steps(Rank(library, spec, stage[0], state, None, dtype))


@pytest.mark.parametrize(("kind", "world"), [("shm", 2), ("tcp", 2), ("tcp", 3)])
def test_sums_between_ranks_are_in_the_program(
    library: ctypes.CDLL, kind: str, world: int, tmp_path: Path
) -> None:
    """Of many sequences, sums over sockets travel in parts while the product goes on."""
    spec, state = model(tmp_path, "llama-biases")
    stage = views(spec, Layout(tp=world), (range(spec.layers),))[0]

    def body(transport: Transport, rank: int) -> None:
        steps(Rank(library, spec, stage[rank], state, transport), many=180)

    with Setup(kind, world) as setup:
        run_ranks(setup, body)


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_ranks_may_be_late_and_need_not_agree_on_programs(
    library: ctypes.CDLL, kind: str, tmp_path: Path
) -> None:
    spec, state = model(tmp_path)
    stage = views(spec, Layout(tp=2), (range(spec.layers),))[0]

    def body(transport: Transport, rank: int) -> None:
        mine = Rank(library, spec, stage[rank], state, transport)
        mine.step([3, 8], 0)
        if rank:
            assert mine.programs is not None
            mine.programs._off = True
            time.sleep(1.2)  # more than twice the patience of native calls
        mine.step([4, 9], 1)
        assert mine.sizes == ([2] if rank == 0 and mine.native else [])

    with Setup(kind, 2) as setup:
        run_ranks(setup, body)


def test_a_lost_peer_is_named(library: ctypes.CDLL, tmp_path: Path) -> None:
    spec, state = model(tmp_path)
    stage = views(spec, Layout(tp=2), (range(spec.layers),))[0]

    def body(transport: Transport, rank: int) -> None:
        mine = Rank(library, spec, stage[rank], state, transport)
        mine.step([3, 8], 0)
        if rank:
            return
        with pytest.raises(ConnectionError, match="rank 0 lost rank 1 during an all-reduce"):
            mine.step([4, 9], 1)

    with Setup("tcp", 2) as setup:
        run_ranks(setup, body, flush=False)


def test_steps_that_cannot_be_recorded_run_as_they_are(
    library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as on a CPU whose matrix instructions only torch uses."""
    spec, state = model(tmp_path)
    rank = Rank(library, spec, views(spec, Layout(), (range(spec.layers),))[0][0], state, None)
    programs = rank.programs
    assert programs is not None

    def left_to_torch(recorder: Recorder) -> CpuOperators:
        operators = CpuOperators(cast(ctypes.CDLL, recorder.library()))
        operators._linear._native = frozenset()
        return operators

    monkeypatch.setattr(programs._operators, "recorded_by", left_to_torch)
    with caplog.at_level("INFO", "seesaw"):
        for seed in range(4):
            rank.step([3, 8], seed)
    assert rank.sizes == []
    said = [record.message for record in caplog.records]
    assert said == ["decode programs: none, since products of torch.float32 are made by torch"]


def test_there_are_none_for_parts_that_cannot_be_recorded(library: ctypes.CDLL, tmp_path: Path) -> None:
    spec, state = model(tmp_path)
    view = views(spec, Layout(), (range(spec.layers),))[0][0]
    rank = Rank(library, spec, view, state, None)
    attention = PagedAttention(CpuAttention(library), rank.pools[0], spec, 0)
    group = TensorParallelGroup(view, cast(Transport, None))
    decoder = Decoder(spec, view, sliced(spec, view, state), group, TorchOperators())
    assert DecodePrograms.of(decoder, TorchOperators(), attention, group, dtype=torch.float32) is None


def test_only_so_many_are_kept(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those used last."""
    monkeypatch.setattr(programs_module, "_MOST", 2)
    spec, state = model(tmp_path)
    rank = Rank(library, spec, views(spec, Layout(), (range(spec.layers),))[0][0], state, None)
    for seed, count in enumerate((1, 1, 2, 2, 1, 3, 3)):
        rank.step([5] * count, seed)
    assert rank.sizes == ([1, 3] if rank.native else [])


def test_what_calls_took_is_booked(library: ctypes.CDLL, tmp_path: Path) -> None:
    spec, state = model(tmp_path)
    profile, trace = Profile(), RankTrace(0, lambda events: None)
    stage = views(spec, Layout(tp=2), (range(spec.layers),))[0]

    def body(transport: Transport, rank: int) -> None:
        mine = Rank(library, spec, stage[rank], state, transport, timing=Timing([profile.book, trace.book]))
        mine.step([3, 8], 0)
        started = time.perf_counter()
        with profile.forward("decode", 2):
            mine.step([4, 9], 1)
        took = time.perf_counter() - started
        functions = profile.phases["decode"].functions
        if not mine.native:
            return
        assert functions["attend"].calls == functions["silu_mul"].calls == spec.layers
        assert functions["all_reduce"].calls == 2 * spec.layers
        assert functions[f"linear {spec.hidden}x{len(stage[rank].ffn)}"].calls == spec.layers
        assert 0 < sum(function.seconds for function in functions.values()) < took
        assert trace._exchanging == functions["all_reduce"].seconds

    with Setup("shm", 2) as setup:
        run_ranks(setup, body)


@contextmanager
def recorded(library: ctypes.CDLL) -> Iterator[tuple[Recorder, Any]]:
    recorder = Recorder(library)
    yield recorder, CpuOperators(recorder.library())


def test_results_that_are_needed_at_the_same_time_lie_apart(library: ctypes.CDLL) -> None:
    with recorded(library) as (recorder, operators):
        x = recorder.input("x", (4, 64), torch.float32)
        first = operators.silu_mul(x)  # [4, 32]
        second = operators.silu_mul(first)  # [4, 16], beside the first
        third = operators.silu_mul(x)  # beside the second, where the first was
        recorder.output("y", operators.join_columns([third]))
        assert second.shape == (4, 16)
    program = recorder.program()
    assert program.scratch_bytes == 4 * 32 * 4 + 4 * 16 * 4
    scratch, given, out = torch.empty(program.scratch_bytes), torch.randn(4, 64), torch.empty(4, 32)
    program.run({"x": given.data_ptr(), "y": out.data_ptr(), SCRATCH: scratch.data_ptr()})
    assert torch.equal(out, CpuOperators(library).silu_mul(given))


def test_an_answer_goes_to_whoever_recorded_the_call(library: ctypes.CDLL) -> None:
    said: list[int] = []
    recorder = Recorder(library)
    for answer in (said.append, None):
        function = recorder.library(answer)["seesaw_linear"]
        function.argtypes = (*[TensorPointer] * 4, *[ctypes.c_int64] * 5, *[ctypes.c_int32] * 3)
        x = recorder.input("x", (1, 8), torch.float32)
        function(x, x, None, x, 1, 1, 8, 8, 8, 99, 0, 1)  # 99 is no type
    values = torch.zeros(8)
    with pytest.raises(AssertionError, match="seesaw_linear in a program answers 1"):
        recorder.program().run({"x": values.data_ptr()})
    assert said == [1]


def test_products_that_torch_makes_are_not_recorded(library: ctypes.CDLL) -> None:
    with recorded(library) as (recorder, operators), pytest.raises(NotRecordable, match="made by torch"):
        x = recorder.input("x", (2, 8), torch.float64)
        operators.linear(x, torch.ones(3, 8, dtype=torch.float64))
