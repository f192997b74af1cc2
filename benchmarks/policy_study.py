"""What scheduling rules gain, in the digital twin: the switch back to prefill, onboarding order, swap-in.

    python benchmarks/policy_study.py --quick     # a small job for each case; prints
    python benchmarks/policy_study.py --record    # in full; writes a record and the tables of docs/policies.md

A case is a job on a node with a host buffer. Its plan is the two-phase plan that is best in closed form; every rule
runs the whole job under it. docs/policies.md says what the rules are, and which are worth having.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from twin_jobs import (
    GIB,
    NONE,
    ROOT,
    Planner,
    Setting,
    arguments,
    candidates,
    conclude,
    geometric_mean,
    run_all,
    table,
)

from seesaw.core.hardware import HardwareSpec
from seesaw.planning import twin
from seesaw.planning.setup import Setup
from seesaw.planning.simulated import Moves
from seesaw.planning.twin import Simulated, simulate
from seesaw.planning.workloads import Workload
from seesaw.scheduling.config import SchedulerConfig
from seesaw.scheduling.policies import Policy
from seesaw.scheduling.policies.phased import PhasedPolicy
from seesaw.scheduling.scheduler import Scheduler
from seesaw.scheduling.sequence import Sequence as Sequence_

PAGE = ROOT / "docs" / "policies.md"
BASE = "full/empty"
QUICK = 4
"""By which a quick run has fewer requests and, since a buffer is to be filled several times, less of that."""
REQUESTS = {
    "sharegpt": 1000,
    "arxiv": 600,
    "azure-code": 2000,
    "azure-conv": 1200,
    "lmsys": 1500,
    "mooncake": 600,
}
ENOUGH = 80.0
"""GiB for each device that hold any of these jobs at once."""
WIDE = (("A10@pcie4x8/L40S", "Llama-2-70B", 8), ("L4@pcie4x8/RTX-PRO-6000", "CodeLlama-34B", 8))
WIDE_BUFFERS = {
    "sharegpt": (2.0, 5.0, 10.0, ENOUGH),
    "arxiv": (2.0, 5.0, 10.0, ENOUGH),
    "azure-code": (5.0, ENOUGH),
    "azure-conv": (5.0, ENOUGH),
    "lmsys": (2.0, ENOUGH),
    "mooncake": (5.0, ENOUGH),
}
"""By trace, GiB for each device."""
NARROW = (
    ("A10@pcie4x8/RTX-PRO-6000", "Llama-3-15B", 4),
    ("A10@pcie4x8/RTX-PRO-6000", "CodeLlama-34B", 8),
    ("L4@pcie4x8/L40S", "Llama-3-15B", 4),
    ("L4@pcie4x8/L40S", "Llama-2-70B", 8),
    ("A100-40G-PCIe", "Llama-2-70B", 8),
    ("A100-40G-SXM", "Llama-2-70B", 8),
)
NARROW_BUFFERS = {"sharegpt": (5.0, ENOUGH), "arxiv": (5.0,)}
RELEVANT = 0.97
"""Share of the best static plan's rate from which on a two-phase plan might be run at all."""


# ---- rules -----------------------------------------------------------------------------------------------------


def remaining(sequence: Sequence_) -> int:
    """Tokens that a sequence will still generate, which only a job with fixed lengths knows."""
    return sequence.limit - len(sequence.tokens)


def prompt(sequence: Sequence_) -> int:
    """Tokens of its prompt."""
    return sequence.prompt_tokens


class OrderedPolicy(PhasedPolicy):
    """Policy `seesaw`, but sequences leave the host buffer by rising `key`."""

    def __init__(self, key: Callable[[Sequence_], int], *, only_last: bool = False) -> None:
        super().__init__("seesaw")
        self._key, self._only_last = key, only_last
        self._seen: tuple[int, Sequence_ | None, Sequence_ | None] = 0, None, None

    def _decode(self, scheduler: Scheduler) -> None:
        """Put what has arrived in the buffer in its place, then as ever."""
        hosted = scheduler.hosted
        last = not (scheduler.waiting or scheduler.more_expected)
        if self._ends(scheduler) != self._seen and (last or not self._only_last):
            ordered = sorted(hosted, key=self._key)  # stable: equals keep their order
            hosted.clear()
            hosted.extend(ordered)
        super()._decode(scheduler)
        self._seen = self._ends(scheduler)

    def _ends(self, scheduler: Scheduler) -> tuple[int, Sequence_ | None, Sequence_ | None]:
        """Arrivals change the length or an end: they come one at a time at either."""
        hosted = scheduler.hosted
        return len(hosted), hosted[0] if hosted else None, hosted[-1] if hosted else None


