"""Random programs of transport calls, and what every call must give, worked out by each rank for itself."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from seesaw.transport.base import Link, Members, Transport, has_partial_sums

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float32, torch.bfloat16)
SIZES = (0, 1, 3, 17, 31, 64, 250, 1000, 1023, 4096, 5001)


@dataclass(frozen=True)
class Call:
    """One call in the program's order; a rank carries out those that concern it."""

    what: str
    number: int
    members: Members
    dtype: torch.dtype
    size: int
    channel: int = 0

    def data(self, rank: int) -> Tensor:
        """What `rank` puts in: numbers of very different magnitudes, whose sums depend on the order."""
        generator = torch.Generator().manual_seed(self.number * 64 + rank)
        if not self.dtype.is_floating_point:
            return torch.randint(-(2**40), 2**40, (self.size,), generator=generator).to(self.dtype)
        scale = torch.randint(-6, 7, (self.size,), generator=generator)
        return (torch.randn(self.size, generator=generator) * 2.0**scale).to(self.dtype)


def ordered_sum(parts: list[Tensor]) -> Tensor:
    """The sum in float32 (wider types in their own), in order, rounded once."""
    dtype = parts[0].dtype
    exact = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    total = parts[0].to(exact)
    for part in parts[1:]:
        total = total + part.to(exact)
    return total.to(dtype)


def random_program(world: int, calls: int, seed: int, *, large: int, in_flight: int) -> list[Call]:
    """A program that cannot come to a standstill while `in_flight` small messages fit each ring.

    Messages are received up to a few calls after they were sent; those of `large` elements at once, since they
    may be larger than any buffer.
    """
    chance = random.Random(seed)
    program: list[Call] = []
    waiting: list[Call] = []
    for number in range(calls):
        dtype = chance.choice(TYPES)
        size = large if chance.random() < 0.1 else chance.choice(SIZES)
        what = chance.choice(
            ("all_reduce", "all_reduce", "all_reduce", "gather", "broadcast", "send", "send")
        )
        count = 2 if what == "send" else chance.randint(1, world)
        members = tuple(chance.sample(range(world), count))
        channel = chance.randint(0, 1)
        program.append(Call(what, number, members, dtype, size, channel))
        if what == "send":
            waiting.append(program[-1])
        while waiting and (size == large or len(waiting) >= in_flight or chance.random() < 0.2):
            sent = waiting.pop(0)
            program.append(Call("receive", sent.number, sent.members, sent.dtype, sent.size, sent.channel))
    for sent in waiting:
        program.append(Call("receive", sent.number, sent.members, sent.dtype, sent.size, sent.channel))
    return program


def groups_of(program: list[Call]) -> list[Members]:
    """The groups that a program's collectives name."""
    return list(dict.fromkeys(call.members for call in program if call.what not in ("send", "receive")))


def links_of(program: list[Call]) -> list[Link]:
    """The links that a program's messages take."""
    return list(dict.fromkeys((*call.members, call.channel) for call in program if call.what == "send"))  # type: ignore[misc]


def run_program(transport: Transport, rank: int, program: list[Call], *, ordered: bool = True) -> None:
    """Carry out the rank's part, and check what every call gives; sums to the bit if they are `ordered`."""
    for call in program:
        if rank not in call.members:
            continue
        if call.what in ("send", "receive"):
            _message(transport, rank, call)
        else:
            _collective(transport, rank, call, ordered)


def _message(transport: Transport, rank: int, call: Call) -> None:
    source, destination = call.members
    if call.what == "send" and rank == source:
        x = call.data(source)
        transport.send(x, destination, call.channel)
        x.zero_()  # as the protocol allows
    if call.what == "receive" and rank == destination:
        x = torch.zeros(call.size, dtype=call.dtype)
        assert transport.receive(x, source, call.channel) is x
        assert torch.equal(x, call.data(source)), call


def _collective(transport: Transport, rank: int, call: Call, ordered: bool) -> None:
    x = call.data(rank)
    if call.what == "all_reduce":
        assert _all_reduce(transport, x, call, rank) is x
        expected = ordered_sum([call.data(m) for m in call.members])
        if ordered:
            assert torch.equal(x, expected), (call, (x != expected).nonzero().flatten()[:5])
        else:
            size = sum(call.data(m).abs().float() for m in call.members)
            near = (x.float() - expected.float()).abs() <= 0.02 * size
            assert near.all() and (x.dtype.is_floating_point or torch.equal(x, expected)), call
    elif call.what == "broadcast":
        assert transport.broadcast(x, call.members) is x
        assert torch.equal(x, call.data(call.members[0])), call
    else:
        parts = transport.gather(x, call.members)
        assert (parts is not None) == (rank == call.members[0]), call
        for member, part in zip(call.members, parts or [], strict=parts is not None):
            assert torch.equal(part, call.data(member)), (call, member)
        assert torch.equal(x, call.data(rank)), "gather changed its input"


def _all_reduce(transport: Transport, x: Tensor, call: Call, rank: int) -> Tensor:
    """At once, or in parts where there is such a thing: all members the same, each at its own pace."""
    chance, pace = random.Random(call.number), random.Random(call.number * 64 + rank)
    if not has_partial_sums(transport) or len(call.members) < 2 or not call.size or chance.random() < 0.3:
        return transport.all_reduce(x, call.members)
    computed = x.clone()
    x.fill_(-1)
    counts = [0]
    while sum(counts) < call.size:
        counts.append(min(call.size - sum(counts), chance.randint(0, 1 + call.size // 2)))

    def compute(part: int) -> None:
        time.sleep(pace.choice((0.0, 0.0, 0.0005)))
        a = sum(counts[:part])
        x[a : a + counts[part]] = computed[a : a + counts[part]]

    return transport.all_reduce_in_parts(x, counts, compute, call.members)
