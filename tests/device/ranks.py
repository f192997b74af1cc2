"""An engine whose ranks are threads of the test's process, on devices that watch the order of their work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from seesaw import launch
from seesaw.attention.base import AttentionBatch
from seesaw.attention.torch_backend import TorchAttention
from seesaw.device.cuda import CudaDevice
from seesaw.execution import kv_copies
from seesaw.execution import worker as worker_module
from seesaw.execution.local import LocalExecutor, _Rank
from seesaw.execution.messages import FromWorker, Ready, Shutdown, ToWorker, TransitionAck
from seesaw.execution.worker import Worker
from seesaw.kv import transfers
from seesaw.models import decoder
from seesaw.weights import reshard
from tests.device.races import Clock, FakeCuda, Memory, Rows
from tests.device.weights import WeightsWatch

TIMEOUT = 60.0


class Watch:
    """What of the ranks' memory is watched."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        self.weights = WeightsWatch(self.cuda)
        self._pools = threading.local()
        self._host: Memory | None = None
        self._lock = threading.Lock()

    def attach(self, worker: Worker) -> None:
        """Watch the pool of a rank, by the thread that is to run it, and the host buffer of all of them."""
        row = worker._spec.head_dim * worker._dtype.itemsize
        arena = worker._pool._arena
        self._pools.memory = Memory(self.cuda, f"pool of rank {worker._config.rank}", arena, row)
        host = worker._copies.host
        if host is not None:
            with self._lock:
                if self._host is None:
                    self._host = Memory(self.cuda, "host buffer", host.tensor, row)

    def pool(self) -> Memory | None:
        """Of this thread's rank."""
        memory = getattr(self._pools, "memory", None)
        assert memory is None or isinstance(memory, Memory)
        return memory

    def swapped(
        self, pool: torch.Tensor, host: torch.Tensor, pairs: torch.Tensor, part: Any, *, out: bool
    ) -> None:
        """A copy of `pairs` is launched; `part` are its layers, heads and one layer or all."""
        near, far = self.pool(), self._host
        assert near is not None and far is not None
        layers, heads, layer = part
        first, count = (layers.start, len(layers)) if layer is None else (layer, 1)
        for device_block, host_block in pairs.tolist():
            here = pool[device_block, first - layers.start : first - layers.start + count]
            there = host[host_block, first : first + count, :, heads.start : heads.stop]
            what = "a copy out" if out else "a copy in"
            near.touch(near.rows(here), write=not out, what=what)
            # every rank has mapped the buffer at an address of its own
            start = there.data_ptr() - host.data_ptr()
            far.touch(far.rows_at(there, start), write=out, what=what)


