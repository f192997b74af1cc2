"""What the command and the engine call: checks of a job's files, and of a plan before its ranks start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from seesaw.core.devices import device_kind
from seesaw.preflight import communication
from seesaw.preflight.disk import check_space, check_writable
from seesaw.preflight.expected import expect, input_bytes
from seesaw.preflight.findings import Finding, settle
from seesaw.preflight.limits import check_limits, needs_of
from seesaw.preflight.program import steps_of

if TYPE_CHECKING:
    from seesaw.deployment import Deployment
    from seesaw.options import PreflightMode

PAYS_FROM_BYTES = 256 << 10
"""Input from which `auto` checks communication: a few hundred rows. Less is over before a check has paid."""
PAYS_FROM_ROWS = 200
"""Of a job with `--limit`."""


def choose_mode(asked: str, *, ranks: int, inputs: Sequence[Path], limit: int | None) -> PreflightMode:
    """What `--preflight` (`auto`, `on` or `off`) means for a job; `auto` leaves tiny jobs to themselves."""
    if asked == "off":
        return "off"
    if ranks == 1:
        return "limits"
    if asked == "on":
        return "on"
    size = input_bytes(inputs)
    tiny = (size is not None and size < PAYS_FROM_BYTES) or (limit is not None and limit < PAYS_FROM_ROWS)
    return "limits" if tiny else "on"


def check_job_files(
    inputs: Sequence[Path], output: Path, errors: Path, *, limit: int | None, written: int = 0
) -> None:
    """Check that the folders of a job's files take what it will write; `written` bytes of it are there already.

    Logs what may fail. Raises `ConfigError` for what must.
    """
    findings: list[Finding | None] = [
        check_writable(folder) for folder in dict.fromkeys((output.parent, errors.parent))
    ]
    expected = expect(inputs, limit)
    if expected is not None:
        expected = expected.as_written(output)
        findings.append(
            check_space(output, rows=expected.rows, least=expected.least, most=expected.most, written=written)
        )
    settle(finding for finding in findings if finding is not None)


def start_early(mode: PreflightMode) -> None:
    """Start what the check of communication needs, so that it loads while the caller does other things."""
    if mode == "on":
        communication.start_early()


def check_plan(deployment: Deployment) -> Deployment:
    """Check that this machine can run a plan, as `options.preflight` asks; returns it with a transport that works.

    Logs what may fail. Raises `ConfigError` for what must.
    """
    options = deployment.options
    if options.preflight != "off":
        settle(check_limits(needs_of(deployment), deployment.places, device=device_kind(options.device)))
    if options.preflight != "on" or deployment.plan.world == 1:
        communication.discard_early()
        return deployment
    found = communication.find_connection(
        steps_of(deployment.spec, deployment.shardings),
        deployment.places,
        transport=options.transport,
        dtype=deployment.dtype,
        device=options.device,
        own=deployment.own_transport,
    )
    return replace(deployment, options=replace(options, transport=found.transport), places=found.places)
