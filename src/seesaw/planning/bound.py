"""The least time that a node needs for a workload, whatever the plan and whoever schedules it.

All ranks together are taken for one device that never waits: no communication, no overheads, perfect balance, and
arithmetic overlaps with reading memory, also across requests and phases. What is left is necessary. With

    R   ranks of the node                     F   flops of a rank x the best share that the curve gives
    B   bytes per second of a rank            p, o   prompt and output tokens of a request
    l   layers                                k   2 x kv_heads x head_dim x kv_bits / 8, KV of a token and layer

**Arithmetic.** p + o - 1 tokens of a request are fed, o are sampled. Let m be the weights that a token meets in a
layer (of experts, those that it passes; routers are left out), v those of K and V, and h those of the LM head.

    products  = 2 x [((l - 1) m + v) x sum(p + o - 1) + (m - v + h) x sum(o)]
    attention = 4 x (l - 1) x heads x head_dim x sum(p (p + 1) / 2)

The last layer runs on sampled tokens only, but for K and V. Attention is that of the prompts, causal; that of decode
steps is bound by memory and counts there.

    arithmetic seconds = (products / F of products + attention / F of attention) / R

**Memory.** A Forward reads the weights once, however many sequences it steps, and a sequence gets at most one token
of it. To sample token i of a request, p + i - 1 of its tokens are in device memory during that Forward. As C tokens
fit at once (`max_resident_tokens`, else all memory that the weights leave, counted once per node):

    forwards >= (sum of p + i - 1 over all requests and i = 1 … o) / C
    forwards >= the longest output

Each reads all weights of the layers and the head. Of the experts it reads those that its sampled rows are expected to
touch, w(s) bytes for s rows. That is concave, so not below the chord from w(1) to w(S), S being the most sequences
that fit into C: with w(s) >= a + b s, all Forwards together read at least `a x forwards + b x sum(o)`. And a token
that is fed after the prompt reads the KV before it and its own, (p + i - 1) k in each layer, i = 2 … o.

    memory seconds = (weights / B + KV / (B x the best share of decode attention)) / R

`seconds` is the larger of the two. `prefill_seconds` and `decode_seconds` are the larger of the two for the work of
one phase: prefill feeds the prompts and samples the first tokens, decode does the rest. So a plan that keeps its
phases apart cannot beat their sum, which is no less than `seconds`; one that mixes them may.

Sliding windows are left out, as in the cost model. The model may undercut the bound only on a device that reads K
and V faster than it multiplies with them: there, a chunk of one token of a prompt costs less than its arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from seesaw.core.errors import MemoryBudgetError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.units import format_bytes
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The least that a workload takes, by all ranks of a node; of the whole job, where the workload is a sample."""

    seconds: float
    prefill_seconds: float
    """If nothing but the prompts and their first tokens were to be done."""
    decode_seconds: float
    """If nothing but the other tokens were to be done."""
    flops: float
    """Of products and of the prompts' attention."""
    bytes: float
    """Of weights and KV that are read."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What has to be done for the tokens of one phase or of both, over all requests."""

    fed: float
    sampled: float
    pairs: float
    """(query, key) pairs of the prompts."""
    read: float
    """Keys that decode steps read."""
    resident: float
    """Tokens in device memory, summed over the tokens that are sampled."""
    longest: int
    """Tokens sampled of one request, at most."""

    def __add__(self, other: _Tokens) -> _Tokens:
        return _Tokens(
            self.fed + other.fed,
            self.sampled + other.sampled,
            self.pairs + other.pairs,
            self.read + other.read,
            self.resident + other.resident,
            self.longest + other.longest,
        )


def bound(
    model: PlannedModel,
    hardware: HardwareSpec,
    workload: Workload,
    dtype: str,
    *,
    max_resident_tokens: float | None,
) -> Bound:
    """The least time for `workload`; `dtype` is that of computation.

    `max_resident_tokens`: tokens whose KV fits the devices of the node at once; None for all memory that one copy
    of the weights leaves. Raises `MemoryBudgetError` if that is none.
    """
    room = _room(model, hardware) if max_resident_tokens is None else max_resident_tokens
    assert room > 0, f"room for {room} tokens"
    scale = workload.requests / len(workload)
    prefill, decode = _tokens(workload, scale)
    prompts = np.cumsum(np.sort(workload.prompt)) * scale
    most = max(1.0, scale * int(np.searchsorted(prompts, room, side="right")))
    need = _Need(model, hardware, dtype, room, most)
    both = prefill + decode
    return Bound(
        seconds=max(need.arithmetic(both), need.memory(both)),
        prefill_seconds=max(need.arithmetic(prefill), need.memory(prefill)),
        decode_seconds=max(need.arithmetic(decode), need.memory(decode)),
        flops=need.products(both) + need.attention(both),
        bytes=need.weights(both) + need.kv(both),
    )


