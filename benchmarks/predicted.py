"""What the twin predicts for this machine, beside what the engine takes.

    seesaw profile                                    # first, on a quiet machine
    python benchmarks/predicted.py --rounds 5 --record predicted-270m-avx2
    python benchmarks/predicted.py --plans T2 'P2->T2' --workloads '8x256->32' --rounds 2 --causes

Each plan runs in an engine of its own with random weights; the workloads take turns, all plans in each round. The
very setup of the engine is simulated with the profile. Phases are compared by the engine's own times, the job by the
clock, from handing over all requests to the last answer. A transition begins with the first rank that changes over,
while others may still compute, in the twin as in the engine's records. An engine begins where its last job has left
it: the change back to the prefill layout is left out. So are phases that take less than a hundredth of the job.

Before and after each run all ranks' cores multiply matrices for a moment. A run that began or ended while they were
slower than the profile by more than `--pace` says is made again, twice at most: other processes, or other machines on
the same host, had a part in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median

from seesaw import LLM, SamplingParams
from seesaw.bench.machine import machine, versions
from seesaw.bench.shapes import model_directory
from seesaw.bench.workloads import Workload, parse_workload
from seesaw.core.hardware import HardwareSpec
from seesaw.core.node import places_on_cores
from seesaw.core.stats import EngineStats
from seesaw.planning.accounts import CAUSES
from seesaw.planning.profiles import Profile, default_path, read_profile
from seesaw.planning.twin import Simulated, simulate
from seesaw.profiling.node import Node, NodeOptions
from seesaw.profiling.tasks import product, sizes_for

PLANS = ("T2", "P2", "D2", "P2->T2", "D2->T2", "P2->D2")
WORKLOADS = ("8x256->32", "12x64->48", "4x1024->16")
JOB = "job"
_PACE_ROWS = 256
_ATTEMPTS = 3
_LEAST_PHASE = 0.01


@dataclass(frozen=True, slots=True)
class Run:
    """One run: seconds by phase, with the whole as `job`, and how fast the cores were beside the profile."""

    seconds: dict[str, float]
    pace: float


@dataclass(slots=True)
class Case:
    """A plan on a workload."""

    plan: str
    workload: Workload
    simulated: Simulated
    runs: list[Run] = field(default_factory=list)
    discarded: int = 0

    def measured(self, phase: str) -> list[float]:
        """Seconds of each run, sorted."""
        return sorted(run.seconds.get(phase, 0.0) for run in self.runs)

    def predicted(self) -> dict[str, float]:
        """Seconds of the job, and before it of phases that take more than a hundredth of it."""
        whole = self.simulated.seconds
        phases = {name: report.seconds for name, report in self.simulated.phases.items() if name != "mixed"}
        return {name: seconds for name, seconds in phases.items() if seconds > _LEAST_PHASE * whole} | {
            JOB: whole
        }


class Pace:
    """Processes on the ranks' cores that tell how fast these are at the moment."""

    def __init__(self, hardware: HardwareSpec, dtype: str, stack: ExitStack) -> None:
        self._node = stack.enter_context(
            Node(places_on_cores(hardware.ranks, 1), NodeOptions(memory=64 << 20), [hardware.ranks])
        )
        self._task = product(dtype, _PACE_ROWS, sizes_for("cpu"))
        elements = sum(depth * columns for depth, columns in sizes_for("cpu").products)
        rate = hardware.flops[dtype] * hardware.curves(dtype).product(_PACE_ROWS)
        self._seconds = 2.0 * _PACE_ROWS * elements / rate

    def now(self) -> float:
        """Of the slowest core, 1 is the profile's."""
        values = self._node.all(self._task.op, 0.05, **self._task.sent())
        return self._seconds / max(value for value in values if value is not None)


