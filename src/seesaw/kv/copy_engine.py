"""Copies of KV beside computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seesaw.device.base import Device, Stream


class CopyEngine:
    """Runs copies on the copy streams of a device, each behind the computation launched before it.

    Those of one direction run in the order submitted. Computation does not wait for copies: whoever reuses what a
    copy reads, or reads what it writes, waits until the copy has been reported (`on_done`), or is launched behind
    `fence`. A copy that fails stops its direction: see `Stream`.
    """

    def __init__(self, device: Device) -> None:
        self._compute = device.compute
        self._to_host, self._to_device = device.to_host, device.to_device

    def to_host(self, copy: Callable[[], int], on_done: Callable[[int, float], None] | None = None) -> None:
        """Queue `copy`, which copies to the host and returns how many bytes.

        Then `on_done(bytes, seconds)` is called on a thread of the device's; an exception from it counts as the
        copy's.
        """
        self._submit(self._to_host, copy, on_done)

    def to_device(self, copy: Callable[[], int], on_done: Callable[[int, float], None] | None = None) -> None:
        """The same for a copy from the host."""
        self._submit(self._to_device, copy, on_done)

    def fence(self) -> None:
        """Hold back computation that is launched from here on until everything submitted so far is done: what copies
        read may be written then. Where computation is the caller's, it blocks, and raises what went wrong."""
        for stream in (self._to_host, self._to_device):
            self._compute.after(stream.record())

    def _submit(
        self, stream: Stream, copy: Callable[[], int], on_done: Callable[[int, float], None] | None
    ) -> None:
        stream.after(self._compute.record())
        if on_done is None:
            stream.launch(copy)
            return
        moved: list[int] = []
        begin = stream.record()
        stream.launch(lambda: moved.append(copy()))
        end = stream.record()
        stream.notify(lambda: on_done(moved[0], end.seconds_since(begin)))
