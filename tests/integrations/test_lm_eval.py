"""`seesaw eval` and the harness's own model `hf` on one checkpoint: the same results, requests and samples."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from seesaw.cli import evaluate
from seesaw.cli.main import app

EXTRACT = Path(__file__).parents[2] / "examples" / "extract"
ROWS = 12
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
{body}
metadata:
  version: 1
"""
CHAT = "<s><user>{{text}}</s><assistant>"
"""As the model's template has it: a text that begins with the token that else is put before it."""
BODIES = {
    "whole_answer": (
        "multiple_choice",
        f'doc_to_text: "{CHAT}"\ndoc_to_target: gold\ndoc_to_choice: choices\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm",
    ),
    "one_letter": (
        "multiple_choice",
        'doc_to_text: "{{text}} A, B, C or D?"\ndoc_to_target: gold\ndoc_to_choice: ["A", "B", "C", "D"]\n'
        "metric_list:\n  - metric: acc",
    ),
    "no_context": (
        "multiple_choice",
        'doc_to_text: ""\ndoc_to_target: gold\ndoc_to_choice: choices\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc",
    ),
    "read_order": (
        "generate_until",
        f'doc_to_text: "{CHAT}"\ndoc_to_target: answer\n'
        "generation_kwargs:\n  until: ['\"city\"']\n  max_gen_toks: 120\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match",
    ),
    "pages": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{page}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n  - metric: bits_per_byte",
    ),
}


def write_tasks(folder: Path) -> None:
    """Tasks of every kind over the example's orders; some pages are longer than the model's 512 tokens."""
    lines = (EXTRACT / "orders.jsonl").read_text().splitlines()[: 3 * ROWS]
    texts = [json.loads(line)["body"]["messages"][-1]["content"] for line in lines]
    lines = (EXTRACT / "orders.expected.jsonl").read_text().splitlines()[: 3 * ROWS]
    answers = [json.loads(line)["answer"] for line in lines]
    rng = random.Random(0)
    rows = []
    for i in range(ROWS):
        choices = [answers[i], *rng.sample(answers[ROWS:], 3)]
        rng.shuffle(choices)
        row = {"text": texts[i], "choices": choices, "gold": choices.index(answers[i])}
        rows.append(
            row | {"answer": answers[i].split('"city"')[0], "page": " ".join(texts[i : i + 1 + 2 * i])}
        )
    data = folder / "orders.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (kind, body) in BODIES.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, body=body))


def run(folder: Path, name: str, *arguments: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Results by task and metric, and samples by task, of the command with these arguments."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    out = folder / name
    command = [sys.executable, "-m", "seesaw", "eval", *arguments, "--tasks", ",".join(BODIES)]
    command += ["--include_path", str(folder), "--output_path", str(out), "--log_samples"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (results,) = out.rglob("results_*.json")
    found = {}
    for task in BODIES:
        (path,) = out.rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        found[task] = sorted(samples, key=lambda sample: sample["doc_id"])
    return json.loads(results.read_text())["results"], found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not all(map(find_spec, ("lm_eval", "accelerate"))), reason="needs lm_eval and accelerate")
def test_results_equal_those_of_transformers(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    model = f"pretrained={EXTRACT / 'model'},dtype=float32"
    hf, hf_samples = run(
        tmp_path, "hf", "--model", "hf", "--device", "cpu", "--model_args", model, "--batch_size", "4"
    )
    plan = "plan=P2->T2,ranks=2,device_memory=64MiB,host_kv=16MiB"
    ours, our_samples = run(tmp_path, "seesaw", "--model_args", f"{model},{plan}")
    assert ours["whole_answer"]["acc,none"] > 0.9 and ours["read_order"]["exact_match,none"] > 0.9
    for task in BODIES:
        for metric, value in hf[task].items():
            # perplexity is the exponential of a sum, which `hf` makes in float32
            close = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert ours[task][metric] == close, (task, metric)
        assert len(our_samples[task]) == len(hf_samples[task]) == ROWS
        for our, their in zip(our_samples[task], hf_samples[task], strict=True):
            check_sample(our, their, BODIES[task][0])


def check_sample(our: dict[str, Any], their: dict[str, Any], kind: str) -> None:
    assert our["arguments"] == their["arguments"]
    for (one,), (other,) in zip(our["resps"], their["resps"], strict=True):
        if kind == "multiple_choice":
            assert float(one[0]) == pytest.approx(float(other[0]), abs=1e-4)
            assert str(one[1]) == str(other[1])  # whether greedy choice gives it
        elif kind == "loglikelihood_rolling":
            assert float(one) == pytest.approx(float(other), rel=1e-6)
        else:
            assert one == other


def test_the_model_is_ours_unless_another_is_named() -> None:
    assert evaluate.with_model(["--tasks", "x"]) == ["--model", "seesaw", "--tasks", "x"]
    assert evaluate.with_model(["run", "--tasks", "x"]) == ["run", "--model", "seesaw", "--tasks", "x"]
    for named in (
        ["--model", "hf"],
        ["--model=hf"],
        ["-M", "hf"],
        ["run", "--config", "a.yaml"],
        ["ls", "tasks"],
        [],
    ):
        assert evaluate.with_model(named) == named


def test_a_missing_harness_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    ended = CliRunner().invoke(app, ["eval", "--tasks", "hellaswag", "--model_args", "pretrained=x"])
    assert ended.exit_code == 2
    assert "pip install 'seesaw-llm[eval]'" in ended.output
