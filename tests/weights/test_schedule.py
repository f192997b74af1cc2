"""Orders of copies beside computation: everything once, and never more memory than was given."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from seesaw.core.layout import Layout
from seesaw.core.model_spec import ModelSpec
from seesaw.weights.changes import CopyList, peak_elements
from seesaw.weights.schedule import Schedule, all_at_once, schedule
from seesaw.weights.sharding import copy_list, device_tensors, make_sharding, reload_list
from tests.weights.shapes import TINY, specs, usable


def peak_of(plan: Schedule, copies: CopyList, held: int) -> int:
    """Most elements in memory when the schedule is carried out from `held` on."""
    level = peak = held
    for change in plan.ahead:
        level += change.tensor.size
    peak = max(peak, level)
    level -= sum(change.source.size for change in plan.ahead if change.source)
    level -= sum(tensor.size for tensor in copies.dropped)
    for change in plan.behind:
        level += change.tensor.size
        peak = max(peak, level)
        level -= change.source.size if change.source else 0
    return peak


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_change_is_made_once_and_memory_is_kept_to(data: st.DataObject) -> None:
    spec: ModelSpec = data.draw(specs())
    world = data.draw(st.sampled_from([2, 4]))
    layouts = usable(spec, world)
    if not layouts:
        return
    old, new = (make_sharding(spec, data.draw(st.sampled_from(layouts))) for _ in range(2))
    rank = data.draw(st.integers(0, world - 1))
    before, after = (device_tensors(spec, sharding, rank) for sharding in (old, new))
    held = sum(tensor.size for tensor in before)
    for mode, listed in (("delta", copy_list), ("reload", reload_list)):
        copies = listed(spec, old, new, rank)
        planned = peak_elements(before, after, mode)  # type: ignore[arg-type]
        room = data.draw(st.integers(0, 2 * planned))
        plan = schedule(copies, held=held, room=room)
        made = [change.tensor.name for change in (*plan.ahead, *plan.behind)]
        assert sorted(made) == sorted(change.tensor.name for change in copies.changes if not change.reuse)
        assert peak_of(plan, copies, held) <= max(room, planned)
    everything = all_at_once(copy_list(spec, old, new, rank))
    assert peak_of(everything, CopyList((), ()), held) == peak_elements(before, after, "resident")


def test_layers_come_in_order_where_memory_lets_them() -> None:
    """From T4 to P4 tensors grow, and the order that needs least memory is another."""
    old, new = (make_sharding(TINY, Layout.parse(text)) for text in ("T4", "P4"))
    copies = copy_list(TINY, old, new, 1)
    held = sum(tensor.size for tensor in device_tensors(TINY, old, 1))
    planned = peak_elements(device_tensors(TINY, old, 1), device_tensors(TINY, new, 1), "delta")
    names = [change.tensor.name for change in copies.changes if not change.reuse]
    narrow, enough, wide = (schedule(copies, held=held, room=room) for room in (0, planned, 2 * planned))
    for plan in (enough, wide):
        assert [change.tensor.name for change in (*plan.ahead, *plan.behind)] == names
    assert [change.tensor.name for change in (*narrow.ahead, *narrow.behind)] != names
    assert len(wide.ahead) > len(enough.ahead) == len(narrow.ahead) == 0


def test_without_room_nothing_comes_ahead() -> None:
    old, new = (make_sharding(TINY, Layout.parse(text)) for text in ("P4", "T4"))
    copies = copy_list(TINY, old, new, 0)
    plan = schedule(copies, held=10**6, room=0)
    assert plan.ahead == ()
    assert plan.behind == tuple(change for change in copies.steps() if not change.reuse)
