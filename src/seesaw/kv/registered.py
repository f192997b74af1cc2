"""The host buffer as a GPU sees it: registered with CUDA, and the way round where that is refused."""

from __future__ import annotations

from torch import Tensor

from seesaw.core.workspace import STAGING_BYTES
from seesaw.device.registration import SLICE_BYTES, Registration, Runtime
from seesaw.kv.staging import StagedCopies
from seesaw.kv.transfers import SlabCopy, copy_slabs


class HostRegistration:
    """Registers `HostBuffer.tensor` in this process, until `close`; see `Registration`.

    If the driver refuses it, `copy_slabs` takes two hops instead of one.
    """

    def __init__(
        self,
        memory: Tensor,
        *,
        runtime: Runtime | None = None,
        slice_bytes: int = SLICE_BYTES,
        staging_bytes: int = STAGING_BYTES,
        device_copy: SlabCopy = copy_slabs,
    ) -> None:
        """`memory` is a contiguous CPU tensor; its pages must not be registered yet.

        `device_copy` moves slabs between the device and memory that it reaches.
        """
        self._pages = Registration(
            [memory],
            "host buffer",
            remedy="make the host buffer smaller, or free host memory",
            runtime=runtime,
            slice_bytes=slice_bytes,
        )
        self._memory = memory
        self._device_copy = device_copy
        self._staged: StagedCopies | None = None
        self._closed = False
        if not self._pages.registered:
            record = self._pages.runtime.record
            self._staged = StagedCopies(self._pages.pinned, record, staging_bytes, device_copy)

    @property
    def registered(self) -> bool:
        """Whether the device reaches the memory itself."""
        return self._pages.registered

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """See `Registration.spans`."""
        return self._pages.spans

    def copy_slabs(self, near: Tensor, far: Tensor, table: Tensor, to_host: bool) -> None:
        """As `transfers.copy_slabs`, for a `far` in this memory; give it to `swap_out` and `swap_in` as `copy`.

        In one hop it runs on the current stream and waits for nothing. In two, what goes to the host is there on
        return, and what comes from it has been read on return: earlier copies to it must be done by then.
        """
        assert not self._closed, "the registration of the host buffer is closed"
        if self._staged is not None:
            self._staged.copy_slabs(near, far, table, to_host)
        else:
            self._device_copy(near, far, table, to_host)

    def close(self) -> None:
        """Wait for the device, then give the pages back. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._staged is not None:
            self._staged.close()
        self._pages.close()
        del self._memory

    def __enter__(self) -> HostRegistration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