def longest_known(sequence: Sequence_) -> int:
    """Most tokens to go first."""
    return -remaining(sequence)


def longest_prompt(sequence: Sequence_) -> int:
    """The longest prompt first."""
    return -prompt(sequence)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One way of running a setup."""

    name: str
    threshold: float | None = None
    """Share of the largest batch at which to turn back; None leaves it to the costs."""
    policy: str | None = None
    """Another than `seesaw`."""
    order: Callable[[Sequence_], int] | None = None
    only_last: bool = False
    """The order holds once no prompt waits any more."""
    free_swap_in: bool = False

    @property
    def turns_back(self) -> bool:
        """Whether it is about nothing but turning back to prefill."""
        return self.threshold is not None

    def applied(self, config: SchedulerConfig) -> SchedulerConfig:
        """The scheduler's settings under this rule."""
        if self.policy is not None:
            return replace(config, policy=self.policy)  # type: ignore[arg-type]  # checked by the config
        if self.threshold is not None:
            return replace(config, turn_costs=None, refill_threshold=self.threshold)
        return config


SWITCHES = (
    Rule(name=BASE, threshold=1.0),
    Rule(name="cost"),
    Rule(name="half", threshold=0.5),
    Rule(name="drain", threshold=0.0),
    Rule(name="prefill-first", policy="prefill-first"),
    Rule(name="decode-first", policy="decode-first"),
)
ORDERS = (
    Rule(name="longest known", order=longest_known),
    Rule(name="longest known, last round", order=longest_known, only_last=True),
    Rule(name="shortest known", order=remaining),
    Rule(name="longest prompt", order=longest_prompt),
    Rule(name="shortest prompt", order=prompt),
    Rule(name="free swap-in", free_swap_in=True),
)
"""On top of the cost decision."""


def run_rule(setup: Setup, hardware: HardwareSpec, job: Workload, rule: Rule) -> Simulated:
    """The whole job under a rule."""
    changed = replace(setup, scheduler=rule.applied(setup.scheduler))
    with deciding(rule), swapping_in(free=rule.free_swap_in):
        return simulate(changed, hardware, job)


@contextmanager
def deciding(rule: Rule) -> Iterator[None]:
    """The twin's scheduler gets the rule's policy."""
    if rule.order is None:
        yield
        return
    order = rule.order

    def create(config: SchedulerConfig) -> Policy:
        return OrderedPolicy(order, only_last=rule.only_last)

    with patch.object(twin, "create_policy", create):
        yield


@contextmanager
def swapping_in(*, free: bool) -> Iterator[None]:
    """Copies of KV to the devices take no time; weights take theirs."""
    if not free:
        yield
        return
    moves = twin._moves

    def without(setup: Setup, hardware: HardwareSpec) -> Moves:
        return replace(moves(setup, hardware), to_device=(0.0, 0.0))

    with patch.object(twin, "_moves", without):
        yield


# ---- cases -----------------------------------------------------------------------------------------------------


def cases(quick: bool = False) -> list[Setting]:
    """What is run."""
    smaller = QUICK if quick else 1
    boxes = [(box, WIDE_BUFFERS) for box in WIDE] + [(box, NARROW_BUFFERS) for box in NARROW]
    return [
        Setting(
            node=node,
            model=model,
            ranks=ranks,
            trace=trace,
            requests=REQUESTS[trace] // smaller,
            host_gib=buffer if buffer == ENOUGH else buffer / smaller,
        )
        for (node, model, ranks), buffers in (boxes[:1] if quick else boxes)
        for trace, sizes in buffers.items()
        for buffer in sizes
    ]


def run_case(setting: Setting) -> dict[str, Any] | None:
    """All rules under the best two-phase plan, and the best static plan; None where the buffer holds the whole job
    and a larger one is looked at as well."""
    planner = Planner(setting)
    fill = float(planner.job.prompt.sum()) * planner.model.kv_bytes_per_token()
    fills = fill / (setting.host_gib * setting.ranks * GIB)
    if fills < 1 and setting.host_gib < ENOUGH:
        return None
    ranking = planner.ranking()
    [static] = planner.best(candidates(ranking, separate=False), 1)
    chosen = next(filter(None, map(planner.replay, candidates(ranking, separate=True))))
    asked = [
        rule for rule in (*SWITCHES, *ORDERS) if rule.name != "cost" and (fills > 1 or not rule.turns_back)
    ]
    runs = {
        rule.name: described(run_rule(chosen.setup, planner.hardware, planner.job, rule)) for rule in asked
    }
    runs["cost"] = described(chosen.simulated)
    runs.setdefault(BASE, runs["cost"])  # a job of one round never turns back
    return {
        "node": f"{setting.ranks}x{setting.node}",
        "model": setting.model,
        "trace": setting.trace,
        "requests": setting.requests,
        "host_gib": setting.host_gib,
        "plan": str(chosen.plan),
        "chunk": chosen.limits.chunk,
        "static": {"plan": str(static.plan), "seconds": static.seconds},
        "fills": fills,
        "runs": runs,
    }


