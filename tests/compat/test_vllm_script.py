"""A script and a batch file for vLLM run here, and give what vLLM gives."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from seesaw import LLM, SamplingParams
from seesaw.cli.main import app
from seesaw.core.errors import ConfigError, RequestError
from tests.compat import batch
from tests.compat.peer import RECOMMENDED, RECORD, SCRIPT, make_model, names, told_by_batch, told_by_script
from tests.compat.test_vllm_arguments import check_names

PEER = os.environ.get("SEESAW_VLLM_PYTHON")
"""The Python of vLLM's environment."""
LOGPROB_ERROR = 1e-4
"""Between two float32 implementations; the largest seen is 2e-5, in a sum over 40 tokens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("compat") / "model")


@pytest.fixture(scope="module")
def script(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script writes with nothing but its import changed."""
    path = tmp_path_factory.mktemp("script") / "told.json"
    text = SCRIPT.read_text()
    changed = text.replace("from vllm import", "from seesaw import")
    assert changed != text
    space: dict[str, Any] = {"__name__": "script"}
    exec(compile(changed, str(SCRIPT), "exec"), space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space["main"](str(model), str(path))
    told: dict[str, Any] = json.loads(path.read_text())
    return told


@pytest.fixture(scope="module")
def lines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The lines of the batch job, answers and errors, by custom_id."""
    folder = tmp_path_factory.mktemp("batch")
    source, output = folder / "batch.jsonl", folder / "out.jsonl"
    batch.write_batch(source)
    files = ["-i", str(source), "-o", str(output), "--model", str(model), "--served-model-name", "extract"]
    done = CliRunner().invoke(app, ["run", *files, "--dtype", "float32", "--ranks", "1"])
    assert done.exit_code == 1, done.output
    found = {}
    for path in (output, folder / "out.errors.jsonl"):
        found |= {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}
    return found


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """What vLLM 0.32 told, on a CPU in float32."""
    told: dict[str, Any] = json.loads(RECORD.read_text())
    return told


def test_the_script_tells_what_vllm_told(script: dict[str, Any], recorded: dict[str, Any]) -> None:
    compare_scripts(script, recorded["script"])


def test_the_batch_is_answered_as_by_vllm(lines: dict[str, Any], recorded: dict[str, Any]) -> None:
    compare_batches(lines, recorded["batch"])


def test_rows_that_are_refused_name_the_field(lines: dict[str, Any]) -> None:
    for name, (_, said) in (batch.FAILED | batch.REFUSED).items():
        response = lines[name]["response"]
        assert 400 <= response["status_code"] < 500
        assert said in response["body"]["error"]["message"]
    for url in batch.ELSEWHERE:
        assert f"found '{url}'" in lines[url]["error"]["message"]


@pytest.mark.slow
@pytest.mark.skipif(PEER is None, reason="needs SEESAW_VLLM_PYTHON, the Python of vLLM's environment")
@pytest.mark.timeout(1800)
def test_the_installed_vllm_tells_the_same(
    script: dict[str, Any], lines: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    assert PEER is not None
    check_names(names(PEER))
    compare_scripts(script, told_by_script(PEER, model, tmp_path))
    compare_batches(lines, told_by_batch(PEER, model, tmp_path))


def compare_scripts(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["recommendation"] == theirs["recommendation"]
    assert ours["answers"].keys() == theirs["answers"].keys()
    for case, told in theirs["answers"].items():
        for mine, other in zip(ours["answers"][case], told, strict=True):
            for field in other.keys() - {"outputs"}:
                assert mine[field] == other[field], f"{case}: {field}"
            for a, b in zip(mine["outputs"], other["outputs"], strict=True):
                _compare_outputs(case, a, b)


def _compare_outputs(case: str, mine: dict[str, Any], other: dict[str, Any]) -> None:
    for field in other.keys() - {"logprobs", "cumulative_logprob"}:
        assert mine[field] == other[field], f"{case}: {field}"
    if other["logprobs"] is None:
        assert mine["logprobs"] is None and mine["cumulative_logprob"] is None
        return
    assert mine["cumulative_logprob"] == pytest.approx(other["cumulative_logprob"], abs=LOGPROB_ERROR)
    for ours, theirs in zip(mine["logprobs"], other["logprobs"], strict=True):
        assert [(t, rank, text) for t, _, rank, text in ours] == [
            (t, rank, text) for t, _, rank, text in theirs
        ]
        assert [p[1] for p in ours] == pytest.approx([p[1] for p in theirs], abs=LOGPROB_ERROR)


def compare_batches(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name in batch.ANSWERED:
        mine, other = ours[name]["response"], theirs[name]["response"]
        assert mine["status_code"] == other["status_code"] == 200, name
        for field in ("object", "model"):
            assert mine["body"][field] == other["body"][field]
        assert mine["body"]["usage"].items() <= other["body"]["usage"].items(), name
        for a, b in zip(mine["body"]["choices"], other["body"]["choices"], strict=True):
            assert (a["index"], a["finish_reason"]) == (b["index"], b["finish_reason"]), name
            assert a["message"].items() <= b["message"].items(), name
            _compare_chat_logprobs(a["logprobs"], b["logprobs"])
    for name in (*batch.FAILED, *batch.ELSEWHERE):
        assert theirs[name]["response"]["status_code"] >= 400 and theirs[name]["error"], name


def _compare_chat_logprobs(mine: dict[str, Any] | None, other: dict[str, Any] | None) -> None:
    if mine is None or other is None:
        assert mine is None and other is None
        return
    for ours, theirs in zip(mine["content"], other["content"], strict=True):
        for a, b in ((ours, theirs), *zip(ours["top_logprobs"], theirs["top_logprobs"], strict=True)):
            assert (a["token"], a["bytes"]) == (b["token"], b["bytes"])
            assert a["logprob"] == pytest.approx(b["logprob"], abs=LOGPROB_ERROR)


# ---- what scripts do beside ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, plan="T1", dtype="float32", device_memory="24MiB", host_kv="2MiB", max_running=8) as llm:
        yield llm


def test_a_bar_counts_prompts(llm: LLM) -> None:
    class Bar:
        def __init__(self, **given: Any) -> None:
            bars.append(self)
            self.total, self.count, self.closed = given["total"], 0, False

        def update(self, count: int) -> None:
            self.count += count

        def close(self) -> None:
            self.closed = True

    bars: list[Bar] = []
    params = SamplingParams(temperature=0, max_tokens=2)
    outputs = llm.generate([[1, 5], [1, 6], [1, 7]], params, use_tqdm=Bar)
    (bar,) = bars
    assert (bar.total, bar.count, bar.closed) == (3, 3, True)
    assert isinstance(outputs, list)
    assert list(outputs[2].prompt_token_ids) + outputs[2].outputs[0].token_ids
    assert outputs[2].prompt_token_ids == [1, 7]


def test_what_has_a_length_gives_a_list(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2)
    prompts = {"a": [1, 5], "b": [1, 6]}
    outputs = llm.generate(prompts.values(), params)
    assert isinstance(outputs, list) and len(outputs) == 2
    assert llm.generate([], params) == []
    with pytest.raises(ConfigError, match="2 prompts, but 3 sampling_params"):
        llm.generate([[1], [2]], [params] * 3)


def test_the_tokenizer_is_a_copy(llm: LLM) -> None:
    """Truncation that a script asks of it would else cut prompts of the engine."""
    text = "We need 235 door hinges in Vilnius on 12.7.2027."
    tokenizer = llm.get_tokenizer()
    assert tokenizer is llm.get_tokenizer()
    assert len(tokenizer(text, truncation=True, max_length=3)["input_ids"]) == 3
    (output,) = llm.generate(text, SamplingParams(temperature=0, max_tokens=1))
    assert len(output.prompt_token_ids) > 3


def test_recommended_settings_serve_where_none_are_given(llm: LLM, model: Path) -> None:
    wanted = {"temperature": 0.6, "top_k": 1, "repetition_penalty": 1.05, "max_tokens": 30}
    assert RECOMMENDED["max_new_tokens"] == 30
    assert llm.get_default_sampling_params() == SamplingParams(**wanted)


def test_a_template_may_be_given(llm: LLM) -> None:
    template = "{{ messages[0].content }}"
    (output,) = llm.chat([{"role": "user", "content": "hello"}], chat_template=template)
    assert output.prompt == "hello"
    with pytest.raises(RequestError, match="exclude each other"):
        llm.chat([{"role": "user", "content": "x"}], add_generation_prompt=True, continue_final_message=True)


def test_methods_of_other_engines_say_what_to_do(llm: LLM) -> None:
    with pytest.raises(AttributeError, match="keep vLLM for embeddings"):
        llm.embed("x")
    assert not hasattr(llm, "beam_search")


def test_a_template_may_be_a_file(tmp_path: Path) -> None:
    from seesaw.llm import _read_template

    path = tmp_path / "t.jinja"
    path.write_text("{{ x }}")
    assert _read_template(path) == _read_template(str(path)) == _read_template("{{ x }}") == "{{ x }}"
    assert _read_template(None) is None
    with pytest.raises(ConfigError, match="neither a template nor a file of one"):
        _read_template("nowhere")
