"""Sequences of all kinds, and devices on which a sampler may not ask for what it has computed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from seesaw.core.actions import SamplingState
from seesaw.device.base import Array
from seesaw.device.cpu import CpuDevice

PLAIN: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "noise_key": 0,
    "logprobs": -1,
    "min_tokens": 0,
    "stop_token_ids": [],
    "generated": 0,
    "prompt": [],
    "output": [],
}


def state(**changes: Any) -> SamplingState:
    """A sequence drawn from the model's own distribution, but for `changes`."""
    return SamplingState(**{**PLAIN, **changes})


def any_state(chance: random.Random, vocab: int) -> SamplingState | None:
    """A sequence with any parameters; histories end within pages and at their borders."""
    one = chance.choice
    if chance.random() < 0.1:
        return None
    return state(
        temperature=one([0.0, 0.3, 1.0, 1.0, 2.0]),
        top_p=one([1.0, 1.0, 0.9, 0.5, 1e-6]),
        top_k=one([0, 0, 1, 5, 50, vocab // 2, vocab]),
        min_p=one([0.0, 0.0, 0.05, 1.0]),
        repetition_penalty=one([1.0, 1.0, 1.3, 0.7]),
        presence_penalty=one([0.0, 0.0, 0.5, -0.5]),
        frequency_penalty=one([0.0, 0.3]),
        noise_key=chance.getrandbits(64),
        logprobs=one([-1, -1, 0, 3, 20]),
        min_tokens=one([0, 0, 4]),
        stop_token_ids=[chance.randrange(vocab + 3) for _ in range(3)],
        prompt=[chance.randrange(vocab + 5) for _ in range(one([0, 1, 63, 64, 65, 200]))],
    )


class Behind(CpuDevice):
    """A CPU that is treated as a device that runs behind."""

    def __init__(self) -> None:
        super().__init__()
        self.runs_behind = True


class Empty(Behind):
    """A device whose tensors hold nothing (torch's meta device): nobody can ask for what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = torch.device("meta")
        self.uploads = 0

    def upload(self, arrays: Sequence[Array]) -> list[Tensor]:
        """See `Device.upload`."""
        self.uploads += 1
        with _disable_current_modes():  # this is what may come from the host
            return [torch.from_numpy(array).to("meta") for array in arrays]


class _Guard(TorchDispatchMode):
    """Refuses tensors of the host beside those of the device, or on their way there: copies that are waited for.

    Masks as indexes are refused as well: a GPU counts them first.
    """

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        name = str(operator)
        tensors = [one for one in tree_leaves([args, kwargs, out]) if isinstance(one, Tensor)]
        kinds = {one.device.type for one in tensors if one.device.type != "cpu" or one.dim()}
        assert kinds <= {"meta"} and "lift_fresh" not in name, f"{name} takes memory of the host"
        masks = name.startswith(("aten.index.", "aten.index_put")) and any(
            one.dtype == torch.bool for one in tree_leaves(args[1]) if one is not None
        )
        assert not masks, f"{name} takes a mask"
        return out


class _Literals(TorchFunctionMode):
    """Refuses numbers that torch copies to the device without telling a `TorchDispatchMode`."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        assert function not in (torch.tensor, torch.as_tensor), "numbers of the host"
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(one, list) for one in index), "a list as an index"
        return function(*args, **(kwargs or {}))


@contextmanager
def guarded() -> Iterator[None]:
    """Work on an `Empty` device fails here, where on a GPU the host would wait."""
    with torch.no_grad(), _Literals(), _Guard():
        yield
