"""A stand-in for CUDA graphs: what torch is told to do while work is captured is written down, and done again later.

As on a GPU, a replay does the same operators on the same memory, whatever Python would do by then. Memory that graphs
allocate belongs to their pool: before a replay it holds garbage, since another graph may have used it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from weakref import WeakSet

    from tests.device.races import FakeCuda, FakeStream, Memory

    Pool = WeakSet["FakeGraph"]

_WAITING = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
"""Operators that wait for the device."""
_ROOM = ("aten::empty", "aten::new_empty")
"""Operators that allocate, and do nothing else."""


_NUMBERS = count()


class FakeGraph:
    """A `torch.cuda.CUDAGraph`. It goes when nobody refers to it any more, as one of CUDA must."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.number = next(_NUMBERS)
        self._cuda = cuda
        self.calls: list[Callable[[], object]] = []
        self.allocated: list[Tensor] = []
        self.pool: Pool | None = None

    def replay(self) -> None:
        """Do everything again."""
        assert self.pool is not None and not self._cuda.capturing()
        self._cuda.replays.append(self.number)
        for graph in self.pool:
            graph.spoil()
        for call in self.calls:
            call()

    def spoil(self) -> None:
        """Leave garbage in the memory that the graph allocated."""
        for tensor in self.allocated:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 99)


class _Mode(TorchDispatchMode):
    """Sees what torch does."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch would import its compiler, for seconds, to shield a mode from it."""
        return False


class _Recording(_Mode):
    """Writes it down."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _WAITING:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing\n({name})")
        held = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        made = [leaf for leaf in _tensors(result) if leaf.untyped_storage().data_ptr() not in held]
        self._graph.allocated += made
        if func._schema.is_mutable:
            self._graph.calls.append(lambda: func(*args, **kwargs))
        elif made and not name.startswith(_ROOM):
            outputs = _tensors(result)

            def again() -> None:
                for output, value in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                    output.copy_(value)

            self._graph.calls.append(again)
        return result


class Watching(_Mode):
    """Tells the clocks of each access of torch to memory that is watched; for one thread."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda
        self._watched: dict[int, tuple[Memory, Tensor]] = {}

    def watch(self, memory: Memory, tensor: Tensor) -> None:
        """From here on, as a whole."""
        self._watched[tensor.untyped_storage().data_ptr()] = memory, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._watched and not self._cuda.capturing():
            self._touch(func, args, kwargs)
        return func(*args, **kwargs)

    def _touch(self, func: Any, args: Any, kwargs: Any) -> None:
        outputs = [returned.alias_info for returned in func._schema.returns]
        if not func._schema.is_mutable and any(alias is not None for alias in outputs):
            return  # a view
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(value):
                found = self._watched.get(tensor.untyped_storage().data_ptr())
                if found is not None and tensor.numel():
                    write = argument.alias_info is not None and argument.alias_info.is_write
                    found[0].touch_all(write=write, what=func._schema.name)


@contextmanager
def capture(cuda: FakeCuda, graph: FakeGraph, pool: Pool, stream: FakeStream) -> Iterator[None]:
    """A `torch.cuda.graph`."""
    graph.pool = pool
    with cuda.stream(stream), cuda.recording(graph), _Recording(graph):
        yield
    pool.add(graph)
    graph.spoil()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
