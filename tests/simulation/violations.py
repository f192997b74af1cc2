"""What a broken engine is caught by."""

from __future__ import annotations


class Violation(AssertionError):
    """An invariant does not hold. `invariant` is its name in the list that `watch.INVARIANTS` is."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant, self.detail = invariant, detail


def hold(condition: object, invariant: str, detail: str) -> None:
    """Raise a `Violation` unless `condition` does."""
    if not condition:
        raise Violation(invariant, detail)
