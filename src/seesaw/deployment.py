"""From what a user asks for to what is started: model, plan, shardings and memory, resolved and checked.

Everything here happens before any worker exists, so every refusal is one sentence and costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import msgspec

from seesaw.budgets import budgets
from seesaw.core.devices import device_kind
from seesaw.core.errors import ConfigError, LayoutError, ModelError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout, Plan
from seesaw.core.model_spec import DType, ModelSpec
from seesaw.core.node import Place, load_node, places_on_cores
from seesaw.device.gpus import Gpu, choose_kind, default_ranks, require_cuda_build, visible_gpus
from seesaw.models.hf_config import load_spec
from seesaw.options import Options, check_options
from seesaw.planning.at_hand import node_at_hand, nominal_turn_costs
from seesaw.planning.device_costs import DeviceCosts, costs_of
from seesaw.planning.memory import MemoryPlan, TransitionMode
from seesaw.planning.setup import Limits, Setup, set_up
from seesaw.planning.shapes import stored_as
from seesaw.scheduling.config import SchedulerConfig
from seesaw.weights.sharding import Sharding, check_layout

logger = logging.getLogger(__name__)

_UNPROVEN = (
    "device 'cuda': what drives GPUs in this version was tested without one; run scripts/gpu_check first"
)
MAX_RUNNING = 256
"""Where nothing is said and nothing is searched for."""


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
    hardware: HardwareSpec | str
    """The figures of the node, by its profile or the catalogue, or why there are none to go by."""

    @property
    def own_transport(self) -> Literal["nccl"] | None:
        """What connects the ranks' devices without the host, which takes one rank to a device alone."""
        devices = [place.device for place in self.places]
        return device_kind(self.options.device).transport if len(set(devices)) == len(devices) else None

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
    options = replace(options, device=choose_kind(options.device))
    check_options(options)
    gpus = find_gpus(options)
    spec = load_spec(options.model)
    dummy = options.load_format == "dummy"
    if not dummy:
        _check_weights(options.model, spec)
    plan = _choose_plan(options, spec, gpus)
    places = _places(options, plan)
    check_devices(places, gpus)
    dtype = _choose_dtype(options, spec)
    device_memory, host_kv = budgets(options, plan, places, gpus)
    hardware = node_at_hand(plan.world, options.device, dtype, [gpu.name for gpu in gpus])
    model = stored_as(spec, dtype, Path(options.model).resolve().name)
    setup = set_up(model, plan, dtype, limits_of(options, device_memory, host_kv))
    if options.max_model_len is None and setup.memory.max_model_len < spec.max_position:
        logger.info("max_model_len is %d, what the memory budgets leave room for", setup.memory.max_model_len)
    return Deployment(
        options=options,
        setup=_with_costs(setup, hardware),
        dummy=dummy,
        device_memory=device_memory,
        host_kv=host_kv,
        places=places,
        hardware=hardware,
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
        costs=device_costs(options),
    )


def device_costs(options: Options) -> DeviceCosts:
    """What devices take beside the model. Ranks that share one, or talk through the host, have no communicators."""
    own = device_kind(options.device).transport
    asked = options.transport.partition("-")[0]  # `nccl-no-p2p` has communicators as well
    talk = own is not None and options.ranks_per_gpu == 1 and asked in ("auto", own)
    return costs_of(options.device, collectives=talk)


def _with_costs(setup: Setup, hardware: HardwareSpec | str) -> Setup:
    """With what turning back to prefill costs on this node, where that is known."""
    if isinstance(hardware, str) or not setup.plan.separate:
        return setup
    costs = nominal_turn_costs(setup, hardware)
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


def _check_weights(model: str, spec: ModelSpec) -> None:
    """Open the checkpoint once, so that whatever is wrong with it is said before workers start."""
    from seesaw.weights.store import HostWeightStore

    if not Path(model).is_dir():
        raise ModelError(f"model {model!r}: no such directory")
    HostWeightStore.open(Path(model), spec).close()


def _choose_plan(options: Options, spec: ModelSpec, gpus: Sequence[Gpu]) -> Plan:
    if options.plan == "auto":
        ranks = options.ranks or default_ranks(
            options.device, threads=options.threads_per_rank, ranks_per_gpu=options.ranks_per_gpu, gpus=gpus
        )
        plan = _default_plan(ranks, spec, options.policy)
    else:
        plan = Plan.parse(options.plan)
        if options.ranks is not None and options.ranks != plan.world:
            raise LayoutError(f"plan {plan} has {plan.world} ranks, but ranks={options.ranks} was asked for")
    check_plan(plan, spec)
    return plan


def find_gpus(options: Options) -> Sequence[Gpu]:
    """The visible GPUs, where ranks compute on such. Raises `ConfigError` if there are none, or torch lacks CUDA."""
    if not device_kind(options.device).numbered:
        return ()
    require_cuda_build()
    logger.warning(_UNPROVEN)
    return visible_gpus()


def check_devices(places: Sequence[Place], gpus: Sequence[Gpu]) -> None:
    """Raise `ConfigError` if a rank's GPU is not among the visible ones."""
    needed = 1 + max((place.device for place in places if place.device is not None), default=-1)
    if needed <= len(gpus):
        return
    visible, ranks = f"{len(gpus)} {'is' if len(gpus) == 1 else 'are'} visible", len(places)
    fewer = len(gpus) * max(1, ranks // needed)
    raise ConfigError(
        f"device 'cuda': {ranks} ranks need {needed} GPUs and {visible}; use a plan of at most {fewer} "
        f"rank{'' if fewer == 1 else 's'}, or let ranks share GPUs to try it out "
        f"(--ranks-per-gpu {-(-ranks // len(gpus))})"
    )


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
        return _on_devices(options, places_on_cores(plan.world, options.threads_per_rank))
    places = load_node(options.node).ranks
    if len(places) < plan.world:
        raise ConfigError(
            f"node file {options.node}: has places for {len(places)} ranks, but plan {plan} needs {plan.world}"
        )
    return _on_devices(options, places[: plan.world])


def _on_devices(options: Options, places: Sequence[Place]) -> tuple[Place, ...]:
    """With the device of each, which it keeps when ranks are lost and others take their numbers."""
    if not device_kind(options.device).numbered:
        return tuple(places)
    return tuple(
        place
        if place.device is not None
        else msgspec.structs.replace(place, device=rank // options.ranks_per_gpu)
        for rank, place in enumerate(places)
    )


def _choose_dtype(options: Options, spec: ModelSpec) -> DType:
    if options.dtype != "auto":
        return cast(DType, options.dtype)
    if spec.dtype == "float16" and not device_kind(options.device).float16:
        logger.info(
            "dtype: the float16 checkpoint runs in bfloat16 on the CPU; --dtype float32 keeps all digits"
        )
        return "bfloat16"
    return spec.dtype
