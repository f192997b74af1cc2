"""One rank's process: `python -m seesaw.profiling.rank`, told what it is by the first line of its input.

Answers JSON lines: `prepare` sets a measurement up, `run` carries it out and answers with seconds (of a copy, for
each byte), or null where the rank has no part in it. So all ranks prepare first, and measure at the same time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec

from seesaw.core.devices import kind_of
from seesaw.core.node import Place

if TYPE_CHECKING:
    from seesaw.kv.registered import HostRegistration
    from seesaw.kv.transfers import SlabCopy
    from seesaw.profiling.clock import Span
    from seesaw.profiling.links import Links


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told at its start."""

    rank: int
    world: int
    place: Place
    device: str
    threads: int
    transport: str
    transport_region: str
    """Path of the transport's shared memory; empty for none."""
    rendezvous: str
    group_sizes: list[int]
    memory: int
    """Bytes that operands are cut from."""
    host_memory: int
    """Bytes of host memory that KV is copied to and from."""


Measurement = Callable[["Span"], float | None]
_WINDOW, _LONG_WINDOW = 0.002, 0.016
"""Seconds. The long one is for ranks in control groups: it lasts several periods of a quota that these may have, so
that it holds its share of their pauses."""
_AFTER_OTHERS = ("attention", "activations", "tiny")
"""What is measured as it is found in a step: after an operator that needed the caches. Not on devices that run
behind, where a call alone would be measured with its launch."""
_IN_A_GRAPH = 32
"""How often tiny operators are in one graph."""
_LEAD = 0.003
"""Seconds from being told to measure until all ranks have begun."""


