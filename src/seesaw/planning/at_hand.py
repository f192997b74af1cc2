"""The figures of the node at hand, by its profile or the catalogue, and what follows from them for a given plan."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seesaw.core.errors import ConfigError
from seesaw.core.hardware import HardwareSpec
from seesaw.planning.profiles import default_path, read_profile

if TYPE_CHECKING:
    from seesaw.planning.setup import Setup
    from seesaw.scheduling.config import TurnCosts

_PROMPT, _OUTPUT = 512, 128
"""Tokens of a request, where the costs of turning are worked out before any is known: they hardly depend on it."""


def node_at_hand(ranks: int, device: str, dtype: str, gpus: Sequence[str] = ()) -> HardwareSpec | str:
    """This machine with `ranks` ranks by its profile, or by the catalogue if each has one of `gpus`, the names of all
    that are visible, as the driver gives them; or in a few words why there are no figures to go by."""
    found = _by_profile(ranks, device, dtype)
    if isinstance(found, HardwareSpec) or not gpus or ranks > len(gpus):
        return found
    listed = visible_node(gpus, ranks)
    return f"{found}, and {listed}" if isinstance(listed, str) else listed


def visible_node(gpus: Sequence[str], ranks: int | None = None) -> HardwareSpec | str:
    """The node of `ranks` of these GPUs (default: all) by the catalogue, or why it has no figures for it."""
    from seesaw.planning.catalogue import hardware

    models = list(dict.fromkeys(gpus))
    if len(models) > 1:
        return f"its GPUs are of several models ({', '.join(models)})"
    try:
        return hardware(f"{ranks or len(gpus)}x{models[0]}")
    except ConfigError as error:
        return str(error)


def _by_profile(ranks: int, device: str, dtype: str) -> HardwareSpec | str:
    """This machine with `ranks` ranks by its profile, or in a few words why there is none to go by."""
    try:
        path = default_path()
        if not path.exists():
            return f"there is no profile at {path}"
        profile = read_profile(path)
    except ConfigError as error:
        return str(error)
    found = profile.hardware
    for what, stated, wanted in (
        ("machine", profile.machine, platform.node()),
        ("device", found.device, device),
        ("number of ranks", found.ranks, ranks),
    ):
        if stated != wanted:
            return f"the profile at {path} is of another {what} ({stated}, not {wanted})"
    if dtype not in found.flops:
        return f"the profile at {path} has {', '.join(found.flops)} only, not {dtype}"
    return found


def nominal_turn_costs(setup: Setup, hardware: HardwareSpec) -> TurnCosts:
    """What turning back to prefill costs under a plan with two phases, whatever its job may be."""
    from seesaw.planning.search import turn_costs
    from seesaw.planning.workloads import workload

    longest = setup.memory.max_model_len
    prompt = max(1, min(_PROMPT, longest - _OUTPUT))
    return turn_costs(setup, hardware, workload(f"in={prompt},out={min(_OUTPUT, longest)}", requests=100))
