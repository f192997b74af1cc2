"""What a rig is asked to be: ranks, link, quota, cores; torch-free and without side effects."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import msgspec

from .errors import RigError

MAX_RANKS = 64
_SMALLEST_MTU, _LARGEST_MTU = 9000, 65000
_PACKET_SECONDS = 132e-6
"""Time of the largest packet on the link: fewer packets cost less, smaller ones share the link better."""
_CATCH_UP = 1.1
"""How much faster than its rate a link may be while it makes up for having been held up, or after it was idle."""
_CATCH_UP_SECONDS = 4e-3
_LATENESS_SECONDS = 60e-6
"""By how much a timer of the kernel is late as a rule; what accrues meanwhile may pass at once."""
_HEADERS = 64
PERIOD_US = 4000
_SHORTEST_QUOTA_US = 1000  # the kernel takes none shorter

_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]?bit)(?:/s|ps)?", re.IGNORECASE)
_SLOWEST, _FASTEST = 1_000_000, 32_000_000_000


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A rig, fully decided."""

    ranks: int
    rate: int | None
    """Bits per second of each rank's link, in each direction; None is no limit."""
    burst: int
    """Bytes that a link may make up for, at a tenth more than its rate, after it was held up or idle."""
    mtu: int
    """Bytes of the largest packet."""
    quota: float | None
    """Cores' worth of processor time each rank may use; None is no quota."""
    cores: list[list[int]]
    """The cores of each rank."""

    @property
    def peak_rate(self) -> int | None:
        """Bits per second that a link never exceeds; None is no limit."""
        return None if self.rate is None else round(self.rate * _CATCH_UP)

    @property
    def at_once(self) -> int:
        """Bytes that pass a link without waiting: one packet, and what accrues while a timer is late."""
        return self.mtu + _HEADERS + _bytes_in(_LATENESS_SECONDS, self.peak_rate)

    @property
    def period_us(self) -> int:
        """Length of the period over which the quota is counted, in microseconds."""
        return max(PERIOD_US, round(_SHORTEST_QUOTA_US / self.quota)) if self.quota else PERIOD_US

    @property
    def quota_us(self) -> int | None:
        """Processor time per period in microseconds; None is no quota."""
        return None if self.quota is None else round(self.quota * self.period_us)

    def describe(self) -> str:
        """One line for people."""
        link = "no limit" if self.rate is None else f"{format_rate(self.rate)}, packets of {self.mtu} B"
        quota = "no quota" if self.quota is None else f"quota {self.quota_us}/{self.period_us} µs"
        cores = " ".join(",".join(map(str, c)) for c in self.cores)
        return f"{self.ranks} ranks, link {link}, {quota}, cores {cores}"


def make_settings(
    ranks: int,
    *,
    link: str | None = None,
    quota: float | str | None = "auto",
    burst: int | None = None,
    mtu: int | None = None,
    cores: Sequence[int] | None = None,
) -> Settings:
    """Decide what is left open.

    `link` is a rate such as `1gbit`, or `none`. `quota` is a number of cores, `auto` (1/k where k ranks share a
    core), or `none`. `burst` and `mtu` follow from the rate. `cores` are dealt to the ranks in turn; left out, they
    are all that this process may use. Raises `RigError`.
    """
    if not 1 <= ranks <= MAX_RANKS:
        raise RigError(f"{ranks} ranks: a rig has 1 to {MAX_RANKS}")
    allowed = sorted(os.sched_getaffinity(0))
    chosen = list(cores) if cores is not None else allowed
    if not chosen or not set(chosen) <= set(allowed):
        raise RigError(f"cores {chosen}: this process may use {allowed}")
    rate = parse_link(link)
    if mtu is None:
        mtu = min(max(_bytes_in(_PACKET_SECONDS, rate or 10**10), _SMALLEST_MTU), _LARGEST_MTU)
    elif not 1500 <= mtu <= _LARGEST_MTU:
        raise RigError(f"mtu {mtu}: must be 1500 to {_LARGEST_MTU} bytes")
    wanted = Settings(ranks=ranks, rate=rate, burst=burst or 0, mtu=mtu, quota=None, cores=[])
    if burst is None:
        burst = max(_bytes_in(_CATCH_UP_SECONDS, rate), wanted.at_once)
    elif burst < wanted.at_once:
        raise RigError(f"burst {burst}: must be at least {wanted.at_once} bytes with packets of {mtu} bytes")
    dealt = deal_cores(ranks, chosen)
    return msgspec.structs.replace(wanted, burst=burst, quota=_quota(quota, dealt), cores=dealt)


def deal_cores(ranks: int, cores: Sequence[int]) -> list[list[int]]:
    """The cores of each rank: dealt in turn, so that neighbouring ranks sit on different cores."""
    if ranks >= len(cores):
        return [[cores[rank % len(cores)]] for rank in range(ranks)]
    each = len(cores) // ranks
    return [list(cores[rank * each : (rank + 1) * each]) for rank in range(ranks)]


def parse_link(text: str | None) -> int | None:
    """Bits per second from `1gbit`, `500mbit` or `0.5Gbit/s`; None from `none`. Raises `RigError`."""
    if text is None or text.strip().lower() == "none":
        return None
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise RigError(f"link {text!r}: expected a rate such as 1gbit or 500mbit, or none")
    rate = round(float(match.group(1)) * _UNITS[match.group(2).lower()])
    if not _SLOWEST <= rate <= _FASTEST:
        raise RigError(f"link {text!r}: must be {format_rate(_SLOWEST)} to {format_rate(_FASTEST)}")
    return rate


def format_rate(bits: float) -> str:
    """Bits per second for people: `1 Gbit/s`, `500 Mbit/s`."""
    return f"{bits / 1e9:.4g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.4g} Mbit/s"


def _bytes_in(seconds: float, rate: int | None) -> int:
    return round(seconds * rate / 8) if rate else 0


def _quota(asked: float | str | None, cores: list[list[int]]) -> float | None:
    if asked == "auto":
        sharing = max(sum(own == other for other in cores) for own in cores)
        return None if sharing == 1 else 1 / sharing
    if asked is None or asked == "none":
        return None
    try:
        quota = float(asked)
    except ValueError:
        quota = 0.0
    if not 0.01 <= quota <= MAX_RANKS:
        raise RigError(f"quota {asked!r}: expected a number of cores from 0.01, auto, or none")
    return quota
