"""What a deployment is, in the words of a record."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seesaw import __version__
from seesaw.recording.record import Run, RunSetup
from seesaw.recording.recorder import now

if TYPE_CHECKING:
    from seesaw.deployment import Deployment

_PACKAGES = ("torch", "transformers", "numpy")


def new_run(command: dict[str, Any]) -> Run:
    """The record of a run that starts now."""
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in _PACKAGES}
    moment = now()
    return Run(
        seesaw=__version__,
        versions=versions,
        machine=platform.node(),
        command=command,
        started=moment,
        written=moment,
    )


def describe(deployment: Deployment) -> RunSetup:
    """What runs."""
    scheduler, memory, hardware = deployment.scheduler, deployment.memory, deployment.hardware
    return RunSetup(
        model=Path(deployment.options.model).resolve().name,
        spec=deployment.spec,
        dummy_weights=deployment.dummy,
        dtype=deployment.dtype,
        plan=str(deployment.plan),
        ranks=deployment.plan.world,
        device=deployment.options.device,
        device_memory=deployment.device_memory,
        host_kv=deployment.host_kv,
        chunk=scheduler.max_batch_tokens,
        max_running=scheduler.max_running,
        policy=scheduler.policy,
        max_model_len=memory.max_model_len,
        block_size=scheduler.block_size,
        transition=memory.mode,
        overlap=scheduler.overlap,
        hardware=None if isinstance(hardware, str) else hardware,
        no_hardware=hardware if isinstance(hardware, str) else "",
    )