class WatchedAttention(TorchAttention):
    """Tells what it reads and writes of the pool."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pool_layer: torch.Tensor,
        batch: AttentionBatch,
        **options: Any,
    ) -> torch.Tensor:
        """See `AttentionBackend.attend`."""
        memory = self._watch.pool()
        if memory is not None:
            block_size = pool_layer.shape[3]
            memory.touch(
                _token_rows(memory, pool_layer, batch.slot_mapping.numpy()), write=True, what="attention"
            )
            counts = np.diff(batch.query_starts.numpy())
            seen = [np.zeros(0, dtype=np.int64)]
            for table, start, count in zip(
                batch.block_tables.numpy(), batch.context_starts.numpy(), counts, strict=True
            ):
                places = np.arange(start + count)
                seen.append(table[places // block_size].astype(np.int64) * block_size + places % block_size)
            memory.touch(_token_rows(memory, pool_layer, np.concatenate(seen)), write=False, what="attention")
        return super().attend(q, k, v, pool_layer, batch, **options)


def _token_rows(memory: Memory, pool_layer: torch.Tensor, slots: Rows) -> Rows:
    """The rows of K and V of tokens at `slots`."""
    _, sides, heads, block_size, _ = pool_layer.shape
    strides = np.array(pool_layer.stride()) * pool_layer.element_size()
    offsets = (slots // block_size * strides[0] + slots % block_size * strides[3])[:, None, None]
    offsets = offsets + (np.arange(sides) * strides[1])[:, None] + np.arange(heads) * strides[2]
    return memory.rows_from(pool_layer.data_ptr(), offsets.reshape(-1))


class ThreadExecutor(LocalExecutor):
    """Ranks as threads. Messages carry what their sender has seen."""

    watch: Watch

    def _start(self, rendezvous: str) -> None:
        self._reports: SimpleQueue[tuple[Clock, FromWorker | BaseException]] = SimpleQueue()
        self._inboxes: list[SimpleQueue[tuple[Clock, bytes]]] = [SimpleQueue() for _ in self._configs]
        self._threads = [
            threading.Thread(target=self._rank, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(len(self._configs))
        ]
        self._ranks = [_Rank(-1, -1, self._outbox) for _ in self._configs]
        for thread in self._threads:
            thread.start()
        ready = 0
        while ready < len(self._threads):
            ready += sum(isinstance(message, Ready) for message in self._receive(1.0))

    def _rank(self, rank: int) -> None:
        cuda = self.watch.cuda

        def report(message: FromWorker | BaseException) -> None:
            # nobody may wait for the report of a transition, which can come at any time: it orders nothing
            clock = cuda.never() if isinstance(message, TransitionAck) else cuda.seen()
            self._reports.put((clock, message))

        try:
            device = CudaDevice("cpu", api=cuda, torch_device=torch.device("cpu"))
            worker = Worker(self._configs[rank], report, device)
            self.watch.attach(worker)
            report(worker.ready())
            while True:
                clock, data = self._inboxes[rank].get()
                cuda.join(clock)
                message = msgspec.msgpack.decode(data, type=ToWorker)
                worker.handle(message)
                if isinstance(message, Shutdown):
                    worker.close()
                    return
        except BaseException as error:
            report(error)

    def _send(self, ranks: Iterable[int], message: ToWorker) -> None:
        data = msgspec.msgpack.encode(message)
        for rank in ranks:
            self._inboxes[rank].put((self.watch.cuda.seen(), data))

    def _receive(self, seconds: float) -> list[FromWorker]:
        try:
            clock, message = self._reports.get(timeout=TIMEOUT)
        except Empty:
            raise AssertionError("the ranks have come to a standstill") from None
        if isinstance(message, BaseException):
            raise AssertionError(f"a rank failed: {message!r}") from message
        self.watch.cuda.join(clock)
        return [message]

    def close(self) -> None:
        """End the threads."""
        if self._closed:
            return
        self._closed = True
        self._send(range(len(self._threads)), Shutdown())
        for thread in self._threads:
            thread.join(10)
        self._outbox.close(linger=0)
        self._context.term()


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Engines made in here have ranks that are watched."""
    watch = Watch()

    def told(swap: Callable[..., int], *, out: bool) -> Callable[..., int]:
        def run(pool: Any, host: Any, pairs: Any, **options: Any) -> int:
            part = options["layers"], options["kv_heads"], options.get("layer")
            watch.swapped(pool, host, pairs, part, out=out)
            return swap(pool, host, pairs, **options)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(kv_copies, "swap_out", told(transfers.swap_out, out=True))
        patch.setattr(kv_copies, "swap_in", told(transfers.swap_in, out=False))
        patch.setattr(worker_module, "create_attention", lambda *_, **__: WatchedAttention(watch))
        weights, made = watch.weights, worker_module.create_operators
        patch.setattr(worker_module, "create_operators", lambda *a, **o: weights.operators(made(*a, **o)))
        patch.setattr(decoder, "embedding", weights.read(decoder.embedding))
        patch.setattr(reshard, "copy_box", weights.copy_box(reshard.copy_box))
        ledger = reshard.MemoryLedger
        patch.setattr(ledger, "allocate", weights.allocate(ledger.allocate))
        patch.setattr(launch, "LocalExecutor", type("Watched", (ThreadExecutor,), {"watch": watch}))
        yield watch