def described(simulated: Simulated) -> dict[str, Any]:
    """For a record."""
    phases = {name: phase.seconds for name, phase in simulated.phases.items()}
    return {
        "seconds": simulated.seconds,
        "phases": phases,
        "transitions": simulated.transitions,
        "swapped_out": simulated.swapped_out,
        "recomputed": simulated.recomputed,
    }


# ---- tables ----------------------------------------------------------------------------------------------------


def over(found: dict[str, Any], rule: str, base: str = BASE) -> float:
    """How much faster a rule is than another."""
    return float(found["runs"][base]["seconds"] / found["runs"][rule]["seconds"])


def over_static(found: dict[str, Any]) -> float:
    """How much faster the plan under the cost decision is than the best static plan."""
    return float(found["static"]["seconds"] / found["runs"]["cost"]["seconds"])


def several_rounds(found: dict[str, Any]) -> bool:
    """Whether the job turns back to prefill at all."""
    return bool(found["fills"] > 1)


def relevant(found: dict[str, Any]) -> bool:
    """Whether the plan might be run."""
    return over_static(found) >= RELEVANT


def mean_table(results: Sequence[dict[str, Any]]) -> str:
    """Geometric mean, least and most of every rule: switches over full/empty, the others over the cost decision."""
    groups: dict[str, list[dict[str, Any]]] = {
        "several rounds, relevant": [f for f in results if several_rounds(f) and relevant(f)],
        "several rounds, all": [f for f in results if several_rounds(f)],
        "one round": [f for f in results if not several_rounds(f)],
    }
    rows = []
    for rule, base in [(r.name, BASE) for r in SWITCHES] + [(r.name, "cost") for r in ORDERS]:
        cells = [spread([over(f, rule, base) for f in of if rule in f["runs"]]) for of in groups.values()]
        if rule != BASE:
            rows.append([rule, base, *cells])
    columns = ["rule", "over", *(f"{name} ({len(group)})" for name, group in groups.items())]
    return table(columns, rows, 2)


def spread(ratios: Sequence[float]) -> str:
    """Geometric mean, least and most."""
    if not ratios:
        return NONE
    return f"{geometric_mean(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"


def switch_table(results: Sequence[dict[str, Any]]) -> str:
    """Each case that goes round several times: full/empty's seconds and what the other switches make of them."""
    rules = [rule.name for rule in SWITCHES if rule.name != BASE]
    columns = ["case", "plan", "× static", "transitions", "swapped out", *(f"{rule}, ×" for rule in rules)]
    rows = []
    for found in filter(several_rounds, results):
        transitions = [f"{found['runs'][rule]['transitions']}" for rule in (BASE, "cost", "drain")]
        swapped = [
            f"{found['runs'][rule]['swapped_out'] / found['requests']:.2f}"
            for rule in (BASE, "cost", "drain")
        ]
        rows.append(
            [
                case_name(found),
                f"`{found['plan']}`",
                f"{over_static(found):.2f}",
                " / ".join(transitions),
                " / ".join(swapped),
                *(f"{over(found, rule):.3f}" for rule in rules),
            ]
        )
    return table(columns, rows, 2)


def order_table(results: Sequence[dict[str, Any]]) -> str:
    """Each case: orders and free swap-in over the cost decision with sequences in their order of arrival."""
    rules = [rule.name for rule in ORDERS]
    columns = ["case", "plan", "rounds", *(f"{rule}, ×" for rule in rules)]
    rows = [
        [
            case_name(found),
            f"`{found['plan']}`",
            f"{max(1.0, found['fills']):.1f}",
            *(f"{over(found, rule, 'cost'):.3f}" for rule in rules),
        ]
        for found in results
    ]
    return table(columns, rows, 2)


def case_name(found: dict[str, Any]) -> str:
    """Node, model, trace, buffer."""
    return f"`{found['node']}` {found['model']} {found['trace']}, {found['host_gib']:g} GiB"


# ---- command ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Run, print, and record if asked."""
    args = arguments(__doc__ or "", f"1/{QUICK} of the requests and of the buffers, on one node")
    results = [found for found in run_all(run_case, cases(args.quick), args.jobs) if found]
    tables = {
        "means": mean_table(results),
        "switches": switch_table(results),
        "orders": order_table(results),
    }
    title = "Scheduling rules in the digital twin"
    conclude(tables, PAGE, "policy-study", title, {"cases": results}, recorded=args.record)


if __name__ == "__main__":
    main()
