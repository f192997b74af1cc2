"""Ranks measure what they are told: every kind of task, in step where it takes several, with errors that say what."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch

from seesaw.bench.process import ContestantError
from seesaw.core.devices import CUDA
from seesaw.core.node import Place, places_on_cores
from seesaw.device.cpu import CpuDevice
from seesaw.profiling import clock, copies, steps
from seesaw.profiling import measure as measuring
from seesaw.profiling.fit import Box
from seesaw.profiling.links import all_groups, groups_of
from seesaw.profiling.measure import Effort, measure
from seesaw.profiling.node import Node, NodeOptions
from seesaw.profiling.operands import Operands
from seesaw.profiling.operators import Heads
from seesaw.profiling.rank import RankConfig
from seesaw.profiling.tasks import (
    Task,
    all_reduce,
    attention,
    copy,
    product,
    reshard,
    send,
    sizes_for,
    step,
    tiny,
)
from tests.planning.machines import hardware

SIZES = sizes_for("cpu")
SMALL = ((64, 96), (96, 64))
ONE_OF_EACH = [
    tiny("bfloat16"),
    step(2, "bfloat16"),
    Task("product", (("dtype", "float32"), ("rows", 3), ("products", SMALL))),
    attention("bfloat16", (4, 2, 64), 3, 40, 40),
    attention("float32", (4, 4, 32), 5, 33, 1),
    Task(
        "activations",
        (("dtype", "bfloat16"), ("heads", (4, 2, 64)), ("rows", 5), ("hidden", 64), ("ffn", 96)),
    ),
    all_reduce("bfloat16", 2, 4096),
    Task("waiting", (("dtype", "bfloat16"), ("size", 2), ("rows", 3), ("products", SMALL))),
    send("float32", 4096),
    *(copy("to_host", "bfloat16", SIZES, alone=alone) for alone in (True, False)),
    copy("to_device", "float32", SIZES, alone=False),
    *(reshard(kind, "bfloat16") for kind in ("within", "fetch")),
]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node([Place(), Place()], NodeOptions(memory=20 << 20, host_memory=20 << 20), [2]) as started:
        yield started


@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_a_profile_says_whether_sums_travel_in_parts(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "fit", lambda *_: hardware())
    options = NodeOptions(memory=20 << 20, host_memory=20 << 20)
    found = measuring.profile(
        [Place(address=address)] * 2,
        ["bfloat16"],
        Box(name="here", memory=1 << 30),
        options,
        effort=Effort(seconds=0.001, passes=1),
        progress=lambda *_: None,
        tasks=[],
    )
    assert found == hardware(partial_sums=address is not None)


def test_every_kind_of_task_takes_some_time(node: Node) -> None:
    seen: list[tuple[int, int, str]] = []
    times = measure(node, ONE_OF_EACH, Effort(seconds=0.001, passes=2), lambda *what: seen.append(what))
    assert list(times) == ONE_OF_EACH
    assert all(seconds > 0 for seconds in times.values())
    assert all(seconds < 1 for task, seconds in times.items() if task.op != "waiting")  # a share
    assert [done for done, _, _ in seen] == list(range(2 * len(ONE_OF_EACH) + 1))
    assert {total for _, total, _ in seen} == {2 * len(ONE_OF_EACH)}
    assert seen[0][2] == "tiny bfloat16" and seen[-1][2] == "done"


def test_a_rank_alone_answers_for_itself(node: Node) -> None:
    task = product("bfloat16", 1, SIZES)
    alone = Task("product", (("dtype", "bfloat16"), ("rows", 2), ("products", SMALL)), alone=True)
    with pytest.raises(ContestantError, match="AssertionError"):  # a layer of this size does not fit
        node.one(task.op, 0.001, **task.sent())
    assert node.one(alone.op, 0.001, **alone.sent()) > 0  # the rank goes on after an error


def test_a_task_that_does_not_exist_is_an_error_of_the_rank(node: Node) -> None:
    with pytest.raises(ContestantError, match="TypeError"):
        node.all("nothing", 0.001, dtype="bfloat16")


def test_slow_links_are_not_measured_at_larger_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def slow(node: Node, task: Task, budget: float) -> float:
        asked.append(dict(task.arguments)["count"])
        return 0.3 if asked[-1] >= 1 << 14 else 0.001

    monkeypatch.setattr("seesaw.profiling.measure._measure", slow)
    tasks = [send("bfloat16", 1 << bits) for bits in (12, 14, 16, 18)]
    times = measure(None, tasks, Effort(passes=1), lambda *_: None)
    assert asked == [1 << 12, 1 << 14]
    assert list(times) == tasks[:2]


def test_copies_go_as_the_device_reaches_host_memory() -> None:
    """By what the engine's registration gives, over blocks of both pools in random order."""
    moved: list[tuple[int, bool]] = []

    def copy(near: torch.Tensor, far: torch.Tensor, table: torch.Tensor, to_host: bool) -> None:
        moved.append((len(table) * near[0].numel() * near.element_size(), to_host))

    near, far = Operands(8 << 20, "cpu"), Operands(8 << 20, "cpu")
    for kind, out in (("to_host", True), ("to_device", False)):
        calls, size = copies.copy_calls(near, far, kind, "bfloat16", Heads(query=4, kv=2, dim=64), copy)
        for call in calls:
            call()
        assert moved == [(size, out)] * len(calls)
        moved.clear()


