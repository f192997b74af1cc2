"""Who talks to whom: every group and every link of given layouts, so that they can be made beforehand. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from seesaw.weights.sharding import RankView

HIDDEN, TOKENS = 0, 1
"""Channels: hidden states to the next stage, sampled tokens to the first."""


def groups_of(views: Iterable[RankView]) -> list[tuple[int, ...]]:
    """The groups whose ranks share layers, each once; those of one rank are among them."""
    return list(dict.fromkeys(view.tp_ranks for view in views))


def links_of(views: Iterable[RankView]) -> list[tuple[int, int, int]]:
    """Every message that ranks with these views send one another, as (source, destination, channel), each once."""
    return list(dict.fromkeys(link for view in views for link in _sent_by(view)))


def _sent_by(view: RankView) -> Iterator[tuple[int, int, int]]:
    if view.next_rank is not None:
        yield view.rank, view.next_rank, HIDDEN
    if view.rank == view.sampler_rank and not view.first_stage:
        for first in view.first_stage_ranks:
            yield view.rank, first, TOKENS
