"""The options of `seesaw bench`: names, help, and what typer checks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from seesaw.cli.run_options import Debug

_WHAT, _HOW, _OUT = "What is compared", "How", "Output"

Shape = Annotated[
    str,
    typer.Option(
        help="Model: tiny, 270m, 1.1b, or a directory with a config.json. Weights are random.",
        metavar="SHAPE",
        rich_help_panel=_WHAT,
    ),
]
Workload = Annotated[
    list[str],
    typer.Option(
        help="short, prefill, decode, sharegpt, sharegpt:REQUESTSxTOKENS, or REQUESTSxIN->OUT; several with spaces "
        "between, or given several times.",
        metavar="WORKLOADS",
        rich_help_panel=_WHAT,
    ),
]
Scale = Annotated[
    float, typer.Option(help="Multiplies the number of requests.", metavar="X", rich_help_panel=_WHAT)
]
Plans = Annotated[
    list[str],
    typer.Option(
        help="Contestants, with spaces between, such as 'P2->T2 T2@chunk=512 T2:prefill-first'.",
        metavar="CONTESTANTS",
        rich_help_panel=_WHAT,
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        help="Further contestants: vllm for all of vllm:TP1 vllm:TP2 vllm:PP2.",
        metavar="CONTESTANTS",
        rich_help_panel=_WHAT,
    ),
]
Rounds = Annotated[
    int, typer.Option(help="Runs of each contestant.", min=1, metavar="N", rich_help_panel=_HOW)
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Contestant that ratios are over; by default the best of vLLM, or the first.",
        metavar="CONTESTANT",
        rich_help_panel=_OUT,
    ),
]
DType = Annotated[
    Literal["bfloat16", "float32"],
    typer.Option(help="Type of weights and KV, for contestants that do not say.", rich_help_panel=_HOW),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory of each rank, such as 700MiB, for contestants that do not say; by default enough for all "
        "requests at once.",
        metavar="SIZE",
        rich_help_panel=_HOW,
    ),
]
HostKV = Annotated[
    str | None,
    typer.Option(help="Host buffer, likewise.", metavar="SIZE", rich_help_panel=_HOW),
]
Node = Annotated[
    str | None,
    typer.Option(
        help="Node file that places the ranks of Seesaw's contestants (see the rig).",
        envvar="SEESAW_NODE",
        metavar="FILE",
        rich_help_panel=_HOW,
    ),
]
VllmPython = Annotated[
    Path | None,
    typer.Option(
        help="Python of the environment that has vLLM; by default .venv-vllm/bin/python.",
        metavar="FILE",
        rich_help_panel=_HOW,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the prompts.", metavar="N", rich_help_panel=_HOW)]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Start every contestant anew for each run.", rich_help_panel=_HOW),
]
Floor = Annotated[
    bool,
    typer.Option("--floor/--no-floor", help="Measure the cores and give floors.", rich_help_panel=_HOW),
]
Profile = Annotated[
    bool,
    typer.Option("--profile", help="Time the functions of Seesaw's ranks, by phase.", rich_help_panel=_HOW),
]
Json = Annotated[
    Path | None,
    typer.Option(help="Write every run to this file.", metavar="FILE", rich_help_panel=_OUT),
]
Record = Annotated[
    str | None,
    typer.Option(
        help="Write <date>-NAME.md and .json into the folder of results.",
        metavar="NAME",
        rich_help_panel=_OUT,
    ),
]
Results = Annotated[Path, typer.Option(help="Folder of results.", metavar="DIR", rich_help_panel=_OUT)]
Note = Annotated[
    str | None,
    typer.Option(help="A sentence for the record.", metavar="TEXT", rich_help_panel=_OUT),
]
Logs = Annotated[
    Path | None,
    typer.Option(help="Keep what the contestants say in this folder.", metavar="DIR", rich_help_panel=_OUT),
]

__all__ = [
    "DType",
    "Debug",
    "DeviceMemory",
    "Floor",
    "Fresh",
    "HostKV",
    "Json",
    "Logs",
    "Node",
    "Note",
    "Peers",
    "Plans",
    "Profile",
    "Record",
    "Reference",
    "Results",
    "Rounds",
    "Scale",
    "Seed",
    "Shape",
    "VllmPython",
    "Workload",
]
