"""vLLM as a contestant; run by path, under the Python of vLLM's own environment.

Options: `layout` (`TP1`, `TP2`, `PP2`, …), `dtype`, `kv_memory` (bytes of KV cache of each rank), `max_model_len`,
`max_num_batched_tokens`, `max_num_seqs`, `eager`, `openmp` (`intel` loads Intel's library, which vLLM recommends, in
place of the one that comes with torch). Ranks share the cores the process may use.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any

from service import Measured, serve  # type: ignore[import-not-found]  # lies beside this file


class VllmEngine:
    """See `service.ServedEngine`."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        layout = str(options["layout"])
        kind, ranks = layout[:2], int(layout[2:])
        _set_environment(ranks)
        if "openmp" in options:
            _choose_openmp(str(options["openmp"]))
        vllm: Any = importlib.import_module("vllm")
        self._params = vllm.SamplingParams
        engine = {name: options[name] for name in _PASSED if name in options}
        self._llm = vllm.LLM(
            model=model,
            load_format="dummy",
            kv_cache_memory_bytes=int(options["kv_memory"]),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            enforce_eager=bool(options.get("eager", False)),
            tensor_parallel_size=ranks if kind == "TP" else 1,
            pipeline_parallel_size=ranks if kind == "PP" else 1,
            distributed_executor_backend="mp" if ranks > 1 else None,
            **engine,
        )
        torch: Any = importlib.import_module("torch")
        self.about = {"vllm": vllm.__version__, "torch": torch.__version__, **options, "layout": layout}

    def run(self, prompts: list[list[int]], outputs: list[int]) -> Measured:
        """See `service.ServedEngine.run`."""
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [
            self._params(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in outputs
        ]
        started = time.perf_counter()
        answers = self._llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return Measured(seconds, [len(answer.outputs[0].token_ids) for answer in answers])

    def close(self) -> None:
        """See `service.ServedEngine.close`."""
        del self._llm


_PASSED = ("dtype", "max_model_len", "max_num_batched_tokens", "max_num_seqs")


def _set_environment(ranks: int) -> None:
    """Must be done before vllm is imported. Cores are divided among the ranks, neighbours together."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    groups = [cores[i * share : (i + 1) * share] or [cores[i % len(cores)]] for i in range(ranks)]
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override `kv_memory`
    os.environ.update(
        VLLM_CPU_OMP_THREADS_BIND="|".join(",".join(map(str, group)) for group in groups),
        VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )


def _choose_openmp(name: str) -> None:
    """vLLM starts its ranks anew, so a library to be loaded first is loaded by them."""
    library = os.path.join(sys.prefix, "lib", "libiomp5.so")
    if name != "intel":
        raise ValueError(f"openmp={name}: only intel can be chosen")
    if not os.path.exists(library):
        raise FileNotFoundError(f"openmp=intel: there is no {library}")
    os.environ["LD_PRELOAD"] = library


if __name__ == "__main__":
    sys.exit(serve(VllmEngine))
