"""One bench per link speed on the rig, joined into one table: where does re-sharding pay?

    python benchmarks/rig_sweep.py --ranks 4 --links 500mbit,1gbit,2gbit,4gbit --record sweep-4 -- \\
        --shape 1.1b --workload '24x1024->128' --device-memory 900MiB \\
        --plans 'P4->T4 P4->T2P2 T4@chunk=512 T4@chunk=2048 T2P2 P4 T4->T4'

What follows `--` goes to `seesaw bench`. The table shows tokens/s of each contestant at each speed, marks the best
static one (`*`: one layout in both phases, whatever its policy) and gives the ratio of the best re-sharded plan to
it. Needs root, as the rig does.

With `--profile` the rig is measured by `seesaw profile` before each bench, for contestants such as `auto@ranks=4`,
which leave the plan to the planner; the table says what it took, the ratio to the best plan that was named, and that
of the plan it took where it was named as well: runs of one plan differ, by noise and by settings.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from seesaw.core.layout import Plan

ROOT = Path(__file__).resolve().parent.parent
NONE = "–"
GRACE = 10.0
"""Seconds that the rig has to end."""


def main() -> int:
    """Run the benches one after the other; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--links", default="500mbit,1gbit,2gbit,4gbit", help="speeds with commas; 'none' is no limit"
    )
    parser.add_argument("--quota", default="auto", help="see the rig")
    parser.add_argument("--profile", action="store_true", help="measure the rig first, for plan auto")
    parser.add_argument(
        "--record", metavar="NAME", help="write <date>-NAME.md and .json into benchmarks/results"
    )
    parser.add_argument("bench", nargs="+", help="arguments of `seesaw bench`, after --")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for link in args.links.split(","):
        print(f"== {args.ranks} ranks, link {link}", flush=True)
        result = run(args, link)
        if result is None:
            print(f"rig_sweep: the bench at {link} gave no result; see above", file=sys.stderr)
        else:
            found[link] = result
    if not found:
        return 1
    text = report(args, found)
    print(text)
    if args.record:
        stem = ROOT / "benchmarks" / "results" / f"{date.today().isoformat()}-{args.record}"
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_name(f"{stem.name}.md").write_text(text)
        stem.with_name(f"{stem.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0 if len(found) == len(args.links.split(",")) else 1


def run(args: argparse.Namespace, link: str) -> dict[str, Any] | None:
    """The JSON of one bench on a rig of this link speed."""
    limits = ["--ranks", str(args.ranks), "--link", link, "--quota", args.quota]
    seesaw = [sys.executable, "-m", "benchmarks.rig", "run", *limits, "--", sys.executable, "-m", "seesaw"]
    with tempfile.TemporaryDirectory() as folder:
        path, environment = Path(folder) / "bench.json", dict(os.environ)
        if args.profile:
            environment["SEESAW_PROFILE"] = str(Path(folder) / "profile.json")
            call([*seesaw, "profile"], environment)
        command = [*seesaw, "bench", *args.bench, "--json", str(path)]
        call(command, environment)
        if not path.exists():
            return None
        return {**json.loads(path.read_text()), "command": repeat()}


def call(command: list[str], environment: dict[str, str]) -> None:
    """Run `command` to its end; whatever ends this process before, SIGTERM too, ends the rig first."""

    def terminated(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminated)
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            # A measurement is under way. The rig leaves nothing behind either way.
            process.kill()
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def repeat() -> str:
    """The command that was given."""
    return shlex.join(["python", *sys.argv])


def report(args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> str:
    """A Markdown text: the command, the machine, a table per workload."""
    first = next(iter(found.values()))
    facts = {**first["machine"], **first["versions"], "rig": f"{args.ranks} ranks, quota {args.quota}"}
    lines = [
        f"# {args.record or 'rig sweep'}: {first['shape']} on {args.ranks} ranks, {first['date']}",
        "",
        *([first["note"], ""] if first.get("note") else []),
        "Repeat with",
        "",
        f"    {repeat()}",
        "",
        *table(["", ""], [[key, str(value)] for key, value in facts.items()]),
        "",
        f"Medians of {first['options']['rounds']} alternating runs, prompt and output tokens per second. `*` is the "
        "best static contestant, over which the ratio of the best re-sharded plan is.",
    ]
    for i, workload in enumerate(first["workloads"]):
        lines += ["", f"## {workload['name']}", "", *speeds(found, i)]
        failures = [
            f"- {link}: {one['name']}: {one['error']}"
            for link, result in found.items()
            for one in (result["workloads"][i]["contestants"] if i < len(result["workloads"]) else ())
            if one["error"]
        ]
        lines += ["", *failures] if failures else []
    return "\n".join(lines) + "\n"


def speeds(found: dict[str, dict[str, Any]], number: int) -> list[str]:
    """The table of one workload: a row per contestant, a column per link speed that the bench got to it at."""
    found = {link: result for link, result in found.items() if number < len(result["workloads"])}
    columns = [
        {one["name"]: one for one in result["workloads"][number]["contestants"]} for result in found.values()
    ]
    static = [best(column, reshards=False) for column in columns]
    resharded = [best(column, reshards=True) for column in columns]
    fastest = [best_of(column, pair) for column, *pair in zip(columns, static, resharded, strict=True)]
    rows = []
    for name in columns[0]:
        cells = [cell(column[name], name == winner) for column, winner in zip(columns, static, strict=True)]
        rows.append([name, *cells])
        if is_planned(columns[0][name]):
            rows.append(["which took", *(str(column[name]["about"].get("plan", NONE)) for column in columns)])
            over = [ratio(column, name, winner) for column, winner in zip(columns, fastest, strict=True)]
            rows.append(["over the best plan named", *over])
            named = [namesake(column, column[name]) for column in columns]
            over = [ratio(*three) for three in zip(columns, named, fastest, strict=True)]
            rows.append(["what it took, as it was named, over the best", *over])
    ratios = [ratio(*three) for three in zip(columns, resharded, static, strict=True)]
    shares = [
        ", ".join(share(column[name]) if name else NONE for name in pair)
        for column, *pair in zip(columns, resharded, static, strict=True)
    ]
    rows.append(["best re-sharded over best static", *ratios])
    if any(one["floor"] for column in columns for one in column.values()):
        rows.append(["share of its floor: best re-sharded, best static", *shares])
    return table(["contestant", *found], rows)


def is_planned(one: dict[str, Any]) -> bool:
    """Whether the plan was left to the planner."""
    return bool(one["kind"] == "seesaw" and one["options"]["plan"] == "auto")


def namesake(column: dict[str, dict[str, Any]], planned: dict[str, Any]) -> str | None:
    """The fastest contestant that was named as the plan which the planner took; its settings may be others."""
    plan = planned["about"].get("plan")
    named = (name for name, one in column.items() if one["runs"] and one["options"].get("plan") == plan)
    return best_of(column, named)


def best_of(column: dict[str, dict[str, Any]], names: Iterable[str | None]) -> str | None:
    """The fastest of those that there are."""
    return max((name for name in names if name), key=lambda name: rate(column[name]), default=None)


def ratio(column: dict[str, dict[str, Any]], name: str | None, other: str | None) -> str:
    """Of the tokens/s of one contestant to another's."""
    if not (name and other and column[name]["runs"]):
        return NONE
    return f"**{rate(column[name]) / rate(column[other]):.2f}**"


def cell(one: dict[str, Any], best_static: bool) -> str:
    """Tokens per second with their spread; nothing of a contestant whose turn never came."""
    if not one["runs"]:
        return "failed" if one["error"] else NONE
    rates = [r["tokens_per_second"] for r in one["runs"]]
    return f"{rate(one):,.0f}{'*' if best_static else ''} ({min(rates):,.0f} to {max(rates):,.0f})"


def share(one: dict[str, Any]) -> str:
    """Floor over median seconds."""
    return f"{one['floor']['seconds'] / one['median_seconds']:.0%}" if one["floor"] else NONE


def rate(one: dict[str, Any]) -> float:
    """Median tokens per second."""
    return float(one["median_tokens_per_second"])


def best(column: dict[str, dict[str, Any]], *, reshards: bool) -> str | None:
    """Name of the fastest plan of those named that re-shard, or of those that do not."""
    names = [
        name
        for name, one in column.items()
        if one["kind"] == "seesaw" and one["runs"] and not is_planned(one)
        if Plan.parse(one["options"]["plan"]).reshards == reshards
    ]
    return best_of(column, names)


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


if __name__ == "__main__":
    sys.exit(main())
