"""Registered host memory and one-hop copies on a GPU: bit for bit, on late streams, and at what rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests import triton_interpreter

pytestmark = [pytest.mark.gpu, triton_interpreter.needs_compiled_kernels()]

from seesaw.device.registration import CudaRuntime  # noqa: E402 - behind the interpreter's switch
from seesaw.kv.host_buffer import HostBuffer  # noqa: E402
from seesaw.kv.registered import HostRegistration  # noqa: E402
from seesaw.kv.transfers import block_table, copy_slabs, swap_in, swap_out  # noqa: E402
from seesaw.kv.triton_copies import copy_slabs as one_hop  # noqa: E402

LAYERS, HEADS, BLOCK_SIZE, HEAD_DIM = 8, 8, 16, 128
BLOCKS, TYPE = 96, torch.bfloat16
SHAPE = (BLOCKS, LAYERS, HEADS, BLOCK_SIZE, HEAD_DIM)


class Refusing(CudaRuntime):
    """A driver that registers nothing."""

    def register(self, address: int, size: int, read_only: bool) -> int:
        """Refuse."""
        return 2


@pytest.fixture(params=["registered", "refused"])
def registration(request: pytest.FixtureRequest) -> Iterator[HostRegistration]:
    host = HostBuffer.create(*SHAPE, TYPE)
    runtime = CudaRuntime() if request.param == "registered" else Refusing()
    torch.cuda.init()
    with HostRegistration(host.tensor, runtime=runtime, staging_bytes=8 << 20) as made:
        assert made.registered == (request.param == "registered")
        yield made
    host.close()


def random_pool(heads: int) -> Tensor:
    shape = (BLOCKS, LAYERS, 2, heads, BLOCK_SIZE, HEAD_DIM)
    pool = torch.empty(shape, dtype=TYPE, device="cuda")
    pool.view(torch.int16).random_(-(1 << 15), 1 << 15)
    return pool


def bits(x: Tensor) -> Tensor:
    return x.cpu().view(torch.int16)


@pytest.mark.parametrize("layer", [None, 3])
@pytest.mark.parametrize("heads", [range(HEADS), range(2, 3), range(4, 8)])
def test_round_trips_are_exact(registration: HostRegistration, heads: range, layer: int | None) -> None:
    """Behind a stalled stream that writes the pool late; the way back on a stream that waits for the way there."""
    host, pool = registration._memory, random_pool(len(heads))
    late = random_pool(len(heads))
    wanted, expected = bits(late), bits(host).clone()
    there, back = torch.cuda.Stream(), torch.cuda.Stream()
    pairs = torch.stack([torch.randperm(BLOCKS), torch.randperm(BLOCKS)], 1)
    where = {"layers": range(LAYERS), "kv_heads": heads, "layer": layer, "copy": registration.copy_slabs}
    torch.cuda.synchronize()
    with torch.cuda.stream(there):
        torch.cuda._sleep(200_000_000)
        pool.copy_(late)
        swap_out(pool, host, block_table(pairs, pool, host), **where)
        pool.zero_()
        out = there.record_event()
    with torch.cuda.stream(back):
        back.wait_event(out)
        swap_in(pool, host, block_table(pairs, pool, host), **where)
    torch.cuda.synchronize()
    inner = slice(0, LAYERS) if layer is None else slice(layer, layer + 1)
    assert torch.equal(bits(pool)[:, inner], wanted[:, inner])
    expected[pairs[:, 1], inner, :, heads.start : heads.stop] = wanted[pairs[:, 0], inner]
    assert torch.equal(bits(host), expected)


def test_memory_that_is_not_registered_is_refused_before_the_device_reads_it() -> None:
    pool, host = random_pool(HEADS), HostBuffer.create(*SHAPE, TYPE).tensor
    try:
        copy_slabs(pool, host, torch.tensor([[0, 0]]), True)
    except ValueError as error:
        assert "cannot be accessed" in str(error)
    else:  # a system whose GPUs reach all of the host's memory
        torch.cuda.synchronize()
        assert torch.equal(bits(host[0]), bits(pool[0]))


def test_a_refusal_by_the_driver_does_not_reach_the_next_kernel() -> None:
    runtime = CudaRuntime()
    torch.cuda.init()
    error = runtime.register(1 << 12, 1 << 12, False)  # nothing is mapped there
    assert error and runtime.explain(error)
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.parametrize("programs", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("heads", [8, 2])
def test_rate(programs: int, heads: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not asserted, beside one large copy by the driver: random blocks, whole and by layer."""
    count = 2048
    host = HostBuffer.create(count, LAYERS, HEADS, BLOCK_SIZE, HEAD_DIM, TYPE)
    pool = torch.zeros(count, LAYERS, 2, heads, BLOCK_SIZE, HEAD_DIM, dtype=TYPE, device="cuda")
    torch.cuda.init()
    with HostRegistration(host.tensor) as registration:
        assert registration.registered
        pairs = torch.stack([torch.randperm(count), torch.randperm(count)], 1)
        table, far = block_table(pairs, pool, host.tensor), host.tensor[:, :, :, :heads]
        flat = host.tensor.view(-1)[: pool.numel()]
        for to_host in (True, False):
            kernel = seconds(lambda out=to_host: one_hop(pool, far, table, out, programs=programs))  # type: ignore[misc]
            layer = seconds(
                lambda out=to_host: one_hop(pool[:, :1], far[:, :1], table, out, programs=programs)  # type: ignore[misc]
            )
            target, source = (flat, pool.view(-1)) if to_host else (pool.view(-1), flat)
            driver = seconds(lambda a=target, b=source: a.copy_(b, non_blocking=True))  # type: ignore[misc]
            rates = [pool.nbytes / 1e9 / each for each in (kernel, layer * LAYERS, driver)]
            with capsys.disabled():
                way = "to host" if to_host else "to device"
                print(f"\n{way:9} {heads} heads {programs:2} programs: {rates[0]:6.1f} GB/s whole, ", end="")
                print(f"{rates[1]:6.1f} by layer, {rates[2]:6.1f} by the driver", end="")
            assert min(rates) > 0
    host.close()


def seconds(call: Callable[[], object]) -> float:
    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(3):
        call()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 3e3
