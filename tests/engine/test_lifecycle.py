"""Processes: nothing outlives the engine, and a failed rank is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from seesaw import LLM, SamplingParams
from seesaw.core.errors import WorkerError
from tests.checkpoints import make_checkpoint

SERVER, RANK = "seesaw.execution.fork_server", "seesaw-rank"

ENDLESS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be inherited as ignored
from seesaw import LLM, SamplingParams
llm = LLM(sys.argv[1], plan=sys.argv[2], dtype="float32", host_kv="4MiB", device_memory="16MiB")
def prompts():
    print("running", flush=True)
    while True:
        yield {"prompt_token_ids": [1, 2, 3]}
for output in llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)):
    pass
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def workers_of(pid: int) -> list[psutil.Process]:
    """The fork server of a control process and its workers."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # or it has ended, and waits for its parent
            if SERVER in " ".join(process.cmdline()):
                found.append(process)
    return found


def ranks_of(pid: int) -> list[psutil.Process]:
    """The workers of a control process, by rank. Process ids say nothing of it: they may have started over."""
    ranks = {}
    for process in workers_of(pid):
        with suppress(psutil.NoSuchProcess):
            if (name := process.name()).startswith(RANK):
                ranks[process] = int(name[len(RANK) :])
    return sorted(ranks, key=ranks.__getitem__)


def shared_memory() -> set[str]:
    """Named shared-memory segments."""
    return set(os.listdir("/dev/shm"))


@pytest.mark.parametrize("plan", ["P2->T2", "P2->P2"])
def test_nothing_survives_the_control_process(checkpoint: Path, plan: str) -> None:
    segments = shared_memory()
    control = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, checkpoint, plan], stdout=subprocess.PIPE, text=True
    )
    assert control.stdout is not None
    assert control.stdout.readline() == "running\n"
    time.sleep(0.5)
    workers = workers_of(control.pid)
    assert len(workers) == 3
    control.kill()
    control.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert shared_memory() <= segments


def test_interrupt_leaves_nothing(checkpoint: Path) -> None:
    control = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, checkpoint, "P2->T2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert control.stdout is not None
    control.stdout.readline()
    time.sleep(0.3)
    workers = workers_of(control.pid)
    os.killpg(control.pid, signal.SIGINT)  # the terminal sends it to all
    control.wait(timeout=20)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_killed_worker_is_named(checkpoint: Path, transport: str, tmp_path: Path) -> None:
    """Its neighbours fail over broken connections: that is not the cause."""
    places = [{"address": f"127.0.0.{rank + 1}"} if transport == "tcp" else {} for rank in range(2)]
    node = tmp_path / "node.json"
    node.write_text(json.dumps({"ranks": places}))
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    before = ranks_of(os.getpid())
    memory = {"device_memory": "16MiB", "host_kv": "1MiB"}
    options = {"transport": transport, "node": str(node), "on_rank_loss": "stop", **memory}
    with LLM(checkpoint, plan="T2", dtype="float32", **options) as llm:
        workers = [p for p in ranks_of(os.getpid()) if p not in before]

        def prompts() -> list[dict[str, list[int]]]:
            workers[-1].kill()
            return [{"prompt_token_ids": [1, 2, 3]}] * 4

        with pytest.raises(WorkerError) as caught:
            llm.generate(prompts(), params)
    assert "rank 1" in str(caught.value) and "ended without a word" in str(caught.value)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_an_engine_serves_again_after_a_run_is_given_up(checkpoint: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [{"prompt_token_ids": [i + 1, 2, 3]} for i in range(20)]
    with LLM(
        checkpoint, plan="P2->T2", dtype="float32", device_memory="16MiB", host_kv="1MiB", max_running=4
    ) as llm:
        first = iter(llm.generate(iter(prompts), params))
        kept = next(first).outputs[0].token_ids
        first.close()  # type: ignore[attr-defined]
        again = llm.generate(prompts, params)
        assert isinstance(again, list)
        assert again[0].outputs[0].token_ids == kept
        assert len(again) == 20
