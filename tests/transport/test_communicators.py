"""What NCCL's transport opens is what the memory plan counts, and no order of the engine's messages hangs on it."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from seesaw.core.errors import LayoutError
from seesaw.core.layout import Layout, Plan
from seesaw.core.workspace import COLLECTIVE_CHANNELS, PEER_CHANNELS, lane_of, most_lanes
from seesaw.execution.links import groups_of, links_of
from seesaw.planning.device_costs import CUDA, Load
from seesaw.planning.shapes import shape
from seesaw.planning.shardings import plan_shardings
from seesaw.transport import nccl, torch_distributed
from seesaw.transport.base import Link, Members
from seesaw.transport.nccl import NO_P2P, NcclTransport, settle_environment
from seesaw.weights.sharding import rank_view


def layouts(world: int) -> Iterator[Layout]:
    for dp, pp in itertools.product(range(1, world + 1), repeat=2):
        if world % (dp * pp) == 0:
            yield Layout(dp=dp, pp=pp, tp=world // dp // pp)


def plans(world: int) -> Iterator[Plan]:
    for pair in itertools.product(layouts(world), repeat=2):
        yield Plan(*pair, separate=pair[0] != pair[1])


@lru_cache(maxsize=512)
def said(plan: Plan) -> tuple[list[Members], list[Link]] | None:
    """Groups and links of a plan, as the engine has them; None if the model does not divide so."""
    model = shape("Llama-3.1-8B")
    try:
        shardings = plan_shardings(model, plan)
    except LayoutError:
        return None
    views = [rank_view(model.spec, s, rank) for s in shardings for rank in range(plan.world)]
    return groups_of(views), links_of(views)


class Opened:
    """Stands for `torch.distributed`: notes the communicators of a rank, and whom it connects with over each."""

    class group:  # noqa: N801  torch's name
        WORLD = "world"

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self.communicators: dict[Any, tuple[int, ...]] = {}
        self.rings: set[Any] = set()
        self.peers: dict[Any, set[int]] = {}

    def init_process_group(self, *_: Any, **__: Any) -> None:
        self.communicators["world"] = tuple(range(self._world))

    def new_group(self, ranks: list[int], **_: Any) -> Any:
        name = (len(self.communicators), *ranks)
        self.communicators[name] = tuple(ranks)
        return name

    def all_reduce(self, x: torch.Tensor, group: Any) -> None:
        self.rings.add(group)

    def gather(self, x: torch.Tensor, parts: Any, dst: int, group: Any) -> None:
        others = [r for r in self.communicators[group] if r != self._rank] if dst == self._rank else [dst]
        self.peers.setdefault(group, set()).update(others)

    def send(self, x: torch.Tensor, dst: int, group: Any) -> None:
        self.peers.setdefault(group, set()).add(dst)

    def recv(self, x: torch.Tensor, src: int, group: Any) -> None:
        self.peers.setdefault(group, set()).add(src)

    def bytes(self) -> int:
        """As `DeviceCosts` has them for each."""
        own = [name for name, ranks in self.communicators.items() if self._rank in ranks]
        ring = [1 + min(len(self.communicators[name]) - 1, 2) for name in self.rings]
        channels = COLLECTIVE_CHANNELS * sum(ring) + PEER_CHANNELS * sum(map(len, self.peers.values()))
        return len(own) * CUDA.communicator + channels * CUDA.connection


def opened(plan: Plan, rank: int, monkeypatch: pytest.MonkeyPatch) -> Opened:
    found = said(plan)
    assert found is not None
    notes = Opened(rank, plan.world)
    with monkeypatch.context() as patch:
        patch.setattr(nccl, "dist", notes)
        patch.setattr(torch_distributed, "dist", notes)
        patch.setattr(NcclTransport, "_meet", lambda *_: None)
        patch.setattr(torch_distributed, "FileStore", lambda *_: None)
        NcclTransport(rank, plan.world, "", *found, device=torch.device("cpu"), timeout=1.0)
    return notes


def counted(plan: Plan) -> int:
    load = Load(
        layouts=(plan.prefill, plan.decode),
        element=2,
        batch_tokens=1,
        running=1,
        sequence_blocks=1,
        head_dim=1,
    )
    return dict(CUDA.shared(load))["collectives"]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_MAX_NCHANNELS", "NCCL_MAX_P2P_NCHANNELS", NO_P2P, nccl._QUIET):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("world", range(1, 9))
def test_what_is_opened_is_counted(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for plan in plans(world):
        found = said(plan)
        if found is None:
            continue
        groups, links = found
        notes = [opened(plan, rank, monkeypatch) for rank in range(world)]
        most = max(each.bytes() for each in notes)
        assert most <= counted(plan), plan
        lanes = {lane_of(source, destination) for source, destination, _ in links}
        wide = {frozenset(group) for group in groups if len(group) > 1} - {frozenset(range(world))}
        silent = not links and all(len(group) == 1 for group in groups)
        expected = 0 if silent else 1 + len(wide) + max(len(lanes) - 1, 0)
        assert all(len(each.communicators) == expected for each in notes), plan
        # what the plan counts beyond: lanes that these links need not, and groups and neighbours of both layouts
        # that are the same
        spare = max(most_lanes(world) - len(lanes), 0) * CUDA.communicator if links else 0
        if plan.prefill == plan.decode:
            assert counted(plan) - spare <= most, plan


def test_a_rank_only_sends_or_only_receives_on_a_lane() -> None:
    for world in range(2, 17):
        sides: dict[int, tuple[set[int], set[int]]] = {}
        for source, destination in itertools.permutations(range(world), 2):
            senders, receivers = sides.setdefault(lane_of(source, destination), (set(), set()))
            senders.add(source)
            receivers.add(destination)
        assert all(not senders & receivers for senders, receivers in sides.values())
        assert sorted(sides) == list(range(most_lanes(world)))


# ---- orders of messages ------------------------------------------------------------------------------------------

Operation = tuple[str, Any]
"""`send` or `receive` and the other rank, or `reduce` and the group."""


def programs(layout: Layout, forwards: int, ahead: int) -> list[list[Operation]]:
    """What each rank launches for decode steps of one micro-batch group, `ahead` of them under way at once, in the
    order of `execution.stage`: tokens of an earlier Forward, hidden states in, the group's sums, what goes out."""
    found = said(Plan(layout, layout, separate=False))
    assert found is not None
    model = shape("Llama-3.1-8B")
    sharding = plan_shardings(model, Plan(layout, layout, separate=False))[1]
    ranks: list[list[Operation]] = []
    for rank in range(layout.world):
        view = rank_view(model.spec, sharding, rank)
        program: list[Operation] = []
        for forward in range(forwards + ahead):
            if view.first_stage and not view.last_stage and forward >= ahead:
                program.append(("receive", view.sampler_rank))
            if forward >= forwards:
                continue
            if view.previous_rank is not None:
                program.append(("receive", view.previous_rank))
            program.append(("reduce", view.tp_ranks))
            if view.next_rank is not None:
                program.append(("send", view.next_rank))
            elif not view.first_stage and rank == view.sampler_rank:
                program += [("send", first) for first in view.first_stage_ranks]
        ranks.append(program)
    return ranks


