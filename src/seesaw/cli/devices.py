"""`seesaw devices`: what this node has, and what an engine would take of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from seesaw.cli.failures import reported, set_up_logging
from seesaw.cli.run_options import Debug
from seesaw.core.devices import device_kind
from seesaw.core.units import format_bytes

if TYPE_CHECKING:
    from seesaw.inventory import Inventory, SeenGpu, Taken

_LABEL = 14
Json = Annotated[bool, typer.Option("--json", help="As JSON, sizes in bytes.")]


def devices(json: Json = False, debug: Debug = False) -> None:
    """What this box has for ranks, and what `seesaw run` would take of it.

    Exit code: 0.
    """
    set_up_logging(debug=debug)
    with reported(debug=debug):
        import msgspec

        from seesaw.inventory import take_inventory

        found = take_inventory()
        if json:
            typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
            return
        for label, text in (*_has(found), ("", ""), *_takes(found.taken)):
            typer.echo(f"{label:<{_LABEL}}{text}".rstrip())


def _has(found: Inventory) -> list[tuple[str, str]]:
    host = found.host
    lines = [
        ("processor", f"{host['processor']}, {host['cores']} cores, {host['extensions']}"),
        ("memory", f"{host['memory']}, {format_bytes(found.free_memory)} free"),
        ("/dev/shm", f"{format_bytes(found.shared_memory)} free"),
        (
            "CPU kernels",
            "native" if found.native else "torch's alone: a C++ compiler would bring faster ones",
        ),
    ]
    lines += [(f"GPU {number}", _gpu(gpu)) for number, gpu in enumerate(found.gpus)]
    if found.no_gpus:
        lines.append(("GPUs" if not found.gpus else "but", found.no_gpus))
    return lines


def _gpu(gpu: SeenGpu) -> str:
    known = f"{gpu.catalogue} of the catalogue" if gpu.catalogue else "not in the catalogue"
    return f"{gpu.name}, {format_bytes(gpu.memory)}, {format_bytes(gpu.free)} free; {known}"


def _takes(taken: Taken) -> list[tuple[str, str]]:
    title = device_kind(taken.device).title
    ranks = f"{taken.ranks} {title} rank{'' if taken.ranks == 1 else 's'} (--device, --ranks)"
    planned = f"chosen by {taken.planner}" if taken.planner else f"by rule: {taken.no_planner}"
    return [
        ("seesaw run", f"takes, unless asked otherwise, {ranks}"),
        ("  each", f"{format_bytes(taken.device_memory)} for weights, activations and KV (--device-memory)"),
        ("  together", f"{format_bytes(taken.host_kv)} for the host buffer (--host-kv)"),
        ("  plan", f"{planned} (--plan)"),
    ]
