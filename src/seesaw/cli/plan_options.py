"""The options of `seesaw plan` and `seesaw simulate`: names, help, and what typer checks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from seesaw.cli.run_options import Debug

_WHAT, _LIMITS, _OUT = "What is planned for", "Limits", "Output"


Model = Annotated[
    str,
    typer.Option(
        help="Directory with a config.json (weights are not needed), or a published model such as Llama-2-70B.",
        metavar="DIR_OR_NAME",
        rich_help_panel=_WHAT,
    ),
]
Hardware = Annotated[
    str | None,
    typer.Option(
        help="Node of the catalogue, such as 8xL4 or 4xA100-80G-PCIe, or a profile written by seesaw profile; by "
        "default the profile of this box, or its GPUs by the catalogue.",
        metavar="NODE_OR_FILE",
        rich_help_panel=_WHAT,
    ),
]
Workload = Annotated[
    str | None,
    typer.Option(
        help="sharegpt (the default), arxiv, azure-code, azure-conv, lmsys, mooncake; in=3000,out=200; a job file "
        "(.jsonl) or a trace (.csv).",
        metavar="WORKLOAD",
        rich_help_panel=_WHAT,
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(
        help="Number of requests; by default 1,000, or all of a file.",
        min=1,
        metavar="N",
        rich_help_panel=_WHAT,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Type of the weights: bfloat16, float16, float32, fp8, int8, int4; by default the model's own.",
        metavar="TYPE",
        rich_help_panel=_WHAT,
    ),
]
KV = Annotated[
    str | None,
    typer.Option(
        help="Type of the KV cache: bfloat16, float16, float32, fp8, int8; by default the model's own.",
        metavar="TYPE",
        rich_help_panel=_WHAT,
    ),
]
Seed = Annotated[
    int,
    typer.Option(help="Seed of the lengths drawn for a named workload.", metavar="N", rich_help_panel=_WHAT),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory of each rank for weights, activations and KV, such as 20GiB; by default what the device has, "
        "less what its runtime takes.",
        metavar="SIZE",
        rich_help_panel=_LIMITS,
    ),
]
HostKV = Annotated[
    str | None,
    typer.Option(
        help="Host buffer for the KV of prefilled prompts, such as 64GiB.",
        metavar="SIZE",
        rich_help_panel=_LIMITS,
    ),
]
MaxRunning = Annotated[
    int | None,
    typer.Option(
        help="Most sequences decoding at once on one replica.",
        min=1,
        metavar="N",
        rich_help_panel=_LIMITS,
    ),
]
Chunk = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of a batch that holds prefill.", min=1, metavar="N", rich_help_panel=_LIMITS
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of a sequence, prompt included; longer requests are left out. By default the model's "
        "context.",
        min=1,
        metavar="N",
        rich_help_panel=_LIMITS,
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help="How phases take turns: seesaw, chunked, prefill-first or decode-first; by default seesaw for two "
        "layouts, chunked for one.",
        metavar="POLICY",
        rich_help_panel=_LIMITS,
    ),
]
Transition = Annotated[
    Literal["auto", "resident", "delta", "reload"],
    typer.Option(
        help="How weights change layout: keep both, move what differs, or load anew; auto goes by memory.",
        rich_help_panel=_LIMITS,
    ),
]
Top = Annotated[
    int,
    typer.Option(help="Rows of the table of plans.", min=1, metavar="N", rich_help_panel=_OUT),
]
Json = Annotated[
    str | None,
    typer.Option(
        help="Write everything as JSON to this file; alone or with '-', to standard output instead of the tables.",
        metavar="[FILE]",
        rich_help_panel=_OUT,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        help="Draw the plans into this HTML file, which needs nothing else.",
        metavar="FILE",
        rich_help_panel=_OUT,
    ),
]
PlanText = Annotated[
    str | None,
    typer.Option(
        help="Plan to replay, such as 'P8->T4P2', or T4 for one layout.",
        metavar="PLAN",
        rich_help_panel=_WHAT,
    ),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(
        help="Plans to compare, with spaces between, such as --compare 'P8->T4P2' T4P2 T8; ratios are over the "
        "first.",
        metavar="PLAN...",
        rich_help_panel=_WHAT,
    ),
]
Plans = Annotated[
    list[str] | None,
    typer.Argument(help="Plans, as with --compare.", metavar="PLAN", show_default=False),
]
Arrivals = Annotated[
    bool,
    typer.Option(
        "--arrivals/--no-arrivals",
        help="Let requests arrive when the workload says; without, all are there from the start.",
        rich_help_panel=_WHAT,
    ),
]

__all__ = [
    "KV",
    "Arrivals",
    "Chunk",
    "Compare",
    "Debug",
    "DeviceMemory",
    "Hardware",
    "HostKV",
    "Json",
    "MaxModelLen",
    "MaxRunning",
    "Model",
    "PlanText",
    "Plans",
    "Plot",
    "Policy",
    "Requests",
    "Seed",
    "Top",
    "Transition",
    "Weights",
    "Workload",
]
