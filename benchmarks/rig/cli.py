"""The commands of the rig."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import permutations

from seesaw.core.errors import SeesawError
from seesaw.core.node import Node, load_node

from .cgroups import find_hierarchy, remove_stale
from .command import NODE_VARIABLE, run_command
from .errors import RigError
from .rig import Rig, check_machine, end_standing, standing_rigs, start_keeper
from .settings import Settings, format_rate, make_settings

_DESCRIPTION = """\
Emulated nodes of several ranks on a few cores. Each rank has a network namespace of its own behind a link with a
token bucket in either direction, and, where ranks share a core, a CPU quota, so that it computes at the pace of a
smaller device whatever its neighbour does. Host memory is shared, as on a real node. Needs root.

  2 ranks on two cores   one core each, no quota
  4 ranks on two cores   two per core, quota 1/2 each (2 ms in every 4 ms)
  8 ranks on two cores   four per core, quota 1/4 each (1 ms in every 4 ms)
"""


def main(argv: Sequence[str]) -> int:
    """Exit code: the command's own for `run`; 0, or 2 with one sentence where the rig cannot be."""
    parser = _parser()
    own, command = _split(list(argv))
    args = parser.parse_args(own)
    try:
        return int(args.act(args, command))
    except (RigError, SeesawError) as error:
        print(f"rig: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rig",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help=f"run a command on a rig, with {NODE_VARIABLE} set to its node file",
        usage="python -m benchmarks.rig run [options] -- COMMAND ...",
    )  # fmt: skip
    _add_settings(run)
    run.set_defaults(act=_run)
    up = commands.add_parser("up", help="set a rig up and leave it standing until `down`")
    _add_settings(up)
    up.set_defaults(act=_up)
    down = commands.add_parser(
        "down", help="remove the rigs that `up` left, and what killed rigs left behind"
    )
    down.add_argument("pid", nargs="?", type=int, help="the keeper of one rig, as `status` shows it")
    down.set_defaults(act=_down)
    status = commands.add_parser("status", help="the rigs that are up, one line each")
    status.set_defaults(act=_status)
    probe = commands.add_parser(
        "probe", help="measure the links and the pace of a rig",
        description=f"Measures the rig of {NODE_VARIABLE} if that is set, else one made for it.",
    )  # fmt: skip
    _add_settings(probe)
    probe.add_argument("--seconds", type=float, default=0.5, help="length of one measurement [%(default)s]")
    probe.add_argument("--dtype", default="float32", help="of the matrix products: float32 or bfloat16")
    probe.add_argument("--skip", choices=["links", "pace"], help="what not to measure")
    probe.set_defaults(act=_probe)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="number of ranks [%(default)s]")
    add("--link", default="1gbit", metavar="RATE",
        help="rate of each rank's link in either direction, such as 500mbit, or none [%(default)s]")  # fmt: skip
    add("--quota", default="auto", metavar="CORES",
        help="processor time of each rank in cores, counted over 4 ms: 0.5 is 2 ms in every 4; "
             "auto is 1/k where k ranks share a core; none [%(default)s]")  # fmt: skip
    add("--burst", type=int, metavar="BYTES",
        help="bytes a link may make up for, at 1.1 times its rate, after a delay or idle [4 ms]")  # fmt: skip
    add("--mtu", type=int, metavar="BYTES", help="largest packet [132 µs of the rate, 9000 to 65000]")
    add("--cores", metavar="LIST", help="cores to deal to the ranks in turn, such as 0,1 [all]")


def _settings(args: argparse.Namespace) -> Settings:
    return make_settings(
        args.ranks, link=args.link, quota=args.quota, burst=args.burst, mtu=args.mtu, cores=_cores(args.cores)
    )


def _cores(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise RigError(f"cores {text!r}: expected numbers with commas, such as 0,1") from None


def _make(args: argparse.Namespace) -> Rig:
    return Rig(args.ranks, args.link, args.quota, burst=args.burst, mtu=args.mtu, cores=_cores(args.cores))


def _run(args: argparse.Namespace, command: list[str]) -> int:
    if not command:
        raise RigError("nothing to run; write the command after --")
    with _make(args) as rig:
        return run_command(command, node_file=rig.node_file, group=rig.command_group)


def _up(args: argparse.Namespace, command: list[str]) -> int:
    process, report = start_keeper(_settings(args), 0)
    print(f"export {NODE_VARIABLE}={report.node_file}  # until: python -m benchmarks.rig down {process.pid}")
    process.returncode = 0  # it stays; we do not wait for it
    return 0


def _down(args: argparse.Namespace, command: list[str]) -> int:
    check_machine()
    ended = [rig for rig in standing_rigs() if rig.owner == 0 and args.pid in (None, rig.pid)]
    if args.pid is not None and not ended:
        raise RigError(f"no rig of `up` is kept by process {args.pid}; see `status`")
    for rig in ended:
        end_standing(rig)
    print(f"{len(ended)} rigs removed, {remove_stale(find_hierarchy())} left by killed ones cleared away")
    return 0


def _status(args: argparse.Namespace, command: list[str]) -> int:
    for rig in standing_rigs():
        owner = f"of process {rig.owner}" if rig.owner else "left standing by `up`"
        print(f"{rig.pid}: {rig.settings.describe()}; {owner}; {NODE_VARIABLE}={rig.node_file or '-'}")
    return 0


def _probe(args: argparse.Namespace, command: list[str]) -> int:
    with ExitStack() as stack:
        node_file = os.environ.get(NODE_VARIABLE)
        if node_file is None:
            rig = stack.enter_context(_make(args))
            print(rig.settings.describe())
            node_file = rig.node_file
        node = load_node(node_file)
        if args.skip != "links":
            _probe_links(node, args.seconds)
        if args.skip != "pace":
            _probe_pace(node, args.dtype, args.seconds)
    return 0


def _probe_links(node: Node, seconds: float) -> None:
    from .probe import ROUND_TRIP_BYTES, rank_probes, ring, round_trip, throughput

    with rank_probes(node) as probes:
        for a, b in permutations(range(len(probes)), 2):
            rate = throughput(probes[a], probes[b], seconds)
            trips = []
            for size in ROUND_TRIP_BYTES:
                median, high = round_trip(probes[a], probes[b], size, 100 if size < 1 << 20 else 20)
                trips.append(f"{_size(size)} {median * 1e6:.0f} µs (95 %: {high * 1e6:.0f})")
            print(f"link {a}->{b}  {format_rate(rate)}  round trip: {', '.join(trips)}", flush=True)
        rates = ring(probes, seconds)
        print(f"ring, all at once  {', '.join(format_rate(rate) for rate in rates)}", flush=True)


def _probe_pace(node: Node, dtype: str, seconds: float) -> None:
    import torch  # once, before the ranks fork

    from .probe import pace, rank_probes, reads

    torch.set_num_threads(1)
    with rank_probes(node) as probes:
        alone = [(pace([p], dtype, seconds)[0], reads([p], dtype, seconds)[0]) for p in probes]
        busy = list(zip(pace(probes, dtype, seconds), reads(probes, dtype, seconds), strict=True))
        for rank, ((f0, b0), (f1, b1)) in enumerate(zip(alone, busy, strict=True)):
            print(
                f"rank {rank}  {dtype} {f0 / 1e9:.1f} GFLOP/s alone, {f1 / 1e9:.1f} with all busy; "
                f"reads {b0 / 1e9:.2f} GB/s alone, {b1 / 1e9:.2f} with all busy"
            )


def _size(count: int) -> str:
    return (
        f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB" if count >= 1024 else f"{count} B"
    )
