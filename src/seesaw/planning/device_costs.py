"""What a device takes of a rank's memory beside weights, activations, logits and KV.

On CPU ranks nothing; on CUDA context, libraries, collectives, graphs and buffers. Which of the two holds is chosen by
the device's name, here alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from seesaw.core.layout import Layout
from seesaw.core.workspace import (
    COLLECTIVE_CHANNELS,
    PEER_CHANNELS,
    SAMPLING_BYTES,
    SPLITS,
    STAGING_BYTES,
    graph_batches,
    most_lanes,
)
from seesaw.planning.demand import MODES, Demand
from seesaw.weights.changes import Mode

Parts = tuple[tuple[str, int], ...]
"""Bytes by name."""
_DECODE = 1
_TENSORS_PER_LAYER = 12
_RESIDENT = MODES.index("resident")
_RELOAD = MODES.index("reload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a plan has a rank do at most."""

    layouts: tuple[Layout, Layout]
    """Of prefill and decode."""
    element: int
    """Bytes of an activation."""
    batch_tokens: int
    running: int
    """Sequences of a replica."""
    sequence_blocks: int
    """KV blocks of the longest sequence that may come."""
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCosts:
    """Bytes by cause. Each part is named in the plan's memory, and 0 where a device has no such thing."""

    context: int = 0
    """The driver's context and loaded kernels: outside of any allocator."""
    libraries: int = 0
    """Workspaces of the matrix library."""
    communicator: int = 0
    """Of a communicator, before anything goes over it."""
    connection: int = 0
    """Buffers of one channel of a communicator to one rank: to send and to receive."""
    channels: int = 0
    """Of a communicator, for its ring and for each of its tree's neighbours."""
    peer_channels: int = 0
    """To each rank that hidden states, tokens or parts of logits are sent to, or come from."""
    graph: int = 0
    """Of a captured decode step, whatever is in it."""
    graph_layer: int = 0
    """Of a layer in a captured decode step."""
    attention: int = 0
    """Workspace of an attention library, if one is used: at least so much is set aside."""
    partial: int = 0
    """Bytes of a number of split-KV decode's partial results."""
    token_inputs: int = 0
    """Of a token of a batch: its number, position, place in the pool, row to sample."""
    block_inputs: int = 0
    """Of a KV block in the block table of a decode step."""
    sampling: int = 0
    """Temporaries of the sampler."""
    staging: int = 0
    """Buffers through which KV is gathered into large copies."""
    segments: int = 0
    """Tails of the allocator's segments."""
    tensor: int = 0
    """To which the allocator rounds a tensor up."""
    churn: float = 0.0
    """Share of weights that are freed and made anew at a transition: what lies between those that stay."""

    def shared(self, load: Load) -> Parts:
        """What every rank of a plan takes."""
        return (
            ("context", self.context),
            ("libraries", self.libraries),
            ("collectives", self._collectives(load)),
            ("inputs", self._inputs(load)),
            ("sampling", self.sampling),
            ("staging", self.staging),
        )

    def own(self, rank: Demand, load: Load) -> Parts:
        """What goes by a rank's place in the layouts; `churned` comes to it."""
        return (
            ("graphs", self._graphs(rank, load)),
            ("attention", self._attention(rank, load)),
            ("allocator", self.segments + _TENSORS_PER_LAYER * sum(rank.layers) * self.tensor),
        )

    def churned(self, rank: Demand, mode: Mode) -> int:
        """What a transition leaves unused between tensors. `peaks` of both shardings, less the larger one, is what it
        frees and makes anew at most."""
        if not self.churn or mode == "resident":
            return 0
        return int((rank.peaks[_RESIDENT] - rank.peaks[_RELOAD]) * self.churn)

    def _collectives(self, load: Load) -> int:
        """What `transport.nccl` opens: a communicator of all ranks where they talk at all, one for each smaller group
        of tensor parallelism, and one for each lane of messages beyond the first, which has that of all ranks.

        Connections of both layouts stay. On one rank: of a group its ring and its tree, and to the first member,
        which gathers from all; of stages a neighbour and the ranks at the other end, or two neighbours.
        """
        channels = communicators = 0
        for layout in dict.fromkeys(load.layouts):
            if layout.tp > 1:
                communicators += layout.tp < layout.world
                channels += self.channels * (1 + min(layout.tp - 1, 2)) + self.peer_channels * (layout.tp - 1)
            if layout.pp > 1:
                channels += self.peer_channels * (1 + layout.tp)
        if not channels:
            return 0
        lanes = most_lanes(load.layouts[0].world) if any(layout.pp > 1 for layout in load.layouts) else 1
        return (communicators + lanes) * self.communicator + channels * self.connection

    def _graphs(self, rank: Demand, load: Load) -> int:
        """Of the decode layout: their pool has the activations of the largest batch. They end before the LM head."""
        if not self.graph:
            return 0
        batches = graph_batches(load.running)
        each = self.graph + rank.layers[_DECODE] * self.graph_layer
        return len(batches) * each + batches[-1] * rank.width[_DECODE] * load.element

    def _attention(self, rank: Demand, load: Load) -> int:
        """Partial results: head_dim sums, a maximum and a denominator for each part of a sequence and head."""
        partial = (load.running + SPLITS) * max(rank.heads) * (load.head_dim + 2) * self.partial
        return max(self.attention, partial)

    def _inputs(self, load: Load) -> int:
        tokens = max(load.batch_tokens, load.running)
        return tokens * self.token_inputs + load.running * load.sequence_blocks * self.block_inputs


