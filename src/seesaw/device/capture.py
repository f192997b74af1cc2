"""Work that is launched as one: a CUDA graph, where the device runs behind the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from seesaw.core.devices import kind_of


def captured(calls: Sequence[Callable[[], object]], device: str) -> Callable[[], None]:
    """One call that does all of `calls` in turn, on the current stream; on a GPU by replaying a graph of them.

    There they are called twice now, once so that kernels and libraries are loaded, and none may wait for the device.
    """

    def in_turn() -> None:
        for call in calls:
            call()

    if not kind_of(device).runs_behind:
        return in_turn
    aside: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        in_turn()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_turn()
    replay: Callable[[], None] = graph.replay
    return replay
