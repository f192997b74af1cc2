"""The worker process: one rank's memory, its copies, and the loop that carries out actions."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar, cast

import msgspec
import torch
import zmq

from seesaw.attention.select import create_attention
from seesaw.core.actions import Forward, SwapIn, SwapOut, Transition
from seesaw.core.devices import kind_of
from seesaw.core.layout import Layout
from seesaw.core.model_spec import DType
from seesaw.device.base import Device
from seesaw.device.select import open_device
from seesaw.execution.collectives import TensorParallelGroup
from seesaw.execution.graphs import RankGraphs
from seesaw.execution.heap import keep_heap
from seesaw.execution.kv_copies import KvCopies
from seesaw.execution.links import groups_of, links_of
from seesaw.execution.liveness import BEAT
from seesaw.execution.messages import (
    Alive,
    CopiesAck,
    Failed,
    FromWorker,
    Ready,
    ShardingMessage,
    Shutdown,
    ToWorker,
    TransitionAck,
    WorkerConfig,
)
from seesaw.execution.placement import enter
from seesaw.execution.profiling import Profile
from seesaw.execution.programs import Timing
from seesaw.execution.stage import Stage
from seesaw.execution.tracing import RankTrace
from seesaw.kv.device_pool import DevicePool
from seesaw.kv.host_buffer import HostBuffer
from seesaw.ops.select import create_operators
from seesaw.transport.base import Transport, has_partial_sums
from seesaw.transport.select import create_transport, staged_for
from seesaw.weights.arrivals import Arrivals
from seesaw.weights.changes import Mode
from seesaw.weights.memory import HostArena
from seesaw.weights.rehearsal import arena_bytes
from seesaw.weights.reshard import RankWeights, Reshard
from seesaw.weights.sharding import Sharding, rank_view
from seesaw.weights.store import HostWeightStore, StoreSource

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_DEVICE_ERRORS = (
    MemoryError,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", MemoryError),  # of torch 2.8 and later
)


def sharding_of(message: ShardingMessage) -> Sharding:
    """The sharding that a message describes."""
    starts = [sum(message.stage_layers[:i]) for i in range(len(message.stage_layers))]
    stages = tuple(range(a, a + n) for a, n in zip(starts, message.stage_layers, strict=True))
    return Sharding(Layout.parse(message.layout), stages, tuple(message.ranks), tuple(message.carried))


class Worker:
    """One rank. The main thread computes, or launches what a GPU computes; KV moves beside, by a copy thread or on
    copy streams; reports come from the main thread or from those that see such work done."""

    def __init__(self, config: WorkerConfig, report: Callable[[FromWorker], None], device: Device) -> None:
        self.phase = "startup"
        """What the worker is doing, for error messages."""
        self._config, self._report, self._device = config, report, device
        self._spec = config.spec
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._shardings = [sharding_of(m) for m in config.shardings]
        self._views = [rank_view(config.spec, s, config.rank) for s in self._shardings]
        self._profile = Profile() if config.profile else None
        self.trace = RankTrace(config.rank, report) if config.trace else None
        """What the rank tells of its doings; None unless a trace is written."""
        attention = create_attention(
            device.name, config.attention, head_dim=config.spec.head_dim, dtype=self._dtype
        )
        self._attention = self._timed(attention, "attend")
        operators = create_operators(device.name, dtype=self._dtype)
        self._operators = self._timed(
            operators, "linear", "rms_norm", "add_rms_norm", "rotate", "silu_mul", "argmax"
        )
        transport = self._connect()
        summing = ("all_reduce_in_parts",) if has_partial_sums(transport) else ()
        self._transport = self._timed(
            transport, "all_reduce", *summing, "gather", "broadcast", "send", "receive"
        )
        if self.trace is not None:
            self._transport = self.trace.watch(self._transport)
        self._store = self._open_store()
        self._weights = RankWeights(
            config.spec,
            self._store,
            cast(DType, config.dtype),
            config.rank,
            device=device,
            budget=config.weight_budget,
            lock=config.lock_weights,
            arena=arena_of(config),
        )
        self._weights.load(self._shardings[0])
        self._check_weights()
        self._pool = DevicePool(max(self._pool_bytes(i) for i in range(len(self._views))), device.torch)
        self._current = 0
        self._graphs = RankGraphs(
            device,
            most=config.max_running,
            blocks=-(-config.max_model_len // config.block_size),
            block_size=config.block_size,
            hidden=config.spec.hidden,
            dtype=self._dtype,
            keep=config.transition_mode == "resident",
        )
        self._copies = KvCopies(device, self._pool, self._attach_host_buffer(), self._views[0])
        self._stage = self._make_stage()

    # ---- start --------------------------------------------------------------------------------------------

    def _timed(self, subject: _T, *methods: str) -> _T:
        return subject if self._profile is None else self._profile.wrap(subject, methods)

    def _connect(self) -> Transport:
        """The transport to the other ranks, for the groups of all layouts."""
        config = self._config
        views = [rank_view(self._spec, s, r) for s in self._shardings for r in range(config.world)]
        transport = create_transport(
            config.transport,
            rank=config.rank,
            world=config.world,
            rendezvous=config.rendezvous,
            groups=groups_of(views),
            links=links_of(views),
            device=self._device.torch,
            open_region=lambda: self._open_shared(config.transport_fd),
            address=config.place.address,
            timeout=config.start_timeout,
        )
        return staged_for(transport, kind_of(config.device))

    def _open_shared(self, fd: int) -> int:
        """A descriptor of memory that the control process holds as `fd`."""
        return os.open(f"/proc/{self._config.control_pid}/fd/{fd}", os.O_RDWR)

    def _open_store(self) -> HostWeightStore:
        dummy = cast(DType, self._config.dtype) if self._config.dummy_weights else None
        return StoreSource(self._config.store_path, self._spec, dummy).open()

    def _pool_bytes(self, index: int) -> int:
        view, config = self._views[index], self._config
        elements = len(view.layers) * 2 * len(view.kv_heads) * config.block_size * self._spec.head_dim
        return config.device_blocks[index] * elements * self._dtype.itemsize

    def _attach_host_buffer(self) -> HostBuffer | None:
        config = self._config
        if config.host_buffer_fd < 0:
            return None
        fd = self._open_shared(config.host_buffer_fd)
        try:
            return HostBuffer.attach(
                fd,
                blocks=config.host_blocks,
                layers=self._spec.layers,
                kv_heads=self._spec.kv_heads,
                block_size=config.block_size,
                head_dim=self._spec.head_dim,
                dtype=self._dtype,
            )
        finally:
            os.close(fd)  # the buffer holds a descriptor of its own

    def _make_stage(self, arrivals: Arrivals | None = None) -> Stage:
        view, sharding = self._views[self._current], self._shardings[self._current]
        self._pool.view(
            blocks=self._config.device_blocks[self._current],
            layers=len(view.layers),
            kv_heads=len(view.kv_heads),
            block_size=self._config.block_size,
            head_dim=self._spec.head_dim,
            dtype=self._dtype,
        )
        watchers = [watcher.book for watcher in (self._profile, self.trace) if watcher is not None]
        widths = [len(rank_view(self._spec, sharding, rank).vocab) for rank in view.tp_ranks]
        return Stage(
            spec=self._spec,
            view=view,
            vocab_widths=widths,
            weights=self._weights.tensors,
            dtype=self._dtype,
            group=TensorParallelGroup(view, self._transport),
            pool=self._pool,
            attention=self._attention,
            operators=self._operators,
            block_size=self._config.block_size,
            device=self._device,
            graphs=self._graphs if self._current == len(self._shardings) - 1 else None,
            arrivals=arrivals,
            timing=Timing(watchers) if watchers else None,
        )

    def ready(self) -> Ready:
        """What the worker holds, once it is up."""
        return Ready(self._config.rank, self._weights.peak_bytes, self._pool.arena_bytes)

    # ---- actions ------------------------------------------------------------------------------------------

    def handle(self, message: ToWorker) -> None:
        """Carry out one message; copies go on beside."""
        match message:
            case Forward():
                self.phase = "forward"
                self._forward(message)
            case SwapOut():
                self.phase = "swap-out"
                self._copies.swap_out(message.pairs, self._acknowledge(message.id, "swap-out"))
            case SwapIn():
                self.phase = "swap-in"
                self._copies.swap_in(message.pairs, self._acknowledge(message.id, "swap-in"))
            case Transition():
                self.phase = "transition"
                self._transition(message)
            case Shutdown():
                pass

    def _forward(self, forward: Forward) -> None:
        """Run a micro-batch. Each layer's KV is copied out behind the layers that follow it."""
        after_attention, finish_copies = None, None
        if forward.write_through:
            after_attention, finish_copies = self._copies.write_through(
                forward.write_through, self._traced_copy("write-through"), self._acknowledge(forward.id)
            )
        with self._profiled(forward), self._traced(forward):
            done = self._stage.run(forward, after_attention)
        if done is not None:
            self._device.compute.notify(lambda: self._report(done()))
        if finish_copies is not None:
            finish_copies()

    def _profiled(self, forward: Forward) -> AbstractContextManager[None]:
        if self._profile is None:
            return nullcontext()
        return self._profile.forward("decode" if forward.decodes else "prefill", sum(forward.counts))

    def _traced(self, forward: Forward) -> AbstractContextManager[None]:
        return nullcontext() if self.trace is None else self.trace.forward(forward)

    def _traced_copy(self, name: str) -> Callable[[int, float], None] | None:
        trace = self.trace
        return None if trace is None else lambda moved, seconds: trace.copied(name, moved, seconds)

    def _acknowledge(self, action: int, name: str | None = None) -> Callable[[int, float], None]:
        """Reports copies that have ended; those with a `name` have an event in the trace."""

        def report(moved: int, seconds: float) -> None:
            if name is not None and self.trace is not None:
                self.trace.copied(name, moved, seconds)
            self._report(CopiesAck(self._config.rank, action, moved, seconds))

        return report

    def _transition(self, action: Transition) -> None:
        """Change over behind the work of the old sharding.

        On a GPU all of it is launched and nothing waited for: what has room is fetched while the last micro-batches
        run, and the next ones wait for their weights layer by layer.
        """
        compute, weights = self._device.compute, self._device.weights
        begun = compute.record()
        self._stage.finish()
        self._copies.change_view(self._views[action.target])
        del self._stage  # its decoder holds weights that the transition is to free
        reshard = self._weights.begin(
            self._shardings[action.target], cast(Mode, self._config.transition_mode)
        )
        self._check_weights()
        self._current = action.target
        self._stage = self._make_stage(reshard.arrivals)
        weights.after(compute.record())  # a transition has ended when the old sharding's work has as well
        ended = weights.record()
        weights.notify(lambda: self._changed(action, reshard, ended.seconds_since(begun)))

    def _changed(self, action: Transition, reshard: Reshard, seconds: float) -> None:
        """Report a transition that has just ended, so many seconds after the last work of the old sharding."""
        ended = time.monotonic()
        stats = reshard.stats()
        fetched, copied = stats.bytes_fetched, stats.bytes_copied
        if self.trace is not None:
            target = str(self._shardings[action.target].layout)
            self.trace.transition(ended - seconds, ended, target, fetched, copied)
        self._report(
            TransitionAck(
                self._config.rank, action.id, fetched, copied, stats.seconds, ended - seconds, ended
            )
        )

    def _check_weights(self) -> None:
        peak, planned = self._weights.peak_bytes, self._config.weight_budget
        assert peak <= planned, f"weights took {peak} bytes, the memory plan says {planned}"

    def close(self) -> None:
        """Finish copies and sends."""
        self.phase = "shutdown"
        self._stage.finish()
        self._device.close()
        del self._stage  # NCCL's communicators outlive the graphs that use them
        self._graphs.close()
        self._copies.close()
        self._weights.close()
        self._transport.close()
        if self.trace is not None:
            self.trace.flush()
        if self._profile is not None:
            self._profile.write(Path(self._config.profile) / f"rank{self._config.rank}.json")


