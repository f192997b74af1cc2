"""Bounds on memory that execution keeps to and the memory plan counts: one place for both."""

from __future__ import annotations

from functools import lru_cache

LOGITS_BYTES = 512 << 20
"""For logits at once: 298 rows of a vocabulary of 150,000, so that a batch of 256 reads the LM head once."""
SAMPLING_BYTES = 64 << 20
"""For what the sampler makes of its logits. It takes about 2^20 of them at a time, and copies, weights, sums and
their order are up to 48 bytes for each."""
STAGING_BYTES = 64 << 20
"""For the two halves of the buffer through which KV goes where the device does not reach host memory itself: a half
takes the link about a millisecond, in which the launches around it are lost."""
SPLITS = 1024
"""Parts into which split-KV decode attention may divide the sequences of a batch beyond one each: with 132 SMs of
several programs each, more would not run at once."""
COLLECTIVE_CHANNELS = 8
"""Of an NCCL communicator at most (`NCCL_MAX_NCHANNELS`). A PCIe link is full with two to four."""
PEER_CHANNELS = 2
"""Of NCCL's sends to one rank at most (`NCCL_MAX_P2P_NCHANNELS`)."""
CHANNEL_LIMITS = {"NCCL_MAX_NCHANNELS": COLLECTIVE_CHANNELS, "NCCL_MAX_P2P_NCHANNELS": PEER_CHANNELS}
"""By the variable of the environment that holds NCCL to it."""

_LOGIT_COPIES = 3
"""Of a row of logits on a rank that samples: what ranks send, what they make together, the sampler's float32."""
_LADDER = ((8, 4), (64, 8), (256, 16), (1024, 64))
"""Up to so many sequences, steps of so many."""


def lane_of(source: int, destination: int) -> int:
    """Which communicator carries messages from one rank to another: they have one for every two directions of a bit.

    It goes by the lowest bit in which their numbers differ, and by which of the two has it. So on any lane a rank
    only sends, or only receives, whatever the layouts.
    """
    differing = source ^ destination
    bit = (differing & -differing).bit_length() - 1
    return 2 * bit + (source >> bit & 1)


def most_lanes(world: int) -> int:
    """Lanes among so many ranks."""
    return 2 * (world - 1).bit_length()


def logit_rows(vocab: int) -> int:
    """Rows of logits that are computed, gathered and sampled at once; the same on all ranks of a stage."""
    return max(1, LOGITS_BYTES // (4 * _LOGIT_COPIES * vocab))


@lru_cache(maxsize=64)
def graph_batches(most: int) -> tuple[int, ...]:
    """Rising batch sizes for which a decode step of up to `most` sequences is captured as a graph.

    A step is padded to the next of them. Beyond 1,024 sequences launching kernels does not count, and steps run
    without a graph.
    """
    sizes, size = [1, 2], 2
    for last, step in _LADDER:
        start = size + step - size % step
        sizes += range(start, last + 1, step)
        size = last
    fitting = [size for size in sizes if size < most]
    return (*fitting, most) if most <= sizes[-1] else tuple(fitting)
