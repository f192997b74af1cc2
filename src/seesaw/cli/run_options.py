"""The options of `seesaw run`: names, help, and what typer checks of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_FILES, _MODEL, _MEMORY, _ENGINE = "Files", "Model", "Memory", "Engine"
_WATCHING = "Watching"

Input = Annotated[
    list[str],
    typer.Option(
        "--input",
        "--input-file",
        "-i",
        help="JSONL (OpenAI Batch lines, or plain lines with 'prompt' or 'messages'), CSV, TSV, Parquet; also .gz, "
        ".zst; '-' is standard input. May be repeated, or a pattern such as 'part-*.jsonl'.",
        metavar="FILE",
        rich_help_panel=_FILES,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "--output-file",
        "-o",
        help="Answers: .jsonl as OpenAI Batch output lines, .csv, .tsv, .parquet as tables; also .gz, .zst. "
        "By default INPUT.output.jsonl beside the input. With - they go to standard output as they come, and the job "
        "cannot be continued.",
        metavar="FILE",
        rich_help_panel=_FILES,
    ),
]
Errors = Annotated[
    Path | None,
    typer.Option(
        help="Failed rows, in the same formats; by default OUTPUT.errors.jsonl beside the output. Created only if a "
        "row fails.",
        metavar="FILE",
        rich_help_panel=_FILES,
    ),
]
PromptColumn = Annotated[
    str | None,
    typer.Option(
        help="Column with the prompts; by default prompt, messages or prompt_token_ids.",
        metavar="NAME",
        rich_help_panel=_FILES,
    ),
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        help="Column with the ids; by default custom_id or id, if there is one.",
        metavar="NAME",
        rich_help_panel=_FILES,
    ),
]
KeepColumn = Annotated[
    list[str] | None,
    typer.Option(
        help="Column that passes through to the output. May be repeated; of a table, by default all that are "
        "neither prompts, ids nor parameters.",
        metavar="NAME",
        rich_help_panel=_FILES,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(help="Take only the first N rows.", min=0, metavar="N", rich_help_panel=_FILES),
]
Ordered = Annotated[
    bool,
    typer.Option(
        "--ordered",
        help="Put the finished files into the order of the input.",
        rich_help_panel=_FILES,
    ),
]
RetryErrors = Annotated[
    bool,
    typer.Option(
        "--retry-errors",
        help="Run rows again that failed before; answered ones stay as they are.",
        rich_help_panel=_FILES,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Go on with a job although its model, input or settings changed; start again what is complete, damaged, "
        "or not ours.",
        rich_help_panel=_FILES,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="Directory with config.json, safetensors files and tokeniser, or the name of a model in the local "
        "Hugging Face cache.",
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
GenerationConfig = Annotated[
    str,
    typer.Option(
        help="Settings of rows that leave them open: auto takes those of the model's generation_config.json, vllm "
        "none, a folder those of its file.",
        metavar="auto|vllm|DIR",
        rich_help_panel=_MODEL,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of an answer, of rows that do not say.", min=1, metavar="N", rich_help_panel=_MODEL
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Of rows that do not say; 0 is greedy.", min=0.0, max=100.0, metavar="X", rich_help_panel=_MODEL
    ),
]
PlanText = Annotated[
    str,
    typer.Option(
        help="Layouts of prefill and decode, such as 'P4->T4', or one layout for both, such as T4; auto plans by "
        "the first rows, given a profile of this node (seesaw profile) or GPUs of the catalogue.",
        metavar="PLAN",
        rich_help_panel=_ENGINE,
    ),
]
Ranks = Annotated[
    int | None, typer.Option(help="Number of ranks.", min=1, metavar="N", rich_help_panel=_ENGINE)
]
Device = Annotated[
    str,
    typer.Option(
        help="What ranks compute on: cuda (NVIDIA GPUs), or cpu; auto is cuda where there are GPUs.",
        metavar="KIND",
        rich_help_panel=_ENGINE,
    ),
]
RanksPerGpu = Annotated[
    int,
    typer.Option(
        help="Ranks that share a GPU, for trying out plans of more ranks than there are GPUs.",
        min=1,
        metavar="N",
        rich_help_panel=_ENGINE,
    ),
]
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
OnRankLoss = Annotated[
    Literal["continue", "stop"],
    typer.Option(
        help="When a rank dies or hangs: go on with those that are left, or stop, so that the job can be resumed.",
        rich_help_panel=_ENGINE,
    ),
]
ThreadsPerRank = Annotated[
    int, typer.Option(help="CPU threads of each rank.", min=1, metavar="N", rich_help_panel=_ENGINE)
]
SyncLoop = Annotated[
    bool,
    typer.Option("--sync-loop", help="Wait for each step before the next.", rich_help_panel=_ENGINE),
]
Preflight = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(
        help="Check memory, disk and, unless the job is tiny, that the ranks can really exchange data, before it "
        "starts; on checks that for any job.",
        rich_help_panel=_ENGINE,
    ),
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
