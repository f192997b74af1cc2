"""One step of a check, as a rank carries it out: data that tells rank, step and position, verified to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from seesaw.preflight.messages import Step
from seesaw.transport.base import Transport

_PERIOD = 251
"""A prime, so that the pattern does not repeat at a power of two; integers below it are exact in every type."""


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
    x = _pattern(rank, number, count).to(dtype=dtype, device=device)
    match step.operation:
        case "barrier" | "all_reduce":
            total = sum(_pattern(member, number, count) for member in step.members)
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


def _pattern(rank: int, number: int, count: int) -> Tensor:
    """What `rank` puts into step `number`: integers of 0 to 250.

    Sums over ranks are made of integers that float32 holds, and rounded once to the type: so they are exact
    whatever the order.
    """
    return (torch.arange(count) * 7 + (rank + 1) * 31 + number * 13) % _PERIOD


def _compare(found: Tensor, expected: Tensor, of: str = "") -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise WrongDataError(f"gave {found.dtype} of shape {tuple(found.shape)}{of}")
    differ = (found.cpu().contiguous().view(torch.uint8) != expected.view(torch.uint8)).nonzero()
    if len(differ):
        raise WrongDataError(f"gave wrong data{of} at byte {int(differ[0])}")
