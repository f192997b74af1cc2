"""What sampling takes beside the logits it is given, against what the memory plan sets aside for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seesaw.core.workspace import HISTORY_BYTES, SAMPLING_BYTES
from seesaw.device.cpu import CpuDevice
from seesaw.execution.sampling import Sampler
from seesaw.execution.sampling.sampler import CHUNK_ELEMENTS
from tests.execution.sampled import Behind, state

ROWS, VOCAB = 64, 1 << 14
ELSEWHERE = 12
"""Bytes of a logit that are not torch's here: the sorted copy is numpy's on CPUs; on other devices sorting makes the
order as well, of 8 bytes each."""


class _Live(TorchDispatchMode):
    """Counts bytes of the tensors that operations make, from when they are made until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._take(tensor.untyped_storage())
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place and place not in self._known:
            self._known.add(place)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._give, place, size)

    def _give(self, place: int, size: int) -> None:
        self.live -= size
        self._known.discard(place)


@pytest.mark.parametrize("device", [CpuDevice, Behind])
@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0.9},
        {"top_k": 50},
        {"min_p": 0.1},
        {},
        {"repetition_penalty": 1.2, "top_p": 0.9, "min_p": 0.05, "logprobs": 20},
        {"temperature": 0.0, "frequency_penalty": 0.5, "logprobs": 20},
    ],
    ids=lambda changes: "+".join(changes) or "all",
)
def test_temporaries_stay_within_what_is_set_aside(
    changes: dict[str, Any], device: Callable[[], CpuDevice]
) -> None:
    sampler = Sampler(VOCAB, None, device())
    for slot in range(ROWS):
        sampler.open(slot, state(**{"prompt": [1, 2, 3], "temperature": 0.8, **changes}))
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    with _Live() as counted:
        sampler.sample(logits, list(range(ROWS)))
    assert ROWS * VOCAB == CHUNK_ELEMENTS, "one chunk, so that all of it is there at once"
    assert 4 * ROWS * VOCAB < counted.peak <= SAMPLING_BYTES - HISTORY_BYTES - ELSEWHERE * CHUNK_ELEMENTS


def test_histories_of_a_million_tokens_fit_with_their_growth() -> None:
    """A thousand sequences of a thousand different tokens, opened one after the other."""
    sampler = Sampler(1 << 12, None, Behind())
    logits = torch.zeros(1, 1 << 12)
    with _Live() as counted:
        for slot in range(1000):
            sampler.open(slot, state(presence_penalty=1.0, temperature=0.0, prompt=list(range(1000))))
            sampler.sample(logits, [slot])
    assert 8 * 1000 * 1000 < counted.peak < HISTORY_BYTES
