"""The options of `seesaw run`: names, help, and what typer checks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_FILES, _MODEL, _MEMORY, _ENGINE = "Files", "Model", "Memory", "Engine"
_WATCHING = "Watching"

Input = Annotated[
    Path,
    typer.Option(
        "--input",
        help="JSONL file: OpenAI Batch lines, or plain lines with 'prompt' or 'messages'.",
        metavar="FILE",
        rich_help_panel=_FILES,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Answers, as OpenAI Batch output lines; by default INPUT.output.jsonl beside the input.",
        metavar="FILE",
        rich_help_panel=_FILES,
    ),
]
Errors = Annotated[
    Path | None,
    typer.Option(
        help="Failed rows; by default OUTPUT.errors.jsonl beside the output. Created only if a row fails.",
        metavar="FILE",
        rich_help_panel=_FILES,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(help="Take only the first N rows.", min=0, metavar="N", rich_help_panel=_FILES),
]
Model = Annotated[
    str,
    typer.Option(
        help="Directory with config.json, safetensors files and tokeniser.",
        metavar="DIR",
        rich_help_panel=_MODEL,
    ),
]
DType = Annotated[
    Literal["auto", "bfloat16", "float32", "float16"],
    typer.Option(help="Type of weights and KV; auto is the checkpoint's.", rich_help_panel=_MODEL),
]
LoadFormat = Annotated[
    Literal["auto", "safetensors", "dummy"],
    typer.Option(help="Where weights come from; dummy makes random ones.", rich_help_panel=_MODEL),
]
ServedModelName = Annotated[
    str | None,
    typer.Option(
        help="Name of the model in the answers; rows that name another model then fail.",
        metavar="NAME",
        rich_help_panel=_MODEL,
    ),
]
PlanText = Annotated[
    str,
    typer.Option(
        help="Layouts of prefill and decode, such as 'P4->T4', or one layout for both, such as T4; auto plans by "
        "the first rows, given a profile of this node (seesaw profile).",
        metavar="PLAN",
        rich_help_panel=_ENGINE,
    ),
]
Ranks = Annotated[
    int | None, typer.Option(help="Number of ranks.", min=1, metavar="N", rich_help_panel=_ENGINE)
]
Device = Annotated[str, typer.Option(help="What a rank is.", metavar="KIND", rich_help_panel=_ENGINE)]
Policy = Annotated[
    Literal["seesaw", "chunked", "prefill-first", "decode-first"] | None,
    typer.Option(
        help="How phases take turns; by default seesaw for two layouts, chunked for one.",
        rich_help_panel=_ENGINE,
    ),
]
Transition = Annotated[
    Literal["auto", "resident", "delta", "reload"],
    typer.Option(
        help="How weights change layout: keep both, move what differs, or load anew; auto goes by memory.",
        rich_help_panel=_ENGINE,
    ),
]
Chunk = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of a batch that holds prefill.", min=1, metavar="N", rich_help_panel=_ENGINE
    ),
]
MaxRunning = Annotated[
    int | None,
    typer.Option(
        help="Most sequences decoding at once on one replica.", min=1, metavar="N", rich_help_panel=_ENGINE
    ),
]
ThreadsPerRank = Annotated[
    int, typer.Option(help="CPU threads of each rank.", min=1, metavar="N", rich_help_panel=_ENGINE)
]
SyncLoop = Annotated[
    bool,
    typer.Option("--sync-loop", help="Wait for each step before the next.", rich_help_panel=_ENGINE),
]
Seed = Annotated[
    int,
    typer.Option(help="Seed of the sampling noise.", metavar="N", rich_help_panel=_ENGINE),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory of each rank for weights, activations and KV, such as 20GiB.",
        metavar="SIZE",
        rich_help_panel=_MEMORY,
    ),
]
HostKV = Annotated[
    str | None,
    typer.Option(
        help="Host buffer for the KV of prefilled prompts, such as 64GiB.",
        metavar="SIZE",
        rich_help_panel=_MEMORY,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of a sequence, prompt included.", min=1, metavar="N", rich_help_panel=_MEMORY
    ),
]
Trace = Annotated[
    str | None,
    typer.Option(
        help="Write what every rank and the scheduler do to a Chrome trace, .json or .json.gz; "
        "https://ui.perfetto.dev opens it.",
        metavar="FILE",
        rich_help_panel=_WATCHING,
    ),
]
MetricsPort = Annotated[
    int | None,
    typer.Option(
        help="Serve Prometheus metrics on this port while the job runs.",
        min=0,
        max=65535,
        metavar="N",
        rich_help_panel=_WATCHING,
    ),
]
MetricsHost = Annotated[
    str,
    typer.Option(
        help="Address to serve them on; 0.0.0.0 for other machines as well.",
        metavar="HOST",
        rich_help_panel=_WATCHING,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="All log messages, and tracebacks of errors.")]