def main() -> int:
    """Run everything, show the table, write the record."""
    args = arguments()
    profile = read_profile(args.profile or default_path())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = str(model_directory(args.shape, folder / "model"))
        jobs = [parse_workload(text) for text in args.workloads]
        engines: dict[str, LLM] = {}
        for plan in args.plans:
            engines[plan] = stack.enter_context(
                LLM(
                    model,
                    load_format="dummy",
                    tokenizer=False,
                    plan=plan,
                    dtype=args.dtype,
                    device_memory=args.device_memory,
                    host_kv=args.host_kv,
                )
            )
        cases = [
            Case(plan, job, simulate(engine.deployment.setup, profile.hardware, job.lengths))
            for job in jobs
            for plan, engine in engines.items()
        ]
        pace = Pace(profile.hardware, args.dtype, stack)
        for case in cases:
            run(engines[case.plan], case.workload.sample(2, 2))
        for number in range(args.rounds):
            for case in cases:
                measure(case, engines[case.plan], pace, args.pace)
                print(f"round {number + 1}: {progress(case)}", file=sys.stderr, flush=True)
    report(cases, profile, args)
    return 0


def measure(case: Case, engine: LLM, pace: Pace, least: float) -> None:
    """One run that counts: the first with cores at their pace, or the best of a few."""
    tries: list[Run] = []
    while len(tries) < _ATTEMPTS and not (tries and tries[-1].pace >= least):
        before = pace.now()
        seconds = run(engine, case.workload)
        tries.append(Run(seconds, min(before, pace.now())))
    case.runs.append(max(tries, key=lambda one: one.pace))
    case.discarded += len(tries) - 1


def run(engine: LLM, workload: Workload) -> dict[str, float]:
    """Seconds by phase, and of the job."""
    prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts(engine.deployment.spec.vocab)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in workload.outputs()]
    before = engine.stats()
    started = time.perf_counter()
    for _ in engine.generate(prompts, params):
        pass
    took = time.perf_counter() - started
    return booked(engine, before, engine.stats(), took)


def booked(engine: LLM, before: EngineStats, after: EngineStats, took: float) -> dict[str, float]:
    """Seconds by phase as the twin has them: what a rank still computes while another changes over is transition."""
    old, new = before.seconds_per_phase, after.seconds_per_phase
    seconds = {name: value - old.get(name, 0.0) for name, value in new.items()}
    changes = list(after.transitions[len(before.transitions) :])
    prefill = str(engine.deployment.shardings[0].layout)
    if changes and changes[0].target == prefill:
        back = changes.pop(0).seconds
        seconds["transition"] -= back
        took -= back
    if changes:
        between = sum(change.seconds for change in changes)
        seconds["prefill"] -= between - seconds["transition"]
        seconds["transition"] = between
    return {**seconds, JOB: took}


def progress(case: Case) -> str:
    """The latest run in a line."""
    last, predicted = case.runs[-1], case.predicted()
    parts = [f"{name} {last.seconds.get(name, 0.0):.2f} s ({predicted[name]:.2f})" for name in predicted]
    return f"{case.plan} on {case.workload.name}: {', '.join(parts)}; pace {last.pace:.2f}"


def error(case: Case, phase: str) -> float:
    """Predicted over the median measured, less one."""
    return case.predicted()[phase] / median(case.measured(phase)) - 1.0


def report(cases: Sequence[Case], profile: Profile, args: argparse.Namespace) -> None:
    """Tables to the terminal, and a record if one was asked for."""
    parts = [lines(*times(cases)), summary(cases), lines(*choices(cases))]
    if args.causes or args.record:
        parts += ["What the predictions are made of, as shares of their time:", lines(*causes(cases))]
    print("\n\n".join(parts))
    if args.record:
        path = args.results / f"{date.today().isoformat()}-{args.record}.md"
        path.write_text(record(parts, cases, profile, args))
        print(f"record: {path}")


def times(cases: Sequence[Case]) -> tuple[list[str], list[list[str]]]:
    """Measured beside predicted, by phase."""
    rows = []
    for case in cases:
        for phase, predicted in case.predicted().items():
            found = case.measured(phase)
            rows.append(
                [
                    f"{case.plan}, {case.workload.name}",
                    phase,
                    f"{median(found):.2f}",
                    f"{found[0]:.2f} to {found[-1]:.2f}",
                    f"{predicted:.2f}",
                    f"{error(case, phase):+.1%}",
                ]
            )
    return ["plan, workload", "phase", "measured s", "least to most", "predicted s", "error"], rows


