"""Where pipeline stages of prefill share the FFN of a layer, tokens are still transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from seesaw import LLM, SamplingParams
from tests.checkpoints import clear_prompts, make_checkpoint

NEW_TOKENS = 24
LENGTHS = (1, 2, 17, 64, 65, 129, 257, 5)
_Oracle = tuple[Path, list[list[int]], list[list[int]], str]
LAYERS = 6
"""They leave two and four stages uneven, since prefill spends next to nothing on the last one."""


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Oracle:
    """Checkpoint, prompts, what comes behind them, and a host buffer for some of them at a time: of native kernels,
    and with biases and kernels of torch."""
    sizes, host_kv = ({"head_dim": 16}, "720KiB") if request.param == "llama" else ({}, "460KiB")
    path = make_checkpoint(tmp_path_factory.mktemp("model"), request.param, num_hidden_layers=LAYERS, **sizes)
    return path, *clear_prompts(path, LENGTHS, NEW_TOKENS), host_kv


@pytest.mark.parametrize("transition", ["delta", "resident", "reload"])
@pytest.mark.parametrize("plan", ["P2->T2", "P4->P2T2", "P2T2->T4"])
def test_equals_transformers(oracle: _Oracle, plan: str, transition: str) -> None:
    """Over several rounds, so that shares of FFNs are given up and come back."""
    path, prompts, expected, host_kv = oracle
    with LLM(
        path,
        plan=plan,
        dtype="float32",
        device_memory="16MiB",
        host_kv=host_kv,
        block_size=8,
        chunk=64,
        max_running=4,
        max_model_len=300,
        transition=transition,
        tokenizer=False,
    ) as llm:
        prefill, decode = llm.deployment.shardings
        assert any(prefill.carried) and not decode.carried
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert len(llm.stats().transitions) >= 3