class Rank:
    """Prepares measurements. Makes the transport when all ranks ask for a link, and memory at first use."""

    def __init__(self, config: RankConfig) -> None:
        from seesaw.device.select import open_device
        from seesaw.profiling.operands import Operands

        self._config = config
        self._device = open_device(config.device)
        self._operands = Operands(config.memory, config.device)
        self._host = Operands(config.host_memory, "cpu")
        self._registration: HostRegistration | None = None
        self._links: Links | None = None
        self._stack = ExitStack()
        """What the measurement prepared holds."""

    def prepare(self, op: str, arguments: dict[str, Any]) -> Measurement:
        """Set the measurement `op` up; the one before is dropped."""
        self._stack.close()
        if op == "all_reduce":
            links, before = self._get_links(), self._evicting(arguments["dtype"])
            return lambda span: links.all_reduce(span, before, **arguments)
        if op == "waiting":
            links, size = self._get_links(), arguments.pop("size")
            work, _ = self._calls("product", arguments)
            return lambda span: links.waiting(span, work, size=size, dtype=arguments["dtype"])
        if op == "send":
            links = self._get_links()
            return lambda span: links.send(span, **arguments)
        from seesaw.profiling.clock import own_clock, seconds_per_call, told

        if op == "step":
            from seesaw.profiling.steps import step_rest

            step = step_rest(place=self._device, clock=own_clock(self._by_clock), **arguments)
            rest = self._stack.enter_context(step)
            return lambda span: told(rest, span)
        if op == "reshard":
            from seesaw.profiling.copies import reshard_seconds

            changes = reshard_seconds(place=self._device, clock=own_clock(self._by_clock), **arguments)
            change = self._stack.enter_context(changes)
            return lambda span: told(change, span)
        behind = kind_of(self._config.device).runs_behind
        others = self._evicting(arguments["dtype"]) if op in _AFTER_OTHERS and not behind else None
        calls, amount = self._calls(op, arguments)
        if behind:
            calls[0]()  # kernels are compiled and libraries loaded before time counts
            self._device.compute.record().wait()
        return lambda span: seconds_per_call(calls, self._config.device, span, others) / amount

    def span(self, told: float, budget: float) -> Span:
        """When to measure for `budget` seconds, having been told so at `told`."""
        from seesaw.profiling.clock import Span

        start = told + _LEAD
        quota = bool(self._config.place.cgroups)
        window = _LONG_WINDOW if quota else _WINDOW
        return Span(start=start, end=start + budget, window=window, by_clock=self._by_clock)

    def close(self) -> None:
        """Give the transport up."""
        self._stack.close()
        if self._links is not None:
            self._links.transport.close()
        if self._registration is not None:
            self._registration.close()
        self._device.close()

    @property
    def _by_clock(self) -> bool:
        """Whether the processor time of the one thread is not all there is."""
        config = self._config
        return config.threads > 1 or bool(config.place.cgroups) or kind_of(config.device).runs_behind

    def _calls(self, op: str, arguments: dict[str, Any]) -> tuple[list[Callable[[], object]], int]:
        """Calls to be timed, and what their seconds are divided by: the bytes of a copy."""
        from seesaw.profiling import copies, operators

        if "heads" in arguments:
            arguments["heads"] = operators.Heads(**arguments["heads"])
        match op:
            case "product":
                return operators.product_calls(self._operands, **arguments), 1
            case "attention":
                return operators.attention_calls(self._operands, **arguments), 1
            case "activations":
                return operators.activation_calls(self._operands, **arguments), 1
            case "tiny":
                return self._tiny(operators.tiny_calls(self._operands, **arguments))
            case _:
                reach = self._reach_host()
                return copies.copy_calls(self._operands, self._host, **arguments, copy=reach)

    def _tiny(self, calls: list[Callable[[], object]]) -> tuple[list[Callable[[], object]], int]:
        """On devices that run behind what an operator costs there, launched ahead as in a decode graph: what it costs
        the host is part of a step."""
        pool = self._device.graph_pool()
        if pool is None:
            return calls, 1
        many = calls * _IN_A_GRAPH
        graph = pool.capture(lambda: [call() for call in many])
        return [graph.replay], len(many)

    def _reach_host(self) -> SlabCopy | None:
        """How the device copies to and from host memory, as in the engine: that is registered with it, once."""
        if not kind_of(self._config.device).pins_memory:
            return None
        if self._registration is None:
            from seesaw.kv.registered import HostRegistration

            self._registration = HostRegistration(self._host.memory)
        return self._registration.copy_slabs

    def _evicting(self, dtype: str) -> Callable[[], object]:
        from seesaw.profiling.operators import evicting

        return evicting(self._operands, dtype)

    def _get_links(self) -> Links:
        if self._links is None:
            import torch

            from seesaw.profiling.links import Links, all_groups, neighbours
            from seesaw.transport.select import create_transport, staged_for

            config = self._config
            transport = create_transport(
                config.transport,
                rank=config.rank,
                world=config.world,
                rendezvous=config.rendezvous,
                groups=all_groups(config.world, config.group_sizes),
                open_region=lambda: os.open(config.transport_region, os.O_RDWR),
                address=config.place.address,
                links=neighbours(config.world),
                device=torch.device(config.device),
            )
            transport = staged_for(transport, kind_of(config.device))
            self._links = Links(transport, config.rank, config.world, config.device)
        return self._links


def _main(lines: Iterator[str]) -> None:
    import torch

    from seesaw.execution.heap import keep_heap
    from seesaw.execution.placement import enter

    config = msgspec.json.decode(next(lines), type=RankConfig)
    enter(config.place)
    keep_heap()
    torch.set_num_threads(config.threads)
    rank = Rank(config)
    measurement: Measurement | None = None
    for line in lines:
        message = json.loads(line)
        if message["op"] == "close":
            break
        try:
            value = None
            with torch.inference_mode():
                if message["op"] == "prepare":
                    measurement = rank.prepare(message["of"], message["arguments"])
                else:
                    assert measurement is not None, "nothing is prepared"
                    value = measurement(rank.span(message["told"], message["budget"]))
            answer = {"event": "value", "value": value}
        except Exception as error:
            answer = {"event": "error", "message": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    rank.close()


if __name__ == "__main__":
    _main(iter(sys.stdin))
