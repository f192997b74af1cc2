"""Memory plans: exact, within the budgets, and refused with their arithmetic."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from seesaw.core.errors import ConfigError, LayoutError, MemoryBudgetError, ModelError
from seesaw.core.layout import Plan
from seesaw.deployment import resolve
from seesaw.options import Options
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=4096)


def options(checkpoint: Path, **changes: Any) -> Options:
    settings: dict[str, Any] = {
        "plan": "P2->T2",
        "device_memory": "16MiB",
        "host_kv": "4MiB",
        "dtype": "float32",
    }
    return Options(model=str(checkpoint), **(settings | changes))


@pytest.mark.parametrize("plan", ["T1", "P2->T2", "P4->D2T2", "D2P2->T4", "T2P2"])
@pytest.mark.parametrize("mode", ["auto", "resident", "delta", "reload"])
def test_plans_stay_within_their_budgets(checkpoint: Path, plan: str, mode: str) -> None:
    deployment = resolve(options(checkpoint, plan=plan, transition=mode))
    memory = deployment.memory
    for parts in zip(memory.weights, memory.workspace, memory.pool, strict=True):
        assert sum(parts) <= 16 << 20
    assert mode in ("auto", memory.mode)
    longest = memory.max_model_len
    assert longest <= min(memory.device_blocks) * 16
    if Plan.parse(plan).separate:
        assert longest <= memory.host_blocks * 16


def test_keeping_both_shardings_costs_room_for_kv(checkpoint: Path) -> None:
    blocks = {}
    for mode in ("resident", "delta", "reload"):
        memory = resolve(options(checkpoint, transition=mode, device_memory="10MiB", max_running=1000)).memory
        blocks[mode] = min(memory.device_blocks)
    assert blocks["resident"] < blocks["delta"] <= blocks["reload"]


def test_more_memory_never_gives_fewer_blocks(checkpoint: Path) -> None:
    sizes = ["10MiB", "12MiB", "20MiB", "40MiB"]
    counts = [min(resolve(options(checkpoint, device_memory=s)).memory.device_blocks) for s in sizes]
    assert all(a <= b for a, b in itertools.pairwise(counts))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"device_memory": "1MiB"},
            MemoryBudgetError,
            r"1\.00 MiB device memory, rank \d needs .* for weights",
        ),
        ({"host_kv": "10KiB"}, MemoryBudgetError, "host buffer has room for 0 tokens"),
        ({"max_model_len": 4000, "host_kv": "1MiB"}, MemoryBudgetError, "sequence of 4000 tokens needs"),
        ({"plan": "P9"}, LayoutError, "9 pipeline stages"),
        ({"plan": "T7"}, LayoutError, "6"),
        ({"plan": "P2->T4"}, LayoutError, "same ranks"),
        ({"plan": "wide"}, LayoutError, "expected D, P and T"),
        ({"ranks": 4}, LayoutError, "has 2 ranks"),
        ({"policy": "chunked"}, ConfigError, "static plan"),
        ({"policy": "fifo"}, ConfigError, "choose one of"),
        ({"dtype": "int3"}, ConfigError, "choose one of"),
        ({"transition": "magic"}, ConfigError, "choose one of"),
        ({"device": "tpu"}, ConfigError, "device 'tpu': 'cpu' and 'cuda' are supported"),
        ({"chunk": 0}, ConfigError, "at least 1"),
        ({"model": "nowhere"}, ModelError, "nowhere"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(
    checkpoint: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = Path(changes.pop("model", checkpoint))
    with pytest.raises(error, match=said) as caught:
        resolve(options(model, **changes))
    assert "\n" not in str(caught.value)


def test_dummy_weights_need_only_a_config(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    assert resolve(options(tmp_path, load_format="dummy")).dummy
    with pytest.raises(ModelError, match="safetensors"):
        resolve(options(tmp_path))
