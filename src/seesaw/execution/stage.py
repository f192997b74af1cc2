"""`Stage`: one rank under one sharding; runs Forwards through its part of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seesaw.attention.base import AttentionBackend, AttentionBatch
from seesaw.core.actions import Forward, ForwardDone
from seesaw.core.model_spec import ModelSpec
from seesaw.execution.collectives import PipelineLinks, TensorParallelGroup
from seesaw.execution.sampler import Sampler
from seesaw.execution.slots import SlotTables
from seesaw.kv.device_pool import DevicePool
from seesaw.models.decoder import Decoder
from seesaw.weights.sharding import RankView


@dataclass(slots=True)
class _PagedAttend:
    """`models.decoder.Attend` over the device pool, for one batch."""

    backend: AttentionBackend
    pool: DevicePool
    spec: ModelSpec
    first_layer: int
    batch: AttentionBatch

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pool_layer = self.pool.layer(layer - self.first_layer)
        window, scale = self.spec.window(layer), self.spec.head_dim**-0.5
        return self.backend.attend(q, k, v, pool_layer, self.batch, scale=scale, window=window)


class Stage:
    """The model part, slot tables and links of a rank under one sharding; a transition makes a new one."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        view: RankView,
        vocab_widths: list[int],
        weights: dict[str, Tensor],
        dtype: torch.dtype,
        group: TensorParallelGroup,
        pool: DevicePool,
        attention: AttentionBackend,
        block_size: int,
    ) -> None:
        self.view = view
        self._spec, self._dtype, self._group = spec, dtype, group
        self._vocab_widths = vocab_widths
        self._decoder = Decoder(spec, view, weights, group)
        self._pool, self._attention = pool, attention
        self._slots = SlotTables(block_size)
        self._links = PipelineLinks(view)
        self._sampler = Sampler(spec.vocab) if view.rank == view.sampler_rank else None
        self._expected: deque[Forward] = deque()
        """Forwards whose sampled tokens the last stage will send to this rank, oldest first."""

    def run(self, forward: Forward, after_layer: Callable[[int], None] | None) -> ForwardDone | None:
        """Run one micro-batch; the rank that samples returns what is reported of it."""
        self._slots.update(forward)
        self._update_sampler(forward)
        with torch.inference_mode():
            hidden = self._compute(forward, after_layer)
            if not self.view.last_stage:
                self._links.send_hidden(hidden)
                self._expect_tokens(forward)
                return None
            return self._sample(forward, hidden)

    def finish(self) -> None:
        """Take in and send out whatever is still between the stages."""
        self._receive_tokens(until=None)
        self._links.flush()

    def _update_sampler(self, forward: Forward) -> None:
        if self._sampler is not None:
            for slot in forward.close:
                self._sampler.close(slot)
            for opened in forward.open:
                self._sampler.open(opened.slot, opened.sampling)

    def _compute(self, forward: Forward, after_layer: Callable[[int], None] | None) -> Tensor:
        if self.view.first_stage and forward.feedback_from >= 0:
            self._receive_tokens(until=forward.feedback_from)
        inputs = self._slots.inputs(forward)
        if self.view.first_stage:
            hidden = self._decoder.embed(torch.from_numpy(inputs.tokens))
        else:
            hidden = self._links.receive_hidden(len(inputs.tokens), self._spec.hidden, self._dtype)
        attend = _PagedAttend(
            self._attention, self._pool, self._spec, self.view.layers.start, inputs.attention
        )
        hidden = self._decoder.layers(hidden, inputs.positions, attend, after_layer)
        return hidden.index_select(0, inputs.sampled_rows) if self.view.last_stage else hidden

    def _sample(self, forward: Forward, rows: Tensor) -> ForwardDone | None:
        if not forward.sampled:
            return ForwardDone(forward.id, [], []) if self._sampler is not None else None
        slots = [forward.slots[i] for i in forward.sampled]
        logits = self._group.gather_logits(self._decoder.logits(rows), self._vocab_widths)
        done = None
        tokens = torch.empty(len(slots), dtype=torch.int64)
        if self._sampler is not None:
            assert logits is not None
            result = self._sampler.sample(logits, slots)
            tokens = result.tokens
            done = ForwardDone(forward.id, tokens.tolist(), result.logprobs)
        if forward.feedback:
            self._feed_back(slots, tokens)
        return done

    def _feed_back(self, slots: list[int], tokens: Tensor) -> None:
        """Give the sampled tokens to the first stage: this rank's own group, or ranks at the far end."""
        if self.view.first_stage:
            self._slots.set_latest(slots, self._group.broadcast_tokens(tokens).numpy())
        elif self._sampler is not None:
            self._links.send_tokens(tokens)

    def _expect_tokens(self, forward: Forward) -> None:
        if self.view.first_stage and forward.feedback and forward.sampled:
            self._expected.append(forward)

    def _receive_tokens(self, until: int | None) -> None:
        while self._expected and (until is None or self._expected[0].id <= until):
            forward = self._expected.popleft()
            tokens = self._links.receive_tokens(len(forward.sampled))
            self._slots.set_latest([forward.slots[i] for i in forward.sampled], tokens.numpy())
