"""Who competes: plans of Seesaw with their options, and engines of others, as written on the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from seesaw.bench import contestants
from seesaw.bench.workloads import Workload
from seesaw.core.devices import CPU
from seesaw.core.errors import ConfigError
from seesaw.core.layout import Plan
from seesaw.core.model_spec import DTYPE_BYTES, ModelSpec
from seesaw.core.units import parse_bytes
from seesaw.deployment import Deployment, resolve
from seesaw.device.gpus import default_ranks
from seesaw.options import Options

PEERS = ("TP1", "TP2", "PP2")
"""Layouts that `vllm` alone stands for: all that two cores have."""
VLLM_PYTHON = Path(".venv-vllm/bin/python")
"""Where `benchmarks/vllm_peer/setup.sh` puts vLLM's Python if it is not told otherwise."""

_FIXED = {"model", "plan", "load_format"}
"""Options of the engine that are not a contestant's to choose."""
_SEESAW_OPTIONS = tuple(sorted(set(Options.__dataclass_fields__) - _FIXED))
_VLLM_OPTIONS = (
    "dtype",
    "eager",
    "kv_memory",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "openmp",
)
_VLLM_LAYOUT = re.compile(r"(TP|PP)[1-9][0-9]{0,2}")
_BLOCK = 128
"""Tokens to which a sequence's KV is rounded up: the largest block of any engine."""
_SLACK = 1 << 29
"""Bytes beyond weights and KV that a rank gets where nothing is said: for activations and logits."""
_AUTO = "auto"
"""Stands for the plan that the planner chooses by the workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """An engine with its options, not yet started."""

    name: str
    """As the user wrote it, less what it has in common with others."""
    kind: str
    """`seesaw` or `vllm`."""
    command: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: int = 0
    """Bytes that its processes may come to take together; 0 until it is prepared for a workload."""

    @property
    def plan(self) -> Plan | None:
        """The plan of a Seesaw contestant, unless it is left to the planner."""
        return Plan.parse(self.options["plan"]) if self.kind == "seesaw" and not self.planned else None

    @property
    def planned(self) -> bool:
        """Whether the planner chooses the plan, when the workload is known."""
        return self.options.get("plan") == _AUTO

    @property
    def world(self) -> int:
        """Number of ranks."""
        if self.planned:
            return int(self.options["ranks"])
        plan = self.plan
        return plan.world if plan else int(self.options.get("layout", "TP1")[2:])

    def with_defaults(self, **defaults: Any) -> Contestant:
        """The same with options that it does not have yet; those that are None are left out."""
        given = {name: value for name, value in defaults.items() if value is not None}
        return replace(self, options={**given, **self.options})


def parse_contestants(text: str, vllm_python: Path | None = None) -> list[Contestant]:
    """Contestants separated by spaces: `PLAN[:POLICY][@option=value,…]` or `vllm[:LAYOUT][@option=value,…]`.

    The plan `auto` (`auto@ranks=2`; by default as many ranks as an engine takes) is left to the planner.
    `vllm` alone is one contestant per layout of `PEERS`. Raises `ConfigError`.
    """
    found: list[Contestant] = []
    for word in text.split():
        head, _, tail = word.partition("@")
        if head == "vllm":
            suffix = f"@{tail}" if tail else ""
            found += [parse_contestant(f"vllm:{layout}{suffix}", vllm_python) for layout in PEERS]
        else:
            found.append(parse_contestant(word, vllm_python))
    return found


def parse_contestant(text: str, vllm_python: Path | None = None) -> Contestant:
    """Read one contestant; see `parse_contestants`."""
    head, _, tail = text.partition("@")
    options = _options(text, tail)
    if head.startswith("vllm:"):
        return _vllm(text, head.removeprefix("vllm:"), options, vllm_python)
    plan, _, policy = head.partition(":")
    if policy:
        options["policy"] = policy
    _check_names(text, options, _SEESAW_OPTIONS)
    if plan == _AUTO:
        options.setdefault("ranks", default_ranks(CPU.name))
    else:
        plan = str(Plan.parse(plan))
    command = (sys.executable, "-m", "seesaw.bench.contestants.seesaw_engine")
    return Contestant(
        name=text.replace("→", "->"), kind="seesaw", command=command, options={"plan": plan, **options}
    )


def _vllm(text: str, layout: str, options: dict[str, Any], python: Path | None) -> Contestant:
    if not _VLLM_LAYOUT.fullmatch(layout):
        raise ConfigError(f"contestant {text!r}: the layout of vLLM must be such as TP1, TP2 or PP2")
    _check_names(text, options, _VLLM_OPTIONS)
    python = python or VLLM_PYTHON
    if not python.is_file():
        raise ConfigError(
            f"contestant {text!r}: there is no {python}; make the environment with "
            "benchmarks/vllm_peer/setup.sh, or pass --vllm-python"
        )
    script = Path(contestants.__file__).with_name("vllm_peer.py")
    command = (str(python.absolute()), str(script))
    return Contestant(name=text, kind="vllm", command=command, options={"layout": layout, **options})


def _options(text: str, tail: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in filter(None, tail.split(",")):
        name, equals, value = pair.partition("=")
        if not equals or not value:
            raise ConfigError(f"contestant {text!r}: {pair!r} is not option=value")
        options[name] = _value(value)
    return options


def _value(text: str) -> bool | int | str:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdigit() else text


def _check_names(text: str, options: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ConfigError(
            f"contestant {text!r}: unknown option {unknown[0]!r}; known are {', '.join(allowed)}"
        )


def prepared(
    contestant: Contestant,
    spec: ModelSpec,
    workload: Workload,
    *,
    dtype: str,
    node: str | None = None,
    device_memory: str | None = None,
    host_kv: str | None = None,
) -> Contestant:
    """The contestant with what the bench sets for all: type, longest sequence, memory.

    Memory that nobody set is enough for all requests at once, so that it decides nothing.
    """
    longest = -(-(workload.longest + 1) // 16) * 16
    kind = str(contestant.options.get("dtype", dtype))
    common = contestant.with_defaults(dtype=kind, max_model_len=longest)
    tokens = sum(-(-(p + o + 1) // _BLOCK) * _BLOCK for p, o in workload.lengths)
    kv, weights = tokens * spec.kv_bytes_per_token(kind), weight_parameters(spec) * DTYPE_BYTES[kind]
    ranks = contestant.world
    if contestant.kind == "vllm":
        memory = parse_bytes(common.options.get("kv_memory", kv // ranks * 5 // 4 + (64 << 20)))
        options = {**common.options, "kv_memory": memory}
        return replace(common, options=options, memory=weights + ranks * (memory + _SLACK))
    if contestant.kind != "seesaw":
        return common
    found = common.with_defaults(
        node=node,
        device=CPU.name,  # floors and probes are of cores
        device_memory=device_memory or 2 * weights + kv + _SLACK,
        host_kv=host_kv or kv,
    )
    rank, host = (parse_bytes(found.options[name]) for name in ("device_memory", "host_kv"))
    return replace(found, memory=ranks * rank + host)


def deployment_of(contestant: Contestant, model: Path) -> Deployment:
    """What a Seesaw contestant will start. Raises the `ConfigError` that its engine would end in."""
    unknown = sorted(set(contestant.options) - set(Options.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"contestant {contestant.name}: this version of the engine has no {unknown[0]!r}")
    try:
        return resolve(Options(model=str(model), load_format="dummy", **contestant.options))
    except ConfigError as error:
        raise type(error)(f"contestant {contestant.name}: {error}") from error


def weight_parameters(spec: ModelSpec) -> int:
    """Elements of all weights, embeddings included."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer = spec.hidden * (q + 2 * kv) + q * spec.hidden + 3 * spec.hidden * spec.ffn + 2 * spec.hidden
    tables = (1 if spec.tied_embeddings else 2) * spec.vocab * spec.hidden
    return spec.layers * layer + tables + spec.hidden
