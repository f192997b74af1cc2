"""The evaluation grid of the Seesaw paper (MLSys 2025) in the digital twin, re-sharding against static plans.

    python benchmarks/paper_grid.py --quick     # a small job for each cell; prints
    python benchmarks/paper_grid.py --record    # in full; writes a record and the tables of docs/paper-grid.md

{A10, L4} x {15B on 4, 34B on 8, 70B on 8} x {2,000 ShareGPT, 500 arXiv}, and 8 A100 of 40 GB with the 70B. Each cell
ranks all plans in closed form and replays the best few in full; the winners are those of the twin. Baselines:

- stock: static plans whose batches mix both phases, at most 256 sequences a replica, chunks of 512 tokens (vLLM
  0.5.4, with which the paper compares) or of 2,048 (vLLM today), the best layout;
- tuned: static plans with layout, chunk, batch and micro-batches chosen freely.

docs/paper-grid.md has the assumptions and reads the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from twin_jobs import (
    NONE,
    ROOT,
    Planner,
    Replay,
    Setting,
    arguments,
    candidates,
    conclude,
    geometric_mean,
    run_all,
    static_plans,
    table,
)

from seesaw.core.hardware import Curve, HardwareSpec
from seesaw.core.layout import Plan
from seesaw.planning.catalogue import hardware
from seesaw.report.causes import CAUSES

PAGE = ROOT / "docs" / "paper-grid.md"
MODELS = {"15B": ("Llama-3-15B", 4), "34B": ("CodeLlama-34B", 8), "70B": ("Llama-2-70B", 8)}
TRACES = {"arxiv": 500, "sharegpt": 2000}
PATTERNS = ("L40S", "RTX-PRO-6000")
"""Measured PCIe nodes whose all-reduce the A10 and L4 boxes may have."""
BASELINES = {"stock_512": "stock, 512", "stock_2048": "stock, 2,048", "tuned": "tuned"}
STOCK_SEQUENCES = 256
STOCK_REPLAYS, TUNED_REPLAYS = 3, 5

PAPER_MEANS = {"A10": (1.45, 1.78), "L4": (1.29, 1.52), "both": (1.36, 1.78)}
"""Geometric mean and maximum over the paper's own baseline: vLLM 0.5.4, chunk tuned, best layout."""
PAPER_LAYOUTS = {
    ("A10", "arxiv"): {"15B": ("D2T2", "P4->T4"), "34B": ("D2T2P2", "D2P4->D2T4"), "70B": ("T2P4", "P8->T4P2")},
    ("A10", "sharegpt"): {"15B": ("D2P2", "P4->T4"), "34B": ("D2T2P2", "D2P4->D2T4"), "70B": ("T4P2", "P8->T4P2")},
    ("L4", "arxiv"): {"15B": ("T2P2", "P4->T4"), "34B": ("D2T4", "D2P4->D2T4"), "70B": ("T4P2", "P8->T4P2")},
    ("L4", "sharegpt"): {"15B": ("P4", "P4->T4"), "34B": ("D2T4", "P8->T4P2"), "70B": ("T4P2", "P8->T4P2")},
}  # fmt: skip
"""vLLM's best and Seesaw's, as the paper writes them."""

