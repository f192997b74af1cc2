"""`seesaw profile --device cuda`, from its ranks to the planner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from seesaw.cli.main import app
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout
from seesaw.planning.at_hand import node_at_hand
from seesaw.planning.cost import LayoutCost, Work
from seesaw.planning.shapes import shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_planner_reads_what_gpus_were_measured_with(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    monkeypatch.setenv("SEESAW_PROFILE", str(tmp_path / "profile.json"))
    arguments = ["profile", "--device", "cuda", "--ranks", str(ranks), "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    print(result.output)
    found = node_at_hand(ranks, "cuda", "bfloat16")
    assert isinstance(found, HardwareSpec), found
    assert found.name == torch.cuda.get_device_name(0)
    assert found.memory >= torch.cuda.mem_get_info(0)[1]
    # any GPU that this runs on is beyond these, and none that is known beyond those
    assert 5e12 < found.flops["bfloat16"] < 5e15 and 5e10 < found.bandwidth < 2e13
    assert all(1e8 < rate < 1e12 for rate in (found.to_host, found.to_device, found.node_to_host))
    assert 0 < found.operator_overhead < 1e-3
    assert 0 <= found.layer_overhead < 1e-2 and 0 <= found.step_overhead < 1e-1
    assert sorted(found.all_reduce) == list(range(2, ranks + 1))
    cost = LayoutCost(shape("Llama-3.1-8B"), found, Layout(tp=ranks), [32])
    step = cost.stage(0, Work(tokens=64, sampled=64, keys=64 * 1024.0))
    assert 0 < step.seconds < 10
