"""Encoder processes that are killed, that a row kills, whose parent is killed, that cannot start."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from seesaw.jobs.base import Endpoint, Row
from seesaw.jobs.encoding.pool import Batch, EncoderPool
from seesaw.jobs.encoding.source import Ahead, EncodedRows, RefusedRow
from seesaw.jobs.encoding.wire import Setup
from tests.jobs.encoders import DEADLY, STALLING, PoisonedTokenizer
from tests.jobs.test_encoding import SETUP, maker, plainly, prompts, ready, row, shape


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`, zombies left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(folder.name))
    return sorted(found)


def family(pool: EncoderPool) -> list[int]:
    """The server of a pool and its encoders."""
    return [] if pool.pid is None else [pool.pid, *children(pool.pid)]


def running(pids: list[int]) -> list[int]:
    """Those that have not ended."""
    alive = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                alive.append(pid)
    return alive


def gone(pids: list[int]) -> bool:
    """Whether all end within some seconds."""
    deadline = time.monotonic() + 20
    while running(pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not running(pids)


@pytest.mark.parametrize("seed", range(6))
def test_killed_encoders_and_servers_cost_no_row(seed: int) -> None:
    dice = random.Random(seed)
    rows = list(prompts(1500, "x" * 50))
    # So far apart that no row is ahead of need at three of them: it would be taken for the cause.
    moments = {start + dice.randrange(50) for start in range(50, 1400, 150)}
    pool = ready(EncoderPool(SETUP, 2))
    made, kills = [], 0
    with EncodedRows(rows, maker(), pool, ahead=Ahead(rows=200, batch_rows=16)) as encoded:
        for number, each in enumerate(encoded):
            made.append(shape(each))
            if number in moments and pool.ready:
                with contextlib.suppress(ProcessLookupError):  # one that ends by itself: its server is gone
                    os.kill(dice.choice(family(pool)), signal.SIGKILL)
                    kills += 1
    assert kills
    assert made == plainly(list(rows))


def test_a_row_that_ends_its_process_is_refused_and_its_neighbours_are_not() -> None:
    rows = [row(i, {"prompt": f"{DEADLY if i in (70, 71, 150) else 'mild'} {i}"}) for i in range(200)]
    with EncodedRows(rows, maker(), ready(EncoderPool(SETUP, 2))) as encoded:
        made = list(encoded)
    refused = {each.row.number: each.error for each in made if isinstance(each, RefusedRow)}
    assert sorted(refused) == [70, 71, 150]
    assert {error.code for error in refused.values()} == {"internal_error"}
    assert str(refused[70]) == (
        "the prompt could not be tokenised: the process that tokenises ended on it each time"
    )
    spared = [shape(each) for each in made if not isinstance(each, RefusedRow)]
    assert spared == plainly([each for each in rows if each.number not in refused])


def test_a_deadly_chat_is_refused_too() -> None:
    messages = [{"role": "user", "content": DEADLY}]
    rows = [*prompts(3), row(3, {"messages": messages}, Endpoint.CHAT), *prompts(6)[4:]]
    with EncodedRows(rows, maker(), ready(EncoderPool(SETUP, 1))) as encoded:
        assert [isinstance(each, RefusedRow) for each in encoded] == [False] * 3 + [True] + [False] * 2


def test_a_tokeniser_that_cannot_be_loaded_leaves_the_work_here(caplog: pytest.LogCaptureFixture) -> None:
    pool = EncoderPool(Setup("tests.jobs.encoders:missing", "m"), 2)
    pool.start()

    def rows_until_it_gives_up() -> Iterator[Row]:
        for each in itertools.takewhile(
            lambda _: not pool.broken, (row(i, {"prompt": "a"}) for i in itertools.count())
        ):
            time.sleep(0.001)
            yield each
        yield from prompts(10)

    with EncodedRows(rows_until_it_gives_up(), maker(), pool) as encoded:
        made = list(encoded)
    assert [shape(each) for each in made] == plainly([each.row for each in made])
    assert made[-1].row.number == 9
    assert "the processes that tokenise do not stay up" in caplog.text


def test_a_broken_pool_gives_back_what_it_holds() -> None:
    pool = ready(EncoderPool(SETUP, 1))
    batch = Batch([msgspec.msgpack.encode(STALLING)], ["row"])
    pool.submit(batch)
    pool._setup = Setup("tests.jobs.encoders:missing", "m")
    os.kill(family(pool)[0], signal.SIGKILL)
    given_back = []
    while not pool.broken:
        for lost in pool.pump(None)[1]:
            given_back.append((lost, pool.broken))
            if not pool.broken:
                pool.submit(lost)
    assert given_back == [(batch, False), (batch, True)]


def test_close_ends_all_processes_even_in_the_middle_of_a_row() -> None:
    pool = ready(EncoderPool(SETUP, 2))
    encoded = EncodedRows([*prompts(5), row(5, {"prompt": STALLING})], maker(), pool)
    next(encoded)
    while len(pids := family(pool)) < 3:  # the pool is ready with its first encoder
        time.sleep(0.01)
    encoded.close()
    assert gone(pids)
    encoded.close()


def test_close_while_the_tokeniser_is_loading() -> None:
    pool = EncoderPool(SETUP, 2)
    pool.start()
    pids = family(pool)
    pool.close()
    assert gone(pids)


def test_nothing_stays_open() -> None:
    def descriptors() -> list[str]:
        return sorted(os.listdir("/proc/self/fd"))

    before = descriptors()
    pool = ready(EncoderPool(SETUP, 2))
    with EncodedRows(prompts(100), maker(), pool) as encoded:
        os.kill(family(pool)[1], signal.SIGKILL)
        list(encoded)
    assert descriptors() == before


PARENT = """
from pathlib import Path
from seesaw.jobs.base import Endpoint, Row
from seesaw.jobs.encoding.pool import EncoderPool
from seesaw.jobs.encoding.source import EncodedRows
from seesaw.jobs.encoding.wire import Setup
from seesaw.jobs.requests import ModelNames, RequestMaker

pool = EncoderPool(Setup("tests.jobs.encoders:PoisonedTokenizer", ""), 2)
pool.start()
while not pool.ready:
    pool.pump(None)
rows = [
    Row(number=i, place="", digest=0, id=str(i), endpoint=Endpoint.COMPLETIONS, body={"prompt": text}, plain=True)
    for i, text in enumerate(["a", "b", "stall", "c"])
]
encoded = EncodedRows(rows, RequestMaker(None, 100, ModelNames("m", None)), pool)
next(encoded)
print(pool.pid, flush=True)
for each in encoded:
    pass
"""


@pytest.fixture
def parent() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that waits for a row that takes for ever, and its encoders."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    server = int(process.stdout.readline())
    while len(children(server)) < 2:
        time.sleep(0.01)
    pids = [server, *children(server)]
    yield process, pids
    process.kill()
    process.communicate()


def test_encoders_end_with_a_parent_that_is_killed(parent: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, pids = parent
    assert running(pids) == pids
    process.kill()
    process.wait()
    assert gone(pids)


def test_ctrl_c_is_the_parents_alone(parent: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, pids = parent
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == 1
    assert "KeyboardInterrupt" in errors
    assert gone(pids)


def test_the_poison_is_no_poison_to_a_spared_process() -> None:
    assert PoisonedTokenizer(str(os.getpid())).encode(DEADLY) == list(DEADLY.encode())
