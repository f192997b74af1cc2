"""The fit undoes the cost model: from times that a known node would take comes that node."""

from __future__ import annotations

import msgspec
import pytest

from seesaw.cli.profile import GPU_OPERANDS
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout
from seesaw.core.model_spec import DTYPE_BYTES
from seesaw.planning.cost import LayoutCost, Work
from seesaw.profiling.fit import Box, fit
from seesaw.profiling.tasks import STEP_LAYERS, Task, all_tasks, group_sizes, sizes_for
from tests.planning.machines import model

PEAK, STREAM, PREFILL, DECODE = 8e10, 1.6e10, 6e10, 8e9
OPERATOR, LAYER, STEP = 3e-5, 7e-5, 3e-4
QUERY, KV = 2e-9, 4e-9
BOX = Box(name="made up", memory=1 << 30)


def seconds(task: Task) -> float:
    """What a task takes on a node whose every figure is known."""
    given = dict(task.arguments)
    sizes = sizes_for("cpu")
    match task.op:
        case "tiny":
            return OPERATOR
        case "step":
            return STEP + given["layers"] * LAYER
        case "product":
            elements = sum(depth * columns for depth, columns in given["products"])
            streaming = elements * DTYPE_BYTES[given["dtype"]] / STREAM
            return max(2 * given["rows"] * elements / PEAK, streaming) + len(given["products"]) * OPERATOR
        case "attention":
            return attention(given) + OPERATOR
        case "activations":
            query, kv, dim = given["heads"]
            width = 8 * sizes.hidden + 3 * (query + 2 * kv) * dim + 3 * sizes.ffn
            return sizes.activation_rows * width * 2 / 5e9 + 4 * OPERATOR
        case "all_reduce":
            return 2e-5 * given["size"] + given["count"] / 2e9
        case "waiting":
            work = Task("product", tuple(item for item in task.arguments if item[0] != "size"))
            met = Task("all_reduce", (("size", given["size"]), ("count", 4096)))
            return 0.01 * given["size"] + seconds(met) / seconds(work)
        case "send":
            return 1e-5 + given["count"] / 4e9
        case "reshard":
            return 1 / (5e9 if given["kind"] == "within" else 6e9)
        case _:
            return 1e-10 if task.alone else 2e-10


def attention(given: dict[str, object]) -> float:
    query, kv, dim = given["heads"]
    count, tokens, new = (int(given[name]) for name in ("sequences", "tokens", "new"))
    each = count * new * dim * (query * QUERY + kv * KV)
    if new == 1:
        return float(each + 2 * kv * dim * DTYPE_BYTES[str(given["dtype"])] * count * tokens / DECODE)
    return float(each + count * 4 * query * dim * tokens * (tokens + 1) / 2 / PREFILL)


def fitted(ranks: int = 2, dtypes: tuple[str, ...] = ("bfloat16",)) -> HardwareSpec:
    times = {task: seconds(task) for task in all_tasks(ranks, dtypes, "cpu")}
    return fit(times, ranks, dtypes, "cpu", BOX)


def test_the_figures_of_a_known_node_come_out() -> None:
    spec = fitted()
    assert (spec.name, spec.ranks, spec.device, spec.memory) == ("made up", 2, "cpu", 1 << 30)
    assert spec.flops == {"bfloat16": pytest.approx(PEAK)}
    assert spec.bandwidth == pytest.approx(STREAM)
    assert spec.operator_overhead == pytest.approx(OPERATOR)
    assert (spec.layer_overhead, spec.step_overhead) == (pytest.approx(LAYER), pytest.approx(STEP))
    assert (spec.token_of_query, spec.token_of_kv) == (pytest.approx(QUERY), pytest.approx(KV))
    assert PEAK * spec.prefill_attention(1e9) == pytest.approx(PREFILL)
    assert STREAM * spec.decode_attention(1e7) == pytest.approx(DECODE)
    assert spec.activation_bandwidth == pytest.approx(5e9)
    assert spec.send(1 << 20) == pytest.approx(1e-5 + (1 << 20) / 4e9)
    assert (spec.to_device, spec.node_to_device) == (pytest.approx(1e10), pytest.approx(1e10))
    assert (spec.device_copy, spec.fetch) == (pytest.approx(5e9), pytest.approx(6e9))