def test_calls_in_a_row_are_settled_once() -> None:
    done: list[str] = []
    span = clock.Span(start=0.0, end=0.0, window=0.001, by_clock=True)
    clock.together(lambda: done.append("call"), lambda n: min(n, 3), span, settle=lambda: done.append("wait"))
    assert done == ["call", "wait"] * 2 + ["call", "call", "call", "wait"]


@pytest.mark.parametrize("clock", [time.perf_counter, time.thread_time])
def test_what_a_step_takes_beside_its_operators(clock: Callable[[], float]) -> None:
    """Whether Python calls them or a program, which the second step of a size is."""
    device = CpuDevice()
    with (
        torch.inference_mode(),
        steps.step_rest(layers=4, dtype="float32", place=device, clock=clock) as rest,
    ):
        for _ in range(5):
            started = time.perf_counter()
            assert 0 < rest() < time.perf_counter() - started
    device.close()


def test_a_step_is_measured_whole_where_the_host_runs_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps on a CPU rank, as a device that runs behind has them: several in a row, then one wait."""
    waits: list[bool] = []
    device = CpuDevice()
    record = device.compute.record
    monkeypatch.setattr(device.compute, "record", lambda: waits.append(True) or record())
    monkeypatch.setattr(steps, "kind_of", lambda _: CUDA)
    with (
        torch.inference_mode(),
        steps.step_rest(layers=2, dtype="float32", place=device, clock=time.perf_counter) as whole,
    ):
        waits.clear()
        assert whole() > 0
    assert len(waits) == 1
    device.close()


def test_a_gpu_node_names_the_devices_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[RankConfig] = []
    monkeypatch.setattr(Node, "_start_rank", lambda self, config, *_: started.append(config))
    options = NodeOptions(device="cuda", memory=1 << 31)
    with Node([Place(), Place(device=3)], options, [2]):
        assert [config.device for config in started] == ["cuda:0", "cuda:3"]
        assert {config.transport for config in started} == {"nccl"}
        assert {(config.memory, config.host_memory) for config in started} == {(1 << 31, 256 << 20)}


def test_ranks_that_are_left_over_are_in_no_group() -> None:
    assert groups_of(5, 2) == [(0, 1), (2, 3)]
    assert groups_of(4, 3) == [(0, 1, 2)]
    assert all_groups(4, [4]) == [(0, 1), (2, 3), (0, 1, 2, 3)]


def test_places_share_cores_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5})
    assert [place.cores for place in places_on_cores(3, 1)] == [[3], [5], [3]]
    assert [place.cores for place in places_on_cores(1, 2)] == [[3, 5]]


def test_the_share_of_waiting_is_what_meetings_take_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def takes(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    span = clock.Span(start=0.0, end=40.0, window=0.001, by_clock=True)
    assert clock.waited([takes(3.0), takes(5.0)], takes(1.0), lambda number: number, span) == pytest.approx(
        0.25
    )


def test_what_comes_before_an_operator_is_not_counted() -> None:
    done: list[str] = []
    span = clock.Span(start=0.0, end=0.0, window=0.001, by_clock=True)
    clock.seconds_per_call([lambda: done.append("call")], "cpu", span, before=lambda: done.append("before"))
    assert done[::2] == ["before"] * (len(done) // 2)
    assert done[1::2] == ["call"] * (len(done) // 2)


def test_the_quartile_counts_where_the_clock_tells_and_the_median_elsewhere() -> None:
    answers = count(1)
    times = [next(answers) for _ in range(9)]
    assert clock._quantile(times, by_clock=True) == 3
    assert clock._quantile(times, by_clock=False) == 5
