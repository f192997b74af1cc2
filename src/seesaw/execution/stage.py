"""`Stage`: one rank under one sharding; runs Forwards through its part of the model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from seesaw.attention.base import AttentionBackend
from seesaw.core.actions import Forward, ForwardDone
from seesaw.core.model_spec import ModelSpec
from seesaw.core.workspace import logit_rows
from seesaw.device.base import Device
from seesaw.execution.collectives import PipelineLinks, TensorParallelGroup
from seesaw.execution.graphs import DecodeGraphs, RankGraphs, Step
from seesaw.execution.layers import PagedAttention, StageLayers
from seesaw.execution.programs import DecodePrograms, Timing
from seesaw.execution.prompt_logprobs import PromptScorer, with_prompt_logprobs
from seesaw.execution.sampling import Logprobs, Sampler, SampleResult
from seesaw.execution.slots import Inputs, SlotTables
from seesaw.kv.device_pool import DevicePool
from seesaw.models.decoder import Decoder
from seesaw.ops.base import Operators
from seesaw.weights.arrivals import HEAD, Arrivals
from seesaw.weights.sharding import RankView


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
        operators: Operators,
        block_size: int,
        device: Device,
        graphs: RankGraphs | None = None,
        arrivals: Arrivals | None = None,
        timing: Timing | None = None,
    ) -> None:
        """`graphs` if decode steps may be captured. With `arrivals`, the first Forward waits for `weights` layer by
        layer. `timing` is for decode programs."""
        self.view = view
        self._device = device
        self._spec, self._dtype, self._group = spec, dtype, group
        self._vocab_widths = vocab_widths
        self._arrivals = arrivals
        self._decoder = Decoder(spec, view, weights, group, operators)
        paged = PagedAttention(attention, pool, spec, view.layers.start)
        programs = DecodePrograms.of(self._decoder, operators, paged, group, dtype=dtype, timing=timing)
        self._layers = StageLayers(self._decoder, paged, programs)
        self._graphs: DecodeGraphs | None = None
        if graphs is not None:
            self._graphs = graphs.of(self._layers, group, attention_capturable=attention.capturable)
        self._ready_graphs: DecodeGraphs | None = None
        """`_graphs` from the second Forward on."""
        self._slots = SlotTables(block_size, device)
        self._links = PipelineLinks(view, group.transport, device.torch)
        self._operators = operators
        self._logit_rows = logit_rows(spec.vocab)
        self._sampler = (
            Sampler(spec.vocab, operators.argmax, device) if view.rank == view.sampler_rank else None
        )
        self._scorer = PromptScorer(spec.vocab, group, device, self._decoder.logits)
        self._particular: set[int] = set()
        """Open slots that want more than the most likely token; known on every rank of the last stage."""
        self._expected: deque[Forward] = deque()
        """Forwards whose sampled tokens the last stage will send to this rank, oldest first."""

    def run(
        self, forward: Forward, after_attention: Callable[[int], None] | None
    ) -> Callable[[], ForwardDone] | None:
        """Launch one micro-batch. The rank that samples returns what makes its report, to be called when the
        device's compute stream has done what was launched."""
        started = time.perf_counter()
        self._open_and_close(forward)
        with torch.inference_mode():
            if self.view.first_stage and forward.feedback_from >= 0:
                self._receive_tokens(until=forward.feedback_from)
            inputs = self._prepare(forward)
            prepared = time.perf_counter()
            hidden = self._compute(inputs, after_attention)
            if not self.view.last_stage:
                self._links.send_hidden(hidden)
                self._expect_tokens(forward)
                return None
            scores, hidden = self._score(forward, hidden)
            result = self._sample(forward, hidden)
            if self._sampler is None:
                return None
            tokens = self._device.download(result.tokens)
            logprobs = None if result.logprobs is None else result.logprobs.download(self._device)
            report = partial(_report, forward.id, tokens, logprobs, prepared - started)
            if scores is None:
                return report
            return partial(with_prompt_logprobs, report, self._device.download(scores), forward.scores)

    def finish(self) -> None:
        """Take in and send out whatever is still between the stages. The stage may go then."""
        self._receive_tokens(until=None)
        self._links.flush()
        if self._graphs is not None:
            self._graphs.finish()

    def _open_and_close(self, forward: Forward) -> None:
        self._slots.update(forward)
        if not self.view.last_stage:
            return
        self._particular.difference_update(forward.close)
        self._particular.update(opened.slot for opened in forward.open if opened.sampling is not None)
        if self._sampler is not None:
            for slot in forward.close:
                self._sampler.close(slot)
            for opened in forward.open:
                self._sampler.open(opened.slot, opened.sampling)

    def _prepare(self, forward: Forward) -> Inputs | Step:
        """The batch on the device: where a graph reads it, if this is to be run as one.

        The first Forward is not: what a stage needs may come with its first pass, which is the same one on all
        ranks of the group.
        """
        graphs, self._ready_graphs = self._ready_graphs, self._graphs
        step = None if graphs is None else graphs.prepare(forward, self._slots)
        return self._slots.inputs(forward) if step is None else step

    def _compute(self, inputs: Inputs | Step, after_attention: Callable[[int], None] | None) -> Tensor:
        """What leaves this stage: hidden states of all tokens, or on the last one of those to be sampled."""
        if isinstance(inputs, Step):
            if not self.view.first_stage:
                self._links.fill_hidden(inputs.hidden)
            return inputs.run()
        received = None
        if not self.view.first_stage:
            received = self._links.receive_hidden(len(inputs.tokens), self._spec.hidden, self._dtype)
        before = None if self._arrivals is None else self._await
        return self._layers(inputs, received, before, after_attention)

    def _await(self, group: int) -> None:
        """Hold computation back until the weights of a layer, or of the embedding or the head, are there."""
        if self._arrivals is not None:
            self._arrivals.before(group)
            if not self._arrivals.pending:
                self._arrivals = None

    def _score(self, forward: Forward, hidden: Tensor) -> tuple[Tensor | None, Tensor]:
        """What `PromptScorer` says of prompts, on the rank that samples, and the rows at which a token is sampled."""
        if not forward.scores:
            return None, hidden
        self._await(HEAD)
        scores = self._scorer.score(forward, hidden)
        ends = np.cumsum(forward.counts, dtype=np.int64) - 1
        (sampled,) = self._device.upload([ends[forward.sampled]])
        return scores, hidden.index_select(0, sampled)

    def _sample(self, forward: Forward, rows: Tensor) -> SampleResult:
        """Sample, and give the tokens to the first stage. Only the sampler's rank gets the true result."""
        slots = [forward.slots[i] for i in forward.sampled]
        if not slots:
            return self._none_chosen(0)
        self._await(HEAD)
        step = self._logit_rows
        parts = [slice(start, start + step) for start in range(0, len(slots), step)]
        result = SampleResult.joined([self._sample_rows(slots[part], rows[part]) for part in parts])
        if forward.feedback:
            self._feed_back(slots, result.tokens)
        return result

    def _sample_rows(self, slots: list[int], rows: Tensor) -> SampleResult:
        """Logits of no more rows than memory is set aside for, and what is chosen from them."""
        local = self._decoder.logits(rows)
        if self._particular.isdisjoint(slots):
            tokens = self._choose_greedily(local)
            return self._none_chosen(len(slots)) if tokens is None else SampleResult(tokens, None)
        logits = self._group.gather_logits(local, self._vocab_widths)
        if self._sampler is None:
            return self._none_chosen(len(slots))
        assert logits is not None
        return self._sampler.sample(logits, slots)

    def _none_chosen(self, count: int) -> SampleResult:
        """What ranks have that do not sample: room for the tokens of the one that does."""
        return SampleResult(torch.empty(count, dtype=torch.int64, device=self._device.torch), None)

    def _choose_greedily(self, local: Tensor) -> Tensor | None:
        """The most likely tokens: each rank looks through its own logits, and only the best are compared."""
        best = self._operators.argmax(local)
        scores = local.gather(1, best[:, None])[:, 0]
        return self._group.gather_best(scores, best + self.view.vocab.start)

    def _feed_back(self, slots: list[int], tokens: Tensor) -> None:
        """Give the sampled tokens to the first stage: this rank's own group, or ranks at the far end."""
        if self.view.first_stage:
            self._slots.set_latest(slots, self._group.broadcast_tokens(tokens))
        elif self._sampler is not None:
            self._links.send_tokens(tokens)

    def _expect_tokens(self, forward: Forward) -> None:
        if self.view.first_stage and forward.feedback and forward.sampled:
            self._expected.append(forward)

    def _receive_tokens(self, until: int | None) -> None:
        while self._expected and (until is None or self._expected[0].id <= until):
            forward = self._expected.popleft()
            tokens = self._links.receive_tokens(len(forward.sampled))
            self._slots.set_latest([forward.slots[i] for i in forward.sampled], tokens)


def _report(forward: int, tokens: Tensor, logprobs: Logprobs | None, preparing: float) -> ForwardDone:
    """Of a micro-batch whose results have come to the host; `preparing` seconds went to its inputs."""
    started = time.perf_counter()
    chosen = [] if logprobs is None else logprobs.listed()
    return ForwardDone(forward, tokens.tolist(), chosen, preparing + time.perf_counter() - started)