LENGTH_PLANS = ("P8", "P4T2", "P2T4", "P8->P2T4")
OUTPUTS = (1, 10, 30, 100, 300, 1000)
LENGTH_REQUESTS = 300
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 50.0)
LINK_PLAN = "D2P4->D2T4"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the grid."""

    gpu: str
    """As the paper says it."""
    pattern: str
    """Of the links; empty for A100, whose nodes are measured as such."""
    size: str
    setting: Setting

    def __str__(self) -> str:
        return f"{self.setting.ranks}x{self.setting.node} {self.size} {self.setting.trace}"


def cells(scale: float = 1.0) -> list[Cell]:
    """The grid; `scale` is of the numbers of requests."""
    found = []
    boxes = [(gpu, pattern, f"{gpu}@pcie4x8/{pattern}") for gpu in ("A10", "L4") for pattern in PATTERNS]
    boxes += [("A100 PCIe", "", "A100-40G-PCIe"), ("A100 SXM", "", "A100-40G-SXM")]
    for gpu, pattern, node in boxes:
        for size, (model, ranks) in MODELS.items():
            if gpu.startswith("A100") and size != "70B":
                continue
            for trace, requests in TRACES.items():
                setting = Setting(
                    node=node, model=model, ranks=ranks, trace=trace, requests=max(1, round(scale * requests))
                )
                found.append(Cell(gpu=gpu, pattern=pattern, size=size, setting=setting))
    return found


# ---- the grid --------------------------------------------------------------------------------------------------


def run_cell(cell: Cell) -> dict[str, Any]:
    """The best two-phase plan and the best of each baseline, replayed in full."""
    planner = Planner(cell.setting)
    ranking = planner.ranking()
    ours = planner.tuned(candidates(ranking, separate=True), TUNED_REPLAYS)
    statics = {"tuned": planner.tuned(candidates(ranking, separate=False), TUNED_REPLAYS)}
    for name, chunk in (("stock_512", 512), ("stock_2048", 2048)):
        stock = planner.ranking(static_plans(cell.setting.ranks), chunk=chunk, max_running=STOCK_SEQUENCES)
        # One micro-batch a stage, as vLLM has it.
        statics[name] = planner.best(candidates(stock, separate=False), STOCK_REPLAYS, micro_batches=None)
    # Whatever tuning missed and a stock configuration happened to have is tuned as well.
    statics["tuned"] = sorted(set().union(*statics.values()), key=lambda one: one.seconds)
    return {
        "gpu": cell.gpu,
        "pattern": cell.pattern,
        "size": cell.size,
        "trace": cell.setting.trace,
        "node": f"{cell.setting.ranks}x{cell.setting.node}",
        "model": cell.setting.model,
        "job": {
            "requests": len(planner.job),
            "mean_prompt": planner.job.mean_prompt,
            "mean_output": planner.job.mean_output,
        },
        "bound_seconds": ranking.bound.seconds,
        "ours": ours[0].described(),
        "replayed": [brief(one) for one in ours],
        **{name: statics[name][0].described() for name in BASELINES},
        "replayed_static": [brief(one) for one in statics["tuned"]],
    }


def brief(replay: Replay) -> tuple[str, int | None, float | None, float]:
    """Plan, chunk, estimated and simulated seconds."""
    return str(replay.plan), replay.limits.chunk, replay.estimated, replay.seconds


def ratio(found: dict[str, Any], baseline: str) -> float:
    """How much faster our plan is."""
    return float(found[baseline]["seconds"] / found["ours"]["seconds"])


def ratio_table(grid: Sequence[dict[str, Any]]) -> str:
    """A line for each cell."""
    columns = ["node", "model, workload", "our plan", "tokens/s", "× stock, 512", "× stock, 2,048"]
    columns += ["best tuned static", "× tuned", "of bound"]
    rows = []
    for found in grid:
        row = [f"`{found['node']}`", f"{found['size']} {found['trace']}", named(found["ours"])]
        row += [f"{found['ours']['tokens_per_second']:,.0f}"]
        row += [
            f"{ratio(found, 'stock_512'):.2f}",
            f"{ratio(found, 'stock_2048'):.2f}",
            named(found["tuned"]),
        ]
        row += [
            f"**{ratio(found, 'tuned'):.2f}**",
            f"{found['bound_seconds'] / found['ours']['seconds']:.0%}",
        ]
        rows.append(row)
    return table(columns, rows, 3)


def named(replay: dict[str, Any]) -> str:
    """A plan with its chunk."""
    return f"`{replay['plan']}` {replay['chunk']:,}"


def mean_table(grid: Sequence[dict[str, Any]]) -> str:
    """Geometric mean and maximum by GPU and link pattern, the paper's beside them."""
    rows = []
    for gpu, (mean, most) in PAPER_MEANS.items():
        for pattern in PATTERNS:
            of = [f for f in grid if f["pattern"] == pattern and gpu in (f["gpu"], "both")]
            rows.append([gpu, pattern, *means(of), f"{mean:.2f} (max {most:.2f})"])
    for gpu in ("A100 PCIe", "A100 SXM"):
        rows.append([gpu, "", *means([f for f in grid if f["gpu"] == gpu]), NONE])
    columns = ["GPU", "links", *(f"over {name}" for name in BASELINES.values()), "paper, over tuned vLLM"]
    return table(columns, rows, 2)