def ends(ranks: list[list[Operation]], stream_of: Any) -> bool:
    """Whether all of it gets done where a send ends when it is received, operations of one stream (`stream_of` source
    and destination) go in order, and everything waits for what the rank received and reduced before."""
    done = [[False] * len(program) for program in ranks]

    def ready(rank: int, at: int) -> bool:
        what, peer = ranks[rank][at]
        for before in range(at):
            if done[rank][before]:
                continue
            earlier, other = ranks[rank][before]
            if earlier != "send":
                return False  # the stream of computation waits for it
            if what == "send" and stream_of(rank, peer) == stream_of(rank, other):
                return False
            if what == "receive" and stream_of(peer, rank) == stream_of(rank, other):
                return False
        return True

    def heads(rank: int) -> dict[Operation, int]:
        """The first operation of each kind with each peer that is not done, if it is ready."""
        first: dict[Operation, int] = {}
        for at, operation in enumerate(ranks[rank]):
            if not done[rank][at]:
                first.setdefault(operation, at)
        return {operation: at for operation, at in first.items() if ready(rank, at)}

    progress = True
    while progress:
        progress = False
        now = [heads(rank) for rank in range(len(ranks))]
        for rank, operations in enumerate(now):
            for (what, peer), at in operations.items():
                if done[rank][at]:
                    continue
                if what == "reduce" and all(("reduce", peer) in now[member] for member in peer):
                    for member in peer:
                        done[member][now[member]["reduce", peer]] = True
                    progress = True
                elif what == "send" and ("receive", rank) in now[peer]:
                    done[rank][at] = done[peer][now[peer]["receive", rank]] = True
                    progress = True
    return all(all(each) for each in done)


@pytest.mark.parametrize("world", range(2, 9))
def test_no_order_of_the_engine_hangs(world: int) -> None:
    """With as many Forwards under way as there are stages, and some more."""
    for layout in layouts(world):
        if layout.pp == 1 or said(Plan(layout, layout, separate=False)) is None:
            continue
        for ahead in (layout.pp, layout.pp + 2):
            assert ends(programs(layout, 3 * layout.pp, ahead), lane_of), (layout, ahead)


def test_one_communicator_for_all_messages_would_hang() -> None:
    """So the model of the test above sees what it is there for."""
    assert not ends(programs(Layout(pp=2), 6, 2), lambda source, destination: 0)
    assert not ends(programs(Layout(pp=4), 12, 4), lambda source, destination: 0)


# ---- the environment ---------------------------------------------------------------------------------------------


def test_nccl_is_held_to_what_the_plan_counts() -> None:
    assert settle_environment(peer_to_peer=True) == []
    assert (os.environ["NCCL_MAX_NCHANNELS"], os.environ["NCCL_MAX_P2P_NCHANNELS"]) == ("8", "2")
    assert NO_P2P not in os.environ
    settle_environment(peer_to_peer=False)
    assert os.environ[NO_P2P] == "1"


@pytest.mark.parametrize(("given", "warned"), [("4", False), ("8", False), ("16", True), ("many", True)])
def test_settings_of_the_user_stay(given: str, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_MAX_NCHANNELS", given)
    lines = settle_environment(peer_to_peer=True)
    assert os.environ["NCCL_MAX_NCHANNELS"] == given
    assert len(lines) == warned
    if warned:
        assert lines[0].startswith(f"NCCL_MAX_NCHANNELS={given}: the memory plan counts on at most 8")


def test_one_rank_says_so_for_all(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("NCCL_MAX_P2P_NCHANNELS", "32")
    with caplog.at_level(logging.INFO, logger="seesaw.transport.nccl"):
        for rank in (0, 1):
            opened(Plan.parse("P2"), rank, monkeypatch)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["NCCL_MAX_P2P_NCHANNELS=32"]
