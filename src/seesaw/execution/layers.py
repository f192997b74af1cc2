"""A stage's layers over the device pool: what a Forward, a decode graph or a decode program makes of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from seesaw.weights.arrivals import EMBEDDING

if TYPE_CHECKING:
    from seesaw.attention.base import AttentionBackend
    from seesaw.core.model_spec import ModelSpec
    from seesaw.execution.programs import DecodePrograms
    from seesaw.execution.slots import Inputs
    from seesaw.kv.device_pool import DevicePool
    from seesaw.models.decoder import Attend, Decoder


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Attention of a stage's layers over the device pool."""

    backend: AttentionBackend
    pool: DevicePool
    spec: ModelSpec
    first_layer: int
    """The global number of the pool's first layer."""

    def over(self, inputs: Inputs) -> Attend:
        """Attention for one batch."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, *, sampled: bool = False) -> Tensor:
            pool_layer = self.pool.layer(layer - self.first_layer)
            window, scale = self.spec.window(layer), self.spec.head_dim**-0.5
            batch = inputs.sampled_attention if sampled else inputs.attention
            return self.backend.attend(q, k, v, pool_layer, batch, scale=scale, window=window)

        return attend


@dataclass(frozen=True, slots=True)
class StageLayers:
    """`graphs.Layers`: the decoder over the device pool, which is all of a stage that a decode graph refers to."""

    decoder: Decoder
    attention: PagedAttention
    programs: DecodePrograms | None = None
    """For steps of one new token for each sequence, of which nobody is to be told layer by layer."""

    def __call__(
        self,
        inputs: Inputs,
        received: Tensor | None,
        before: Callable[[int], None] | None = None,
        after_attention: Callable[[int], None] | None = None,
    ) -> Tensor:
        """What leaves the stage: hidden states of all tokens, or on the last one of those to be sampled.

        `before` is called with each group of weights before it is read.
        """
        if received is None and before is not None:
            before(EMBEDDING)
        hidden = self.decoder.embed(inputs.tokens) if received is None else received
        if self.programs is not None and before is None and after_attention is None:
            program = self.programs.ready(inputs)
            if program is not None:
                return self.programs.run(program, hidden, inputs)
        return self.decoder.layers(
            hidden,
            inputs.positions,
            self.attention.over(inputs),
            before_layer=before,
            after_attention=after_attention,
            sampled_rows=inputs.sampled_rows,
        )
