"""When the weights of a new sharding are there, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seesaw.device.base import Event, Stream

EMBEDDING, HEAD = -1, -2
"""Groups of tensors beside the layers, whose groups are their numbers: the embedding; final norm and LM head."""
_GROUPS = {"embed": EMBEDDING, "norm": HEAD, "head": HEAD}


class Arrivals:
    """What the compute stream waits for before it uses tensors that another stream brings.

    A layer is waited for once, before its first use: the stream's work is in order, so all later uses come behind.
    """

    def __init__(self, compute: Stream, begun: Event) -> None:
        """`begun` is behind all copies of earlier changes: tensors that stay as they are may have come by these."""
        self._compute = compute
        self._begun: Event | None = begun
        self._events: dict[int, Event] = {}

    def launched(self, tensor: str, event: Event) -> None:
        """The copies of `tensor`, the name of a device tensor, come before `event`, as all those launched before."""
        self._events[_group(tensor)] = event

    @property
    def pending(self) -> bool:
        """Whether something has not been waited for."""
        return self._begun is not None or bool(self._events)

    def before(self, group: int) -> None:
        """Hold computation back until the tensors of a layer, or of `EMBEDDING` or `HEAD`, are there."""
        if self._begun is not None:
            self._compute.after(self._begun)
            self._begun = None
        event = self._events.pop(group, None)
        if event is not None:
            self._compute.after(event)


def _group(tensor: str) -> int:
    first, _, rest = tensor.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else _GROUPS[first]