def arena_of(config: WorkerConfig) -> HostArena | None:
    """Where a rank that computes on the host lays its weights; a GPU's allocator has means of its own."""
    if not kind_of(config.device).on_host:
        return None
    size = config.weight_budget
    if config.transition_mode == "delta" and len(config.shardings) == 2:
        shardings = [sharding_of(message) for message in config.shardings]
        size = arena_bytes(config.spec, shardings, config.rank, config.dtype, size)
    return HostArena(size)


def _watch_control(pid: int) -> None:
    """End this process when the control process does, even if the fork server was killed first."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        os._exit(1)

    def watch() -> None:
        select.select([fd], [], [])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-control").start()


def worker_main(config: WorkerConfig) -> int:
    """Run a worker until it is told to shut down; returns the process's exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the control process's business
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"seesaw-rank{config.rank}")  # what ps and top show
    _watch_control(config.control_pid)
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(config.inbox)
    outbox.connect(config.outbox)
    lock = threading.Lock()  # the copy thread reports too

    def report(message: FromWorker) -> None:
        data = msgspec.msgpack.encode(message)
        with lock:
            outbox.send(data)

    ending = threading.Event()

    def beat() -> None:
        while not ending.wait(BEAT):
            sign = msgspec.msgpack.encode(Alive(config.rank, worker.phase if worker else "startup"))
            with lock, contextlib.suppress(zmq.Again):  # thousands may lie unread while the engine idles
                if not ending.is_set():
                    outbox.send(sign, zmq.NOBLOCK)

    worker: Worker | None = None
    try:
        enter(config.place)  # after the sockets to the control process are connected: it stays where it is
        keep_heap()
        torch.set_num_threads(config.threads)
        worker = Worker(config, report, open_device(config.device))
        report(worker.ready())
        threading.Thread(target=beat, daemon=True, name="signs-of-life").start()
        _serve(worker, inbox)
        code = 0
    except Exception as error:
        phase = worker.phase if worker is not None else "startup"
        said = f"{type(error).__name__}: {error}"
        report(Failed(config.rank, phase, said, traceback.format_exc(), _is_of_device(error)))
        code = 1
    with lock:
        ending.set()
    outbox.close(linger=2000)
    context.destroy(linger=2000)
    return code


def _is_of_device(error: Exception) -> bool:
    """Whether it is the device or its memory that failed, so that another rank may do what this one could not."""
    if isinstance(error, _DEVICE_ERRORS):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's word on a CPU


def _serve(worker: Worker, inbox: zmq.Socket[bytes]) -> None:
    decoder = msgspec.msgpack.Decoder(ToWorker)
    while True:
        if worker.trace is not None:
            worker.trace.wait(lambda seconds: inbox.poll(int(seconds * 1e3)))
        message = decoder.decode(inbox.recv())
        worker.handle(message)
        if isinstance(message, Shutdown):
            worker.close()
            return
