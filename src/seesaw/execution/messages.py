"""What the control process and the workers say to each other, besides actions; msgpack over ZeroMQ."""

from __future__ import annotations

import msgspec

from seesaw.core.actions import Forward, ForwardDone, SwapIn, SwapOut, Transition
from seesaw.core.events import Event
from seesaw.core.model_spec import ModelSpec
from seesaw.core.node import Place


class ShardingMessage(msgspec.Struct, array_like=True, frozen=True):
    """A `weights.sharding.Sharding` in plain numbers."""

    layout: str
    stage_layers: list[int]
    ranks: list[int]
    carried: list[int]


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker is told at its start."""

    rank: int
    world: int
    control_pid: int
    inbox: str
    """Address at which the worker takes messages."""
    outbox: str
    """Address to which it reports."""
    rendezvous: str
    """Directory through which the ranks find each other."""
    transport: str
    transport_fd: int
    """The shared memory of the transport, a descriptor in the control process; -1 for none."""
    device: str
    place: Place
    """Control groups, network namespace and cores of the worker."""
    threads: int
    spec: ModelSpec
    dtype: str
    shardings: list[ShardingMessage]
    transition_mode: str
    block_size: int
    weight_budget: int
    """Most bytes of weights this rank may hold at any time, as the memory plan has it."""
    device_blocks: list[int]
    """Blocks of the device pool under each sharding."""
    max_running: int
    """Most sequences of a replica at once."""
    max_model_len: int
    """Most tokens of a sequence."""
    host_blocks: int
    host_buffer_fd: int
    """The host buffer's descriptor in the control process; -1 for none."""
    store_path: str
    """Where the host weight store is opened: the model's directory, or the memory of random weights."""
    dummy_weights: bool
    lock_weights: bool
    """Whether a rank on a GPU registers the store with it, which locks all of it in the host's memory."""
    attention: str | None
    profile: str
    """Folder to which the rank writes where its time went; empty for none."""
    trace: bool
    """Whether the rank reports `Events`."""
    start_timeout: float
    """Seconds to wait for the other ranks."""
    rank_timeout: float
    """Seconds without a sign of life after which a rank is taken for lost."""


class Shutdown(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Finish what was submitted and end."""


ToWorker = Forward | SwapOut | SwapIn | Transition | Shutdown


class Ready(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The worker holds its weights and its KV pool, and waits for actions."""

    rank: int
    weight_bytes: int
    pool_bytes: int


class CopiesAck(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """One rank has finished its part of the copies of action `id`."""

    rank: int
    id: int
    bytes: int
    seconds: float


class TransitionAck(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """One rank runs under the new sharding. Times are of the monotonic clock, which all processes share."""

    rank: int
    id: int
    bytes: int
    """Fetched from the host store."""
    copied: int
    """Copied on the device."""
    moving: float
    """Seconds of fetching and copying."""
    started: float
    ended: float


class Alive(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A sign of life, sent every `execution.liveness.BEAT` seconds beside whatever the rank computes."""

    rank: int
    phase: str


class Events(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """What a rank did since it last said so, if a trace is written; in no order."""

    events: list[Event]


class Failed(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A worker raised while doing `phase`, and has ended."""

    rank: int
    phase: str
    message: str
    details: str
    device: bool = False
    """Whether its device failed or has no memory left, rather than what runs on it."""


FromWorker = Ready | ForwardDone | CopiesAck | TransitionAck | Alive | Events | Failed
