"""Byte sizes as people write them."""

from __future__ import annotations

import re

from seesaw.core.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(value: int | str) -> int:
    """Bytes from a number, or from text such as `512MiB`, `1.5GiB` or `2GB`. Raises `ConfigError`."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ConfigError(f"size {value}: must not be negative")
        return value
    match = _SIZE.fullmatch(str(value))
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(
            f"size {value!r}: expected bytes or a number with a unit, such as 512MiB, 1.5GiB or 2GB"
        )
    return int(float(match.group(1)) * unit)


def format_bytes(count: float) -> str:
    """`count` bytes in binary units, with three or four digits: `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.{2 if count < 10 else 1}f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
