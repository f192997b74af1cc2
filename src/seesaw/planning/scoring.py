"""The closed form over all plans: `Scorer` gives each plan its best chunk, batch, micro-batches and stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from seesaw.core.errors import LayoutError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout, Plan
from seesaw.planning.device_costs import HOST, DeviceCosts
from seesaw.planning.estimate import Estimate, Room, Traffic, static, two_phases
from seesaw.planning.memory import TransitionMode, estimate_memory
from seesaw.planning.pace import Pace
from seesaw.planning.setup import Limits
from seesaw.planning.shapes import PlannedModel
from seesaw.planning.shardings import Role, Stages, carried_shares, sharding_for, whole_stages
from seesaw.planning.statistics import Statistics
from seesaw.scheduling.config import TurnCosts
from seesaw.weights.sharding import check_layout

CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
STATIC_CHUNKS = (128, *CHUNKS)
"""Beside decode steps a smaller chunk may hide reading weights behind arithmetic, and pipelines like it even."""
BATCHES = (64, 128, 256, 512, 1024)
FORWARD_IN_TOKENS = 100
"""Simulating a Forward takes as long as so many tokens of sequences in it."""
Paces = tuple[Pace, Pace]
"""Of prefill and decode."""
_SHIFT = 3
"""Layers by which the last stage may differ from the division by weight."""
_USUAL_CHUNK, _USUAL_BATCH = 1024, 128
_TRIED_CHUNKS = 3
"""Of two phases: those with which the prefill layout is fastest. What a chunk costs decode is only its workspace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What a search may choose, and how far it goes. What is None is chosen."""

    device_memory: int
    """Bytes of each rank."""
    host_kv: int
    """Bytes of the node's host buffer."""
    chunk: int | None = None
    max_running: int | None = None
    plans: tuple[Plan, ...] | None = None
    """None: every pair of layouts."""
    policy: str | None = None
    max_model_len: int | None = None
    """None: the longest request of the workload."""
    block_size: int = 16
    transition: TransitionMode | None = None
    overlap: bool = True
    costs: DeviceCosts = HOST
    """What the devices take of their memory beside the model."""
    replays: int = 3
    """Plans to replay, the best of one layout always among them."""
    replayed_tokens: int = 200_000
    """Output tokens of all replays together, a Forward counting as `FORWARD_IN_TOKENS` more: bounds the time of a
    search. A longer job is replayed in part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The best limits of a plan, by its estimate."""

    plan: Plan
    limits: Limits
    estimate: Estimate


