"""The pure functions of the studies on the digital twin, and small runs of what they are made of."""

from __future__ import annotations

import importlib
import sys
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from seesaw.core.actions import DECODE
from seesaw.core.hardware import Curve
from seesaw.core.layout import Plan
from seesaw.planning.setup import Limits, set_up
from seesaw.planning.twin import simulate
from seesaw.planning.workloads import Workload
from seesaw.scheduling.config import TurnCosts
from tests.planning import machines

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
COSTS = TurnCosts(step=0.01, turn=0.5, block=1e-4)


def script(name: str) -> ModuleType:
    """A script, as if it ran: it finds the modules beside it."""
    sys.path.append(str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


jobs, grid, study = script("twin_jobs"), script("paper_grid"), script("policy_study")


# ---- jobs ------------------------------------------------------------------------------------------------------


def test_a_draw_has_the_number_asked_for_and_nothing_longer_than_the_context() -> None:
    drawn = jobs.draw("sharegpt", 500, 2048)
    assert len(drawn) == drawn.requests == 500
    assert drawn.longest <= 2048


def test_the_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert jobs.geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert jobs.geometric_mean([1.2, 1.2, 1.2]) == pytest.approx(1.2)


def test_static_plans_are_all_ways_to_share_the_ranks_out() -> None:
    names = {str(plan) for plan in jobs.static_plans(4)}
    assert names == {"D4", "P4", "T4", "D2P2", "D2T2", "P2T2"}


@pytest.mark.parametrize(
    ("chunk", "smaller", "larger"),
    [(512, 256, 1024), (128, None, 256), (8192, 4096, None), (None, None, None)],
)
def test_chunks_climb_by_steps(chunk: int | None, smaller: int | None, larger: int | None) -> None:
    assert (jobs.smaller_chunk(chunk), jobs.larger_chunk(chunk)) == (smaller, larger)


def test_tables_are_put_between_their_marks_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n")
    jobs.put(page, {"a": "new", "b": "first"})
    assert page.read_text() == (
        "before\n<!-- a -->\nnew\n<!-- /a -->\nbetween\n<!-- b -->\nfirst\n<!-- /b -->\nafter\n"
    )


def test_a_table_has_text_on_the_left_and_numbers_on_the_right() -> None:
    assert jobs.table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


# ---- grid ------------------------------------------------------------------------------------------------------


def found(**changes: Any) -> dict[str, Any]:
    """A cell's result."""
    causes = dict.fromkeys(grid.CAUSES, 0.0) | {"weights": 60.0, "all_reduce": 40.0}
    static = {"plan": "P2T4", "chunk": 512, "seconds": 100.0, "tokens_per_second": 10.0, "causes": causes}
    ours = static | {"plan": "P8->T8", "seconds": 80.0, "causes": causes | {"all_reduce": 20.0}}
    return {
        "gpu": "A10",
        "pattern": "L40S",
        "size": "70B",
        "trace": "arxiv",
        "node": "8xA10@pcie4x8/L40S",
        "bound_seconds": 40.0,
        "ours": ours,
        "tuned": static,
        "stock_512": static | {"seconds": 120.0},
        "stock_2048": static | {"seconds": 160.0},
        **changes,
    }


def test_the_grid_has_the_papers_cells_with_both_link_patterns() -> None:
    every = grid.cells()
    assert len(every) == len({str(cell) for cell in every}) == 2 * 2 * 3 * 2 + 2 * 2
    assert {cell.setting.requests for cell in every} == {2000, 500}
    assert all(cell.setting.ranks == (4 if cell.size == "15B" else 8) for cell in every)


def test_means_are_geometric_and_by_gpu_and_links() -> None:
    twice = found(gpu="L4")
    twice["tuned"] = twice["tuned"] | {"seconds": 160.0}
    lines = grid.mean_table([found(), twice]).splitlines()
    a10, l4, both = lines[2], lines[4], lines[6]
    assert "| 1.25 (1.25 to 1.25) |" in a10
    assert "| 2.00 (2.00 to 2.00) |" in l4
    assert f"| {2.5**0.5:.2f} (1.25 to 2.00) |" in both
    assert lines[3].count(jobs.NONE) == 3  # the other links have no cell


def test_causes_are_in_per_cent_of_the_static_plan() -> None:
    static, ours = grid.cause_table([found()]).splitlines()[2:]
    assert static.split(" | ")[2:] == ["`P2T4`", "60", "40", "100 |"]
    assert ours.split(" | ")[2:] == ["`P8->T8`", "60", "20", "80 |"]


def test_the_papers_layouts_are_written_as_ours_are() -> None:
    [line] = [x for x in grid.layout_table([found()]).splitlines() if "A10 arxiv | 70B" in x]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == ["`P4T2`", "`P2T4`", jobs.NONE, "`P8->P2T4`", "`P8->T8`", jobs.NONE]


def test_a_faster_all_reduce_keeps_its_latency() -> None:
    spec = machines.hardware(all_reduce={2: Curve((1.0, 1e6), (1e-5, 1e-3))})
    faster = grid.faster_all_reduce(spec, 10.0).all_reduce[2]
    assert faster.values == pytest.approx((1e-5, 1e-5 + (1e-3 - 1e-5) / 10))


# ---- policies --------------------------------------------------------------------------------------------------


def workload(requests: int = 60) -> Workload:
    rng = np.random.default_rng(0)
    return Workload("made up", rng.integers(20, 200, requests), rng.integers(2, 120, requests))


def setup(host_kv: int = 1 << 24, device_memory: int = 190 << 20) -> Any:
    limits = Limits(
        device_memory=device_memory,
        host_kv=host_kv,
        chunk=256,
        max_running=16,
        max_model_len=512,
        turn_costs=COSTS,
    )
    return set_up(machines.model(), Plan.parse("P2->T2"), "bfloat16", limits)


def hardware() -> Any:
    return machines.hardware(ranks=2)


def test_rules_change_the_switch_and_nothing_else() -> None:
    config = setup().scheduler
    by_name = {rule.name: rule.applied(config) for rule in (*study.SWITCHES, *study.ORDERS)}
    assert by_name["cost"] == by_name["longest known"] == config
    assert by_name["full/empty"].turn_costs is None
    assert by_name["full/empty"].refill_threshold == 1.0
    assert by_name["drain"].refill_threshold == 0.0
    assert by_name["prefill-first"].policy == "prefill-first"


def test_without_an_order_a_rule_is_the_twin_as_it_is() -> None:
    job = workload()
    plain = simulate(setup(), hardware(), job)
    assert study.run_rule(setup(), hardware(), job, study.Rule(name="cost")).seconds == plain.seconds


def test_every_rule_ends_the_job_and_the_twin_is_as_before() -> None:
    job = workload()
    before = simulate(setup(), hardware(), job)
    for rule in (*study.SWITCHES, *study.ORDERS):
        ran = study.run_rule(setup(), hardware(), job, rule)
        assert (ran.requests, ran.output_tokens) == (len(job), int(job.output.sum()))
    assert simulate(setup(), hardware(), job) == before


def test_draining_swaps_nothing_out_to_turn_and_full_empty_turns_most_often() -> None:
    job, rules = workload(200), {rule.name: rule for rule in study.SWITCHES}
    ran = {name: study.run_rule(setup(), hardware(), job, rules[name]) for name in ("full/empty", "drain")}
    assert ran["drain"].transitions >= 3  # the job goes round several times
    assert ran["full/empty"].swapped_out > ran["drain"].swapped_out
    assert ran["full/empty"].transitions >= ran["drain"].transitions


def test_free_swap_in_leaves_transitions_as_they_are() -> None:
    job = workload()
    plain, free = (
        study.run_rule(setup(1 << 28), hardware(), job, study.Rule(name="r", free_swap_in=free))
        for free in (False, True)
    )
    assert free.seconds < plain.seconds
    assert free.phases["transition"].causes["transition"] == pytest.approx(
        plain.phases["transition"].causes["transition"]
    )


def test_an_ordered_policy_sorts_what_is_in_the_buffer() -> None:
    taken: list[int] = []

    class Recording(study.OrderedPolicy):  # type: ignore[misc, name-defined]
        def schedule(self, scheduler: Any) -> None:
            before = deque(scheduler.hosted)
            super().schedule(scheduler)
            if scheduler.phase == DECODE:
                left = set(map(id, scheduler.hosted))
                taken.extend(s.limit - s.prompt_tokens for s in before if id(s) not in left)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study.twin, "create_policy", lambda config: Recording(study.longest_known))
        simulate(setup(1 << 28, device_memory=220 << 20), hardware(), workload())
    assert len(taken) == 60, "none is parked again"
    first, last = sorted(taken[:16]), sorted(taken[-16:])
    assert first[0] >= last[-1]


def test_means_of_rules_are_over_their_base() -> None:
    runs = {rule.name: {"seconds": 100.0} for rule in (*study.SWITCHES, *study.ORDERS)}
    runs["cost"] = {"seconds": 80.0}
    runs["longest known"] = {"seconds": 40.0}
    case = {"fills": 3.0, "runs": runs, "static": {"seconds": 100.0}}
    lines = {line.split(" | ")[0].strip("| "): line for line in study.mean_table([case]).splitlines()}
    assert "| full/empty | 1.250 (1.25 to 1.25)" in lines["cost"]
    assert "| cost | 2.000 (2.00 to 2.00)" in lines["longest known"]
    assert lines["cost"].endswith(f"| {jobs.NONE} |")  # no case of one round
