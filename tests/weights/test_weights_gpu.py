"""Weights on a GPU: every bit under stalled streams, beside computation, within memory, and at what rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests import triton_interpreter

pytestmark = [pytest.mark.gpu, triton_interpreter.needs_compiled_kernels()]

from seesaw.core.layout import Layout  # noqa: E402 - behind the interpreter's switch
from seesaw.core.model_spec import DType, ModelSpec  # noqa: E402
from seesaw.device.cuda import CudaDevice  # noqa: E402
from seesaw.device.registration import CudaRuntime  # noqa: E402
from seesaw.weights.changes import Mode  # noqa: E402
from seesaw.weights.host_copies import HostCopies  # noqa: E402
from seesaw.weights.intervals import Interval  # noqa: E402
from seesaw.weights.reshard import RankWeights, Reshard  # noqa: E402
from seesaw.weights.sharding import Sharding, make_sharding, plan_peak_bytes, weight_bytes  # noqa: E402
from seesaw.weights.store import HostWeightStore  # noqa: E402
from tests.weights.shapes import TINY, spec_of  # noqa: E402
from tests.weights.test_reshard import MODES, loaded, store_of  # noqa: E402

CYCLES = 200_000_000
"""About a tenth of a second."""
BIG = spec_of(layers=8, hidden=1024, heads=16, kv_heads=4, head_dim=64, ffn=4096, vocab=4096)
"""Of some 230 million bytes in bfloat16."""
CHAIN = ("P4", "T4", "P2T2", "P4", "D2P2", "T4", "D4", "P4")


class Refusing(CudaRuntime):
    """A driver that registers nothing."""

    def register(self, address: int, size: int, read_only: bool) -> int:
        """Refuse."""
        return 2


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    made = CudaDevice("cuda:0")
    yield made
    made.close()


def arrived(change: Reshard, weights: RankWeights) -> dict[str, Tensor]:
    """Copies of all tensors, made by computation that waits for each layer as it comes to it."""
    assert change.arrivals is not None
    copies = {}
    for name, tensor in weights.tensors.items():
        kind, _, rest = name.partition(".")
        change.arrivals.before(
            int(rest.partition(".")[0]) if kind == "layers" else -1 if kind == "embed" else -2
        )
        copies[name] = tensor.clone()
    return copies


def assert_equal(
    copies: dict[str, Tensor], spec: ModelSpec, sharding: Sharding, rank: int, dtype: torch.dtype
) -> None:
    expected = loaded(spec, sharding, rank)
    assert list(copies) == list(expected)
    for name, tensor in copies.items():
        assert torch.equal(tensor.cpu(), expected[name].to(dtype)), name


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("room", [0, 1 << 20])
@pytest.mark.parametrize("mode", MODES)
def test_every_bit_behind_a_stalled_computation(
    mode: Mode, room: int, dtype: DType, registered: bool, device: CudaDevice
) -> None:
    """It reads the old weights late, after the host has launched changes that free them, and the new ones at once."""
    rank, kind = 1, getattr(torch, dtype)
    store = store_of(TINY)
    weights = RankWeights(TINY, store, dtype, rank, device=device, budget=room)
    if not registered:
        weights.close()
        staged = HostCopies(store.mappings, runtime=Refusing(), staging_bytes=4096)
        weights._fetch = staged.copy_box
    chain = [make_sharding(TINY, Layout.parse(text)) for text in CHAIN]
    change = weights.begin(chain[0], "reload")
    taken = [(chain[0], arrived(change, weights))]
    for sharding in chain[1:]:
        torch.cuda._sleep(CYCLES)
        late = {name: tensor.clone() for name, tensor in weights.tensors.items()}
        taken.append((taken[-1][0], late))
        change = weights.begin(sharding, mode)
        taken.append((sharding, arrived(change, weights)))
    torch.cuda.synchronize()
    for sharding, copies in taken:
        assert_equal(copies, TINY, sharding, rank, kind)
    weights.close()


@pytest.mark.parametrize("mode", MODES)
def test_the_host_does_not_wait_and_copies_come_beside_computation(mode: Mode, device: CudaDevice) -> None:
    """By events: with room for it, the new sharding is there before the last work of the old one is done."""
    with HostWeightStore.dummy(BIG, "bfloat16", seed=1) as store:
        weights = RankWeights(BIG, store, "bfloat16", 0, device=device, budget=4 << 30)
        old, new = (make_sharding(BIG, Layout.parse(text)) for text in ("P4", "T4"))
        weights.load(old)
        weights.transition(new, "delta")  # kernels are compiled now
        weights.transition(old, "delta")
        start = device.compute.record()
        torch.cuda._sleep(5 * CYCLES)
        done = device.compute.record()
        change = weights.begin(new, mode)
        assert not done.native.query()
        begun, ended = change.spans[0]
        change.wait()
        done.wait()
        copied = ended.seconds_since(begun)
        assert copied > 0 and ended.seconds_since(start) < done.seconds_since(start)
        assert change.stats().seconds < done.seconds_since(start)
        weights.close()


@pytest.mark.parametrize("mode", ["delta", "reload"])
def test_memory_is_as_planned(mode: Mode, device: CudaDevice) -> None:
    """As torch counts it, up to the rounding of each tensor."""
    with HostWeightStore.dummy(BIG, "bfloat16", seed=1) as store:
        weights = RankWeights(BIG, store, "bfloat16", 1, device=device)
        chain = [make_sharding(BIG, Layout.parse(text)) for text in ("P4", "T4", "P4", "P2T2", "T4")]
        before = torch.cuda.memory_allocated()
        weights.load(chain[0])
        rounding = 512 * 8 * 12
        for old, new in pairwise(chain):
            torch.cuda.reset_peak_memory_stats()
            torch.cuda._sleep(CYCLES)
            weights.begin(new, mode)
            planned = plan_peak_bytes(BIG, old, new, mode=mode, dtype="bfloat16", rank=1)
            assert torch.cuda.max_memory_allocated() - before <= planned + rounding
            held = weight_bytes(BIG, new, 1, "bfloat16")
            assert torch.cuda.memory_allocated() - before <= held + rounding
        torch.cuda.synchronize()
        weights.close()


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize(("stored", "compute"), [("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_rate(parts: int, stored: DType, compute: DType, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not asserted: part of every row of a down projection, beside one large copy by the driver."""
    spec = spec_of(layers=1, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=64)
    device = CudaDevice("cuda:0")
    with HostWeightStore.dummy(spec, stored, seed=1) as store:
        copies = HostCopies(store.mappings)
        assert copies.registered
        source = store.tensor("model.layers.0.mlp.down_proj.weight")
        rows, columns = source.shape[0], source.shape[1] // parts
        target = torch.empty(rows, columns, dtype=getattr(torch, compute), device="cuda")
        box, place = (
            (Interval(0, rows), Interval(columns * (parts - 1), columns * parts)),
            (
                Interval(0, rows),
                Interval(0, columns),
            ),
        )
        pinned = torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=True)
        beside = torch.empty(source.nbytes, dtype=torch.uint8, device="cuda")
        ours = seconds(lambda: copies.copy_box(source, box, target, place))
        driver = seconds(lambda: beside.copy_(pinned, non_blocking=True))
        assert torch.equal(target.cpu(), source[:, box[1].start :].to(target.dtype))
        moved = rows * columns * source.element_size()
        with capsys.disabled():
            print(f"\n1/{parts} of rows, {stored} to {compute}: {moved / ours / 1e9:6.1f} GB/s, ", end="")
            print(f"{source.nbytes / driver / 1e9:6.1f} by the driver", end="")
        copies.close()
    device.close()


def seconds(call: Callable[[], object]) -> float:
    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(3):
        call()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 3e3
