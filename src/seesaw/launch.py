"""Starts the workers of a deployment on this node, with the host memory they share."""

from __future__ import annotations

import logging
import os

import torch

from seesaw.core.actions import Action, Completion
from seesaw.core.devices import device_kind
from seesaw.core.errors import EngineError
from seesaw.core.units import format_bytes
from seesaw.deployment import Deployment
from seesaw.execution.local import LocalExecutor, OnEvents
from seesaw.execution.messages import ShardingMessage, WorkerConfig
from seesaw.kv.host_buffer import HostBuffer
from seesaw.preflight.limits import stored_bytes
from seesaw.preflight.system import available_memory
from seesaw.transport.select import resolve_kind
from seesaw.transport.shared_memory import create_region
from seesaw.weights.sharding import Sharding
from seesaw.weights.store import HostWeightStore

logger = logging.getLogger(__name__)


def start_local(deployment: Deployment) -> LocalNode:
    """The started ranks of `deployment`. Raises `StartupError` or `WorkerError`; nothing is left behind then."""
    node = LocalNode()
    try:
        node.start(deployment)
    except BaseException:
        node.close()
        raise
    return node


class LocalNode:
    """The executor of this node: its ranks, and the host memory that they share.

    The ranks can be replaced by those of another plan; the host buffer and random weights stay. Owns both.
    """

    def __init__(self, on_events: OnEvents | None = None) -> None:
        """`on_events` takes what the ranks tell of their doings, if a trace is written."""
        self._on_events = on_events
        self._ranks: LocalExecutor | None = None
        self._host_buffer: HostBuffer | None = None
        self._store: HostWeightStore | None = None
        self._lock_weights: bool | None = None
        """Decided before the first ranks take host memory."""
        self._closed = False

    def start(self, deployment: Deployment) -> None:
        """End the present ranks, if there are any, start those of `deployment`, and wait until all are ready.

        Model, type, host blocks and block size are the same in all calls. Raises `StartupError` or `WorkerError` if
        the ranks do not come up: the host memory stands until `close`, and `start` may be called again.
        """
        if self._closed:
            raise EngineError("the engine has been closed; make a new one")
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
        self._reserve(deployment)
        if self._lock_weights is None:
            self._lock_weights = _can_lock_weights(deployment, self._host_buffer)
        self._ranks = _start_ranks(
            deployment, self._host_buffer, self._store, self._on_events, self._lock_weights
        )

    def submit(self, action: Action) -> None:
        """See `Executor`."""
        assert self._ranks is not None, "the ranks have not been started"
        self._ranks.submit(action)

    def wait(self) -> list[Completion]:
        """See `Executor`."""
        assert self._ranks is not None, "the ranks have not been started"
        return self._ranks.wait()

    def close(self) -> None:
        """End the ranks and free the host memory. May be called twice."""
        self._closed = True
        for owned in (self._ranks, self._host_buffer, self._store):
            if owned is not None:
                owned.close()

    def _reserve(self, deployment: Deployment) -> None:
        """Make the shared host memory, the first time."""
        spec, memory = deployment.spec, deployment.memory
        if memory.host_blocks and self._host_buffer is None:
            self._host_buffer = HostBuffer.create(
                blocks=memory.host_blocks,
                layers=spec.layers,
                kv_heads=spec.kv_heads,
                block_size=deployment.options.block_size,
                head_dim=spec.head_dim,
                dtype=getattr(torch, deployment.dtype),
            )
        if deployment.dummy and self._store is None:
            self._store = HostWeightStore.dummy(spec, deployment.dtype, deployment.options.seed)


def _start_ranks(
    deployment: Deployment,
    host_buffer: HostBuffer | None,
    store: HostWeightStore | None,
    on_events: OnEvents | None,
    lock_weights: bool,
) -> LocalExecutor:
    memory = deployment.memory
    logger.info(
        "memory of rank %d, the fullest, within %s: %s",
        memory.fullest,
        format_bytes(deployment.device_memory),
        memory.describe(memory.fullest),
    )
    shardings = list(deployment.shardings[: 2 if deployment.plan.reshards else 1])
    transport, region = _transport(deployment)
    configs = [
        _worker_config(deployment, shardings, rank, host_buffer, store, (transport, region), lock_weights)
        for rank in range(deployment.plan.world)
    ]
    try:
        return LocalExecutor(configs, list(deployment.shardings), on_events)
    finally:
        if region >= 0:
            os.close(region)  # the ranks have mapped it


def _can_lock_weights(deployment: Deployment, host_buffer: HostBuffer | None) -> bool:
    """Whether the host has memory for all of a checkpoint beside the host buffer, once for all ranks.

    Locked pages cannot be dropped: what does not fit would not be refused, but end in processes being killed.
    """
    if not device_kind(deployment.options.device).pins_memory or deployment.dummy:
        return True  # nothing is locked, or random weights take their memory anyway
    buffer = 0 if host_buffer is None else host_buffer.bytes
    weights, room = stored_bytes(deployment), available_memory()
    if weights + buffer <= room:
        return True
    logger.warning(
        "weights: the checkpoint's %s and a host buffer of %s are more than the %s of host memory that can be had, "
        "so weights are not registered with CUDA, and pass through a staging buffer, at half the speed or less; a "
        "smaller host buffer (--host-kv) may help",
        *map(format_bytes, (weights, buffer, room)),
    )
    return False


def _transport(deployment: Deployment) -> tuple[str, int]:
    """The transport to use, and the descriptor of its shared memory (-1 for none)."""
    world = deployment.plan.world
    addresses = all(place.address for place in deployment.places)
    own = deployment.own_transport
    kind = resolve_kind(deployment.options.transport, world=world, addresses=addresses, own=own)
    return kind, create_region(world) if kind == "shm" else -1


def _worker_config(
    deployment: Deployment,
    shardings: list[Sharding],
    rank: int,
    host_buffer: HostBuffer | None,
    store: HostWeightStore | None,
    transport: tuple[str, int],
    lock_weights: bool,
) -> WorkerConfig:
    options, memory = deployment.options, deployment.memory
    return WorkerConfig(
        rank=rank,
        world=deployment.plan.world,
        control_pid=os.getpid(),
        inbox="",  # the executor fills the addresses in
        outbox="",
        rendezvous="",
        device=device_kind(options.device).device_name(deployment.places[rank].device),
        transport=transport[0],
        transport_fd=transport[1],
        place=deployment.places[rank],
        threads=options.threads_per_rank,
        spec=deployment.spec,
        dtype=deployment.dtype,
        shardings=[_message(sharding) for sharding in shardings],
        transition_mode=memory.mode,
        block_size=options.block_size,
        weight_budget=memory.weights[rank],
        device_blocks=list(memory.device_blocks[: len(shardings)]),
        max_running=deployment.scheduler.max_running,
        max_model_len=deployment.scheduler.max_model_len,
        host_blocks=memory.host_blocks,
        host_buffer_fd=-1 if host_buffer is None else host_buffer.fd,
        store_path=options.model if store is None else store.source.path,
        dummy_weights=store is not None,
        lock_weights=lock_weights,
        attention=options.attention,
        profile=options.profile or "",
        trace=options.trace is not None,
        start_timeout=options.start_timeout,
        rank_timeout=options.rank_timeout,
    )


def _message(sharding: Sharding) -> ShardingMessage:
    stages = [len(stage) for stage in sharding.stages]
    return ShardingMessage(str(sharding.layout), stages, list(sharding.ranks), list(sharding.carried))
