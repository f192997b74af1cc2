"""What the control process, the leader of a check and its ranks say to each other; one line of JSON each."""

from __future__ import annotations

from typing import Literal

import msgspec

from seesaw.core.node import Place

Operation = Literal["barrier", "all_reduce", "gather", "broadcast", "send"]

PLACE, MEET = -2, -1
"""Where a rank stands before its first step: going to its place, connecting with the others."""


class Step(msgspec.Struct, frozen=True):
    """One operation of the check; ranks that are not among its members take no part."""

    operation: Operation
    members: tuple[int, ...]
    """Ranks in the order of the group; of `send`, sender and receiver."""
    bytes: int
    channel: int = 0
    timed: bool = False
    """Whether it is there for its speed: what arrives is not looked at."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt: these steps over this transport, by ranks at these places."""

    transport: str
    places: list[Place]
    dtype: str
    """Of activations; name of a torch type."""
    device: str = "cpu"
    """The kind that ranks compute on; the places say which of them."""
    steps: list[Step]
    limit: float
    """Seconds until the attempt counts as hanging."""
    rendezvous: str
    """A new directory in which the ranks meet; empty where they need none."""
    wrapper: str = ""
    """`module:function` that stands between each rank and its transport; how tests make transports fail."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The last word of a rank."""

    rank: int
    step: int
    """Number of the step it was at; `PLACE` or `MEET`; the number of steps if it came through."""
    kind: Literal["done", "wrong", "raised"]
    message: str = ""
    rates: dict[int, float] = {}
    """Bytes a second by the number of a step that was timed."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why an attempt failed."""

    kind: Literal["wrong", "raised", "died", "hung"]
    step: int
    """As of `Report`."""
    ranks: tuple[int, ...]
    """Those that saw it."""
    message: str = ""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt ended."""

    problem: Problem | None
    seconds: float
    rates: dict[int, float] = {}
    """Of steps that were timed, by their number: bytes a second of the slowest rank."""


class Ready(msgspec.Struct, frozen=True):
    """The leader has loaded what ranks need, and waits for a `Check`."""

    ready: bool = True
