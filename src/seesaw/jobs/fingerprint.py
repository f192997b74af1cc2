"""What the answers of a job depend on, so that a job is not continued with something else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import msgspec

from seesaw.core.units import format_bytes
from seesaw.jobs.base import STDIN, JobOptions
from seesaw.jobs.disk import reading

_EDGE = 64 << 10
_MOST_HEADER = 64 << 20
_MODEL_FILES = (
    *("config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "preprocessor_config.json"),
)
"""Small files of a model, which are read whole. Weights are known by their headers and sizes."""

Setting = str | int | float | bool | None


class FileMark(msgspec.Struct, frozen=True):
    """What a file is known by: its size in bytes, and a hash of the parts of it that were read."""

    name: str
    size: int | None
    """None for what is no regular file, such as a pipe; it is known by its name alone."""
    hash: str


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """What must stay the same for a job to be continued."""

    model: tuple[FileMark, ...]
    """Content of configuration, tokeniser and template; size and header of the weights."""
    inputs: tuple[FileMark, ...]
    """Size, first and last 64 KiB."""
    settings: dict[str, Setting]
    """Options that decide the answers."""


def take_fingerprint(options: JobOptions) -> Fingerprint:
    """The fingerprint of a job. Raises `JobError` if an input cannot be read."""
    return Fingerprint(
        model=tuple(_model_marks(options.model_folder or Path(options.model))),
        inputs=tuple(_input_mark(path) for path in options.inputs),
        settings={
            "model": os.path.normpath(options.model),
            "served-model-name": options.served_model_name,
            "errors": options.errors_path.name,
            "limit": options.limit,
            "prompt-column": options.prompt_column,
            "id-column": options.id_column,
            "keep-column": ", ".join(options.keep_columns) or None,
            **options.settings,
        },
    )


def differences(new: Fingerprint, old: Fingerprint) -> list[str]:
    """What changed, one phrase each."""
    changes = []
    for name in dict.fromkeys((*new.settings, *old.settings)):
        now, was = new.settings.get(name), old.settings.get(name)
        if now != was:
            changes.append(f"--{name} is {_shown(now)}, was {_shown(was)}")
    if len(new.inputs) != len(old.inputs):
        files = "file" if len(new.inputs) == 1 else "files"
        changes.append(f"{len(new.inputs)} input {files}, were {len(old.inputs)}")
    else:
        changes += [
            _difference("the input", a, b) for a, b in zip(new.inputs, old.inputs, strict=True) if a != b
        ]
    ours, theirs = ({mark.name: mark for mark in marks} for marks in (new.model, old.model))
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            changes.append(f"the model has {'no more' if a is None else 'a new file'} {name}")
        elif a != b:
            changes.append(_difference("the model's", a, b))
    return changes


def _shown(value: Setting) -> str:
    return "not given" if value is None else str(value)


def _difference(what: str, new: FileMark, old: FileMark) -> str:
    if new.name != old.name:
        return f"{what} is {new.name}, was {old.name}"
    if new.size != old.size:
        sizes = [_size(mark.size) for mark in (new, old)]
        if sizes[0] == sizes[1]:
            sizes = [f"{new.size:,} bytes", f"{old.size:,}"]
        return f"{what} {new.name} has {sizes[0]}, had {sizes[1]}"
    return f"{what} {new.name} has another content"


def _size(size: int | None) -> str:
    return "no size" if size is None else format_bytes(size)


def _input_mark(path: Path) -> FileMark:
    if path == STDIN:
        return FileMark(str(path), None, "")
    with reading(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return FileMark(path.name, None, "")
        with path.open("rb") as file:
            digest = blake2b(file.read(_EDGE), digest_size=16)
            file.seek(max(0, status.st_size - _EDGE))
            digest.update(file.read(_EDGE))
    return FileMark(path.name, status.st_size, digest.hexdigest())


def _model_marks(folder: Path) -> Iterator[FileMark]:
    if not folder.is_dir():
        return  # the engine says what is wrong with it
    small = {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    weights = {path for path in folder.glob("*.safetensors*") if path.is_file()}
    for path in sorted(small | weights):
        with reading(path), path.open("rb") as file:
            content = _weights_header(file) if path.suffix == ".safetensors" else file.read()
            yield FileMark(path.name, path.stat().st_size, blake2b(content, digest_size=16).hexdigest())


def _weights_header(file: BinaryIO) -> bytes:
    """The header of a safetensors file, behind its length in 8 bytes."""
    start = file.read(8)
    return start + file.read(min(int.from_bytes(start, "little"), _MOST_HEADER))
