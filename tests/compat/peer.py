"""What vLLM makes of the script and of the batch file, run or recorded.

`python -m tests.compat.peer PYTHON` records it anew, PYTHON being that of vLLM's environment
(`benchmarks/vllm_peer/setup.sh`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.compat.batch import write_batch

FOLDER = Path(__file__).parent
SCRIPT = FOLDER / "vllm_script.py"
RECORD = FOLDER / "vllm_answers.json"
EXTRACT = FOLDER.parents[1] / "examples" / "extract" / "model"
RECOMMENDED = {"temperature": 0.6, "top_k": 1, "repetition_penalty": 1.05, "max_new_tokens": 30}


def make_model(folder: Path) -> Path:
    """The example's model, whose authors recommend settings."""
    shutil.copytree(EXTRACT, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | RECOMMENDED))
    return folder


def told_by_script(python: str, model: Path, folder: Path) -> dict[str, Any]:
    """What the script writes under vLLM."""
    path = folder / "script.json"
    _run(python, str(SCRIPT), str(model), str(path))
    told: dict[str, Any] = json.loads(path.read_text())
    return told


def told_by_batch(python: str, model: Path, folder: Path) -> dict[str, Any]:
    """The lines of `vllm run-batch`, by custom_id."""
    path, output = folder / "batch.jsonl", folder / "batch.vllm.jsonl"
    write_batch(path)
    files = ("-i", str(path), "-o", str(output), "--model", str(model), "--served-model-name", "extract")
    _run(python, "-m", "vllm.entrypoints.openai.run_batch", *files, "--dtype", "float32", "--enforce-eager")
    return {line["custom_id"]: line for line in map(json.loads, output.read_text().splitlines())}


def names(python: str) -> dict[str, list[str]]:
    """The arguments of vLLM's calls and the fields of its `SamplingParams`."""
    code = """
import dataclasses, inspect, json
from vllm import LLM, EngineArgs, SamplingParams
given = lambda call: [name for name in inspect.signature(call).parameters if name not in ("self", "kwargs")]
print("NAMES", json.dumps({
    "LLM": sorted({field.name for field in dataclasses.fields(EngineArgs)} | set(given(LLM.__init__))),
    "SamplingParams": [name for name in SamplingParams.__struct_fields__ if name[0] != "_"],
    "generate": given(LLM.generate),
    "chat": given(LLM.chat),
}))
"""
    lines = _run(python, "-c", code).splitlines()
    found: dict[str, list[str]] = json.loads(next(line for line in lines if line.startswith("NAMES"))[5:])
    return found


def _run(python: str, *arguments: str) -> str:
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | quiet
    done = subprocess.run(
        [python, *arguments], env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _short(told: dict[str, Any]) -> dict[str, Any]:
    """Without the prompts, of which there are many."""
    return {key: value for key, value in told.items() if key not in ("prompt", "prompt_token_ids")}


def record(python: str) -> None:
    """Write `RECORD`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        everything = {
            "names": names(python),
            "batch": told_by_batch(python, model, folder),
            "script": told_by_script(python, model, folder),
        }
    for case, each in everything["script"]["answers"].items():
        everything["script"]["answers"][case] = [_short(told) for told in each]
    RECORD.write_text(json.dumps(everything, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    record(sys.argv[1])
