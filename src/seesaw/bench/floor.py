"""The least time that a workload can take on ranks of a measured speed. Arithmetic only, no torch.

Each operator takes `max(flops / rate, bytes / bandwidth)`, where rate and bandwidth are sums over the ranks,
measured with all of them busy: as if work were divided evenly, nothing but matrix products and memory reads took
time, and no rank ever waited for another. Operators of one step follow each other. So a floor is a lower bound that
no engine reaches; how near one comes is the share reached.

With M rows, a weight of K × N elements of `b` bytes:

    product     flops = 2 M K N                      bytes = b K N       (activations stay in cache)
    attention   flops = 4 heads head_dim C           bytes = 2 b kv_heads head_dim R

C is the number of (query, key) pairs, R the number of keys read from the cache, both over all sequences of the step.

- Prefill of prompts of n tokens: M = n summed over the prompts, in batches of at most `batch_tokens` tokens, each of
  which reads the weights once; C = n (n + 1) / 2 for each prompt (the causal half; less under a sliding window). Keys
  are in cache. The LM head runs on the last row of each prompt only.
- Decode: every sequence has its first token from prefill, so one of `out` tokens takes `out - 1` steps. A step with B
  running sequences has M = B in all products, the LM head included, and reads weights once; a sequence whose t-th
  step it is has C = R = in + t. Sequences run from the first step on as far as `capacity` (tokens, whole
  sequences) and `max_running` allow, and are replaced at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from seesaw.core.model_spec import DTYPE_BYTES, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What all ranks together do in a second while all are busy."""

    flops: float
    """Of matrix products at the best size and implementation."""
    bandwidth: float
    """Bytes read from memory."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a phase must do at least, and how long that takes."""

    seconds: float
    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.seconds + other.seconds, self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Work(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The floors of both phases of a workload, done one after the other."""

    rates: Rates
    dtype: str
    prefill: Work
    decode: Work
    decode_steps: int
    mean_batch: float
    """Sequences running in a decode step, on average."""

    @property
    def seconds(self) -> float:
        """Of the whole workload."""
        return self.prefill.seconds + self.decode.seconds

    def phase(self, name: str) -> Work:
        """Of `prefill`, `decode`, or anything else: both, since batches of the other kinds mix them."""
        return {"prefill": self.prefill, "decode": self.decode}.get(name, self.prefill + self.decode)


def operator(flops: float, moved: float, rates: Rates) -> Work:
    """One operator, bound by arithmetic or by memory."""
    return Work(max(flops / rates.flops, moved / rates.bandwidth), flops, moved)


def layer_products(spec: ModelSpec) -> list[tuple[int, int]]:
    """(K, N) of the matrix products of one layer: Q, K and V in one; output; gate and up in one; down."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return [
        (spec.hidden, q + 2 * kv),
        (q, spec.hidden),
        (spec.hidden, 2 * spec.ffn),
        (spec.ffn, spec.hidden),
    ]


def products(spec: ModelSpec, rows: int, head_rows: int, reads: int, size: int, rates: Rates) -> Work:
    """All products of a model: `rows` through the layers, `head_rows` through the LM head.

    Weights have `size` bytes per element and are read `reads` times.
    """
    total = NOTHING
    for k, n in layer_products(spec):
        one = operator(2.0 * rows * k * n, float(reads * k * n * size), rates)
        total += Work(spec.layers * one.seconds, spec.layers * one.flops, spec.layers * one.bytes)
    head = spec.hidden * spec.vocab
    return total + operator(2.0 * head_rows * head, float(reads * head * size), rates)


def prefill_floor(
    spec: ModelSpec, dtype: str, prompts: Sequence[int], batch_tokens: int, rates: Rates
) -> Work:
    """Of prompts of these lengths; see above."""
    tokens = sum(prompts)
    batches = -(-tokens // batch_tokens)
    total = products(spec, tokens, len(prompts), batches, DTYPE_BYTES[dtype], rates)
    for layer in range(spec.layers):
        window = spec.window(layer)
        pairs = sum(_causal_pairs(n, window) for n in prompts)
        total += operator(4.0 * spec.heads * spec.head_dim * pairs, 0.0, rates)
    return total


def _causal_pairs(tokens: int, window: int | None) -> int:
    """(query, key) pairs of a prompt where a token sees itself and what lies before it within the window."""
    seen = tokens if window is None else min(window, tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


def decode_floor(spec: ModelSpec, dtype: str, steps: Iterator[tuple[int, list[int]]], rates: Rates) -> Work:
    """Of steps as `decode_steps` yields them."""
    size, total = DTYPE_BYTES[dtype], NOTHING
    windows = [spec.window(layer) for layer in range(spec.layers)]
    for batch, contexts in steps:
        total += products(spec, batch, batch, 1, size, rates)
        for window in set(windows):
            keys = sum(contexts if window is None else (min(c, window) for c in contexts))
            one = operator(
                4.0 * spec.heads * spec.head_dim * keys,
                2.0 * size * spec.kv_heads * spec.head_dim * keys,
                rates,
            )
            count = windows.count(window)
            total += Work(count * one.seconds, count * one.flops, count * one.bytes)
    return total


def decode_steps(
    lengths: Sequence[tuple[int, int]], *, capacity: int | None = None, max_running: int | None = None
) -> Iterator[tuple[int, list[int]]]:
    """(running sequences, keys that each of them reads) of each decode step.

    `lengths` are (prompt tokens, output tokens), in the order in which they are taken up. At least one runs.
    """
    waiting = deque((prompt, output) for prompt, output in lengths if output > 1)
    running: list[tuple[int, int, int]] = []  # prompt, steps done, steps in all
    held = 0
    while waiting or running:
        while waiting and (not running or _fits(waiting[0], held, len(running), capacity, max_running)):
            prompt, output = waiting.popleft()
            running.append((prompt, 0, output - 1))
            held += prompt + output
        yield len(running), [prompt + done + 1 for prompt, done, _ in running]
        running = [(prompt, done + 1, steps) for prompt, done, steps in running]
        held -= sum(prompt + steps + 1 for prompt, done, steps in running if done == steps)
        running = [one for one in running if one[1] < one[2]]


def _fits(
    sequence: tuple[int, int], held: int, running: int, capacity: int | None, max_running: int | None
) -> bool:
    roomy = capacity is None or held + sum(sequence) <= capacity
    return roomy and (max_running is None or running < max_running)


def floor_of(
    spec: ModelSpec,
    dtype: str,
    lengths: Sequence[tuple[int, int]],
    rates: Rates,
    *,
    batch_tokens: int = 2048,
    capacity: int | None = None,
    max_running: int | None = None,
) -> Floor:
    """Both phases of a workload of (prompt tokens, output tokens)."""
    batches = [batch for batch, _ in decode_steps(lengths, capacity=capacity, max_running=max_running)]
    return Floor(
        rates=rates,
        dtype=dtype,
        prefill=prefill_floor(spec, dtype, [prompt for prompt, _ in lengths], batch_tokens, rates),
        decode=decode_floor(
            spec, dtype, decode_steps(lengths, capacity=capacity, max_running=max_running), rates
        ),
        decode_steps=len(batches),
        mean_batch=sum(batches) / len(batches) if batches else 0.0,
    )
