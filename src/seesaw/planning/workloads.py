"""Workloads for the planner: prompt and output lengths of the requests of a job, and their arrivals if any.

Named ones draw from histograms of published traces (`data/*.json`, made by `benchmarks/make_histograms.py`; where
each comes from stands in the file and in `docs/workloads.md`).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np

from seesaw.core.errors import ConfigError
from seesaw.planning.workload_files import Floats, Ints, Lengths, read_csv, read_jsonl

NAMED_WORKLOADS = ("sharegpt", "arxiv", "azure-code", "azure-conv", "lmsys", "mooncake")
DEFAULT_REQUESTS = 1000
"""Of a workload that is not a file."""

_UNIFORM = re.compile(r"in\s*=\s*([0-9]{1,9})\s*,\s*out\s*=\s*([0-9]{1,9})", re.IGNORECASE)
_READERS = {".csv": read_csv, ".jsonl": read_jsonl}


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests of a job. The arrays have one entry for each, in the order of the job, and cannot be written to.

    Raises `ConfigError` if there are no requests, if the arrays differ in length, or if a length is below 1.
    """

    name: str
    prompt: Ints
    """Tokens of each prompt."""
    output: Ints
    """Tokens that each request generates; for a job file, the most it may generate."""
    arrival_s: Floats | None = None
    """Seconds from the start at which each request arrives, rising; None if all are there from the start."""
    represented: int | None = None
    """Requests of the whole job, where the arrays are an even sample of them; None if they are the whole job."""
    notes: tuple[str, ...] = ()
    """What was assumed or left out."""

    def __post_init__(self) -> None:
        for name, kind in (("prompt", np.int64), ("output", np.int64), ("arrival_s", np.float64)):
            if getattr(self, name) is not None:
                own = np.array(getattr(self, name), dtype=kind)  # a copy, so that nobody else can change it
                own.flags.writeable = False
                object.__setattr__(self, name, own)
        shapes = {array.shape for array in (self.prompt, self.output, self.arrival_s) if array is not None}
        if shapes != {(len(self.prompt),)}:
            raise ConfigError(
                f"workload {self.name}: arrays of the shapes {shapes}; expected one entry a request"
            )
        if len(self.prompt) == 0:
            raise ConfigError(f"workload {self.name} is empty; expected at least one request")
        if min(self.prompt.min(), self.output.min()) < 1:
            raise ConfigError(
                f"workload {self.name}: prompts and outputs must have at least 1 token each, "
                f"the shortest have {self.prompt.min()} and {self.output.min()}"
            )

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def requests(self) -> int:
        """Requests of the whole job."""
        return len(self) if self.represented is None else self.represented

    @property
    def mean_prompt(self) -> float:
        """Mean tokens of a prompt."""
        return float(self.prompt.mean())

    @property
    def mean_output(self) -> float:
        """Mean tokens of an output."""
        return float(self.output.mean())

    @property
    def longest(self) -> int:
        """Most tokens of one request, its output included."""
        return int((self.prompt + self.output).max())

    def percentiles(self, *shares: float) -> tuple[tuple[float, float], ...]:
        """(prompt, output) tokens that so many of 100 requests do not exceed, for each of `shares`."""
        return tuple(
            (float(np.percentile(self.prompt, share)), float(np.percentile(self.output, share)))
            for share in shares
        )

    def within(self, tokens: int) -> Workload:
        """The requests of at most `tokens` tokens, output included: those that a model of this context serves.

        Raises `ConfigError` if there is none.
        """
        fits = self.prompt + self.output <= tokens
        left_out = len(self) - int(fits.sum())
        if not left_out:
            return self
        if left_out == len(self):
            raise ConfigError(
                f"workload {self.name}: no request fits {tokens:,} tokens, "
                f"the shortest has {int((self.prompt + self.output).min()):,}"
            )
        represented = self.represented and round(self.represented * int(fits.sum()) / len(self))
        note = f"{left_out:,} of {len(self):,} left out that exceed {tokens:,} tokens"
        return replace(
            self,
            prompt=self.prompt[fits],
            output=self.output[fits],
            arrival_s=None if self.arrival_s is None else self.arrival_s[fits],
            represented=represented,
            notes=(*self.notes, note),
        )

    def describe(self) -> str:
        """Requests and tokens in a sentence."""
        text = f"{self.name}: {self.requests:,} request{'s' * (self.requests != 1)}"
        if np.ptp(self.prompt) == np.ptp(self.output) == 0:
            text += f" of {self.mean_prompt:,.0f} tokens in, {self.mean_output:,.0f} out"
        else:
            (half_in, half_out), (most_in, most_out) = self.percentiles(50, 99)
            text += (
                f" of {self.mean_prompt:,.0f} tokens in and {self.mean_output:,.0f} out on average "
                f"(median {half_in:,.0f} and {half_out:,.0f}, 99th percentile {most_in:,.0f} and {most_out:,.0f})"
            )
        if self.arrival_s is not None:
            text += f", arriving over {self.arrival_s[-1] - self.arrival_s[0]:,.0f} s"
        return "; ".join((text, *self.notes))