def summary(cases: Sequence[Case]) -> str:
    """How far off, over all rows and over jobs alone."""
    texts = []
    for what, phases in (("phases and jobs", None), ("jobs", {JOB})):
        off = [
            abs(error(case, phase))
            for case in cases
            for phase in case.predicted()
            if phases is None or phase in phases
        ]
        texts.append(f"{len(off)} {what}: median error {median(off):.1%}, largest {max(off):.1%}")
    paces = [run.pace for case in cases for run in case.runs]
    discarded = sum(case.discarded for case in cases)
    texts.append(
        f"cores at {min(paces):.0%} to {max(paces):.0%} of the profile's pace around the runs, median "
        f"{median(paces):.0%}; {discarded} runs were made again for slow cores"
    )
    return "\n".join(f"- {text}" for text in texts)


def choices(cases: Sequence[Case]) -> tuple[list[str], list[list[str]]]:
    """By workload, the plan that is predicted to be fastest beside the one that was."""
    rows = []
    for name in dict.fromkeys(case.workload.name for case in cases):
        rivals = [case for case in cases if case.workload.name == name]
        chosen = min(rivals, key=lambda case: case.simulated.seconds)
        fastest = min(rivals, key=lambda case: median(case.measured(JOB)))
        more = median(chosen.measured(JOB)) / median(fastest.measured(JOB)) - 1
        rows.append([name, chosen.plan, fastest.plan, f"{more:.1%}"])
    return ["workload", "predicted fastest", "measured fastest", "the first takes more by"], rows


def causes(cases: Sequence[Case]) -> tuple[list[str], list[list[str]]]:
    """Shares of a predicted phase by cause."""
    phases = [
        (case, name, found)
        for case in cases
        for name, found in case.simulated.phases.items()
        if found.seconds > _LEAST_PHASE * case.simulated.seconds
    ]
    used = [cause for cause in CAUSES if any(found.causes[cause] > 0 for _, _, found in phases)]
    rows = [
        [
            f"{case.plan}, {case.workload.name}",
            name,
            *(f"{found.causes[cause] / found.seconds:.1%}" for cause in used),
        ]
        for case, name, found in phases
    ]
    return ["plan, workload", "phase", *(cause.replace("_", " ") for cause in used)], rows


def lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---", "---", *["---:"] * (len(columns) - 2)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def record(parts: Sequence[str], cases: Sequence[Case], profile: Profile, args: argparse.Namespace) -> str:
    """The record: what was measured, on what, and how to do it again."""
    facts = {**machine(), **versions(), "profile": f"of {profile.date}", "dtype": args.dtype}
    head = [
        f"# {args.record}: {args.shape}, {date.today().isoformat()}",
        *([args.note] if args.note else []),
        f"Repeat with\n\n    seesaw profile\n    {command(args)}",
        f"Weights are random. Measured times are medians of {args.rounds} runs, all plans and workloads in turn; the "
        "job runs from handing over all requests, as token ids, to the last answer. Predictions are of the twin with "
        "the profile, for the very setup of the engine; nothing was fitted to these runs.",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())]),
    ]
    return "\n\n".join([*head, *parts]) + "\n"


def command(args: argparse.Namespace) -> str:
    """This command, without the options that were left alone or name files."""
    import shlex

    words = ["python", "benchmarks/predicted.py", "--shape", args.shape, "--plans", *args.plans]
    words += ["--workloads", *args.workloads, "--rounds", str(args.rounds), "--dtype", args.dtype]
    words += ["--device-memory", args.device_memory, "--host-kv", args.host_kv, "--record", args.record]
    return shlex.join(words)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="270m")
    parser.add_argument("--plans", nargs="+", default=list(PLANS))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), metavar="REQUESTSxIN->OUT")
    parser.add_argument("--profile", type=Path, help="by default the one that seesaw profile writes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device-memory", default="1500MiB", help="of each rank")
    parser.add_argument("--host-kv", default="512MiB")
    parser.add_argument(
        "--pace", type=float, default=0.9, help="least pace of the cores around a run that counts"
    )
    parser.add_argument("--causes", action="store_true", help="show what predictions are made of")
    parser.add_argument("--record", metavar="NAME", help="write <date>-NAME.md")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--note", help="a sentence for the record")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