class Scorer:
    """Estimates plans. Keeps what does not depend on the other phase."""

    def __init__(
        self,
        model: PlannedModel,
        hardware: HardwareSpec,
        of: Statistics,
        dtype: str,
        options: SearchOptions,
    ) -> None:
        self.model, self.hardware, self.dtype, self.options = model, hardware, dtype, options
        self.refused: dict[str, str] = {}
        self.considered = 0
        self._of = of
        self._too_large: dict[Plan, str] = {}
        """Why memory refused a plan with some of its limits."""
        self._weights = model.weight_bytes()
        self._paces: dict[tuple[Layout, tuple[int, ...], tuple[float, ...]], Pace] = {}
        self._found: dict[tuple[Layout, Role], Pace] = {}

    def limits(self, *, chunk: int, max_running: int) -> Limits:
        """Limits of a candidate."""
        options = self.options
        return Limits(
            device_memory=options.device_memory,
            host_kv=options.host_kv,
            policy=options.policy,
            chunk=chunk,
            max_running=max_running,
            block_size=options.block_size,
            max_model_len=options.max_model_len or self._of.longest,
            transition=options.transition,
            overlap=options.overlap,
            costs=options.costs,
        )

    # ---- closed form --------------------------------------------------------------------------------------

    def scored(self) -> Iterator[Scored]:
        """Every plan that memory allows, with its best limits."""
        for plan in self.options.plans or self._plans():
            try:
                check_layout(self.model.spec, plan.prefill, self.model.moe)
                check_layout(self.model.spec, plan.decode, self.model.moe)
            except LayoutError as error:
                self.refused[str(plan)] = str(error)
                continue
            found = [one for paces in self._paces_of(plan) for one in self._combinations(plan, paces)]
            if found:
                yield min(found, key=lambda one: one.estimate.seconds)
            else:
                self.refused[str(plan)] = self._too_large[plan]

    def _plans(self) -> Iterator[Plan]:
        """Every pair of layouts that the policy, if one is asked for, can run."""
        layouts, policy = list(self._layouts()), self.options.policy
        for prefill in layouts:
            if policy != "seesaw":
                yield Plan(prefill, prefill, separate=False)
            if policy != "chunked":
                yield from (Plan(prefill, decode, separate=True) for decode in layouts)

    def _layouts(self) -> Iterator[Layout]:
        for layout in Layout.all(self.hardware.ranks):
            if layout.tp > 1 and layout.tp not in self.hardware.all_reduce:
                continue
            with suppress(LayoutError):
                check_layout(self.model.spec, layout, self.model.moe)
                yield layout

    def _combinations(self, plan: Plan, paces: Paces) -> Iterator[Scored]:
        stages = self._stages(plan, paces)
        for chunk in self._chunks(plan, paces[0]):
            for sequences in self._batches():
                limits = replace(self.limits(chunk=chunk, max_running=sequences), stages=stages)
                room = self._room(plan, limits)
                if room is None:
                    break  # more sequences leave less room
                limited = False
                for groups in self._groups(plan.decode):
                    self.considered += 1
                    chosen = replace(
                        limits,
                        micro_batches=None if groups == plan.decode.pp else (plan.prefill.pp, groups),
                        turn_costs=self._turn_costs(plan, paces, chunk, groups) if plan.separate else None,
                    )
                    estimate = self._estimate(chosen, plan, paces, room)
                    limited = limited or estimate.batch >= 0.99 * sequences * plan.decode.dp
                    yield Scored(plan=plan, limits=chosen, estimate=estimate)
                if not limited:
                    break  # more sequences than are ever reached only take memory

    def _room(self, plan: Plan, limits: Limits) -> Room | None:
        """What memory leaves for KV; None, with the reason noted, if it is not enough."""
        budget = limits.budget(plan.prefill, separate=plan.separate)
        blocks = estimate_memory(self.model, plan.prefill, plan.decode, self.dtype, budget, limits.stages)
        if isinstance(blocks, str):
            self._too_large.setdefault(plan, blocks)
            return None
        return Room(
            device=float(blocks[1] * limits.block_size),
            host=self.options.host_kv / self.model.kv_bytes_per_token(),
            sequences=limits.max_running,
            block_size=limits.block_size,
        )

    def _estimate(self, limits: Limits, plan: Plan, paces: Paces, room: Room) -> Estimate:
        chunk = limits.chunk or CHUNKS[0]
        groups = limits.micro_batches[1] if limits.micro_batches else plan.decode.pp
        if limits.turn_costs is None:
            return static(paces[1], room, chunk=chunk, groups=groups)
        traffic = self._traffic(plan)
        return two_phases(*paces, room, traffic, limits.turn_costs, chunk=chunk, groups=groups)

    def turn_costs(self, plan: Plan, chunk: int, groups: int) -> TurnCosts:
        """Of a plan with two phases."""
        return self._turn_costs(plan, next(self._paces_of(plan)), chunk, groups)

    def _turn_costs(self, plan: Plan, paces: Paces, chunk: int, groups: int) -> TurnCosts:
        traffic = self._traffic(plan)
        block = traffic.kv_bytes * self.options.block_size
        return TurnCosts(
            step=paces[1].step(1.0, groups),
            turn=2 * traffic.transition + paces[0].prefill(chunk)[1],
            block=block / traffic.to_host + block / traffic.to_device,
        )

    # ---- stages -------------------------------------------------------------------------------------------

    def _paces_of(self, plan: Plan) -> Iterator[Paces]:
        """Of prefill and decode: with layers divided by weight, as it is fastest if that differs, and without sharing
        FFNs if stages would.

        Which is better depends on what they leave for KV.
        """
        prefill, decode = _roles(plan)
        usual = self._pace(plan.prefill, prefill), self._pace(plan.decode, decode)
        yield usual
        fastest = self._fastest(plan.prefill, prefill), self._fastest(plan.decode, decode)
        if fastest != usual:
            yield fastest
        if any(usual[0].carried):
            yield self._pace(plan.prefill, prefill, whole_stages(self.model, plan.prefill, prefill)), usual[1]

    def _pace(self, layout: Layout, role: Role, stages: tuple[int, ...] | None = None) -> Pace:
        carried: tuple[float, ...] = ()
        if stages is None:
            sharding = sharding_for(self.model, layout, role)
            stages = tuple(len(stage) for stage in sharding.stages)
            carried = carried_shares(self.model, sharding)
        key = layout, stages, carried
        if key not in self._paces:
            self._paces[key] = Pace(self.model, self.hardware, layout, stages, self.dtype, self._of, carried)
        return self._paces[key]

    def _fastest(self, layout: Layout, role: Role) -> Pace:
        """With some layers more or fewer in the last stage, if that is faster in this role."""
        if (layout, role) not in self._found:
            usual = self._pace(layout, role)
            tried = [self._pace(layout, role, stages) for stages in self._divisions(layout, usual.stages[-1])]
            self._found[layout, role] = min([usual, *tried], key=partial(_slowness, role))
        return self._found[layout, role]

    def _divisions(self, layout: Layout, usual: int) -> Iterator[tuple[int, ...]]:
        """Divisions of layers that are alike, by the size of the last stage."""
        if layout.pp == 1 or self.model.moe is not None:
            return
        for last in range(max(1, usual - _SHIFT), usual + _SHIFT + 1):
            size, extra = divmod(self.model.spec.layers - last, layout.pp - 1)
            if last != usual and size:
                yield (*(size + (stage < extra) for stage in range(layout.pp - 1)), last)

    def _stages(self, plan: Plan, paces: Paces) -> Stages | None:
        """Where they are not what the plan would have anyway."""
        usual = next(self._paces_of(plan))
        prefill, decode = (
            None if pace is other else tuple(pace.stages) for pace, other in zip(paces, usual, strict=True)
        )
        return (prefill, decode) if prefill or decode else None

    # ---- what there is to choose from ---------------------------------------------------------------------

    def _traffic(self, plan: Plan) -> Traffic:
        """Of a rank's new weights it keeps what both layouts give it at best."""
        hardware, new, old = self.hardware, plan.decode, plan.prefill
        share = 1 / (new.pp * new.tp) - 1 / (max(new.pp, old.pp) * max(new.tp, old.tp))
        rate = hardware.fetch or min(hardware.to_device, hardware.node_to_device / hardware.ranks)
        return Traffic(
            to_host=min(hardware.node_to_host, hardware.to_host * hardware.ranks),
            to_device=min(hardware.node_to_device, hardware.to_device * hardware.ranks),
            kv_bytes=float(self.model.kv_bytes_per_token()),
            transition=self._weights * share / rate if plan.reshards else 0.0,
        )

    def _chunks(self, plan: Plan, pace: Pace) -> Sequence[int]:
        if self.options.chunk is not None:
            return (self.options.chunk,)
        if not plan.separate:
            return STATIC_CHUNKS
        longest = self._of.requests * self._of.prompt

        def seconds(chunk: int) -> float:
            per_token, fill = pace.prefill(chunk)
            return longest * per_token + fill

        return sorted(CHUNKS, key=seconds)[:_TRIED_CHUNKS]

    def _batches(self) -> Sequence[int]:
        if self.options.max_running is not None:
            return (self.options.max_running,)
        return BATCHES

    def _groups(self, layout: Layout) -> Sequence[int]:
        return (1,) if layout.pp == 1 else (layout.pp, layout.pp + 1)


def _roles(plan: Plan) -> tuple[Role, Role]:
    """What the layouts of both phases must be good at: one sharding serves both phases unless it changes."""
    return ("prefill", "decode") if plan.reshards else ("both", "both")


def _slowness(role: Role, pace: Pace) -> float:
    """Of a stage division, at a usual chunk and batch."""
    prompt, _ = pace.prefill(_USUAL_CHUNK)
    step = pace.step(_USUAL_BATCH, pace.layout.pp) / (_USUAL_BATCH * pace.layout.dp)
    if role == "both":
        return prompt * pace.of.prompt + step * pace.of.steps
    return prompt if role == "prefill" else step