def workload(text: str | Path, requests: int | None = None, seed: int = 0) -> Workload:
    """The workload that `text` names: one of `NAMED_WORKLOADS`, `in=3000,out=200`, or a `.csv` or `.jsonl` file.

    Named ones are drawn from the histogram of a published trace: the same `requests` and `seed` give the same
    lengths. Draws are stratified: each bin gets its share of the requests to within one, the seed places them in
    their bins (uniformly) and orders them. So a few hundred requests have nearly the trace's means, as far as
    its tail allows. Files are described at `read_csv` (traces, with arrivals if they have them; a malformed line
    is an error) and `read_jsonl` (job files, with lengths estimated; a malformed line is left out and noted).

    `requests` is how many: 1,000 if not given, and all of a file. Of a file the first ones are taken; if it has
    fewer, it is repeated, a trace with arrivals at its own rate. Raises `ConfigError`.
    """
    if requests is not None and requests < 1:
        raise ConfigError(f"requests={requests}: expected at least 1")
    cleaned = str(text).strip()
    if cleaned.lower() in NAMED_WORKLOADS:
        return _named(cleaned.lower(), requests or DEFAULT_REQUESTS, seed)
    uniform = _UNIFORM.fullmatch(cleaned)
    if uniform:
        prompt, output = (int(group) for group in uniform.groups())
        ones = np.ones(requests or DEFAULT_REQUESTS, dtype=np.int64)
        return Workload(f"in={prompt},out={output}", prompt * ones, output * ones)
    path = Path(cleaned)
    if path.suffix.lower() in _READERS:
        return _resized(path.name, _READERS[path.suffix.lower()](path, requests), requests)
    raise _unknown(cleaned, path)


def _resized(name: str, lengths: Lengths, requests: int | None) -> Workload:
    have = len(lengths.prompt)
    if lengths.represented != have:
        represented = lengths.represented if requests is None else requests
        return Workload(name, lengths.prompt, lengths.output, None, represented, lengths.notes)
    take = np.arange(have if requests is None else requests)
    rounds, index = take // have, take % have
    arrival = lengths.arrival_s
    if arrival is not None:
        gap = (arrival[-1] - arrival[0]) / max(have - 1, 1)
        arrival = arrival[index] + rounds * (arrival[-1] - arrival[0] + gap)
    notes = lengths.notes
    if len(take) > have:
        notes = (*notes, f"the file's {have:,} requests, repeated")
    return Workload(name, lengths.prompt[index], lengths.output[index], arrival, None, notes)


def _unknown(text: str, path: Path) -> ConfigError:
    forms = f"{', '.join(NAMED_WORKLOADS)}, in=3000,out=200, or a .csv or .jsonl file"
    if os.path.exists(path):
        return ConfigError(f"workload {text!r}: neither a .csv nor a .jsonl file; expected {forms}")
    near = difflib.get_close_matches(text.lower(), NAMED_WORKLOADS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(f"workload {text!r} is unknown; {hint}expected {forms}")


# ---- histograms ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Histogram:
    """Cells of a two-dimensional histogram that are not empty, neighbours next to each other.

    Cell i holds `counts[i]` requests with `prompt_from[i] <= prompt < prompt_to[i]`, and so the output.
    """

    counts: Ints
    prompt_from: Ints
    prompt_to: Ints
    output_from: Ints
    output_to: Ints
    longest: int
    """Most tokens of one request of the trace in all."""


@lru_cache(maxsize=len(NAMED_WORKLOADS))
def _histogram(name: str) -> _Histogram:
    text = (files("seesaw.planning") / "data" / f"{name}.json").read_text(encoding="utf-8")
    stored = json.loads(text)
    cells: list[tuple[int, int, int]] = []
    for row, flat in enumerate(stored["cells"]):
        line = [(row, column, count) for column, count in zip(flat[::2], flat[1::2], strict=True)]
        cells += line if row % 2 == 0 else line[::-1]
    rows, columns, counts = np.array(cells, dtype=np.int64).T
    prompt = np.array(stored["prompt_edges"], dtype=np.int64)
    output = np.array(stored["output_edges"], dtype=np.int64)
    return _Histogram(
        counts, prompt[rows], prompt[rows + 1], output[columns], output[columns + 1], stored["longest"]
    )


def _named(name: str, requests: int, seed: int) -> Workload:
    histogram = _histogram(name)
    ends = np.cumsum(histogram.counts)
    # The middles of equal shares of the trace, not random points: with tails this heavy (one ShareGPT prompt has
    # 241,402 tokens, the mean is 299) random points would move the mean by several per cent from seed to seed.
    points = (np.arange(requests) + 0.5) * (int(ends[-1]) / requests)
    cell = np.searchsorted(ends, points, side="right")
    rng = np.random.default_rng(seed)
    prompt = rng.integers(histogram.prompt_from[cell], histogram.prompt_to[cell])
    output = rng.integers(histogram.output_from[cell], histogram.output_to[cell])
    # The corner of a cell may lie beyond the longest request, where the trace was cut off at a context length.
    output = np.minimum(output, np.maximum(histogram.longest - prompt, 1))
    order = rng.permutation(requests)
    return Workload(name, prompt[order], output[order])
