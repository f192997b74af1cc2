"""The decoder: one definition for every family, computing the part of the model that one rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from seesaw.models.rope import Rotation, rotation
from seesaw.ops.base import HeadNorms

if TYPE_CHECKING:
    from seesaw.core.model_spec import ModelSpec
    from seesaw.ops.base import Operators
    from seesaw.weights.sharding import RankView


class TensorParallel(Protocol):
    """The ranks that share the layers of this stage."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the tensor-parallel ranks; the result may be `x` itself, changed in place."""
        ...

    def linear(self, operators: Operators, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`operators.linear` of each rank, summed over them."""
        ...


class Attend(Protocol):
    """Causal attention of one layer over what the sequences of a batch hold so far and the new tokens.

    `layer` is the global layer number. `q` is `[N, q_local, head_dim]`, `k` and `v` are
    `[N, kv_local, head_dim]`, q and k after rotary embedding; heads and channels are contiguous, rows may be
    strided. Returns `[N, q_local * head_dim]`, contiguous. The scale is `head_dim ** -0.5`, the window
    `spec.window(layer)`. With `sampled`, `q` and the result have only the rows at which a token is sampled.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sampled: bool = False) -> Tensor: ...


class _Layer(NamedTuple):
    """The tensors of one layer; the names are those of the device tensors."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    ffn: _FeedForward

    def head_norms(self, q_heads: int, eps: float) -> HeadNorms | None:
        """The norms of heads of which the first `q_heads` are queries, the others keys."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm, self.k_norm, q_heads, eps)


