"""vLLM's arguments: each is mapped, warned of once, or refused with what to do; none is dropped in silence."""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import seesaw.compat.vllm_engine as vllm_engine
from seesaw import LLM, SamplingParams, TokensPrompt
from seesaw.compat.vllm_arguments import REFUSED, WITHOUT_EFFECT
from seesaw.compat.vllm_calls import check_call, check_prompt, missing
from seesaw.compat.vllm_engine import engine_options
from seesaw.core.errors import ConfigError, LayoutError, ModelError, RequestError
from seesaw.core.foreign import Foreign
from seesaw.core.vllm_sampling import FOREIGN, UNBOUNDED
from seesaw.defaults import default_sampling
from seesaw.device.gpus import Gpu
from seesaw.hub import find_model
from seesaw.options import Options
from tests.compat.peer import RECORD

OWN = set(Options.__dataclass_fields__) - {"model"}
GIB = 1 << 30


def options(**given: Any) -> dict[str, Any]:
    """What is made of arguments, none of which may be warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return engine_options(given, OWN)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"tensor_parallel_size": 4}, {"ranks": 4}),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 2}, {"ranks": 8}),
        ({"tensor_parallel_size": 4, "plan": "P4->T4"}, {"plan": "P4->T4"}),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 4096}, {"max_running": 64, "chunk": 4096}),
        ({"max_num_seqs": 64, "max_running": 64}, {"max_running": 64}),
        ({"kv_offloading_size": 8.5}, {"host_kv": int(8.5 * GIB)}),
        ({"swap_space": 4, "tensor_parallel_size": 2}, {"host_kv": 8 * GIB, "ranks": 2}),
        ({"dtype": "half"}, {"dtype": "float16"}),
        ({"max_model_len": -1, "seed": None, "quantization": None, "block_size": None}, {}),
        ({"max_model_len": 512, "seed": 3, "load_format": "dummy"}, None),
        ({"enable_lora": False, "kv_cache_dtype": "auto", "runner": "generate", "hf_overrides": {}}, {}),
        ({"trust_remote_code": False, "enforce_eager": False, "speculative_config": None}, {}),
    ],
)
def test_arguments_with_a_meaning_are_mapped(given: dict[str, Any], wanted: dict[str, Any] | None) -> None:
    assert options(**given) == (given if wanted is None else wanted)


def test_torch_types_are_known_by_name() -> None:
    import torch

    assert options(dtype=torch.bfloat16) == {"dtype": "bfloat16"}


def test_a_share_of_gpu_memory_is_a_budget_of_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu("a", 24 * GIB, 20 * GIB), Gpu("b", 16 * GIB, 16 * GIB)]
    monkeypatch.setattr(vllm_engine, "visible_gpus", lambda: gpus)
    assert options(gpu_memory_utilization=0.5, device="cuda")["device_memory"] == 8 * GIB
    shared = options(gpu_memory_utilization=0.5, device="cuda", ranks_per_gpu=2)
    assert shared["device_memory"] == 4 * GIB


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"quantization": "awq"}, ConfigError, "quantization='awq': quantised weights .* take a 16-bit"),
        ({"trust_remote_code": True}, ConfigError, "never run; leave it out"),
        ({"enable_lora": True}, ConfigError, "merge the adapter"),
        ({"speculative_config": {"method": "ngram"}}, ConfigError, "no speculative decoding; leave it out"),
        ({"kv_cache_dtype": "fp8"}, ConfigError, "16-bit"),
        ({"runner": "pooling"}, ConfigError, "keep vLLM for embeddings"),
        ({"logits_processors": [object]}, ConfigError, "leave it out"),
        ({"hf_overrides": {"rope_theta": 1}}, ConfigError, "config.json"),
        ({"logprobs_mode": "processed_logprobs"}, ConfigError, "the model itself"),
        ({"tensor_paralel_size": 2}, ConfigError, "unknown argument .*; did you mean 'tensor_parallel_size'"),
        ({"tensor_parallel_size": 0}, ConfigError, "tensor_parallel_size=0: must be"),
        ({"tensor_parallel_size": 2, "plan": "T4"}, LayoutError, "plan T4 has 4 ranks, but tensor_parallel_size=2"),
        ({"tensor_parallel_size": 2, "ranks": 4}, ConfigError, "ranks=4, but tensor_parallel_size=2"),
        ({"max_num_seqs": 2, "max_running": 4}, ConfigError, "the same setting; give one of them"),
        ({"gpu_memory_utilization": 1.5}, ConfigError, "greater than 0 and at most 1"),
    ],
)  # fmt: skip
def test_what_would_give_other_answers_is_refused(
    given: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        engine_options(given, OWN)


def test_what_has_no_effect_is_warned_of_once() -> None:
    given = {
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "gpu_memory_utilization": 0.9,
        "swap_space": 0,
    }
    with pytest.warns(UserWarning) as caught:
        assert engine_options({**given, "disable_log_stats": True, "max_num_seqs": 2}, OWN) == {
            "max_running": 2
        }
    (warning,) = caught
    said = str(warning.message)
    assert all(f"{name} (" in said for name in [*given, "disable_log_stats"])
    assert "every prompt is computed" in said and "max_num_seqs" not in said


def test_every_argument_of_vllm_is_known() -> None:
    """Those of the release that was recorded; `test_vllm_script` asks the one that is installed."""
    check_names(json.loads(RECORD.read_text())["names"])


def check_names(names: dict[str, list[str]]) -> None:
    init = set(inspect.signature(LLM.__init__).parameters)
    mapped = set(vllm_engine._MAPPED)
    assert set(names["LLM"]) <= OWN | init | mapped | set(REFUSED) | set(WITHOUT_EFFECT)
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    held_back = {"output_kind", "stream_interval", "skip_clone", "spaces_between_special_tokens"}
    held_back |= {"prompt_logprob_start"}  # `prompt_logprobs_start` here
    internal = {"output_text_buffer_length"}
    assert set(names["SamplingParams"]) - internal <= fields | set(FOREIGN) | held_back
    assert not (set(REFUSED) & set(WITHOUT_EFFECT) or (set(REFUSED) | set(WITHOUT_EFFECT)) & OWN)
    for method in ("generate", "chat"):
        own = set(inspect.signature(getattr(LLM, method)).parameters)
        for name in set(names[method]) - own:
            check_call(method, {name: None}, others=method == "chat")


@pytest.mark.parametrize("foreign", [*REFUSED.items(), *FOREIGN.items()], ids=lambda item: item[0])
def test_a_refusal_says_why(foreign: tuple[str, Foreign]) -> None:
    name, what = foreign
    assert what.asks(object()) and not what.asks(None), name
    assert len(what.reason.split()) >= 4, f"{name}: {what.reason}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"logit_bias": {5: 1.0}}, "logit_bias={5: 1.0}: tokens cannot be forced"),
        ({"structured_outputs": object()}, "grammar or schema"),
        ({"bad_words": ["x"]}, "keep these prompts in vLLM"),
        ({"logprob_token_ids": [3]}, "use logprobs, at most 20"),
        ({"best_of": 3}, "use n and choose among them"),
        ({"logits_processors": [print]}, "leave it out"),
        ({"truncate_prompt_tokens": 5}, "cut the prompt"),
        ({"skip_special_tokens": False, "spaces_between_special_tokens": False}, "own spaces"),
        ({"temprature": 0}, "unknown argument 'temprature'; did you mean 'temperature'"),
        ({"detokenize": False, "stop": "x"}, "stop strings need the text"),
        ({"logprobs": -1}, "between 0 and 20"),
    ],
)
def test_sampling_that_is_not_here_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        SamplingParams(**given)


def test_neutral_fields_of_vllm_pass() -> None:
    given: dict[str, Any] = {
        **{"logit_bias": None, "allowed_token_ids": None, "bad_words": [], "best_of": 1, "output_kind": 2},
        **{"prompt_logprobs": None, "spaces_between_special_tokens": False, "extra_args": {}, "seed": -1},
        **{"truncate_prompt_tokens": None, "use_beam_search": False, "length_penalty": 1.0, "stop": None},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SamplingParams(**given) == SamplingParams()
        assert SamplingParams(n=3, best_of=3) == SamplingParams(n=3)  # type: ignore[call-arg]
        assert SamplingParams(max_tokens=None).max_tokens == UNBOUNDED  # type: ignore[arg-type]
    copy = dataclasses.replace(SamplingParams(max_tokens=5), temperature=0)
    assert (copy.max_tokens, copy.temperature) == (5, 0)
    with pytest.warns(UserWarning, match="flat_logprobs"):
        SamplingParams(flat_logprobs=True)  # type: ignore[call-arg]


def test_calls_and_prompts_that_are_not_here_are_refused() -> None:
    with pytest.raises(RequestError, match=r"generate: lora_request.*merge"):
        check_call("generate", {"lora_request": object()})
    with pytest.raises(RequestError, match="unknown argument 'lora_requests'; did you mean 'lora_request'"):
        check_call("generate", {"lora_requests": None})
    with pytest.warns(UserWarning, match="priority"):
        assert check_call("chat", {"priority": 3, "tools": []}, others=True) == {"tools": []}
    with pytest.raises(RequestError, match="multi_modal_data: only text"):
        check_prompt({"prompt": "x", "multi_modal_data": {"image": 1}})
    check_prompt({**TokensPrompt(prompt_token_ids=[1]), "multi_modal_data": None})
    assert "keep vLLM for embeddings" in str(missing("embed"))
    assert str(missing("generat")) == "LLM has no 'generat'"


def test_recommended_settings_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert default_sampling(tmp_path) == {}
    path.write_text(
        '{"temperature": 0.6, "top_k": null, "max_new_tokens": 7, "do_sample": true, "bos_token_id": 1}'
    )
    assert default_sampling(tmp_path) == {"temperature": 0.6, "max_tokens": 7}
    assert default_sampling(tmp_path, "vllm") == {}
    assert default_sampling(tmp_path / "x", str(tmp_path), {"temperature": 0.1})["temperature"] == 0.1
    path.write_text('{"temperature": -1}')
    with pytest.raises(ModelError, match=r"temperature=-1.*generation_config='vllm'"):
        default_sampling(tmp_path)
    path.write_text("[")
    with pytest.raises(ModelError, match="cannot be read"):
        default_sampling(tmp_path)
    with pytest.raises(ConfigError, match="choose auto, vllm or a folder"):
        default_sampling(tmp_path, "nowhere")


def test_a_model_is_found_by_its_name(tmp_path: Path) -> None:
    """In a cache laid out as Hugging Face does."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--small" / "snapshots" / commit
    (tmp_path / "models--org--small" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--small" / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert find_model("org/small", cache=str(tmp_path)) == snapshot
    assert find_model(snapshot) == snapshot
    assert find_model("/no/such/folder") == Path("/no/such/folder")
    with pytest.raises(
        ModelError, match="download it first: hf download org/small --revision v2 --cache-dir"
    ):
        find_model("org/small", revision="v2", cache=str(tmp_path))
    with pytest.raises(ModelError, match="is a folder, which has none"):
        find_model(snapshot, revision="v2")
