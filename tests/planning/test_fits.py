"""What is said of a model that fits nowhere: the figures are right, and what is offered does fit."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from seesaw.core.errors import MemoryBudgetError
from seesaw.core.hardware import HardwareSpec
from seesaw.core.layout import Layout, Plan
from seesaw.planning.catalogue import hardware
from seesaw.planning.fits import nothing_fits
from seesaw.planning.setup import Limits, set_up
from seesaw.planning.shapes import PlannedModel, shape
from tests.planning.machines import hardware as made_up
from tests.weights.shapes import layouts


def limits(node: HardwareSpec, **changes: Any) -> Limits:
    settings: dict[str, Any] = {"chunk": 256, "max_running": 64, "max_model_len": 2048, "host_kv": 64 << 30}
    return Limits(**({"device_memory": int(node.memory * 0.95)} | settings | changes))


def fits(model: PlannedModel, node: HardwareSpec, **changes: Any) -> bool:
    """Under some layout, by working each out."""
    for layout in layouts(node.ranks):
        try:
            set_up(model, Plan(layout, layout, separate=False), "bfloat16", limits(node, **changes))
        except ValueError:
            continue
        return True
    return False


@pytest.mark.parametrize(
    ("model", "node"),
    [
        ("Llama-3.1-405B", "8xL4"),
        ("Llama-2-70B", "4xA10"),
        ("Mixtral-8x7B", "2xL4"),
        ("Llama-3-15B", "1xA10"),
    ],
)
def test_what_is_offered_fits_and_nothing_smaller_does(model: str, node: str) -> None:
    has, planned = hardware(node), shape(model)
    assert not fits(planned, has)
    text = str(nothing_fits(planned, has, limits(has)))
    assert "\n" not in text and f"fits no layout of {node}" in text and text.endswith("would do")
    nodes = re.findall(r"(?:; |, | or )(\d+x[\w-]+)", text)
    assert nodes, text
    for offered in nodes:
        assert fits(planned, hardware(offered)), offered
    more = [int(n.split("x")[0]) for n in nodes if n.endswith(f"x{has.name}")]
    for ranks in itertools.takewhile(lambda n: n < min(more, default=0), (2, 4, 8, 16, 24, 32)):
        assert ranks <= has.ranks or not fits(planned, hardware(f"{ranks}x{has.name}"))
    for bits in re.findall(r"(fp8|int4) weights", text):
        assert fits(shape(model, weights=bits), has)


def check_least_need(planned: PlannedModel, has: HardwareSpec, text: str) -> None:
    """What `text` says is needed is enough for the layout it names, and less is too little for all."""
    named = re.search(r"each\): (\w+) needs at least ([\d.]+) GiB a rank for sequences of 2048 tokens", text)
    assert named is not None
    needs = float(named[2]) * 2**30
    layout = Layout.parse(named[1])
    enough = limits(has, device_memory=int(needs * 1.003), host_kv=0)
    made = set_up(planned, Plan(layout, layout, separate=False), "bfloat16", enough)
    assert made.memory.max_model_len == 2048
    for layout in layouts(has.ranks):
        if layout.tp > 1 and layout.tp not in has.all_reduce:
            continue
        less = limits(has, device_memory=int(needs * 0.997), host_kv=0)
        with pytest.raises(MemoryBudgetError):
            set_up(planned, Plan(layout, layout, separate=False), "bfloat16", less)


def test_the_least_need_is_exact() -> None:
    has, planned = hardware("4xA10"), shape("Llama-2-70B")
    text = str(nothing_fits(planned, has, limits(has)))
    assert "Llama-2-70B (128.5 GiB of weights)" in text and "(21.4 GiB each)" in text
    check_least_need(planned, has, text)


def test_the_least_need_of_a_pipeline_counts_its_own_stages() -> None:
    # No sums among three are known here; the head and the embedding weigh as much as five of 32 layers.
    has, planned = made_up(ranks=3, memory=1 << 30), shape("Llama-3-8B")
    text = str(nothing_fits(planned, has, limits(has)))
    assert "P3 needs at least" in text
    check_least_need(planned, has, text)


def test_long_sequences_may_be_what_is_too_much() -> None:
    has, planned = hardware("1xL4"), shape("Llama-3.1-8B")
    text = str(nothing_fits(planned, has, limits(has, max_model_len=131072)))
    longest = re.search(r"sequences of at most (\d+) tokens would do", text)
    assert longest is not None
    assert fits(planned, has, max_model_len=int(longest[1]))
    assert not fits(planned, has, max_model_len=int(longest[1]) + 16)


def test_a_layout_that_fits_is_named_where_only_some_plans_were_tried() -> None:
    has = hardware("4xL4")
    text = str(nothing_fits(shape("Llama-3-15B"), has, limits(has)))
    assert "fits none of the plans tried on 4xL4" in text
    named = re.search(r"but (\w+) needs only", text)
    assert named is not None
    layout = Layout.parse(named[1])
    assert set_up(shape("Llama-3-15B"), Plan(layout, layout, separate=False), "bfloat16", limits(has))


def test_a_profiled_machine_is_told_how_much_memory_it_takes() -> None:
    has = made_up(ranks=2, memory=1 << 30)
    text = str(nothing_fits(shape("Llama-3-8B"), has, limits(has)))
    need = re.search(r"at least ([\d.]+ GiB) a rank", text)
    assert need is not None and f"{need[1]} of memory a rank would do" in text


def test_where_nothing_would_do() -> None:
    has = hardware("1xL4")
    huge = shape("Llama-3.1-405B")
    text = str(nothing_fits(huge, has, limits(has, max_running=2_000_000)))
    assert text.endswith("no node of up to 64 of the catalogue's devices would do, nor int4 weights")
    many = made_up(ranks=97)
    text = str(nothing_fits(shape("Qwen3-0.6B"), many, limits(many)))
    assert "cannot be divided among 97xmade up" in text
