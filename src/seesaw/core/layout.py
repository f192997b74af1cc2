"""`Layout` and `Plan`: how the ranks of a node share a model in each phase."""

from __future__ import annotations

import re
from dataclasses import dataclass

from seesaw.core.errors import LayoutError

_LAYOUT = re.compile(r"(?:[DPT][1-9][0-9]{0,3}){1,3}")
_AXIS = re.compile(r"([DPT])([0-9]+)")


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A place in a layout: data-parallel replica, pipeline stage, tensor-parallel index (each from 0)."""

    dp: int
    pp: int
    tp: int


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """Degrees of data, pipeline and tensor parallelism; their product is the world size.

    Written `D2P2T2` with degrees of one left out (`T4`, `P4`; `T1` is one rank). `parse` takes the axes in
    any order.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis, degree in (("dp", self.dp), ("pp", self.pp), ("tp", self.tp)):
            if degree < 1:
                raise LayoutError(f"layout: {axis}={degree} is not a positive degree")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read `T4`, `P2T2`, `D2P2T2`, … Raises `LayoutError` naming what is wrong."""
        cleaned = text.strip().upper()
        if not _LAYOUT.fullmatch(cleaned):
            raise LayoutError(f"layout {text!r}: expected D, P and T degrees such as T4, P4, T2P2 or D2P2T2")
        degrees: dict[str, int] = {}
        for axis, degree in _AXIS.findall(cleaned):
            if axis in degrees:
                raise LayoutError(f"layout {text!r}: {axis} is given twice")
            degrees[axis] = int(degree)
        return cls(dp=degrees.get("D", 1), pp=degrees.get("P", 1), tp=degrees.get("T", 1))

    @classmethod
    def all(cls, ranks: int) -> list[Layout]:
        """Every layout of so many ranks, those of least tensor parallelism first."""
        degrees = [degree for degree in range(1, ranks + 1) if ranks % degree == 0]
        return [
            cls(dp=ranks // tp // pp, pp=pp, tp=tp)
            for tp in degrees
            for pp in degrees
            if ranks % (tp * pp) == 0
        ]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.pp * self.tp

    @property
    def replica_ranks(self) -> int:
        """Number of ranks that hold one copy of the model."""
        return self.pp * self.tp

    def coordinate(self, index: int) -> Coordinate:
        """Coordinate number `index`, counted with tp fastest, then pp, then dp."""
        if not 0 <= index < self.world:
            raise LayoutError(f"layout {self}: index {index} is outside 0..{self.world - 1}")
        replica, place = divmod(index, self.replica_ranks)
        stage, tensor = divmod(place, self.tp)
        return Coordinate(replica, stage, tensor)

    def index(self, coordinate: Coordinate) -> int:
        """Inverse of `coordinate`."""
        return (coordinate.dp * self.pp + coordinate.pp) * self.tp + coordinate.tp

    def __str__(self) -> str:
        axes = (("D", self.dp), ("P", self.pp), ("T", self.tp))
        return "".join(f"{name}{degree}" for name, degree in axes if degree > 1) or "T1"


@dataclass(frozen=True, slots=True)
class Plan:
    """A prefill layout and a decode layout over the same ranks.

    `P4->T4` re-shards between the phases. `P2->P2` separates the phases in time without a re-shard.
    A single layout, `T4`, is a static plan: `separate` is false and both phases may share a batch.
    """

    prefill: Layout
    decode: Layout
    separate: bool

    def __post_init__(self) -> None:
        if self.prefill.world != self.decode.world:
            raise LayoutError(
                f"plan {self}: {self.prefill} has {self.prefill.world} ranks and {self.decode} has "
                f"{self.decode.world}; both phases must use the same ranks"
            )
        if not self.separate and self.prefill != self.decode:
            raise LayoutError(f"plan {self}: two layouts need phases that are separated in time")

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read `T4`, `P4->T4` or `P4→T4`. Raises `LayoutError`."""
        parts = text.replace("→", "->").split("->")
        if len(parts) == 1:
            layout = Layout.parse(parts[0])
            return cls(layout, layout, separate=False)
        if len(parts) == 2:
            return cls(Layout.parse(parts[0]), Layout.parse(parts[1]), separate=True)
        raise LayoutError(f"plan {text!r}: expected one layout (T4) or two (P4->T4), found {len(parts)}")

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.prefill.world

    @property
    def reshards(self) -> bool:
        """Whether the two phases use different layouts."""
        return self.prefill != self.decode

    def __str__(self) -> str:
        return f"{self.prefill}->{self.decode}" if self.separate else str(self.prefill)
