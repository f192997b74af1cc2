"""The decoder against transformers, whole and sharded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seesaw.core.layout import Layout
from seesaw.core.model_spec import ModelSpec
from seesaw.models.decoder import Decoder
from seesaw.models.hf_config import load_spec
from seesaw.ops.base import Operators
from seesaw.ops.torch_ops import TorchOperators
from seesaw.weights.sharding import device_tensors, make_sharding, rank_view
from tests.checkpoints import FAMILIES, make_checkpoint, reference_model
from tests.models.shards import DenseAttend, ThreadSum, run_logits, sliced, views

_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral-no-window": (
        "mistral",
        {"sliding_window": None, "num_attention_heads": 9, "num_key_value_heads": 9},
    ),
    "qwen2-yarn": ("qwen2", {"rope_parameters": _YARN}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3-biases": (
        "qwen3",
        {"attention_bias": True, "rope_parameters": {**_YARN, "attention_factor": 0.7}},
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class _Case:
    """A checkpoint, what we make of its config, and sequences with transformers' logits for them."""

    def __init__(self, directory: Path, variant: str) -> None:
        family, overrides = _VARIANTS[variant]
        self.path = make_checkpoint(directory, family, seed=3, **overrides)
        self.spec: ModelSpec = load_spec(self.path)
        self.state = reference_model(self.path).state_dict()
        generator = torch.Generator().manual_seed(1)
        self.sequences = [
            torch.randint(self.spec.vocab, (length,), generator=generator).tolist() for length in (90, 1, 17)
        ]
        self.expected = self.reference(torch.float32)
        best = self.expected.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 3e-4, "a near tie would make argmax a matter of rounding"

    def reference(self, dtype: torch.dtype) -> Tensor:
        model = reference_model(self.path, dtype)
        with torch.inference_mode():
            return torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in self.sequences])


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Case:
    return _Case(tmp_path_factory.mktemp("checkpoint"), request.param)


every_variant = pytest.mark.parametrize("case", list(_VARIANTS), indirect=True)


