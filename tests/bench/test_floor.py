"""Floors against figures computed by hand."""

from __future__ import annotations

import dataclasses

import pytest

from seesaw.bench.floor import Rates, decode_floor, decode_steps, floor_of, layer_products, prefill_floor
from seesaw.core.model_spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    family="llama",
    layers=2,
    hidden=8,
    heads=4,
    kv_heads=2,
    head_dim=2,
    ffn=16,
    vocab=100,
    max_position=64,
    rms_eps=1e-5,
    rope=RopeSpec(),
)
LAYER = 8 * 16 + 8 * 8 + 8 * 32 + 16 * 8
"""Elements of one layer: QKV (8 heads of 2), output, gate and up, down."""
HEAD = 800
FAST_MEMORY = Rates(flops=1000.0, bandwidth=1e12)
FAST_CORES = Rates(flops=1e12, bandwidth=1000.0)


def test_products_of_a_layer() -> None:
    assert layer_products(SPEC) == [(8, 16), (8, 8), (8, 32), (16, 8)]
    assert sum(k * n for k, n in layer_products(SPEC)) == LAYER


def test_prefill_is_its_arithmetic() -> None:
    work = prefill_floor(SPEC, "bfloat16", [3, 5], 2048, FAST_MEMORY)
    pairs = 3 * 4 // 2 + 5 * 6 // 2
    flops = 2 * (2 * 8 * LAYER + 4 * 4 * 2 * pairs) + 2 * 2 * HEAD
    assert work.flops == flops
    assert work.seconds == pytest.approx(flops / 1000)
    assert work.bytes == 2 * (2 * LAYER + HEAD)


def test_prefill_reads_weights_once_per_batch() -> None:
    work = prefill_floor(SPEC, "float32", [3, 5], 4, FAST_CORES)
    assert work.bytes == 2 * 4 * (2 * LAYER + HEAD)
    assert work.seconds == pytest.approx(work.bytes / 1000)


def test_a_window_limits_what_prefill_sees() -> None:
    windowed = dataclasses.replace(SPEC, sliding_window=(2, None))
    work = prefill_floor(windowed, "bfloat16", [5], 2048, FAST_MEMORY)
    full = prefill_floor(SPEC, "bfloat16", [5], 2048, FAST_MEMORY)
    # each token of the windowed layer sees two, the first one: 9 pairs, not 15
    assert full.flops - work.flops == 4 * 4 * 2 * (15 - 9)


def test_each_decode_step_reads_weights_and_kv_once() -> None:
    work = decode_floor(SPEC, "bfloat16", decode_steps([(3, 3), (5, 2)]), FAST_CORES)
    keys = (4 + 6) + 5  # two sequences in the first step, the longer answer alone in the second
    assert work.bytes == 2 * 2 * (2 * LAYER + HEAD) + 2 * 2 * 2 * 2 * 2 * keys
    assert work.flops == 3 * 2 * (2 * LAYER + HEAD) + 2 * 4 * 4 * 2 * keys
    assert work.seconds == pytest.approx(work.bytes / 1000)


def test_operators_are_bound_one_by_one() -> None:
    # at these rates a product of 3 rows is bound by arithmetic (6 flops per 2 bytes), attention by memory
    rates = Rates(flops=2500.0, bandwidth=1000.0)
    work = decode_floor(SPEC, "bfloat16", decode_steps([(3, 2)] * 3), rates)
    products = 3 * 2 * (2 * LAYER + HEAD) / 2500
    keys = 3 * 4
    attention = 2 * max(4 * 4 * 2 * keys / 2500, 2 * 2 * 2 * 2 * keys / 1000)
    assert work.seconds == pytest.approx(products + attention)
    assert attention == pytest.approx(2 * 2 * 2 * 2 * 2 * keys / 1000)


def test_steps_without_limits() -> None:
    steps = list(decode_steps([(10, 4), (20, 2), (30, 1)]))
    assert steps == [(2, [11, 21]), (1, [12]), (1, [13])]


def test_steps_within_limits() -> None:
    assert list(decode_steps([(1, 2)] * 3, max_running=1)) == [(1, [2])] * 3
    by_capacity = list(decode_steps([(6, 3), (6, 3), (2, 2)], capacity=10))
    assert by_capacity == [(1, [7]), (1, [8]), (1, [7]), (1, [8]), (1, [3])]
    refilled = list(decode_steps([(1, 3), (1, 2), (1, 3)], capacity=7))
    assert refilled == [(2, [2, 2]), (1, [3]), (1, [2]), (1, [3])]
    assert list(decode_steps([(50, 2)], capacity=1)) == [(1, [51])]  # one always runs


def test_refilling_is_at_once() -> None:
    steps = list(decode_steps([(1, 3), (1, 2), (1, 3)], max_running=2))
    assert steps == [(2, [2, 2]), (2, [3, 2]), (1, [3])]


def test_floor_of_a_workload() -> None:
    floor = floor_of(SPEC, "bfloat16", [(3, 3), (5, 2)], FAST_MEMORY)
    assert floor.decode_steps == 2
    assert floor.mean_batch == 1.5
    assert floor.seconds == floor.prefill.seconds + floor.decode.seconds
    assert floor.phase("prefill") == floor.prefill
    assert floor.phase("decode") == floor.decode
    assert floor.phase("mixed").seconds == floor.seconds
    nothing_to_decode = floor_of(SPEC, "bfloat16", [(3, 1)], FAST_MEMORY)
    assert nothing_to_decode.decode.seconds == 0
    assert nothing_to_decode.mean_batch == 0
