"""An engine whose ranks are threads of the test's process, on devices that watch the order of their work."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from seesaw import launch
from seesaw.attention.base import AttentionBackend, AttentionBatch
from seesaw.attention.torch_backend import TorchAttention
from seesaw.core.actions import ForwardDone
from seesaw.device.cuda import CudaDevice
from seesaw.execution import graphs as graphs_module
from seesaw.execution import kv_copies
from seesaw.execution import stage as stage_module
from seesaw.execution import worker as worker_module
from seesaw.execution.local import LocalExecutor, _Rank
from seesaw.execution.messages import FromWorker, Ready, Shutdown, ToWorker, TransitionAck
from seesaw.execution.sampling import Logprobs
from seesaw.execution.worker import Worker
from seesaw.kv import transfers
from seesaw.models import decoder
from seesaw.ops.torch_ops import TorchOperators
from seesaw.transport.base import Members, Transport
from seesaw.weights import reshard
from tests.device.captures import Watching
from tests.device.races import Clock, FakeCuda, Memory, Rows
from tests.device.weights import WeightsWatch

TIMEOUT = 60.0
_WHOLE = np.zeros(1, dtype=np.int64)
"""The only row of memory that is watched as one."""


class Watch:
    """What of the ranks' memory is watched."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        self.weights = WeightsWatch(self.cuda)
        self._pools = threading.local()
        self._host: Memory | None = None
        self._lock = threading.Lock()
        self.graphs = False
        """Whether decode steps are captured."""
        self._tables: dict[int, Memory] = {}
        self._downloads: dict[int, Memory] = {}

    def watching(self) -> Any:
        """In which a rank's thread runs: then torch tells what it reads and writes of a graph's inputs."""
        if not self.graphs:
            return nullcontext()
        self._pools.torch = Watching(self.cuda)
        return self._pools.torch

    def attach_static(self, static: graphs_module.StaticInputs) -> None:
        """Watch the inputs of this rank's graphs, each as a whole."""
        for name in ("_words", "_tables", "hidden"):
            tensor = getattr(static, name)
            row = tensor.numel() * tensor.element_size()
            self._pools.torch.watch(Memory(self.cuda, f"static {name}", tensor, row), tensor)

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

    def made(self, table: torch.Tensor) -> torch.Tensor:
        """A block table is put on the device, in memory that its stream uses again as soon as it is dropped."""
        table = table.clone()  # whose memory nobody else has
        memory, maker = Memory(self.cuda, "block table", table, table.nbytes), self.cuda.acting()
        memory.touch(_WHOLE, write=True, what="an upload")
        self._tables[id(table)] = memory

        def dropped(number: int) -> None:
            del self._tables[number]
            memory.touch(_WHOLE, write=True, what="the next use", by=maker)

        weakref.finalize(table, dropped, id(table))
        return table

    def downloaded(self, copy: torch.Tensor) -> torch.Tensor:
        """A copy to the host is launched."""
        if copy.numel():
            what = "tokens" if copy.dtype == torch.int64 else "log-probabilities"
            memory = Memory(self.cuda, what, copy, copy.nbytes)
            memory.touch(_WHOLE, write=True, what="a download")
            self._downloads[id(copy)] = memory
            weakref.finalize(copy, self._downloads.pop, id(copy))
        return copy

    def read(self, copy: torch.Tensor) -> None:
        """The host reads what was downloaded."""
        memory = self._downloads.get(id(copy))
        if memory is not None:
            with self.cuda.stream(None):  # the thread may have one, but the host reads
                memory.touch(_WHOLE, write=False, what="a report")

    def pool(self) -> Memory | None:
        """Of this thread's rank."""
        memory = getattr(self._pools, "memory", None)
        assert memory is None or isinstance(memory, Memory)
        return memory

    def swapped(
        self, pool: torch.Tensor, host: torch.Tensor, pairs: torch.Tensor, part: Any, *, out: bool
    ) -> None:
        """A copy of `pairs` is launched; `part` are its layers, heads and one layer or all."""
        if id(pairs) in self._tables:
            self._tables[id(pairs)].touch(_WHOLE, write=False, what="a copy")
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


