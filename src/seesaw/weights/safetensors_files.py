"""Reading the headers of a model directory's safetensors files, and checking them. No torch.

A file is an 8-byte little-endian header length, a JSON header (name → dtype, shape, begin and end of the
data), and the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from seesaw.core.errors import ModelError
from seesaw.core.model_spec import DTYPE_BYTES, DType, ModelSpec
from seesaw.models.parameters import LM_HEAD, Parameter, parameters

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES: dict[str, DType] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_HEADER = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth")
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Buffers that old checkpoints carry and the engine computes itself."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: file, byte offset of its first element in the file, type and shape."""

    file: Path
    offset: int
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def locate_parameters(directory: Path, spec: ModelSpec) -> dict[str, StoredTensor]:
    """Where every parameter of `spec` lies in the safetensors files of a model directory.

    Raises `ModelError`, naming file and parameter, if a file or a parameter is missing, a shape or type is
    not what the model needs, a file is truncated, or it holds weights that the model would leave out.
    """
    files = checkpoint_files(directory)
    entries: dict[str, tuple[Path, Mapping[str, Any], int]] = {}
    for file in files:
        header, start = _read_header(file)
        entries |= {name: (file, entry, start) for name, entry in header.items() if name != "__metadata__"}
    wanted = parameters(spec)
    found = {parameter.name: _locate(parameter, entries, files) for parameter in wanted}
    _refuse_unused(entries, found)
    return found


def checkpoint_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a model directory: those its index names, or the single one.

    Raises `ModelError` saying what the directory has instead.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory}: not a directory with {SINGLE_FILE} or {INDEX_FILE}")
    if (directory / INDEX_FILE).is_file():
        return _indexed_files(directory)
    if (directory / SINGLE_FILE).is_file():
        return (directory / SINGLE_FILE,)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"{directory}: holds only pickle files ({_some(pickles)}), which can run code when read; "
            "convert them to safetensors, for example with transformers: model.save_pretrained(path)"
        )
    raise ModelError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _indexed_files(directory: Path) -> tuple[Path, ...]:
    index = directory / INDEX_FILE
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        plain = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: is not an index of safetensors files ({error!r})") from None
    except OSError as error:
        raise ModelError(f"{index}: cannot be read: {error.strerror}") from None
    if not names or not plain:
        raise ModelError(f"{index}: weight_map must name files beside it, found: {_some(sorted(names))}")
    missing = sorted(name for name in names if not (directory / name).is_file())
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of the {len(names)} files in {INDEX_FILE} are missing "
            f"({_some(missing)}); the download is incomplete"
        )
    return tuple(directory / name for name in sorted(names))


def _read_header(file: Path) -> tuple[Mapping[str, Any], int]:
    """The JSON header of a file and the offset of its data."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            fits = len(prefix) == 8 and length <= min(_MAX_HEADER, size - 8)
            text = stream.read(length) if fits else b""
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None
    if prefix == b"version ":
        raise ModelError(f"{file}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if not fits:
        raise ModelError(
            f"{file}: truncated, or not a safetensors file: its {size} bytes hold no whole header"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelError(f"{file}: its safetensors header is not JSON") from None
    if not isinstance(header, dict):
        raise ModelError(f"{file}: its safetensors header is not a JSON object")
    return header, 8 + length


def _locate(
    parameter: Parameter, entries: Mapping[str, tuple[Path, Mapping[str, Any], int]], files: Sequence[Path]
) -> StoredTensor:
    name = parameter.name
    if name not in entries:
        where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
        raise ModelError(f"{where}: parameter {name} of shape {list(parameter.shape)} is missing")
    file, entry, start = entries[name]
    try:
        dtype_name, shape = entry["dtype"], tuple(int(extent) for extent in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{file}: parameter {name} has a malformed header entry {entry!r}") from None
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise ModelError(
            f"{file}: parameter {name} has type {dtype_name}; supported are F32, BF16 and F16, "
            "not quantised weights"
        )
    if shape != parameter.shape:
        raise ModelError(
            f"{file}: parameter {name} has shape {list(shape)}, but config.json asks for "
            f"{list(parameter.shape)}"
        )
    stored = StoredTensor(file, start + begin, dtype, shape)
    if begin < 0 or end - begin != stored.nbytes:
        raise ModelError(
            f"{file}: parameter {name} needs {stored.nbytes} bytes, but its header gives it {end - begin}"
        )
    if start + end > file.stat().st_size:
        raise ModelError(
            f"{file}: truncated: parameter {name} ends at byte {start + end}, the file has "
            f"{file.stat().st_size}"
        )
    return stored


def _refuse_unused(entries: Mapping[str, tuple[Path, Any, int]], found: Mapping[str, StoredTensor]) -> None:
    """Weights the model would leave out (a bias, an adapter, a scale) mean that it would compute wrong."""
    unused = [
        name
        for name in sorted(entries)
        if name not in found and name != LM_HEAD and not name.endswith(_IGNORED_SUFFIXES)
    ]
    if unused:
        file = entries[unused[0]][0]
        raise ModelError(
            f"{file}: holds {len(unused)} tensors that the architecture in config.json has no place for "
            f"({_some(unused)})"
        )


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(str(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown}, … {len(names) - 3} more"
