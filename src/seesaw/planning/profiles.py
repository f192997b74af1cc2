"""Profiles: a measured node (`seesaw profile`) as a JSON file. No torch.

    {"version": 1, "date": "2026-11-21", "machine": "node7", "hardware": {...}}

`hardware` is a `HardwareSpec`. A profile holds for the machine, and for the places of ranks, that it was measured on.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from datetime import date
from pathlib import Path

import msgspec

from seesaw.core.errors import ConfigError
from seesaw.core.hardware import HardwareSpec

VERSION = 1
"""Of the file; a change of what the figures mean raises it."""
_AGAIN = "run `seesaw profile` again"


class _Version(msgspec.Struct, frozen=True):
    version: int


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The file's contents."""

    version: int
    date: str
    """Day of the measurement, as YYYY-MM-DD."""
    machine: str
    """Network name of the machine."""
    hardware: HardwareSpec


def default_path() -> Path:
    """`$SEESAW_PROFILE`, or `profile.json` in `$SEESAW_CACHE` (default `~/.cache/seesaw`). Raises `ConfigError`."""
    named, cache = os.environ.get("SEESAW_PROFILE"), os.environ.get("SEESAW_CACHE")
    if named:
        return Path(named)
    try:
        return (Path(cache) if cache else Path.home() / ".cache" / "seesaw") / "profile.json"
    except RuntimeError as error:  # no home directory
        raise ConfigError(f"profile: {error} Set SEESAW_PROFILE to a file") from None


def load_profile(path: str | os.PathLike[str]) -> HardwareSpec:
    """The node that the profile at `path` describes. Raises `ConfigError` saying what to do."""
    return read_profile(path).hardware


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """The profile at `path`, with its date and machine. Raises `ConfigError` saying what to do."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"profile {path}: there is no such file; `seesaw profile` writes one") from None
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot be read: {error.strerror}") from None
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version == VERSION:
            return msgspec.json.decode(data, type=Profile)
    except (msgspec.MsgspecError, ConfigError) as error:
        raise ConfigError(f"profile {path}: is not a profile: {error}; {_AGAIN}") from None
    raise ConfigError(f"profile {path}: has version {version}, this Seesaw reads {VERSION}; {_AGAIN}")


def save_profile(path: str | os.PathLike[str], spec: HardwareSpec) -> None:
    """Write `spec` as today's profile of this machine; folders are made. Raises `ConfigError`."""
    profile = Profile(version=VERSION, date=date.today().isoformat(), machine=platform.node(), hardware=spec)
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1))
        draft.replace(target)  # readers see the old profile or the new one
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise ConfigError(f"profile {path}: cannot be written: {error.strerror}") from None