def _assert_same(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


@every_variant
def test_logits_equal_those_of_transformers(case: _Case) -> None:
    _assert_same(run_logits(case.spec, case.state, case.sequences), case.expected)


@every_variant
@pytest.mark.parametrize("layout", ["T2", "P2T3", "P2T4"])
def test_sharded_logits_equal_those_of_transformers(case: _Case, layout: str) -> None:
    parsed = Layout.parse(layout)
    stages = (range(0, 3), range(3, 5)) if parsed.pp == 2 else (range(5),)
    if layout == "P2T4":
        stages = (range(0, 1), range(1, 5))
    _assert_same(run_logits(case.spec, case.state, case.sequences, parsed, stages), case.expected)


@every_variant
@pytest.mark.parametrize(
    ("layout", "ends", "carried"),
    [("P2", (3, 5), (0, 1)), ("P2T3", (4, 5), (0, 40)), ("P4", (1, 2, 4, 5), (0, 11, 47, 0))],
)
def test_stages_that_share_an_ffn_make_the_same_logits(
    case: _Case, layout: str, ends: tuple[int, ...], carried: tuple[int, ...]
) -> None:
    """Also where a stage has one layer, and a part of the FFN before and of its own."""
    stages = tuple(map(range, (0, *ends), ends))
    rows = torch.tensor([3, 89, 90, 106])
    for sampled in (None, rows):
        logits = run_logits(
            case.spec, case.state, case.sequences, Layout.parse(layout), stages, sampled, carried
        )
        _assert_same(logits, case.expected if sampled is None else case.expected[sampled])


@every_variant
@pytest.mark.parametrize("layout", ["T1", "P2T3"])
@pytest.mark.parametrize("rows", [[3, 89, 90, 106], []], ids=["some", "none"])
def test_the_last_layer_computes_sampled_rows_only(case: _Case, layout: str, rows: list[int]) -> None:
    parsed = Layout.parse(layout)
    stages = (range(0, 3), range(3, 5)) if parsed.pp == 2 else (range(5),)
    sampled = torch.tensor(rows, dtype=torch.int64)
    logits = run_logits(case.spec, case.state, case.sequences, parsed, stages, sampled)
    _assert_same(logits, case.expected[sampled])


@every_variant
@pytest.mark.parametrize(("layout", "carried"), [("T1", ()), ("P2T3", ()), ("P2T3", (0, 13))])
def test_decoder_takes_what_sharding_provides(case: _Case, layout: str, carried: tuple[int, ...]) -> None:
    """Names and shapes of the device tensors are those of the weights cut by hand."""
    sharding = make_sharding(case.spec, Layout.parse(layout), carried=carried)
    for rank in range(sharding.layout.world):
        weights = sliced(case.spec, rank_view(case.spec, sharding, rank), case.state)
        provided = {tensor.name: tensor.shape for tensor in device_tensors(case.spec, sharding, rank)}
        assert provided == {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3-biases"], indirect=True)
@pytest.mark.parametrize("layout", ["T1", "T3"])
def test_bfloat16_stays_near_float32(case: _Case, layout: str) -> None:
    """Log-probabilities are about as far from float32 as those transformers computes in bfloat16."""
    state = {name: tensor.bfloat16() for name, tensor in case.state.items()}
    logits = run_logits(case.spec, state, case.sequences, Layout.parse(layout))
    assert logits.dtype == torch.bfloat16
    exact = case.expected.log_softmax(-1)
    ours = (logits.float().log_softmax(-1) - exact).square().mean().sqrt()
    theirs = (case.reference(torch.bfloat16).float().log_softmax(-1) - exact).square().mean().sqrt()
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_decoder_reads_weights_without_copying_them(case: _Case) -> None:
    """Weights may be filled in after construction, as a re-shard does."""
    view = views(case.spec, Layout(), (range(5),))[0][0]
    final = sliced(case.spec, view, case.state)
    weights = {name: torch.zeros_like(tensor) for name, tensor in final.items()}
    decoder = Decoder(case.spec, view, weights, ThreadSum(1).of(0), TorchOperators())
    for name, tensor in final.items():
        weights[name].copy_(tensor)
    tokens = case.sequences[0]
    hidden = decoder.embed(torch.tensor(tokens))
    out = decoder.layers(hidden, torch.arange(len(tokens)), DenseAttend(case.spec, view, [len(tokens)]))
    _assert_same(decoder.logits(out), case.expected[: len(tokens)])
    _assert_same(decoder.logits(out[-1:]), case.expected[len(tokens) - 1 : len(tokens)])


@pytest.mark.parametrize("case", ["mistral"], indirect=True)
def test_layers_go_by_their_global_numbers(case: _Case) -> None:
    view = views(case.spec, Layout.parse("P2"), (range(2), range(2, 5)))[1][0]
    decoder = Decoder(
        case.spec, view, sliced(case.spec, view, case.state), ThreadSum(1).of(0), TorchOperators()
    )
    events: list[tuple[str, int]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, *, sampled: bool = False) -> Tensor:
        events.append(("attend", layer))
        return torch.zeros(len(q), q.shape[1] * q.shape[2])

    decoder.layers(
        torch.ones(2, 72),
        torch.tensor([0, 7]),
        attend,
        after_attention=lambda layer: events.append(("after", layer)),
    )
    assert events == [(what, layer) for layer in (2, 3, 4) for what in ("attend", "after")]


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_all_reduce_runs_only_between_several_ranks(case: _Case) -> None:
    """Per pass: once for the embedding, twice per layer, never for the head; and not at all for one rank."""

    class Counting:
        calls = 0

        def all_reduce(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

        def linear(self, operators: Operators, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.all_reduce(operators.linear(x, weight, bias))

    for layout, expected in (("T1", 0), ("T2", 1 + 2 * 5)):
        counting = Counting()
        view = views(case.spec, Layout.parse(layout), (range(5),))[0][0]
        decoder = Decoder(case.spec, view, sliced(case.spec, view, case.state), counting, TorchOperators())
        out = decoder.layers(
            decoder.embed(torch.tensor([3])), torch.tensor([0]), DenseAttend(case.spec, view, [1])
        )
        decoder.logits(out)
        assert counting.calls == expected


@pytest.mark.parametrize("case", ["qwen2"], indirect=True)
def test_misshapen_weights_are_caught_at_construction(case: _Case) -> None:
    view = views(case.spec, Layout.parse("T2"), (range(5),))[0][0]
    weights = sliced(case.spec, view, case.state)
    weights["layers.1.qkv.weight"] = weights["layers.1.qkv.weight"][:-1]
    with pytest.raises(AssertionError):
        Decoder(case.spec, view, weights, SimpleNamespace(all_reduce=lambda x: x), TorchOperators())