def test_ranks_wait_for_each_other_as_was_measured() -> None:
    """The all-reduce that they meet in counts by itself."""
    spec = fitted(ranks=4)
    assert sorted(spec.waiting) == [2, 3, 4]
    for work in (1e-3, 1e-2, 1.0):
        assert spec.waiting[2](work) == pytest.approx(0.02) and spec.waiting[4](work) == pytest.approx(0.04)
        assert 0.02 < spec.waiting[3](work) < 0.04
    work = Work(tokens=64, sampled=64, keys=64 * 256.0)
    shared, alone = (
        LayoutCost(model(), spec, layout, [8]).stage(0, work) for layout in (Layout(tp=2), Layout())
    )
    patient = LayoutCost(model(), msgspec.structs.replace(spec, waiting={}), Layout(tp=2), [8]).stage(0, work)
    overheads = spec.step_overhead + 8 * spec.layer_overhead
    assert shared.seconds - patient.seconds == pytest.approx(
        0.02 * (patient.seconds - patient.all_reduce - overheads)
    )
    assert alone.all_reduce == 0


def test_more_work_is_never_waited_for_less() -> None:
    times = {task: seconds(task) for task in all_tasks(2, ("bfloat16",), "cpu")}
    for task in times:
        if task.op == "waiting":
            times[task] = 0.5 if dict(task.arguments)["rows"] == 8 else 1e-9
    shares = fit(times, 2, ("bfloat16",), "cpu", BOX).waiting[2]
    waits = [work * share for work, share in zip(shares.sizes, shares.values, strict=True)]
    assert waits == sorted(waits) and waits[2] == pytest.approx(waits[1])


def test_rows_that_take_no_longer_than_fewer_are_passed_over() -> None:
    times = {task: seconds(task) for task in all_tasks(2, ("bfloat16",), "cpu")}
    for task in times:
        if task.op == "product" and dict(task.arguments)["rows"] == 8:
            times[task] = min(times.values()) / 2
    assert len(fit(times, 2, ("bfloat16",), "cpu", BOX).waiting[2].sizes) == 3


def test_the_cost_model_gives_back_the_times_that_were_measured() -> None:
    cost = LayoutCost(model(), fitted(), Layout(), [8])
    step = cost.stage(0, Work(tokens=4, sampled=4, keys=4 * 256.0))
    elements = 8 * (1024 * 2048 + 1024 * 1024 + 3 * 1024 * 2816) + 1024 * 32000
    assert step.weights + step.arithmetic == pytest.approx(elements * 2 / STREAM, rel=0.01)
    prompts = cost.stage(0, Work(tokens=1024, sampled=1024, pairs=4 * 256 * 257 / 2))
    assert prompts.attention == pytest.approx(
        8 * (attention({"heads": (16, 8, 64), "sequences": 4, "tokens": 256, "new": 256}) + OPERATOR)
    )