class _FeedForward(NamedTuple):
    """The tensors of a layer's FFN, or of some columns of it."""

    norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Decoder:
    """One rank's part of the model: its stage's layers, and of each its heads, FFN columns, vocabulary rows.

    Where two stages share a layer's FFN (`weights.sharding.Sharding.carried`), what passes between them is
    `[2, N, hidden]`: the hidden states that the FFN is added to, and the sum over the columns of the first of them.

    `weights` maps device tensor names (global layer numbers) to tensors, which the decoder reads but neither
    copies nor owns: their contents may be filled in later, and after a re-shard one makes a new `Decoder`,
    which costs no more than looking the names up. All weights have one type, and hidden states have it too;
    norms and rotary angles are computed in float32. Methods run in inference mode, and so must code that
    changes their results in place.
    """

    def __init__(
        self,
        spec: ModelSpec,
        view: RankView,
        weights: Mapping[str, Tensor],
        parallel: TensorParallel,
        operators: Operators,
    ) -> None:
        self._spec = spec
        self._view = view
        self._ops = operators
        self._parallel = parallel if len(view.tp_ranks) > 1 else None
        self._q_heads, self._kv_heads = len(view.q_heads), len(view.kv_heads)
        self._layers = [(layer, self._layer(weights, layer)) for layer in view.layers]
        self._carried = self._carried_ffn(weights)
        self._embedding = weights["embed.weight"] if view.first_stage else None
        self._norm = weights["norm.weight"] if view.last_stage else None
        self._head: Tensor | None = None
        if view.last_stage:
            # tied embeddings: a rank that is first and last stage at once holds the matrix once
            self._head = weights["head.weight" if "head.weight" in weights else "embed.weight"]

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings `[N, hidden]` of token ids `[N]` (int64), whole on every rank. First stage only."""
        assert self._embedding is not None, "embed is for the first stage"
        with torch.inference_mode():
            if self._parallel is None:
                return embedding(tokens, self._embedding)
            local = tokens - self._view.vocab.start
            elsewhere = (local < 0) | (local >= len(self._view.vocab))
            rows = embedding(local.masked_fill_(elsewhere, 0), self._embedding)
            return self._parallel.all_reduce(rows.masked_fill_(elsewhere[:, None], 0))

    def layers(
        self,
        hidden: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        before_layer: Callable[[int], None] | None = None,
        after_attention: Callable[[int], None] | None = None,
        sampled_rows: Tensor | None = None,
    ) -> Tensor:
        """Run this stage's layers.

        `hidden` is `[N, hidden]` and is changed in place; the result is whole on every rank. Either is
        `[2, N, hidden]` where the FFN of a layer is shared with the stage before or behind. `positions` (`[N]`,
        int64) counts tokens from the start of each sequence. `before_layer(layer)` is called with the global number
        of each layer before its first operator, `after_attention(layer)` once its K and V are in the pool.

        With `sampled_rows` (`[M]`, int64) the result has these rows only, `[M, hidden]`, on the last stage: of
        the model's last layer all tokens need K and V, but only they need the rest. Other stages ignore it.
        """
        with torch.inference_mode():
            turn, delta = self.turn(positions), None
            if self._carried is not None:
                if before_layer is not None:
                    before_layer(self._view.layers.start - 1)
                hidden, delta = hidden[0], hidden[1]
                delta.add_(self._mlp(self._carried, self._add_norm(hidden, None, self._carried.norm)))
            hidden, delta = self._through(
                hidden, delta, turn, attend, before_layer, after_attention, sampled_rows
            )
            if delta is None:
                return hidden
            return hidden.add_(delta) if self._view.last_ffn is None else torch.stack((hidden, delta))

    def turn(self, positions: Tensor) -> Rotation:
        """The angles of tokens at `positions` (`[N]`, int64)."""
        return rotation(self._spec.rope, self._spec.head_dim, positions)

    @property
    def whole(self) -> bool:
        """Whether none of its layers is shared with another stage."""
        return self._carried is None and self._view.last_ffn is None

    def operations(
        self, operators: Operators, parallel: TensorParallel, hidden: Tensor, turn: Rotation, attend: Attend
    ) -> Tensor:
        """What `layers` does for a stage that is `whole`, but by other operators: those that record, over stand-ins
        for `hidden` and `turn`. The result is what is left to be added to `hidden`, `[N, hidden]`."""
        assert self.whole
        recorded = copy(self)
        recorded._ops = operators
        recorded._parallel = None if self._parallel is None else parallel
        _, delta = recorded._through(hidden, None, turn, attend)
        assert delta is not None
        return delta

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[M, vocab_local]` of the rows `[M, hidden]` at which a token is sampled. Last stage only.

        Column j is token `view.vocab[j]`. The type is that of the weights.
        """
        assert self._norm is not None and self._head is not None, "logits is for the last stage"
        with torch.inference_mode():
            return self._ops.linear(self._add_norm(hidden, None, self._norm), self._head)

    def _through(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        turn: Rotation,
        attend: Attend,
        before_layer: Callable[[int], None] | None = None,
        after_attention: Callable[[int], None] | None = None,
        sampled_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The layers, and behind them hidden states and what is still to be added to them, if anything.

        What is done to `hidden` and `delta`, to be added to it first, is seen by the caller."""
        for number, layer in self._layers:
            if before_layer is not None:
                before_layer(number)
            rows = sampled_rows if number == self._spec.layers - 1 else None
            normed = self._add_norm(hidden, delta, layer.input_norm)
            mixed = self._attention(number, layer, normed, turn, attend, rows)
            if after_attention is not None:
                after_attention(number)
            if rows is not None:
                hidden = hidden.index_select(0, rows)
                if not len(rows):
                    return hidden, None
            attended = self._summed(mixed, layer.o, layer.o_bias)
            delta = self._mlp(layer.ffn, self._add_norm(hidden, attended, layer.ffn.norm))
        return hidden, delta

    def _layer(self, weights: Mapping[str, Tensor], number: int) -> _Layer:
        def tensor(name: str) -> Tensor:
            return weights[f"layers.{number}.{name}"]

        spec, first = self._spec, self._view.coordinate.tp == 0
        # the ranks' products are summed, so only one of them may add the bias of a row-parallel matrix
        layer = _Layer(
            input_norm=tensor("input_norm.weight"),
            qkv=tensor("qkv.weight"),
            qkv_bias=tensor("qkv.bias") if spec.qkv_bias else None,
            q_norm=tensor("q_norm.weight") if spec.qk_norm else None,
            k_norm=tensor("k_norm.weight") if spec.qk_norm else None,
            o=tensor("o.weight"),
            o_bias=tensor("o.bias") if spec.output_bias and first else None,
            ffn=self._feed_forward(weights, number, biased=spec.mlp_bias and first),
        )
        assert layer.qkv.shape[0] == (self._q_heads + 2 * self._kv_heads) * spec.head_dim, layer.qkv.shape
        last = self._view.last_ffn if number == self._view.layers[-1] else None
        width = len(self._view.ffn if last is None else last)
        assert layer.ffn.gate_up.shape[0] == 2 * layer.ffn.down.shape[1] == 2 * width, layer.ffn.gate_up.shape
        return layer

    def _feed_forward(self, weights: Mapping[str, Tensor], number: int, *, biased: bool) -> _FeedForward:
        """With the bias of its result if it is `biased`."""
        layer = f"layers.{number}."
        return _FeedForward(
            norm=weights[layer + "post_norm.weight"],
            gate_up=weights[layer + "gate_up.weight"],
            gate_up_bias=weights[layer + "gate_up.bias"] if self._spec.mlp_bias else None,
            down=weights[layer + "down.weight"],
            down_bias=weights[layer + "down.bias"] if biased else None,
        )

    def _carried_ffn(self, weights: Mapping[str, Tensor]) -> _FeedForward | None:
        """Columns of the FFN of the layer before the stage's first, whose other columns the stage before has."""
        if not self._view.carried:
            return None
        return self._feed_forward(weights, self._view.layers.start - 1, biased=False)

    def _add_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """Add `delta` to `hidden` in place, and return the norm of the sum."""
        if delta is None:
            return self._ops.rms_norm(hidden, weight, self._spec.rms_eps)
        return self._ops.add_rms_norm(hidden, delta, weight, self._spec.rms_eps)

    def _summed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product with a matrix of which each rank has some rows of the inputs, summed over the ranks."""
        if self._parallel is None:
            return self._ops.linear(x, weight, bias)
        return self._parallel.linear(self._ops, x, weight, bias)

    def _attention(
        self,
        number: int,
        layer: _Layer,
        normed: Tensor,
        turn: Rotation,
        attend: Attend,
        rows: Tensor | None,
    ) -> Tensor:
        if rows is not None:
            return self._sampled_attention(number, layer, normed, turn, attend, rows)
        heads = self._heads(self._ops.linear(normed, layer.qkv, layer.qkv_bias))
        turning = self._q_heads + self._kv_heads
        qk, v = heads[:, :turning], heads[:, turning:]
        qk = self._ops.rotate(qk, turn.cos, turn.sin, layer.head_norms(self._q_heads, self._spec.rms_eps))
        return attend(number, qk[:, : self._q_heads], qk[:, self._q_heads :], v)

    def _sampled_attention(
        self, number: int, layer: _Layer, normed: Tensor, turn: Rotation, attend: Attend, rows: Tensor
    ) -> Tensor:
        """Attention of the last layer: keys and values of all tokens, queries of the sampled ones."""
        split, ops, eps = self._q_heads * self._spec.head_dim, self._ops, self._spec.rms_eps
        q_bias, kv_bias = (None, None) if layer.qkv_bias is None else layer.qkv_bias.tensor_split((split,))
        q = self._heads(ops.linear(normed.index_select(0, rows), layer.qkv[:split], q_bias))
        kv = self._heads(ops.linear(normed, layer.qkv[split:], kv_bias))
        k, v = kv[:, : self._kv_heads], kv[:, self._kv_heads :]
        cos, sin = turn.cos.index_select(0, rows), turn.sin.index_select(0, rows)
        q = ops.rotate(q, cos, sin, layer.head_norms(self._q_heads, eps))
        k = ops.rotate(k, turn.cos, turn.sin, layer.head_norms(0, eps))
        return attend(number, q, k, v, sampled=True)

    def _heads(self, packed: Tensor) -> Tensor:
        head_dim = self._spec.head_dim
        return packed.view(len(packed), packed.shape[1] // head_dim, head_dim)

    def _mlp(self, ffn: _FeedForward, normed: Tensor) -> Tensor:
        mixed = self._ops.silu_mul(self._ops.linear(normed, ffn.gate_up, ffn.gate_up_bias))
        return self._summed(mixed, ffn.down, ffn.down_bias)
