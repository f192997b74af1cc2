"""What an engine on GPUs resolves to: devices of ranks, budgets, types, transports; without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seesaw import launch
from seesaw.core.devices import CPU, CUDA, device_kind, kind_of
from seesaw.core.errors import ConfigError, WorkerError
from seesaw.core.hardware import HardwareSpec
from seesaw.deployment import Deployment, device_costs, resolve
from seesaw.device.gpus import Gpu
from seesaw.elastic import without
from seesaw.inventory import take_inventory
from seesaw.options import Options
from seesaw.preflight.limits import stored_bytes

GIB = 1 << 30


def asked(
    model: Path, monkeypatch: pytest.MonkeyPatch, free: tuple[int, ...] = (20, 16), **more: Any
) -> Deployment:
    """The deployment on GPUs that have so many GiB free."""
    gpus = [Gpu("L4", 24 * GIB, size * GIB) for size in free]
    monkeypatch.setattr("seesaw.deployment.require_cuda_build", lambda: None)
    monkeypatch.setattr("seesaw.deployment.visible_gpus", lambda: gpus)
    monkeypatch.setattr("seesaw.budgets.available_memory", lambda: 100 * GIB)
    given: dict[str, Any] = {"host_kv": "8MiB", "load_format": "dummy", "device": "cuda"}
    return resolve(Options(model=str(model), **given | more))


def devices(deployment: Deployment) -> list[str]:
    """As the ranks are told."""
    messages = [launch._message(sharding) for sharding in deployment.shardings]
    assert messages
    shardings = list(deployment.shardings)
    return [
        launch._worker_config(deployment, shardings, rank, None, None, ("shm", -1), True).device
        for rank in range(deployment.plan.world)
    ]


def test_kinds() -> None:
    assert device_kind("cpu") is CPU and device_kind("cuda") is CUDA and kind_of("cuda:3") is CUDA
    assert (CPU.device_name(None), CUDA.device_name(3)) == ("cpu", "cuda:3")
    with pytest.raises(ConfigError, match=r"device 'tpu': 'cpu' and 'cuda' are supported"):
        device_kind("tpu")
    with pytest.raises(ConfigError, match=r"device 'cuda:1': name the kind alone"):
        device_kind("cuda:1")


def test_one_rank_to_each_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(model, monkeypatch)
    assert str(found.plan) == "P2->T2" and devices(found) == ["cuda:0", "cuda:1"]
    assert found.own_transport == "nccl"
    assert found.device_memory == int(16 * GIB * 0.95)  # of the one that has least free
    assert device_costs(found.options).channels > 0


def test_ranks_that_share_gpus(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(model, monkeypatch, plan="P4->T4", ranks_per_gpu=2)
    assert devices(found) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert found.own_transport is None and device_costs(found.options).channels == 0
    assert found.device_memory == int(16 * GIB * 0.95) // 2
    assert asked(model, monkeypatch, ranks_per_gpu=2).plan.world == 4
    odd = asked(model, monkeypatch, plan="P2->T2", ranks_per_gpu=2, free=(20, 1))
    assert odd.device_memory == int(20 * GIB * 0.95) // 2  # the second has no rank


def test_the_host_buffer_is_no_share_of_what_ranks_have(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(model, monkeypatch, host_kv=None).host_kv == 50 * GIB
    assert asked(model, monkeypatch, host_kv=None, plan="T2").host_kv == 4 * GIB


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"plan": "P4->T4"},
            r"4 ranks need 4 GPUs and 2 are visible; use a plan of at most 2 ranks, or .*-gpu 2\)",
        ),
        (
            {"plan": "T2", "free": (20,)},
            r"2 ranks need 2 GPUs and 1 is visible; use a plan of at most 1 rank, or",
        ),
        (
            {"plan": "P8->D2T4", "ranks_per_gpu": 2, "max_model_len": 64},
            r"at most 4 ranks, or .*\(--ranks-per-gpu 4\)",
        ),
        (
            {"device_memory": "17GiB"},
            r"of 24.0 GiB on GPU 1 \(L4\), 16.0 GiB are free; ask for at most 16.0 GiB",
        ),
        ({"plan": "P4->T4", "ranks_per_gpu": 2, "device_memory": "9GiB"}, "for each of its 2 ranks"),
        ({"device": "cpu", "ranks_per_gpu": 2}, "ranks_per_gpu=2: device 'cpu' has no GPUs to share"),
        ({"ranks_per_gpu": 0}, "ranks_per_gpu=0: must be at least 1"),
    ],
)
def test_refusals(more: dict[str, Any], said: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=said):
        asked(model, monkeypatch, **more)


def test_a_float16_checkpoint_stays_float16_on_gpus(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"float16"'))
    assert asked(model, monkeypatch).dtype == "float16"
    assert asked(model, monkeypatch, device="cpu", plan="P2->T2", device_memory="64MiB").dtype == "bfloat16"


@pytest.mark.parametrize("lost", [0, 1])
def test_devices_follow_places_when_a_rank_is_lost(
    lost: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(model, monkeypatch, free=(20, 20, 20), plan="D3->D3")
    left = without(found, WorkerError("gone", rank=lost, phase="forward", lost=(lost,)), longest=64)
    assert devices(left) == [f"cuda:{rank}" for rank in range(3) if rank != lost][: left.plan.world]
    assert left.plan.world == 2


def test_a_node_file_names_devices(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    node = tmp_path / "node.json"
    node.write_text('{"ranks": [{"device": 1}, {"device": 0}]}')
    assert devices(asked(model, monkeypatch, plan="T2", node=str(node))) == ["cuda:1", "cuda:0"]
    node.write_text('{"ranks": [{"device": 1}, {}]}')
    with pytest.raises(ConfigError, match=r"ranks \[1\] have no device while others have one"):
        asked(model, monkeypatch, plan="T2", node=str(node))
    node.write_text('{"ranks": [{"device": 1}, {"device": -2}]}')
    with pytest.raises(ConfigError, match="devices are numbered from 0"):
        asked(model, monkeypatch, plan="T2", node=str(node))


def test_the_planner_has_the_catalogue_where_there_is_no_profile(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEESAW_PROFILE", str(tmp_path / "none.json"))
    found = asked(model, monkeypatch, dtype="bfloat16").hardware
    assert isinstance(found, HardwareSpec) and (found.name, found.ranks) == ("L4", 2)
    shared = asked(model, monkeypatch, dtype="bfloat16", ranks_per_gpu=2).hardware
    assert "there is no profile" in str(shared)  # the catalogue knows whole devices


def test_what_a_node_has_and_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEESAW_PROFILE", str(tmp_path / "none.json"))
    monkeypatch.setattr("seesaw.device.gpus.has_driver", lambda: False)
    bare = take_inventory()
    assert bare.gpus == () and "no NVIDIA driver" in bare.no_gpus and bare.taken.device == "cpu"
    assert bare.taken.ranks * bare.taken.device_memory + bare.taken.host_kv <= bare.free_memory * 1.2
    gpus = [Gpu("NVIDIA L4", 24 * GIB, size * GIB) for size in (20, 16)]
    monkeypatch.setattr("seesaw.device.gpus.has_driver", lambda: True)
    monkeypatch.setattr("seesaw.device.gpus.visible_gpus", lambda: gpus)
    monkeypatch.setattr("seesaw.device.gpus.require_cuda_build", lambda: None)
    kept = take_inventory()  # the suite's environment asks for the CPU
    assert len(kept.gpus) == 2 and kept.taken.device == "cpu" and kept.taken.ranks >= 1
    monkeypatch.delenv("SEESAW_DEVICE")
    found = take_inventory()
    assert [gpu.catalogue for gpu in found.gpus] == ["L4", "L4"] and found.no_gpus == ""
    assert (found.taken.device, found.taken.ranks) == ("cuda", 2)
    assert found.taken.device_memory == int(16 * GIB * 0.95)
    assert "catalogue's figures of L4" in found.taken.planner
    monkeypatch.setattr("seesaw.device.gpus.has_driver", lambda: False)
    monkeypatch.setenv("SEESAW_DEVICE", "cuda")
    with pytest.raises(ConfigError, match="no NVIDIA driver"):
        take_inventory()


def test_weights_are_locked_where_the_host_has_memory_for_them(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside the host buffer; random weights take theirs anyway, and ranks on the host lock nothing."""
    deployment = replace(asked(model, monkeypatch), dummy=False)
    size = stored_bytes(deployment)
    for room, can in ((size, True), (size - 1, False)):
        monkeypatch.setattr(launch, "available_memory", lambda room=room: room)
        assert launch._can_lock_weights(deployment, None) == can
        assert ("are not registered with CUDA" in caplog.text) != can
    assert launch._can_lock_weights(asked(model, monkeypatch), None)
    assert launch._can_lock_weights(resolve(Options(model=str(model), load_format="dummy")), None)