def test_a_gpu_whose_steps_were_measured_whole_comes_out() -> None:
    """Sizes are those of large models, and what ten operators of a layer cost anyhow is not counted twice."""
    sizes, dtypes = sizes_for("cuda"), ("bfloat16", "float32")

    def on_gpu(task: Task) -> float:
        given = dict(task.arguments)
        match task.op:
            case "step":
                return STEP + OPERATOR + given["layers"] * (LAYER + 10 * OPERATOR)
            case "attention":
                query, kv, dim = given["heads"]
                count, tokens = given["sequences"], given["tokens"]
                if given["new"] == 1:
                    return OPERATOR + 2 * kv * dim * DTYPE_BYTES[given["dtype"]] * count * tokens / DECODE
                return OPERATOR + count * 4 * query * dim * tokens * (tokens + 1) / 2 / PREFILL
            case "activations":
                query, kv, dim = given["heads"]
                width = 8 * sizes.hidden + 3 * (query + 2 * kv) * dim + 3 * sizes.ffn
                return sizes.activation_rows * width * 2 / 5e9 + 4 * OPERATOR
            case _:
                return seconds(task)

    spec = fit({task: on_gpu(task) for task in all_tasks(4, dtypes, "cuda")}, 4, dtypes, "cuda", BOX)
    assert (spec.device, spec.ranks) == ("cuda", 4)
    assert spec.operator_overhead == pytest.approx(OPERATOR)
    assert (spec.layer_overhead, spec.step_overhead) == (pytest.approx(LAYER), pytest.approx(STEP))
    assert (spec.token_of_query, spec.token_of_kv) == (0.0, 0.0)
    assert spec.bandwidth == pytest.approx(STREAM) and spec.activation_bandwidth == pytest.approx(5e9)
    assert PEAK * spec.prefill_attention(5e11) == pytest.approx(PREFILL)
    assert STREAM * spec.decode_attention(1e9) == pytest.approx(DECODE)
    assert sorted(spec.all_reduce) == [2, 3, 4]


def test_what_a_gpu_is_measured_with_fits_its_memory() -> None:
    for task in all_tasks(2, ["bfloat16", "float32"], "cuda"):
        given = dict(task.arguments)
        if task.op == "product":
            elements = sum(depth * columns for depth, columns in given["products"])
        elif task.op == "attention":
            _, kv, dim = given["heads"]
            elements = 2 * kv * dim * given["sequences"] * (-(-given["tokens"] // 16) * 16)
        else:
            continue
        assert elements * DTYPE_BYTES[given["dtype"]] <= GPU_OPERANDS, task.label


def test_each_type_has_its_curves() -> None:
    spec = fitted(dtypes=("bfloat16", "float32"))
    assert set(spec.by_type) == set(spec.flops) == {"bfloat16", "float32"}
    ratio = spec.curves("float32").product(1) / spec.curves("bfloat16").product(1)
    assert ratio == pytest.approx(0.5)  # one row streams twice the bytes
    assert spec.product == spec.by_type["bfloat16"].product


def test_groups_that_were_not_measured_lie_between_those_that_were() -> None:
    assert group_sizes(6) == [2, 3, 4, 6] and group_sizes(8) == [2, 4, 8] and group_sizes(1) == []
    curves = fitted(ranks=8).all_reduce
    assert sorted(curves) == [2, 3, 4, 5, 6, 7, 8]
    assert curves[2](4096) < curves[3](4096) < curves[4](4096) < curves[5](4096)


def test_one_rank_has_no_links_but_a_hand_over_that_is_a_copy() -> None:
    spec = fitted(ranks=1)
    assert spec.all_reduce == {}
    assert spec.send(1e6) == pytest.approx(1e6 / spec.device_copy)


def test_links_too_slow_for_large_sizes_go_on_in_a_line() -> None:
    times = {
        task: seconds(task)
        for task in all_tasks(2, ["bfloat16"], "cpu")
        if dict(task.arguments).get("count", 0) <= 1 << 20
    }
    spec = fit(times, 2, ["bfloat16"], "cpu", BOX)
    assert spec.all_reduce[2](1 << 24) == pytest.approx(4e-5 + (1 << 24) / 2e9, rel=0.3)


def test_noise_never_makes_a_figure_negative() -> None:
    times = {task: seconds(task) for task in all_tasks(2, ["bfloat16"], "cpu")}
    for i, task in enumerate(times):
        times[task] *= 1.0 + 0.5 * ((i * 7919) % 13) / 13
    few, many = (
        next(t for t in times if t.op == "step" and dict(t.arguments)["layers"] == n) for n in STEP_LAYERS
    )
    times[few] = 2 * times[many]
    spec = fit(times, 2, ["bfloat16"], "cpu", BOX)
    assert spec.step_overhead > 0 and spec.layer_overhead >= 0 and spec.operator_overhead > 0
    assert spec.token_of_query >= 0 and spec.token_of_kv >= 0
    assert max(spec.product.values) == pytest.approx(1.0)
