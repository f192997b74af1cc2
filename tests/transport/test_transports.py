"""Every transport against the same oracle: what each call must give, worked out in one process."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from seesaw.transport.base import Transport, has_partial_sums
from seesaw.transport.select import Kind, sums_in_parts
from tests.transport.programs import groups_of, links_of, ordered_sum, random_program, run_program
from tests.transport.ranks import Setup, run_ranks

TINY_REGION = {"slot_bytes": 4096, "one_round_bytes": 1024, "blocks": (4, 3), "block_bytes": (4096, 1000)}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "shm": ("shm", {}, 16),
    "shm-tiny": ("shm", TINY_REGION, 1),
    "tcp": ("tcp", {}, 16),
    "tcp-two-rounds": ("tcp", {"one_round_bytes": 0, "buffer_bytes": 20_000}, 1),
    "gloo": ("gloo", {}, 16),
}
"""Transport, options, and how many messages of a few KB it takes before anybody receives."""


def setup_for(case: str, world: int, **more: Any) -> Setup:
    kind, options, _ = CASES[case]
    return Setup(kind, world, options, **more)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_random_programs(case: str, world: int) -> None:
    program = random_program(world, 100, seed=world, large=200_003, in_flight=CASES[case][2])
    with setup_for(case, world, groups=groups_of(program)) as setup:
        run_ranks(setup, lambda transport, rank: run_program(transport, rank, program))


@pytest.mark.parametrize("kind", ["shm", "tcp", "gloo"])
def test_which_transports_sum_in_parts(kind: Kind) -> None:
    """As the profile of a node takes it to be."""

    def body(transport: Transport, rank: int) -> None:
        assert has_partial_sums(transport) == sums_in_parts(kind)
        # Gloo's ranks are not all connected when the first of them is.
        transport.all_reduce(torch.ones(1), (0, 1))

    with setup_for(kind, 2, groups=[(0, 1)]) as setup:
        run_ranks(setup, body)


@pytest.mark.parametrize("world", [2, 4])
def test_random_programs_on_ranks_that_talk_through_the_host(world: int) -> None:
    """Staging changes no bit."""
    program = random_program(world, 60, seed=world, large=200_003, in_flight=16)
    with Setup("shm", world, staged=True) as setup:
        run_ranks(setup, lambda transport, rank: run_program(transport, rank, program))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_random_programs_over_lanes(world: int) -> None:
    """What `NcclTransport` asks of `torch.distributed`, of a backend that runs here."""
    program = random_program(world, 60, seed=world, large=200_003, in_flight=1)
    with Setup("nccl", world, groups=groups_of(program), links=links_of(program)) as setup:
        run_ranks(setup, lambda transport, rank: run_program(transport, rank, program, ordered=False))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_long_random_programs(case: str, seed: int) -> None:
    program = random_program(4, 800, seed=seed, large=100_001 + seed, in_flight=CASES[case][2])
    with setup_for(case, 4, groups=groups_of(program)) as setup:
        run_ranks(setup, lambda transport, rank: run_program(transport, rank, program))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["shm", "shm-tiny", "tcp", "gloo"])
def test_special_values_have_the_same_bits_everywhere(case: str, dtype: torch.dtype) -> None:
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, largest, -largest, tiny / 4, float("inf"), -float("inf")])
    generator = torch.Generator().manual_seed(1)
    parts = [values[torch.randint(len(values), (3001,), generator=generator)].to(dtype) for _ in range(5)]
    expected = ordered_sum(parts)
    assert expected.isnan().any() and expected.isinf().any()

    def body(transport: Transport, rank: int) -> None:
        x = transport.all_reduce(parts[rank].clone(), (0, 1, 2, 3, 4))
        assert torch.equal(x.isnan(), expected.isnan())
        whole = ~expected.isnan()
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        assert torch.equal(x[whole].view(bits), expected[whole].view(bits))

    with setup_for(case, 5, groups=[(0, 1, 2, 3, 4)]) as setup:
        run_ranks(setup, body)


@pytest.mark.parametrize("case", ["shm", "tcp"])
def test_every_type_is_summed(case: str) -> None:
    members = (2, 0, 1)
    types = (torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)

    def body(transport: Transport, rank: int) -> None:
        for dtype in types:
            for size in (5, 40_000):
                parts = [torch.arange(size).add(50 * r).to(dtype) for r in range(3)]
                expected = ordered_sum([parts[r] for r in members])
                assert torch.equal(transport.all_reduce(parts[rank], members), expected), dtype
        with pytest.raises(TypeError, match=r"torch\.bool is not summed"):
            transport.all_reduce(torch.zeros(3, dtype=torch.bool), members)

    with setup_for(case, 3) as setup:
        run_ranks(setup, body)


@pytest.mark.parametrize("case", ["shm", "tcp", "gloo"])
def test_sends_do_not_wait_for_the_receiver(case: str) -> None:
    """Both ranks send first; tokens pass hidden states that nobody has received yet."""
    hidden, tokens = torch.randn(3_000_000), torch.arange(500)

    def body(transport: Transport, rank: int) -> None:
        other = 1 - rank
        for i in range(5):
            transport.send(hidden + i, other, 0)
            transport.send(tokens + i, other, 1)
        x, t = torch.empty_like(hidden), torch.empty_like(tokens)
        for i in range(5):
            assert torch.equal(transport.receive(t, other, 1), tokens + i)
        for i in range(5):
            assert torch.equal(transport.receive(x, other, 0), hidden + i)

    with setup_for(case, 2, groups=[]) as setup:
        run_ranks(setup, body)


@pytest.mark.parametrize("case", ["shm-tiny", "tcp-two-rounds"])
def test_a_message_larger_than_every_buffer_streams_through(case: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, (9_000_001,), dtype=torch.uint8, generator=generator)

    def body(transport: Transport, rank: int) -> None:
        for channel in (0, 1):
            if rank == 0:
                transport.send(x, 1, channel)
            else:
                assert torch.equal(transport.receive(torch.empty_like(x), 0, channel), x)

    with setup_for(case, 2) as setup:
        run_ranks(setup, body)


@pytest.mark.parametrize("case", ["shm", "tcp"])
def test_a_message_of_another_size_is_refused(case: str) -> None:
    def body(transport: Transport, rank: int) -> None:
        if rank == 0:
            transport.send(torch.zeros(10), 1, 0)
            transport.all_reduce(torch.zeros(1), (0, 1))
        else:
            transport.all_reduce(torch.zeros(1), (0, 1))
            with pytest.raises(AssertionError, match="rank 0 on channel 0"):
                transport.receive(torch.zeros(11), 0, 0)

    with setup_for(case, 2) as setup:
        run_ranks(setup, body)


@pytest.mark.parametrize("what", ["receive", "all_reduce", "full ring"])
@pytest.mark.parametrize("case", ["shm-tiny", "tcp-two-rounds"])
def test_signal_handlers_run_while_a_rank_waits(case: str, what: str) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupt

    def body(transport: Transport, rank: int) -> None:
        if rank == 0:
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            x = torch.zeros(200_000)
            with pytest.raises(Interrupt):
                if what == "receive":
                    transport.receive(x, 1, 0)
                elif what == "all_reduce":
                    transport.all_reduce(x, (0, 1))
                else:
                    while True:
                        transport.send(x, 1, 0)
            transport.send(torch.zeros(1), 1, 1)  # on another ring: it ends the test
        else:
            transport.receive(torch.zeros(1), 0, 1)

    with setup_for(case, 2) as setup:
        run_ranks(setup, body, flush=False)