def _tokens(workload: Workload, scale: float) -> tuple[_Tokens, _Tokens]:
    prompt, output = workload.prompt.astype(np.float64), workload.output.astype(np.float64)
    requests, later = scale * len(workload), output - 1
    keys = scale * float(np.sum(later * prompt + later * output / 2))  # the sum of p + i - 1 over i = 2 … o
    prompts = scale * float(prompt.sum())
    pairs = scale * float(np.sum(prompt * (prompt + 1) / 2))
    steps = scale * float(later.sum())
    return (
        _Tokens(prompts, requests, pairs, 0.0, prompts, 1),
        _Tokens(steps, steps, 0.0, keys, keys, int(later.max())),
    )


def _room(model: PlannedModel, hardware: HardwareSpec) -> float:
    """Tokens of KV beside one copy of the weights."""
    memory, weights = hardware.ranks * hardware.memory, model.weight_bytes()
    if weights + model.kv_bytes_per_token() > memory:
        raise MemoryBudgetError(
            f"{model.name} does not fit: its weights take {format_bytes(weights)}, and "
            f"{hardware.ranks}x{hardware.name} have {format_bytes(memory)} of device memory; take more or larger "
            "devices, or fewer bits a weight"
        )
    return (memory - weights) / model.kv_bytes_per_token()


class _Need:
    """What tokens need, and how long the node takes for it."""

    def __init__(
        self, model: PlannedModel, hardware: HardwareSpec, dtype: str, room: float, most: float
    ) -> None:
        """`room`: tokens whose KV fits at once; `most`: sequences that fit."""
        spec, moe = model.spec, model.moe
        self._model, self._room, self._most = model, room, most
        self._curves = hardware.curves(dtype)
        self._flops = hardware.ranks * hardware.flops[dtype]
        self._bandwidth = hardware.ranks * hardware.bandwidth
        self._heads = spec.heads * spec.head_dim
        self._kv = 2 * spec.hidden * spec.kv_heads * spec.head_dim
        self._head = spec.hidden * spec.vocab
        self._around = 2 * spec.hidden * self._heads + self._kv
        self._sparse = moe.sparse_layers if moe else 0
        self._dense = spec.layers - self._sparse

    # ---- arithmetic ---------------------------------------------------------------------------------------

    def arithmetic(self, tokens: _Tokens) -> float:
        """Seconds of all ranks together."""
        product, attention = max(self._curves.product.values), max(self._curves.prefill_attention.values)
        return (self.products(tokens) / product + self.attention(tokens) / attention) / self._flops

    def products(self, tokens: _Tokens) -> float:
        """Flops."""
        moe, spec = self._model.moe, self._model.spec
        dense = self._around + 3 * spec.hidden * spec.ffn
        sparse = self._around + self._experts(moe.experts_per_token) if moe else dense
        layers = self._dense * dense + self._sparse * sparse
        saved = max(dense if self._dense else 0, sparse) - self._kv  # by the last layer, of whichever kind
        elements = tokens.fed * layers - (tokens.fed - tokens.sampled) * saved + tokens.sampled * self._head
        return 2.0 * elements

    def attention(self, tokens: _Tokens) -> float:
        """Flops of the prompts' attention."""
        return 4.0 * (self._model.spec.layers - 1) * self._heads * tokens.pairs

    # ---- memory -------------------------------------------------------------------------------------------

    def memory(self, tokens: _Tokens) -> float:
        """Seconds of all ranks together."""
        best = max(self._curves.decode_attention.values)
        return (self.weights(tokens) + self.kv(tokens) / best) / self._bandwidth

    def weights(self, tokens: _Tokens) -> float:
        """Bytes."""
        if not tokens.sampled:
            return 0.0
        forwards = max(ceil(tokens.resident / self._room), tokens.longest)
        least, most = self._weights_of(1.0), self._weights_of(self._most)
        rise = (most - least) / (self._most - 1) if self._most > 1 else 0.0
        return (least - rise) * forwards + rise * tokens.sampled

    def kv(self, tokens: _Tokens) -> float:
        """Bytes."""
        return tokens.read * self._model.kv_bytes_per_token()

    def _weights_of(self, rows: float) -> float:
        """Bytes that one Forward reads which samples so many rows."""
        model, spec = self._model, self._model.spec
        dense = self._around + 3 * spec.hidden * spec.ffn
        touched = model.moe.expected_experts(rows) if model.moe else 0.0
        layers = self._dense * dense + self._sparse * (self._around + self._experts(touched))
        return (layers * model.weight_bits + self._head * max(model.weight_bits, 16.0)) / 8

    def _experts(self, count: float) -> float:
        """Elements of so many experts and the shared one."""
        moe = self._model.moe
        return 3.0 * self._model.spec.hidden * (count * moe.expert_ffn + moe.shared_ffn) if moe else 0.0
