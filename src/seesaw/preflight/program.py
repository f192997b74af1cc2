"""Which operations a check carries out: all that the layouts of a plan will use, with small and large messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from seesaw.core.model_spec import ModelSpec
from seesaw.execution.links import groups_of as view_groups
from seesaw.execution.links import links_of
from seesaw.preflight.messages import MEET, PLACE, Step
from seesaw.weights.sharding import Sharding, rank_view

SMALL, MIDDLE, LARGE = 64, 40 << 10, 1 << 20
"""Bytes of a message: a few tokens; just past where an all-reduce takes two rounds; a micro-batch of prefill."""
TIMED = 16 << 20
"""Bytes of a message whose speed is measured: several milliseconds on PCIe."""
ROUNDS = 4
"""How often small messages go: what one leaves behind shows in the next."""


def steps_of(spec: ModelSpec, shardings: Sequence[Sharding]) -> list[Step]:
    """Every group and every link of `shardings`, each once; a barrier of all ranks at both ends."""
    views = [rank_view(spec, sharding, rank) for sharding in shardings for rank in range(len(sharding.ranks))]
    groups = [members for members in view_groups(views) if len(members) > 1]
    links = links_of(views)
    everyone = tuple(range(max(view.rank for view in views) + 1))
    barrier = Step("barrier", everyone, 8)
    steps = [barrier]
    for size in (*(SMALL,) * ROUNDS, MIDDLE, LARGE):
        for members in groups:
            steps += [
                Step("all_reduce", members, size),
                Step("gather", members, size),
                Step("broadcast", members, size),
            ]
        steps += [Step("send", (sender, receiver), size, channel) for sender, receiver, channel in links]
    return [*steps, barrier]


def timed_steps(steps: Iterable[Step]) -> list[Step]:
    """One for each group and each link of `steps`, to tell how fast they are."""
    found = dict.fromkeys(
        (step.operation, step.members, step.channel)
        for step in steps
        if step.operation in ("all_reduce", "send")
    )
    return [Step(operation, members, TIMED, channel, timed=True) for operation, members, channel in found]


def groups_of(steps: Iterable[Step]) -> list[tuple[int, ...]]:
    """The groups that the collectives of `steps` name."""
    return list(dict.fromkeys(step.members for step in steps if step.operation != "send"))


def links_in(steps: Iterable[Step]) -> list[tuple[int, int, int]]:
    """(sender, receiver, channel) of the messages of `steps`."""
    return list(dict.fromkeys((*step.members, step.channel) for step in steps if step.operation == "send"))  # type: ignore[misc]


def describe(steps: Sequence[Step], number: int) -> str:
    """Step `number` in words: `all_reduce of 1 MiB among ranks 0, 1`."""
    if number == PLACE:
        return "the way to the ranks' places"
    if number == MEET:
        return "the meeting of the ranks"
    if number >= len(steps):
        return "the end"
    step = steps[number]
    if step.operation == "send":
        sender, receiver = step.members
        return f"message of {_size(step.bytes)} from rank {sender} to rank {receiver}"
    size = "" if step.operation == "barrier" else f" of {_size(step.bytes)}"
    return f"{step.operation}{size} among ranks {', '.join(map(str, step.members))}"


def _size(count: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count // unit} {name}"
    return f"{count} bytes"