HOST = DeviceCosts()
"""CPU ranks: the process itself is the host's business, not the budget's."""

CUDA = DeviceCosts(
    # Of a process with torch on SM80 to SM90, kernels loaded lazily: 0.4 to 0.5 GiB is what other engines report as
    # taken outside of torch by one rank.
    context=512 << 20,
    # cuBLAS has 8.1 MiB a stream by torch's default, on SM90 and later 32 MiB, and cuBLASLt as much again; there is a
    # stream for steps and one for capturing them.
    libraries=4 * (32 << 20),
    # A dozen structures and queues, each in pages of 2 MiB where NCCL maps its memory itself.
    communicator=24 << 20,
    # NCCL logs 10 MiB for what a channel receives (all its protocols) and 2 MiB for what it sends (a page).
    connection=12 << 20,
    channels=COLLECTIVE_CHANNELS,
    peer_channels=PEER_CHANNELS,
    # A page of the pool, and nodes with their parameters: some dozen kernels a layer, a few KiB each.
    graph=2 << 20,
    graph_layer=128 << 10,
    # FlashInfer's documentation asks for 128 MiB for floats, and it takes 8 MiB for its plan.
    attention=136 << 20,
    partial=4,
    # Two of each, since the next step's are filled while one runs: five integers of at most 8 bytes a token, an
    # integer of 4 bytes a block.
    token_inputs=2 * 5 * 8,
    block_inputs=2 * 4,
    sampling=SAMPLING_BYTES,
    staging=STAGING_BYTES,
    # With expandable segments (`PYTORCH_ALLOC_CONF`) a pool grows by 20 MiB for large and by 2 MiB for small tensors:
    # pools of steps, of graphs and of copies.
    segments=3 * (22 << 20),
    tensor=512,
    churn=1 / 32,
)
"""A CUDA device under one rank. Constants of the driver and of libraries are upper bounds by their documentation and
logs."""

_BY_DEVICE = {"cpu": HOST, "cuda": CUDA}


def costs_of(device: str, *, collectives: bool = True) -> DeviceCosts:
    """Those of a device such as `cpu` or `cuda:0`. Without `collectives` ranks talk through the host, as they do
    where they share a device, and the device's own library takes nothing."""
    costs = _BY_DEVICE[device.partition(":")[0]]
    return costs if collectives else replace(costs, channels=0, peer_channels=0, communicator=0)
