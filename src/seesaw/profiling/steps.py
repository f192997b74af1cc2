"""What a Forward costs beside its operators: the engine's own stage runs decode steps, and its operators are timed.

The model is small, but large enough that its weights drive everything else from the caches, as those of any model do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from seesaw.attention.select import create_attention
from seesaw.core.actions import Forward, SlotInit
from seesaw.core.devices import kind_of
from seesaw.core.layout import Layout
from seesaw.core.model_spec import DType, ModelSpec, RopeSpec
from seesaw.device.base import Device
from seesaw.execution.collectives import TensorParallelGroup
from seesaw.execution.programs import Timing
from seesaw.execution.stage import Stage
from seesaw.kv.device_pool import DevicePool
from seesaw.ops.select import create_operators
from seesaw.transport.select import SingleTransport
from seesaw.weights.reshard import RankWeights
from seesaw.weights.sharding import make_sharding, rank_view
from seesaw.weights.store import HostWeightStore

_BLOCK_SIZE = 16
_BLOCKS = 4
_STEPS = 16
"""In a row, where the host runs ahead."""
_TIMED = ("attend", "linear", "rms_norm", "add_rms_norm", "rotate", "silu_mul", "argmax")


class _Timed:
    """Stands for operators or a backend, and adds up the seconds of their calls."""

    def __init__(self, subject: object, clock: Callable[[], float]) -> None:
        self._subject, self._clock = subject, clock
        self.seconds, self.calls = 0.0, 0
        for name in _TIMED:
            if hasattr(subject, name):
                setattr(self, name, self._around(getattr(subject, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def book(self, label: str, calls: int, seconds: float) -> None:
        """Calls that a program made."""
        self.seconds += seconds
        self.calls += calls

    def _around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = self._clock()
            result = method(*args, **kwargs)
            self.seconds += self._clock() - started
            self.calls += 1
            return result

        return call


@contextmanager
def step_rest(
    layers: int, dtype: str, place: Device, clock: Callable[[], float]
) -> Iterator[Callable[[], float]]:
    """A function that runs a decode step of one sequence, and returns the seconds that its operators do not take; of
    a device that runs behind the host those of a whole step, of several in a row."""
    spec, device = _spec(layers), place.name
    operators = _Timed(create_operators(device, dtype=getattr(torch, dtype)), clock)
    attention = _Timed(create_attention(device, head_dim=spec.head_dim, dtype=getattr(torch, dtype)), clock)
    with HostWeightStore.dummy(spec, cast(DType, dtype), seed=0) as store:
        by = time.CLOCK_THREAD_CPUTIME_ID if clock is time.thread_time else time.CLOCK_MONOTONIC
        stage = _stage(spec, dtype, place, store, operators, attention, Timing([operators.book], by))
        stage.run(_step(opens=True), None)
        taken = _cost_of(clock)

        def rest() -> float:
            inside, calls = operators.seconds + attention.seconds, operators.calls + attention.calls
            started = clock()
            stage.run(_step(opens=False), None)
            total = clock() - started
            inside = operators.seconds + attention.seconds - inside
            return total - inside - taken * (operators.calls + attention.calls - calls)

        def whole() -> float:
            started = time.perf_counter()
            for _ in range(_STEPS):
                stage.run(_step(opens=False), None)
            place.compute.record().wait()
            return (time.perf_counter() - started) / _STEPS

        yield whole if kind_of(device).runs_behind else rest


def _cost_of(clock: Callable[[], float]) -> float:
    """Seconds that timing a call takes beside what is timed: about one reading of the clock."""
    started = time.perf_counter()
    for _ in range(1000):
        clock()
    return (time.perf_counter() - started) / 1000


def _spec(layers: int) -> ModelSpec:
    return ModelSpec(
        family="llama",
        layers=layers,
        hidden=512,
        heads=8,
        kv_heads=4,
        head_dim=64,
        ffn=1408,
        vocab=2048,
        max_position=256,
        rms_eps=1e-5,
        rope=RopeSpec(),
    )


def _stage(
    spec: ModelSpec,
    dtype: str,
    place: Device,
    store: HostWeightStore,
    operators: Any,
    attention: Any,
    timing: Timing,
) -> Stage:
    sharding = make_sharding(spec, Layout())
    view, element = rank_view(spec, sharding, 0), getattr(torch, dtype)
    weights = RankWeights(spec, store, cast(DType, dtype), 0, device=place)
    weights.load(sharding)
    weights.close()
    shape = (_BLOCKS, spec.layers, spec.kv_heads, _BLOCK_SIZE, spec.head_dim)
    pool = DevicePool(2 * torch.Size(shape).numel() * element.itemsize, place.torch)
    pool.view(*shape, element)
    return Stage(
        spec=spec,
        view=view,
        vocab_widths=[spec.vocab],
        weights=weights.tensors,
        dtype=element,
        group=TensorParallelGroup(view, SingleTransport()),
        pool=pool,
        attention=attention,
        operators=operators,
        block_size=_BLOCK_SIZE,
        device=place,
        timing=timing,
    )


def _step(*, opens: bool) -> Forward:
    return Forward(
        id=1,
        replica=0,
        slots=[0],
        starts=[20],
        counts=[1],
        tokens=[3],
        sampled=[0],
        open=[SlotInit(0, [0, 1], None)] if opens else [],
        close=[],
        new_blocks=[],
        write_through=[],
        feedback=True,
        feedback_from=-1,
    )
