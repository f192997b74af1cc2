"""The host weight store: a model's checkpoint in host memory, once per node, mapped by every rank."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from seesaw.core.errors import ModelError
from seesaw.core.model_spec import DTYPE_BYTES, DType, ModelSpec
from seesaw.models.parameters import Parameter, parameters
from seesaw.weights.safetensors_files import locate_parameters

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_ALIGNMENT = 64
_PATTERN = 1_048_573
"""Elements of the random pattern that dummy weights repeat: a prime, so that rows of a matrix differ."""
_DUMMY_STD = 0.02


@dataclass(frozen=True, slots=True)
class StoreSource:
    """How another process of the node opens a store; small and picklable.

    `path` is the model directory, or with `dummy_dtype` the memory of dummy weights, such as
    `/proc/<pid>/fd/<n>`, which can be opened for as long as process `pid` holds it.
    """

    path: str
    spec: ModelSpec
    dummy_dtype: DType | None = None

    def open(self) -> HostWeightStore:
        """Map the store. Raises `ModelError` if it cannot be opened."""
        if self.dummy_dtype is None:
            return HostWeightStore.open(Path(self.path), self.spec)
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"{self.path}: the dummy weights cannot be opened: {error.strerror}") from None
        try:
            return HostWeightStore.attach_dummy(fd, self.spec, self.dummy_dtype)
        finally:
            os.close(fd)


class HostWeightStore:
    """Read-only tensors of a checkpoint, zero-copy views of mapped memory that all ranks of the node share.

    Mappings live as long as a tensor that views them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        mappings: Sequence[mmap.mmap],
        source: StoreSource,
        fd: int | None = None,
    ) -> None:
        """`tensors` view `mappings`."""
        self._tensors = dict(tensors)
        self._mappings = tuple(_flat(memory, "uint8", len(memory), 0) for memory in mappings)
        self._source = source
        self._fd = fd

    @classmethod
    def open(cls, path: Path, spec: ModelSpec) -> HostWeightStore:
        """Map the safetensors files of the model directory `path`. Reads their headers only.

        Raises `ModelError` if files or parameters are missing, malformed, or not what `spec` needs.
        """
        located = locate_parameters(path, spec)
        files = {stored.file: _map_file(stored.file) for stored in located.values()}
        tensors = {
            name: _view(files[stored.file], stored.dtype, stored.offset, stored.shape)
            for name, stored in located.items()
        }
        return cls(tensors, list(files.values()), StoreSource(str(path), spec))

    @classmethod
    def dummy(cls, spec: ModelSpec, dtype: DType, seed: int) -> HostWeightStore:
        """Random weights in anonymous shared memory: norms 1, the rest normal with a small deviation.

        Made at the speed of memory by repeating one random pattern at offsets that differ by parameter.
        """
        fd = os.memfd_create("seesaw-dummy-weights", os.MFD_CLOEXEC)
        layout, size = _dummy_layout(spec, dtype)
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
        fill = _pattern_filler(spec, dtype, seed)
        for number, parameter in enumerate(parameters(spec)):
            fill(number, parameter, _view(memory, dtype, layout[parameter.name], parameter.shape).view(-1))
        source = StoreSource(f"/proc/{os.getpid()}/fd/{fd}", spec, dtype)
        return cls._of_dummy(fd, spec, dtype, source)

    @classmethod
    def attach_dummy(cls, fd: int, spec: ModelSpec, dtype: DType) -> HostWeightStore:
        """Map the dummy weights that another process made, from its descriptor; `fd` stays the caller's."""
        own = os.dup(fd)
        source = StoreSource(f"/proc/{os.getpid()}/fd/{own}", spec, dtype)
        return cls._of_dummy(own, spec, dtype, source)

    @classmethod
    def _of_dummy(cls, fd: int, spec: ModelSpec, dtype: DType, source: StoreSource) -> HostWeightStore:
        layout, size = _dummy_layout(spec, dtype)
        held = os.fstat(fd).st_size
        if held != size:
            raise ModelError(f"dummy weights: the memory has {held} bytes, the model needs {size} in {dtype}")
        memory = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
        tensors = {
            parameter.name: _view(memory, dtype, layout[parameter.name], parameter.shape)
            for parameter in parameters(spec)
        }
        return cls(tensors, [memory], source, fd)

    @property
    def fd(self) -> int:
        """Descriptor of the memory of dummy weights, open until `close`."""
        assert self._fd is not None, "only dummy weights have a descriptor"
        return self._fd

    @property
    def source(self) -> StoreSource:
        """How another process opens this store; for dummy weights, only until this one is closed."""
        return self._source

    def tensor(self, name: str) -> Tensor:
        """The parameter `name` in its own type, shape as in `parameters(spec)`. Must not be written to."""
        return self._tensors[name]

    @property
    def mappings(self) -> tuple[Tensor, ...]:
        """The memory of all tensors, as mapped in this process: bytes of each file that holds any, or of the dummy
        weights. Read-only; the last page may be mapped further."""
        return self._mappings

    def close(self) -> None:
        """Let go of tensors and descriptor. Tensors handed out stay valid. May be called twice."""
        self._tensors.clear()
        self._mappings = ()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> HostWeightStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _map_file(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{file}: cannot be mapped: {error.strerror}") from None


def _view(memory: mmap.mmap, dtype: DType, offset: int, shape: tuple[int, ...]) -> Tensor:
    return _flat(memory, dtype, prod(shape), offset).view(shape)


def _flat(memory: mmap.mmap, dtype: str, count: int, offset: int) -> Tensor:
    with warnings.catch_warnings():
        # The memory is read-only on purpose; nothing writes to tensors of the store.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=getattr(torch, dtype), count=count, offset=offset)


def _dummy_layout(spec: ModelSpec, dtype: DType) -> tuple[dict[str, int], int]:
    """Byte offset of every parameter, and the bytes of all."""
    offsets: dict[str, int] = {}
    end = 0
    for parameter in parameters(spec):
        offsets[parameter.name] = end
        end += -(-parameter.size * DTYPE_BYTES[dtype] // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _pattern_filler(spec: ModelSpec, dtype: DType, seed: int) -> Callable[[int, Parameter, Tensor], None]:
    """A function that fills a flat tensor with its parameter's weights."""
    generator = torch.Generator().manual_seed(seed)
    largest = max(parameter.size for parameter in parameters(spec))
    normal = torch.randn(min(_PATTERN, 2 * largest), generator=generator) * _DUMMY_STD
    # Projections back into the residual stream are smaller, so that it does not grow with depth.
    patterns = {
        residual: (normal * scale).to(TORCH_DTYPES[dtype])
        for residual, scale in ((False, 1.0), (True, (2 * spec.layers) ** -0.5))
    }

    def fill(number: int, parameter: Parameter, target: Tensor) -> None:
        if parameter.name.endswith("norm.weight"):
            target.fill_(1.0)
            return
        pattern = patterns[parameter.name.endswith(("o_proj.weight", "down_proj.weight"))]
        start = number * 7919 % len(pattern)
        done = 0
        while done < len(target):
            count = min(len(pattern) - start, len(target) - done)
            target[done : done + count].copy_(pattern[start : start + count])
            done += count
            start = 0

    return fill
