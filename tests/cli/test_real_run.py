"""`seesaw run` as a process, on the real engine: answers, poison, interruption."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from seesaw.cli.main import app
from seesaw.text import Tokenizer
from tests.checkpoints import clear_prompts, make_checkpoint
from tests.jobs.contract import check_answer, check_failure, read
from tests.jobs.poison import POISONS, batch
from tests.test_text import save

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "llama", vocab_size=420, eos_token_id=2)
    save(path, "byte-level")
    return path


def command(model: Path, source: Path, *options: str) -> list[str]:
    memory = ["--device-memory", "16MiB", "--host-kv", "1MiB", "--max-model-len", "200", "--dtype", "float32"]
    files = ["--model", str(model), "--input", str(source), "--output", str(source.with_name("out.jsonl"))]
    return [sys.executable, "-m", "seesaw", "run", *files, *memory, *options]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("plan", ["P2->T2", "T1"])
def test_answers_are_those_of_transformers(plan: str, model: Path, tmp_path: Path) -> None:
    prompts, expected = clear_prompts(model, [3, 20, 60, 7, 33], NEW_TOKENS)
    tokenizer = Tokenizer.load(model)
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    messages = [{"role": "user", "content": "Stop! Ça va?"}]
    rows = [
        *({"id": f"tokens-{i}", "prompt_token_ids": p, **greedy} for i, p in enumerate(prompts)),
        batch("text", prompt="The quick brown fox", model="m", **greedy),
        batch("text-tokens", prompt=tokenizer.encode("The quick brown fox"), **greedy),
        batch("chat", "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=2, **greedy),
        {"id": "chat-tokens", "prompt": tokenizer.render_chat(messages), "logprobs": 2, **greedy},
        {"id": "several", "prompt": "Die", "n": 3, "seed": 5, "max_tokens": 4},
    ]
    result = subprocess.run(command(model, write(tmp_path / "in.jsonl", rows), "--plan", plan), check=False)
    assert result.returncode == 0
    lines = {line["custom_id"]: line for line in read(tmp_path / "out.jsonl")}
    assert set(lines) == {row.get("id") or row["custom_id"] for row in rows}
    bodies = {name: line["response"]["body"] for name, line in lines.items()}
    for name, line in lines.items():
        check_answer(line, "chat.completion" if name == "chat" else "text_completion")
    for i, tokens in enumerate(expected):
        assert bodies[f"tokens-{i}"]["choices"][0]["text"] == tokenizer.decode(tokens)
        assert bodies[f"tokens-{i}"]["usage"]["completion_tokens"] == NEW_TOKENS
    for asked, told in (("text", "text-tokens"), ("chat", "chat-tokens")):
        choice, other = bodies[asked]["choices"][0], bodies[told]["choices"][0]
        assert (choice["message"]["content"] if asked == "chat" else choice["text"]) == other["text"]
        assert bodies[asked]["usage"] == bodies[told]["usage"]
    content = bodies["chat"]["choices"][0]["logprobs"]["content"]
    assert [t["logprob"] for t in content] == bodies["chat-tokens"]["choices"][0]["logprobs"][
        "token_logprobs"
    ]
    assert [t["token"] for t in content] == [t["top_logprobs"][0]["token"] for t in content]
    assert len({choice["text"] for choice in bodies["several"]["choices"]}) > 1


def test_poison_among_good_rows(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    good = [b'{"id": "good-%d", "prompt": "row %d", "max_tokens": 3}' % (i, i) for i in range(40)]
    bad = [p.line.replace(b"@ID@", b"bad-%d" % i) for i, p in enumerate(POISONS)]
    source.write_bytes(b"\n".join([*good[:20], *bad, *good[20:]]))
    options = ("--plan", "P2->T2", "--served-model-name", "m")
    result = subprocess.run(command(model, source, *options), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"40 answered, {len(POISONS)} failed" in result.stdout
    assert len(read(tmp_path / "out.jsonl")) == 40
    failures = {line["custom_id"]: line for line in read(tmp_path / "out.errors.jsonl")}
    assert len(failures) == len(POISONS)
    for i, poison in enumerate(POISONS):
        line = failures[f"bad-{i}" if poison.has_id else f"line-{21 + i}"]
        # what a message lacks is for the tokeniser to say, and the model's for the context
        check_failure(line, code=poison.code, status=poison.status, param=poison.param)


def endless(path: Path) -> Path:
    """A job that lasts a while."""
    return write(path, [{"prompt": "go", "max_tokens": 50, "ignore_eos": True}] * 5000)


def wait_for_answers(part: Path) -> None:
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_job_keeps_its_answers(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    line = command(model, endless(tmp_path / "in.jsonl"), "--plan", "P2->T2")
    job = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_answers(tmp_path / "out.jsonl.part")
    if number == signal.SIGINT:
        os.killpg(job.pid, number)  # as a terminal does
    else:
        job.send_signal(number)
    out, err = job.communicate(timeout=30)
    assert job.returncode == 3, err
    assert "interrupted" in err
    assert "Traceback" not in err
    answers = read(tmp_path / "out.jsonl.part")
    assert f"{len(answers):,} answered" in out
    assert answers
    assert not (tmp_path / "out.jsonl").exists()


def test_on_a_terminal_progress_is_shown(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "go", "max_tokens": 30, "ignore_eos": True}] * 250)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(model, source, "--plan", "T2"), stderr=theirs, stdout=subprocess.DEVNULL
    ) as job:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                break
    os.close(ours)
    assert job.returncode == 0
    assert b"rows 250/250" in shown
    assert b"mixed" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plan", "T7"], "T7"),
        (["--device-memory", "1KiB"], "device memory"),
        (["--device", "tpu"], "'tpu'"),
    ],
)
def test_what_the_engine_refuses_is_one_sentence(
    options: list[str], said: str, model: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    result = CliRunner().invoke(app, command(model, source, *options)[3:], catch_exceptions=False)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_table_through_the_engine(model: Path, tmp_path: Path) -> None:
    """A CSV file and JSON lines from standard input, with the same prompts, into one Parquet file."""
    texts = ["The quick", 'brown "fox"\njumps', "Ça va?"]
    greedy = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
    (tmp_path / "in.csv").write_text(
        "question,temperature,max_tokens,ignore_eos,topic\n"
        + "".join('"{}",0,5,true,t{}\n'.format(text.replace('"', '""'), i) for i, text in enumerate(texts))
    )
    lines = b"".join(json.dumps({"question": text, **greedy}).encode() + b"\n" for text in texts)
    output = tmp_path / "out.parquet"
    options = ["--input", "-", "--output", str(output), "--plan", "P2->T2", "--prompt-column", "question"]
    result = subprocess.run(command(model, tmp_path / "in.csv", *options), input=lines, check=False)
    assert result.returncode == 0
    found = {row["id"]: row for row in pq.read_table(output).to_pylist()}
    assert set(found) == {f"{where}-{i}" for where in ("in.csv:row", "stdin:line") for i in (1, 2, 3)}
    for i in (1, 2, 3):
        assert found[f"in.csv:row-{i}"]["text"] == found[f"stdin:line-{i}"]["text"] != ""
        assert found[f"in.csv:row-{i}"]["topic"] == f"t{i - 1}"
        assert found[f"stdin:line-{i}"]["topic"] is None
