"""Model shapes that divide badly, for the algebra of shards."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from seesaw.core.errors import LayoutError
from seesaw.core.layout import Layout
from seesaw.core.model_spec import ModelSpec, RopeSpec
from seesaw.core.moe import MoESpec
from seesaw.weights.sharding import Sharding, check_layout, make_sharding


def spec_of(**sizes: Any) -> ModelSpec:
    """A small model; `sizes` replace fields."""
    fields: dict[str, Any] = {
        "family": "llama",
        "layers": 5,
        "hidden": 6,
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 2,
        "ffn": 37,
        "vocab": 53,
        "max_position": 64,
        "rms_eps": 1e-5,
        "rope": RopeSpec(),
        "dtype": "float32",
    }
    return ModelSpec(**{**fields, **sizes})


AWKWARD = {
    "kv3-plain": spec_of(),
    "kv1-odd": spec_of(layers=7, heads=17, kv_heads=1, qkv_bias=True, qk_norm=True),
    "kv2-tied": spec_of(layers=16, heads=14, kv_heads=2, tied_embeddings=True, ffn=101, vocab=97),
    "kv8-wide": spec_of(heads=16, kv_heads=8, ffn=67, output_bias=True, mlp_bias=True),
    "kv3-tied-biases": spec_of(
        layers=9, heads=15, tied_embeddings=True, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True
    ),
    "kv5-mha": spec_of(layers=3, heads=5, kv_heads=5, ffn=16, vocab=19),
}

TINY = spec_of(layers=8, hidden=4, heads=8, kv_heads=2, ffn=11, vocab=13, qkv_bias=True, output_bias=True)
TINY_TIED = spec_of(
    layers=8, hidden=4, heads=8, kv_heads=2, ffn=9, vocab=17, tied_embeddings=True, qk_norm=True
)


def layouts(world: int) -> list[Layout]:
    """All layouts of `world` ranks."""
    return [
        Layout(dp, pp, world // dp // pp)
        for dp in range(1, world + 1)
        if world % dp == 0
        for pp in range(1, world // dp + 1)
        if (world // dp) % pp == 0
    ]


def usable(spec: ModelSpec, world: int, moe: MoESpec | None = None) -> list[Layout]:
    """The layouts of `world` ranks into which the model can be divided."""
    return [layout for layout in layouts(world) if fits(spec, layout, moe)]


def fits(spec: ModelSpec, layout: Layout, moe: MoESpec | None = None) -> bool:
    """Whether `check_layout` accepts the layout."""
    try:
        check_layout(spec, layout, moe)
    except LayoutError:
        return False
    return True


def carrying(spec: ModelSpec, sharding: Sharding, moe: MoESpec | None = None) -> Sharding:
    """`sharding` with an FFN shared at every border of stages where it can be, but one in three."""
    tp = sharding.layout.tp
    room = range(tp, spec.ffn - tp + 1)
    carried = [
        room[7 * stage % len(room)]
        if room and stage % 3 and not (moe and layers.start - 1 in moe.sparse)
        else 0
        for stage, layers in enumerate(sharding.stages)
    ]
    return make_sharding(
        spec,
        sharding.layout,
        stages=sharding.stages,
        ranks=sharding.ranks,
        carried=tuple(carried),
        moe=moe,
    )


@st.composite
def shardings(
    draw: st.DrawFn, spec: ModelSpec, world: int, moe: MoESpec | None = None, most: float = 5
) -> Sharding:
    """Random ones of all layouts, ranks and divisions of layers and FFNs; the LM head weighs up to `most` layers."""
    layout = draw(st.sampled_from(usable(spec, world, moe)))
    ranks = tuple(draw(st.permutations(range(world))))
    whole = make_sharding(spec, layout, head_weight=draw(st.floats(0, most)), ranks=ranks, moe=moe)
    carried = [0]
    for stage in whole.stages[1:]:
        divisible = spec.ffn >= 2 * layout.tp and not (moe and stage.start - 1 in moe.sparse)
        columns = st.just(0) | st.integers(layout.tp, spec.ffn - layout.tp) if divisible else st.just(0)
        carried.append(draw(columns))
    return make_sharding(spec, layout, stages=whole.stages, ranks=ranks, carried=tuple(carried), moe=moe)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Random small models."""
    kv_heads = draw(st.integers(1, 9))
    return spec_of(
        layers=draw(st.integers(1, 9)),
        hidden=draw(st.integers(1, 9)),
        heads=kv_heads * draw(st.integers(1, 7)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        ffn=draw(st.integers(1, 40)),
        vocab=draw(st.integers(1, 40)),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
    )


@st.composite
def moes(draw: st.DrawFn, spec: ModelSpec) -> MoESpec:
    """Random experts for some of the layers of a model."""
    experts = draw(st.integers(1, 5))
    return MoESpec(
        experts=experts,
        experts_per_token=draw(st.integers(1, experts)),
        expert_ffn=draw(st.integers(1, 20)),
        shared_ffn=draw(st.integers(0, 20)),
        sparse=tuple(sorted(draw(st.sets(st.integers(0, spec.layers - 1), min_size=1)))),
    )