class CapturedAttention:
    """A backend that can be captured: what `inner` does with a batch is one kernel, which leaves padding out."""

    name, capturable = "captured", True

    def __init__(self, cuda: FakeCuda, inner: AttentionBackend, *, pads: bool = False) -> None:
        """`pads`: whether `inner` can leave padding out itself."""
        self._cuda, self._inner, self._pads = cuda, inner, pads

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
        if not batch.padded:
            return self._inner.attend(q, k, v, pool_layer, batch, **options)
        assert batch.max_query == 1 and not batch.fresh and batch.host_lengths is None
        out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype)

        def run() -> None:
            count = len(q) if self._pads else int(batch.query_starts[-1])
            assert bool((batch.slot_mapping[int(batch.query_starts[-1]) :] == -1).all())
            real = AttentionBatch(
                query_starts=batch.query_starts[: count + 1],
                context_starts=batch.context_starts[:count],
                block_tables=batch.block_tables[:count],
                slot_mapping=batch.slot_mapping[:count],
                max_query=1,
                padded=self._pads,
            )
            out.fill_(float("nan"))
            if count:
                out[:count] = self._inner.attend(q[:count], k[:count], v[:count], pool_layer, real, **options)

        self._cuda.kernel(run)
        return out


class CapturedTransport:
    """A transport whose all-reduces can be captured."""

    capturable = True

    def __init__(self, cuda: FakeCuda, inner: Transport) -> None:
        self._cuda, self._inner = cuda, inner

    def all_reduce(self, x: torch.Tensor, members: Members) -> torch.Tensor:
        """See `Transport.all_reduce`."""
        self._cuda.kernel(lambda: self._inner.all_reduce(x, members))
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


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
            with self.watch.watching():
                self._run(rank, report)
        except BaseException as error:
            report(error)

    def _run(self, rank: int, report: Callable[[FromWorker], None]) -> None:
        torch.set_num_threads(self._configs[rank].threads)
        cuda = self.watch.cuda
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

        def report(
            forward: int, tokens: torch.Tensor, logprobs: Logprobs | None, preparing: float
        ) -> ForwardDone:
            for copy in (tokens, *(table for _, table in (logprobs.parts if logprobs else ()))):
                if copy is not None:
                    watch.read(copy)
            return whole_report(forward, tokens, logprobs, preparing)

        whole_report, download = stage_module._report, CudaDevice.download
        patch.setattr(stage_module, "_report", report)
        patch.setattr(CudaDevice, "download", lambda self, tensor: watch.downloaded(download(self, tensor)))
        patch.setattr(kv_copies, "block_table", lambda *given: watch.made(transfers.block_table(*given)))
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


@contextmanager
def captured(
    monkeypatch: pytest.MonkeyPatch, *, attention: AttentionBackend | None = None
) -> Iterator[Watch]:
    """The same with ranks that capture their decode steps, with `attention`, which leaves padding out by itself, or
    with one that is watched."""
    with watched(monkeypatch) as watch, monkeypatch.context() as patch:
        watch.graphs = True
        inner = attention or WatchedAttention(watch)
        backend = CapturedAttention(watch.cuda, inner, pads=attention is not None)
        connect, make = Worker._connect, graphs_module.RankGraphs.static_inputs

        def static(self: graphs_module.RankGraphs) -> graphs_module.StaticInputs:
            made = make(self)
            watch.attach_static(made)
            return made

        patch.setattr(worker_module, "create_attention", lambda *_, **__: backend)
        patch.setattr(worker_module, "create_operators", lambda *_, **__: TorchOperators())
        patch.setattr(Worker, "_connect", lambda self: CapturedTransport(watch.cuda, connect(self)))
        patch.setattr(graphs_module.RankGraphs, "static_inputs", static)
        yield watch