def means(grid: Sequence[dict[str, Any]]) -> list[str]:
    """Geometric mean, least and most for each baseline."""
    texts = []
    for baseline in BASELINES:
        ratios = [ratio(found, baseline) for found in grid]
        if not ratios:
            texts.append(NONE)
            continue
        texts.append(f"{geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return texts


def layout_table(grid: Sequence[dict[str, Any]]) -> str:
    """The paper's layouts and ours, static and two-phase."""
    columns = ["GPU, workload", "model", "vLLM's best, paper", *(f"tuned static, {p}" for p in PATTERNS)]
    columns += ["Seesaw, paper", *(f"ours, {pattern}" for pattern in PATTERNS)]
    rows = []
    for (gpu, trace), sizes in PAPER_LAYOUTS.items():
        for size, (static, seesaw) in sizes.items():
            of = {f["pattern"]: f for f in grid if (f["gpu"], f["trace"], f["size"]) == (gpu, trace, size)}
            row = [f"{gpu} {trace}", size, code(static)]
            row += [code(of[p]["tuned"]["plan"]) if p in of else NONE for p in PATTERNS]
            row += [code(seesaw), *(code(of[p]["ours"]["plan"]) if p in of else NONE for p in PATTERNS)]
            rows.append(row)
    return table(columns, rows, 8)


def code(plan: str) -> str:
    """A plan as this project writes it."""
    return f"`{Plan.parse(plan)}`"


def cause_table(grid: Sequence[dict[str, Any]]) -> str:
    """Where the best tuned static plan and ours spend their time, in per cent of the static plan's."""
    shown = [cause for cause in CAUSES if any(found["ours"]["causes"][cause] for found in grid)]
    columns = ["node", "model, workload", "plan", *(CAUSES[cause].name for cause in shown), "sum"]
    rows = []
    for found in grid:
        whole = found["tuned"]["seconds"]
        for which in ("tuned", "ours"):
            causes = found[which]["causes"]
            shares = [f"{100 * causes[cause] / whole:.0f}" for cause in shown]
            where = [f"`{found['node']}`", f"{found['size']} {found['trace']}"]
            total = f"{100 * found[which]['seconds'] / whole:.0f}"
            rows.append([*where, code(found[which]["plan"]), *shares, total])
    return table(columns, rows, 3)


def accuracy(grid: Sequence[dict[str, Any]]) -> str:
    """How far the closed form was from the twin, over all replays."""
    lines = []
    for name, key in (("two-phase", "replayed"), ("static", "replayed_static")):
        misses = sorted(
            abs(estimated / seconds - 1) for f in grid for *_, estimated, seconds in f[key] if estimated
        )
        at = [misses[int(share * (len(misses) - 1))] for share in (0.5, 0.9, 1.0)]
        lines.append([name, str(len(misses)), *(f"{miss:.1%}" for miss in at)])
    return table(["plans", "replays", "median error", "90th percentile", "largest"], lines)


# ---- sensitivity -----------------------------------------------------------------------------------------------


def by_output(pattern: str, requests: int) -> dict[str, Any]:
    """Rates of fixed plans as outputs grow: 70B on 8 A10, prompts of 3,000 tokens."""
    rates: dict[str, dict[int, float]] = {plan: {} for plan in LENGTH_PLANS}
    for output in OUTPUTS:
        setting = Setting(
            node=f"A10@pcie4x8/{pattern}",
            model="Llama-2-70B",
            ranks=8,
            trace=f"in=3000,out={output}",
            requests=requests,
        )
        planner = Planner(setting)
        for name in LENGTH_PLANS:
            plan = Plan.parse(name)
            of = candidates(planner.ranking([plan]), separate=plan.separate)
            rates[name][output] = planner.tuned(of, 1)[0].simulated.rows_per_second
    return {"pattern": pattern, "rows_per_second": rates}


def output_table(studies: Iterable[dict[str, Any]]) -> str:
    """Rates relative to the re-sharding plan's."""
    rows = []
    for study in studies:
        rates = study["rows_per_second"]
        for name in LENGTH_PLANS:
            ours = rates[LENGTH_PLANS[-1]]
            cells = [
                f"{rates[name][out]:.3f}"
                if name == LENGTH_PLANS[-1]
                else f"{rates[name][out] / ours[out]:.2f} ×"
                for out in OUTPUTS
            ]
            rows.append([study["pattern"], f"`{name}`", *cells])
    return table(["links", "plan", *(f"out {output:,}" for output in OUTPUTS)], rows, 2)


def by_link(pattern: str, requests: int) -> dict[str, Any]:
    """The paper's plan, our best and the best static one as all-reduces get slower or faster: 34B on 8 A10."""
    setting = Setting(
        node=f"A10@pcie4x8/{pattern}", model="CodeLlama-34B", ranks=8, trace="arxiv", requests=requests
    )
    rows = []
    for factor in FACTORS:
        planner = Planner(setting, faster_all_reduce(hardware(f"8x{setting.node}"), factor))
        ranking = planner.ranking()
        of_paper = candidates(planner.ranking([Plan.parse(LINK_PLAN)]), separate=True)
        found = {
            "paper": planner.tuned(of_paper, 1)[0],
            "ours": planner.tuned(candidates(ranking, separate=True), 3)[0],
            "static": planner.tuned(candidates(ranking, separate=False), 3)[0],
        }
        rows.append({"factor": factor, **{name: one.described() for name, one in found.items()}})
    return {"pattern": pattern, "factors": rows}


def faster_all_reduce(spec: HardwareSpec, factor: float) -> HardwareSpec:
    """All-reduces with `factor` times the bandwidth; what the smallest one takes is latency and stays."""

    def scaled(curve: Curve) -> Curve:
        latency = curve.values[0]
        values = tuple(latency + (seconds - latency) / factor for seconds in curve.values)
        return Curve(curve.sizes, values, curve.extends)

    return msgspec.structs.replace(spec, all_reduce={n: scaled(c) for n, c in spec.all_reduce.items()})


def link_table(studies: Iterable[dict[str, Any]]) -> str:
    """A line for each factor."""
    columns = ["links", "bandwidth", "best static", "tokens/s", f"`{LINK_PLAN}`, ×", "our best", "×"]
    rows = []
    for study in studies:
        for row in study["factors"]:
            static = row["static"]
            over = [static["seconds"] / row[which]["seconds"] for which in ("paper", "ours")]
            rows.append([study["pattern"], f"{row['factor']:g} ×", named(static)])
            rows[-1] += [f"{static['tokens_per_second']:,.0f}", f"{over[0]:.2f}"]
            rows[-1] += [named(row["ours"]), f"{over[1]:.2f}"]
    return table(columns, rows, 3)


# ---- command ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Run, print, and record if asked."""
    args = arguments(__doc__ or "", "a tenth of the requests")
    scale = 0.1 if args.quick else 1.0
    grid = run_all(run_cell, cells(scale), args.jobs)
    requests = round(scale * LENGTH_REQUESTS), round(scale * TRACES["arxiv"])
    outputs = run_all(partial(by_output, requests=requests[0]), PATTERNS, args.jobs)
    links = run_all(partial(by_link, requests=requests[1]), PATTERNS, args.jobs)
    tables = {
        "means": mean_table(grid),
        "ratios": ratio_table(grid),
        "layouts": layout_table(grid),
        "causes": cause_table(grid),
        "outputs": output_table(outputs),
        "links": link_table(links),
        "accuracy": accuracy(grid),
    }
    found = {"grid": grid, "by_output": outputs, "by_link": links}
    title = "The paper's grid in the digital twin"
    conclude(tables, PAGE, "paper-grid", title, found, recorded=args.record)


if __name__ == "__main__":
    main()
