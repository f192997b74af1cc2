"""One step of a check, as a rank carries it out: data that tells rank, step and position, verified to the bit."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from seesaw.preflight.messages import Step
from seesaw.transport.base import Transport

_PERIOD = 251
"""A prime, so that the pattern does not repeat at a power of two; integers below it are exact in every type."""
_EXACT = 256
"""Up to which bfloat16 has every integer: sums that stay below it are exact in whatever order and however often they
are rounded on the way, as NCCL rounds them from rank to rank."""
_REPEATS = 5
"""Messages or sums in a row that are timed; the first is not counted."""


class WrongDataError(Exception):
    """What arrived is not what was sent; the message says where."""


def exercise(
    transport: Transport,
    rank: int,
    number: int,
    step: Step,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> None:
    """Carry out the rank's part of step `number` with data on `device`, by default on the host.

    Raises `WrongDataError`, or what the transport raises.
    """
    if step.operation in ("barrier", "broadcast") or (step.operation == "send" and step.channel):
        dtype = torch.int64  # as tokens are
    count = max(1, step.bytes // dtype.itemsize)
    summed = step.operation in ("barrier", "all_reduce")
    period = summed_period(len(step.members)) if summed else _PERIOD
    x = _pattern(rank, number, count, period).to(dtype=dtype, device=device)
    match step.operation:
        case "barrier" | "all_reduce":
            total = sum(_pattern(member, number, count, period) for member in step.members)
            assert isinstance(total, Tensor)
            _compare(transport.all_reduce(x, step.members), total.to(dtype))
        case "gather":
            _gather(transport, rank, number, step, x)
        case "broadcast":
            first = _pattern(step.members[0], number, count).to(dtype)
            _compare(transport.broadcast(x, step.members), first)
        case "send":
            _message(transport, rank, number, step, x)


def _gather(transport: Transport, rank: int, number: int, step: Step, x: Tensor) -> None:
    parts = transport.gather(x, step.members)
    if (parts is not None) != (rank == step.members[0]):
        raise WrongDataError(f"gave rank {rank} {'data' if parts is not None else 'nothing'}")
    for member, part in zip(step.members, parts or [], strict=parts is not None):
        _compare(part, _pattern(member, number, x.numel()).to(x.dtype), f" of rank {member}")


def _message(transport: Transport, rank: int, number: int, step: Step, x: Tensor) -> None:
    sender, receiver = step.members
    if rank == sender:
        transport.send(x, receiver, step.channel)
        x.zero_()  # the transport must have its own copy by now
    else:
        expected = _pattern(sender, number, x.numel()).to(x.dtype)
        _compare(transport.receive(x, sender, step.channel), expected)


def summed_period(ranks: int) -> int:
    """The largest prime of which so many ranks may sum smaller integers, and stay exact; at least 2."""
    most = max(2, _EXACT // ranks)
    return next(n for n in range(most, 1, -1) if all(n % i for i in range(2, int(n**0.5) + 1)))


def _pattern(rank: int, number: int, count: int, period: int = _PERIOD) -> Tensor:
    """What `rank` puts into step `number`: integers below `period`."""
    return (torch.arange(count) * 7 + (rank + 1) * 31 + number * 13) % period


def timed(
    transport: Transport, rank: int, step: Step, dtype: torch.dtype, device: torch.device
) -> float | None:
    """Bytes a second at which a step goes several times in a row, as this rank sees it; None on one that sends.

    Of an all-reduce, what each rank sends and receives of a ring: 2 (n - 1)/n of the bytes.
    """
    x = torch.zeros(max(1, step.bytes // dtype.itemsize), dtype=dtype, device=device)
    size, times = x.nbytes, []
    for _ in range(_REPEATS):
        if step.operation == "all_reduce":
            transport.all_reduce(x, step.members)
        elif rank == step.members[0]:
            transport.send(x, step.members[1], step.channel)
            continue
        else:
            transport.receive(x, step.members[0], step.channel)
        x[:1].cpu()  # the device is done
        times.append(time.perf_counter())
    if not times:
        transport.flush()
        return None
    share = 2 - 2 / len(step.members) if step.operation == "all_reduce" else 1.0
    return share * size * (len(times) - 1) / max(times[-1] - times[0], 1e-9)


def _compare(found: Tensor, expected: Tensor, of: str = "") -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise WrongDataError(f"gave {found.dtype} of shape {tuple(found.shape)}{of}")
    differ = (found.cpu().contiguous().view(torch.uint8) != expected.view(torch.uint8)).nonzero()
    if len(differ):
        raise WrongDataError(f"gave wrong data{of} at byte {int(differ[0])}")
