"""`Rows`: a source of requests that can be looked at before they are taken."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint

from seesaw.core.request import Request


class Rows(Iterator[Request]):
    """The requests of `source`, in its order, pulled no further than asked for."""

    def __init__(self, source: Iterable[Request]) -> None:
        self._source = iter(source)
        self._ahead: deque[Request] = deque()
        self._exhausted = False

    def __next__(self) -> Request:
        if self._ahead:
            return self._ahead.popleft()
        if not self._exhausted:
            for request in self._source:
                return request
            self._exhausted = True
        raise StopIteration

    def look_ahead(self, count: int) -> Sequence[Request]:
        """The next requests, `count` of them if the source has as many. They are still to be taken."""
        while len(self._ahead) < count and self._pull():
            pass
        return self._ahead

    @property
    def ended(self) -> bool:
        """Whether the source is known to have nothing more."""
        return self._exhausted and not self._ahead

    @property
    def left(self) -> int | None:
        """How many are still to be taken, by what the source says (`__length_hint__`); None if it does not say."""
        if self._exhausted:
            return len(self._ahead)
        hint = length_hint(self._source, -1)
        return None if hint < 0 else len(self._ahead) + hint

    def _pull(self) -> bool:
        if not self._exhausted:
            for request in self._source:
                self._ahead.append(request)
                return True
            self._exhausted = True
        return False


class Counted(Iterator[Request]):
    """Requests made one by one of the items of `of`, which may know how many it has."""

    def __init__(self, source: Iterable[Request], of: Iterable[object]) -> None:
        self._source, self._of = iter(source), of
        self._taken = 0

    def __next__(self) -> Request:
        request = next(self._source)
        self._taken += 1
        return request

    def __length_hint__(self) -> int:
        hint = length_hint(self._of, -1)
        if hint >= 0 and not isinstance(self._of, Iterator):
            hint = max(0, hint - self._taken)
        return hint if hint >= 0 else NotImplemented
