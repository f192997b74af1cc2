"""The record of a job: `OUTPUT.run/run.json`, beside the output. One `Run` for each sitting of the job.

out/orders.jsonl  ->  out/orders.run/run.json
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from seesaw.core.errors import ConfigError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.model_spec import ModelSpec
from seesaw.core.stats import EngineStats, TransitionRecord
from seesaw.recording.bounded import History

VERSION = 1
"""Of the file; a change of what its figures mean raises it."""
MOST_RUNS = 50
"""Sittings that are kept: the latest."""
RECORD = "run.json"
_COMPRESSED = (".gz", ".zst")


class Sample(msgspec.Struct, array_like=True, frozen=True):
    """Where the engine stood at one moment. Counts are since the engine started, tokens those computed so far."""

    at: float
    """Seconds since the engine started."""
    phase: str
    rows: int
    """Requests that ended."""
    prompt_tokens: int
    output_tokens: int
    host_kv: int
    """Bytes of the host buffer in use."""
    device_kv: int
    """Bytes of the ranks' KV pools in use."""
    running: int
    waiting: int


class RunSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What ran: the model's shape, the plan worked out, and the node as far as it has been measured."""

    model: str
    spec: ModelSpec
    dummy_weights: bool
    dtype: str
    plan: str
    ranks: int
    device: str
    device_memory: int
    """Bytes of each rank that the plan may use."""
    host_kv: int
    chunk: int
    """Most tokens of a batch that holds prefill."""
    max_running: int
    policy: str
    max_model_len: int
    block_size: int
    transition: str
    """How weights change layout."""
    overlap: bool
    hardware: HardwareSpec | None
    """By the profile of the machine; None if there is none to go by."""
    no_hardware: str
    """Why."""


class Run(msgspec.Struct, kw_only=True):
    """One sitting of a job, from the start of its engine to its end."""

    seesaw: str
    """Version; those of other packages stand in `versions`."""
    versions: dict[str, str]
    machine: str
    command: dict[str, Any]
    """Input and output files and options that were given."""
    started: str
    """ISO 8601, with time zone; so are all times of day."""
    written: str
    """When this was written last."""
    state: str = "running"
    """`running` (or killed, if nothing is), `finished`, `interrupted` or `failed`."""
    error: str | None = None
    """What ended it, of a failed one."""
    setup: RunSetup | None = None
    rows_answered: int = 0
    """In this sitting, like all that follows."""
    rows_failed: int = 0
    rows_total: int | None = None
    """In the input, as far as known."""
    failures: dict[str, int] = {}
    """Failed rows by code; of a run that was killed, perhaps fewer than `rows_failed`."""
    elapsed_seconds: float = 0.0
    """From the job's first row to its last."""
    plans: list[tuple[float, str]] = []
    """Plans that ran, with the second from which on."""
    timeline: list[Sample] = []
    transitions: list[TransitionRecord] = []
    """At most some thousand, evenly thinned out."""
    transition_count: int = 0
    transition_bytes: int = 0
    history: History = History()
    stats: EngineStats | None = None
    """At the end; without its transitions."""


class Record(msgspec.Struct, kw_only=True):
    """The file's contents: the sittings of a job, in order."""

    version: int = VERSION
    runs: list[Run]


def run_directory(output: Path) -> Path:
    """The folder of the record of a job with this output: its name without `.jsonl`, `.parquet`, …, plus `.run`."""
    name = output.name
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return output.with_name(f"{Path(name).stem}.run")


def load_record(directory: str | os.PathLike[str]) -> Record:
    """The record in a run's folder. Raises `ConfigError` saying what is wrong with it."""
    path = Path(directory) / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        raise ConfigError(
            f"{directory}: no run was recorded here; `seesaw run` makes a folder OUTPUT.run with a {RECORD} in it"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: is not the record of a run of this version of Seesaw: {error}") from None


def save_record(directory: Path, record: Record) -> None:
    """Write the record; readers see the old one or the new one. Raises `OSError`."""
    directory.mkdir(exist_ok=True)
    target = directory / RECORD
    draft = target.with_name(f".{RECORD}.{os.getpid()}")
    try:
        draft.write_bytes(msgspec.json.encode(record))
        draft.replace(target)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
