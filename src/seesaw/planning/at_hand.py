"""The profile of the node at hand, if it is one to go by, and what follows from it for a plan that was given."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from seesaw.core.errors import ConfigError
from seesaw.core.hardware import HardwareSpec
from seesaw.planning.profiles import default_path, read_profile

if TYPE_CHECKING:
    from seesaw.planning.setup import Setup
    from seesaw.scheduling.config import TurnCosts

_PROMPT, _OUTPUT = 512, 128
"""Tokens of a request, where the costs of turning are worked out before any is known: they hardly depend on it."""


def profile_at_hand(ranks: int, device: str, dtype: str) -> HardwareSpec | str:
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
