"""From what a user asks for to what is started: model, plan, shardings and memory, resolved and checked.

Everything here happens before any worker exists, so every refusal is one sentence and costs nothing.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

from seesaw.core.errors import ConfigError, LayoutError, ModelError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout, Plan
from seesaw.core.model_spec import DTYPE_BYTES, DType, ModelSpec
from seesaw.core.node import Place, load_node, places_on_cores
from seesaw.core.units import parse_bytes
from seesaw.models.hf_config import load_spec
from seesaw.planning.at_hand import nominal_turn_costs, profile_at_hand
from seesaw.planning.device_costs import costs_of
from seesaw.planning.memory import MemoryPlan, TransitionMode
from seesaw.planning.setup import Limits, Setup, set_up
from seesaw.planning.shapes import stored_as
from seesaw.preflight.gate import Mode as PreflightMode
from seesaw.preflight.system import available_memory
from seesaw.recording.trace import check_trace
from seesaw.scheduling.config import SchedulerConfig
from seesaw.weights.sharding import Sharding, check_layout

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "safetensors", "dummy"]
MAX_RUNNING = 256
"""Where nothing is said and nothing is searched for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may ask of an engine; None leaves the choice to Seesaw."""

    model: str
    """A directory with `config.json` and safetensors files."""
    plan: str = "auto"
    """Such as `P4->T4` or `T4`; `auto` plans by the first rows where the node has a profile, else by rule."""
    ranks: int | None = None
    device: str = "cpu"
    device_memory: int | str | None = None
    """Budget per rank, in bytes or as `"8GiB"`."""
    host_kv: int | str | None = None
    """Budget of the host KV buffer of the node."""
    dtype: str = "auto"
    load_format: str = "auto"
    policy: str | None = None
    max_model_len: int | None = None
    seed: int = 0
    chunk: int | None = None
    """Most tokens of a batch that holds prefill; by default 2048 shared out over the pipeline stages of prefill."""
    max_running: int | None = None
    """Most sequences decoding at once on one replica; by default 256, or what plan `auto` finds best."""
    block_size: int = 16
    transition: str = "auto"
    overlap: bool = True
    threads_per_rank: int = 1
    attention: str | None = None
    transport: str = "auto"
    """How tensors travel between ranks: `auto`, `shm`, `tcp` (ranks with addresses of their own) or `gloo`."""
    node: str | None = None
    """A JSON file that places each rank in a network namespace, control groups and cores (`core.node`)."""
    start_timeout: float = 120.0
    on_rank_loss: str = "continue"
    """When a rank dies or hangs: `continue` with those that are left, or `stop`."""
    rank_timeout: float = 60.0
    """Seconds without a sign of life after which a rank is taken for lost."""
    preflight: str = "off"
    """What is checked before ranks start: `off`, `limits` (memory), or `on` (that ranks can really talk, too)."""
    profile: str | None = None
    """A folder to which each rank writes where its time went, by phase and function (`rank0.json`, …)."""
    trace: str | None = None
    """A file for a Chrome trace of ranks and scheduler, which Perfetto opens; `.json` or `.json.gz`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A checked plan: what `launch.LocalNode` starts and the scheduler drives."""

    options: Options
    setup: Setup
    dummy: bool
    """Whether weights are random."""
    device_memory: int
    host_kv: int
    places: tuple[Place, ...]
    """Where each rank runs."""
    measured: HardwareSpec | str
    """The node by its profile, or why there is none to go by."""

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        return self.setup.spec

    @property
    def plan(self) -> Plan:
        """The layouts."""
        return self.setup.plan

    @property
    def dtype(self) -> DType:
        """Of weights, KV and computation."""
        return self.setup.dtype

    @property
    def shardings(self) -> tuple[Sharding, Sharding]:
        """(prefill, decode)."""
        return self.setup.shardings

    @property
    def memory(self) -> MemoryPlan:
        """What is allocated."""
        return self.setup.memory

    @property
    def scheduler(self) -> SchedulerConfig:
        """Its settings."""
        return self.setup.scheduler


def resolve(options: Options) -> Deployment:
    """Choose what was left open and check everything. Raises a `ConfigError`."""
    _check_choices(options)
    spec = load_spec(options.model)
    dummy = options.load_format == "dummy"
    if not dummy:
        _check_weights(options.model, spec)
    plan = _choose_plan(options, spec)
    dtype = _choose_dtype(options, spec)
    device_memory, host_kv = _budgets(options, plan)
    measured = profile_at_hand(plan.world, options.device, dtype)
    model = stored_as(spec, dtype, Path(options.model).resolve().name)
    setup = set_up(model, plan, dtype, limits_of(options, device_memory, host_kv))
    if options.max_model_len is None and setup.memory.max_model_len < spec.max_position:
        logger.info("max_model_len is %d, what the memory budgets leave room for", setup.memory.max_model_len)
    return Deployment(
        options=options,
        setup=_with_costs(setup, measured),
        dummy=dummy,
        device_memory=device_memory,
        host_kv=host_kv,
        places=_places(options, plan),
        measured=measured,
    )


def limits_of(options: Options, device_memory: int, host_kv: int) -> Limits:
    """The bounds of `options` within so many bytes of each rank, and of the host buffer."""
    return Limits(
        device_memory=device_memory,
        host_kv=host_kv,
        policy=options.policy,
        chunk=options.chunk,
        max_running=options.max_running or MAX_RUNNING,
        block_size=options.block_size,
        max_model_len=options.max_model_len,
        transition=transition_mode(options),
        overlap=options.overlap,
        seed=options.seed,
        costs=costs_of(options.device),
    )


def _with_costs(setup: Setup, measured: HardwareSpec | str) -> Setup:
    """With what turning back to prefill costs on this node, where that is known."""
    if isinstance(measured, str) or not setup.plan.separate:
        return setup
    costs = nominal_turn_costs(setup, measured)
    return replace(setup, scheduler=replace(setup.scheduler, turn_costs=costs))


def redeploy(deployment: Deployment, plan: Plan, limits: Limits) -> Deployment:
    """The same model on the same ranks and memory budgets under another plan. Raises a `ConfigError`."""
    options = deployment.options
    check_plan(plan, deployment.spec)
    own = replace(limits, transition=transition_mode(options), overlap=options.overlap, seed=options.seed)
    return replace(deployment, setup=set_up(deployment.setup.model, plan, deployment.dtype, own))


def transition_mode(options: Options) -> TransitionMode | None:
    """How weights are to change; None leaves it to the memory plan."""
    return None if options.transition == "auto" else cast(TransitionMode, options.transition)


def _check_choices(options: Options) -> None:
    if options.profile is not None and not Path(options.profile).is_dir():
        raise ConfigError(f"profile {options.profile!r}: no such folder; make it first")
    if options.trace is not None:
        check_trace(options.trace)
    if options.device != "cpu":
        raise ConfigError(f"device {options.device!r}: this version runs on 'cpu' only")
    choices = {
        "dtype": ("auto", *DTYPE_BYTES),
        "load_format": get_args(LoadFormat),
        "transition": ("auto", *get_args(TransitionMode)),
        "on_rank_loss": ("continue", "stop"),
        "preflight": get_args(PreflightMode),
    }
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise ConfigError(f"{name} {getattr(options, name)!r}: choose one of {', '.join(allowed)}")
    for name in ("ranks", "max_model_len", "chunk", "max_running", "block_size", "threads_per_rank"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")


def _check_weights(model: str, spec: ModelSpec) -> None:
    """Open the checkpoint once, so that whatever is wrong with it is said before workers start."""
    from seesaw.weights.store import HostWeightStore

    if not Path(model).is_dir():
        raise ModelError(f"model {model!r}: no such directory")
    HostWeightStore.open(Path(model), spec).close()


def _choose_plan(options: Options, spec: ModelSpec) -> Plan:
    if options.plan == "auto":
        ranks = options.ranks or min(8, len(os.sched_getaffinity(0)))
        plan = _default_plan(ranks, spec, options.policy)
    else:
        plan = Plan.parse(options.plan)
        if options.ranks is not None and options.ranks != plan.world:
            raise LayoutError(f"plan {plan} has {plan.world} ranks, but ranks={options.ranks} was asked for")
    check_plan(plan, spec)
    return plan


def check_plan(plan: Plan, spec: ModelSpec) -> None:
    """Raise `LayoutError` if the model does not divide into the layouts of `plan`."""
    for layout in {plan.prefill, plan.decode}:
        check_layout(spec, layout)


def _default_plan(ranks: int, spec: ModelSpec, policy: str | None) -> Plan:
    """Pipeline for prefill, tensor parallelism for decode, as far as model and policy allow."""
    if ranks == 1:
        return Plan.parse("T1->T1" if policy == "seesaw" else "T1")
    tensor = Layout(tp=ranks)
    pairs = [Plan(first, tensor, separate=True) for first in (Layout(pp=ranks), Layout(dp=ranks))]
    for plan in [Plan(tensor, tensor, separate=False)] if policy == "chunked" else pairs:
        with suppress(LayoutError):
            check_plan(plan, spec)
            return plan
    return Plan.parse(f"D{ranks}->D{ranks}" if policy == "seesaw" else f"D{ranks}")


def _places(options: Options, plan: Plan) -> tuple[Place, ...]:
    """The places that the node file gives the ranks; without one, each has cores of its own as far as they go."""
    if options.node is None:
        return tuple(places_on_cores(plan.world, options.threads_per_rank))
    places = load_node(options.node).ranks
    if len(places) < plan.world:
        raise ConfigError(
            f"node file {options.node}: has places for {len(places)} ranks, but plan {plan} needs {plan.world}"
        )
    return tuple(places[: plan.world])


def _choose_dtype(options: Options, spec: ModelSpec) -> DType:
    if options.dtype != "auto":
        return cast(DType, options.dtype)
    if spec.dtype == "float16":
        logger.info(
            "dtype: the float16 checkpoint runs in bfloat16 on the CPU; --dtype float32 keeps all digits"
        )
        return "bfloat16"
    return spec.dtype


def _budgets(options: Options, plan: Plan) -> tuple[int, int]:
    """Bytes per rank and of the host buffer. Left open, they are shares of the memory that is free now."""
    free = available_memory()
    default_host = min(free // 4, 32 << 30) if plan.separate else min(free // 10, 4 << 30)
    host_kv = default_host if options.host_kv is None else parse_bytes(options.host_kv)
    if options.device_memory is not None:
        return parse_bytes(options.device_memory), host_kv
    return max(int(free * 0.7 - host_kv) // plan.world, 1), host_kv
