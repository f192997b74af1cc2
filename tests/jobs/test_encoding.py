"""Rows made into requests by encoder processes: the same as in this process, in order, within bounds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seesaw.core.errors import JobError, RequestError
from seesaw.jobs.base import Encoder, Endpoint, Row, RowFailure
from seesaw.jobs.encoding.pool import EncoderPool, encoder_pool, spare_processes
from seesaw.jobs.encoding.source import Ahead, Encoded, EncodedRow, EncodedRows, RefusedRow
from seesaw.jobs.encoding.wire import Setup, encode_items, framed, take_frames
from seesaw.jobs.requests import ModelNames, RequestMaker
from seesaw.text import Tokenizer
from tests.jobs.echo_engine import ByteTokenizer
from tests.jobs.encoders import BROKEN, PoisonedTokenizer
from tests.test_text import save

SETUP = Setup("tests.jobs.encoders:PoisonedTokenizer", "")
WORDS = ["", "a", "fox", "süß 日本", "🙂", "\ud800", BROKEN, "x" * 300, "</s><eos>"]


def row(number: int, body: dict[str, Any], endpoint: Endpoint = Endpoint.COMPLETIONS) -> Row:
    return Row(
        number=number,
        place=f"line {number}",
        digest=number,
        id=f"row-{number}",
        endpoint=endpoint,
        body=body,
        plain=endpoint is Endpoint.COMPLETIONS,
    )


def prompts(count: int, text: str = "prompt") -> list[Row]:
    return [row(i, {"prompt": f"{text} {i}"}) for i in range(count)]


def maker(encoder: Encoder | None = None) -> RequestMaker:
    return RequestMaker(encoder or PoisonedTokenizer(""), 1000, ModelNames("m", None))


def ready(pool: EncoderPool) -> EncoderPool:
    """`pool`, once an encoder is up, so that a test does not depend on who is first."""
    pool.start()
    while not pool.ready:
        pool.pump(None)
    return pool


def shape(encoded: Encoded) -> object:
    """What can be compared."""
    match encoded:
        case EncodedRow():
            return encoded.row, encoded.request
        case RefusedRow():
            error = encoded.error
            return encoded.row, str(error), error.code, error.param
        case _:
            return encoded


def plainly(rows: list[Row | RowFailure], encoder: Encoder | None = None) -> list[object]:
    """What `RequestMaker.make` makes of rows, one after the other."""
    made = maker(encoder)
    result: list[object] = []
    for each in rows:
        if isinstance(each, RowFailure):
            result.append(each)
            continue
        try:
            result.append((each, made.make(each)))
        except RequestError as error:
            result.append((each, str(error), error.code, error.param))
    return result


# --- equal to what this process makes -----------------------------------------------------------------------

TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=20))
NUMBERS = st.one_of(st.integers(-3, 3), st.floats(), st.just(2**70), st.booleans(), st.none())
TOKENS = st.lists(st.one_of(st.integers(-1, 300), st.just(2**31 - 1), st.just(2**40)), max_size=4)
VALUES = st.one_of(TEXTS, NUMBERS, TOKENS)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "robot"]), "content": TEXTS}),
        st.dictionaries(st.sampled_from(["role", "content", "name"]), VALUES, max_size=3),
    ),
    max_size=3,
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["m", "alias", "other", ""]),
        "max_tokens": st.one_of(st.integers(1, 9), NUMBERS),
        "temperature": NUMBERS,
        "stop": st.lists(TEXTS, max_size=2),
        "nonsense": st.just(1),
    },
)
COMPLETIONS = st.builds(
    lambda more, content: (Endpoint.COMPLETIONS, more | content),
    SETTINGS,
    st.one_of(
        st.fixed_dictionaries({"prompt": st.one_of(TEXTS, TOKENS, st.lists(TEXTS, max_size=2), VALUES)}),
        st.fixed_dictionaries({"prompt_token_ids": TOKENS}),
    ),
)
CHATS = st.builds(
    lambda more, messages, template: (Endpoint.CHAT, {**more, "messages": messages, **template}),
    SETTINGS,
    MESSAGES,
    st.fixed_dictionaries(
        {}, optional={"chat_template_kwargs": st.dictionaries(st.sampled_from(["a", "b"]), VALUES)}
    ),
)
FAILURE = RowFailure(number=0, digest=0, id="bad", code="invalid_json", message="line 0: not JSON")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokeniser")
    save(folder, "byte-level")
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def pools(real: Tokenizer) -> Iterator[dict[str, EncoderPool]]:
    """A pool of Hugging Face tokenisers and one of bytes, which examples share."""
    named = encoder_pool(real, 2)
    assert named is not None
    pools = {"real": ready(named), "bytes": ready(EncoderPool(SETUP, 2))}
    yield pools
    for pool in pools.values():
        pool.close()


class Lent(EncodedRows):
    """Rows on a pool that outlives them."""

    def close(self) -> None:
        self._pool = None


@pytest.mark.parametrize("kind", ["real", "bytes"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_comes_out_is_what_this_process_would_make(
    kind: str, pools: dict[str, EncoderPool], real: Tokenizer, data: st.DataObject
) -> None:
    bodies = data.draw(st.lists(st.one_of(COMPLETIONS, CHATS, st.none()), max_size=12))
    rows = [FAILURE if b is None else row(i, b[1], b[0]) for i, b in enumerate(bodies)]
    encoder: Encoder = real if kind == "real" else PoisonedTokenizer("")
    ahead = Ahead(rows=data.draw(st.integers(1, 20)), batch_rows=data.draw(st.integers(1, 5)))
    with Lent(rows, maker(encoder), pools[kind], ahead=ahead) as encoded:
        assert repr([shape(each) for each in encoded]) == repr(plainly(rows, encoder))


def test_the_first_foreign_model_name_in_the_order_of_rows_is_the_alias() -> None:
    names = ["one", "m", "two", "one", "two"]
    rows = [row(i, {"prompt": "a", "model": name}) for i, name in enumerate(names)]
    with EncodedRows(rows, maker(), ready(EncoderPool(SETUP, 2))) as encoded:
        refused = [each.row.number for each in encoded if isinstance(each, RefusedRow)]
    assert refused == [2, 4]


def test_without_a_pool_rows_are_made_one_at_a_time() -> None:
    source = iter(prompts(10))
    encoded = EncodedRows(source, maker())
    assert shape(next(encoded)) == plainly(prompts(10))[0]
    assert encoded.rows_ahead == 0
    assert next(source).number == 1


def test_before_an_encoder_is_up_rows_are_made_here() -> None:
    pool = EncoderPool(SETUP, 1)
    pool.start()
    with EncodedRows(prompts(3000), maker(), pool) as encoded:
        assert [shape(each) for each in encoded] == plainly(list(prompts(3000)))


# --- bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 50, 500])
def test_no_more_rows_are_read_than_allowed(rows: int) -> None:
    read = 0

    def source() -> Iterator[Row]:
        nonlocal read
        for each in prompts(2000):
            read += 1
            yield each

    pool = ready(EncoderPool(SETUP, 2))
    with EncodedRows(source(), maker(), pool, ahead=Ahead(rows=rows)) as encoded:
        for given_out in range(1, 1001):
            next(encoded)
            assert read - given_out <= rows
            assert encoded.rows_ahead <= rows
        assert [shape(each) for each in encoded] == plainly(list(prompts(2000)))[1000:]


def test_no_more_bytes_are_held_than_allowed_but_for_one_row() -> None:
    rows = [row(i, {"prompt": "x" * (i % 7 * 1000)}) for i in range(1, 400)]
    pool = ready(EncoderPool(SETUP, 1))
    held = []
    with EncodedRows(rows, maker(), pool, ahead=Ahead(bytes=20_000)) as encoded:
        for each in encoded:
            assert each is not None
            held.append(encoded.bytes_ahead)
    assert max(held) <= 20_000 + 6_100
    assert held[-1] == 0


def test_a_row_beyond_all_bounds_passes() -> None:
    rows = [*prompts(5), row(5, {"prompt": "y" * 3_000_000}), *prompts(9)[6:]]
    pool = ready(EncoderPool(SETUP, 1))
    with EncodedRows(rows, maker(), pool, ahead=Ahead(rows=4, bytes=1000, batch_bytes=100)) as encoded:
        assert [shape(each) for each in encoded] == plainly(list(rows))


def test_the_source_is_read_no_further_when_the_consumer_stops() -> None:
    numbers = itertools.count()
    endless = (row(i, {"prompt": "a"}) for i in numbers)
    with EncodedRows(endless, maker(), ready(EncoderPool(SETUP, 1)), ahead=Ahead(rows=100)) as encoded:
        next(encoded)
    assert next(numbers) <= 101
    encoded.close()


def test_what_the_source_raises_comes_after_its_rows() -> None:
    def source() -> Iterator[Row]:
        yield from prompts(100)
        raise JobError("in.jsonl: it has gone")

    seen = 0
    with EncodedRows(source(), maker(), ready(EncoderPool(SETUP, 1))) as encoded:
        with pytest.raises(JobError, match="it has gone"):
            for _ in encoded:
                seen += 1
        assert seen == 100
        with pytest.raises(JobError):
            next(encoded)


# --- parts --------------------------------------------------------------------------------------------------


def test_frames_survive_any_cut() -> None:
    payloads = [b"", b"a", b"bc" * 1000, b""]
    stream = b"".join(map(framed, payloads))
    for cut in range(len(stream) + 1):
        buffer = bytearray(stream[:cut])
        first = list(take_frames(buffer))
        buffer += stream[cut:]
        assert [*first, *take_frames(buffer)] == payloads
        assert not buffer


def test_whatever_a_tokeniser_raises_concerns_one_row() -> None:
    class Panic(BaseException):
        """As pyo3 raises it when Rust code panics."""

    class Panicking(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            if text == "no":
                raise Panic("index out\nof bounds")
            return super().encode(text)

    reply = encode_items(Panicking(), ["a", "no", "bc"])
    assert reply.counts == [1, -1, 2]
    (refusal,) = reply.refusals
    assert refusal.code == "internal_error"
    assert refusal.message == "the tokeniser failed on this row (Panic: index out of bounds)"


def test_only_a_tokeniser_that_was_loaded_by_name_gets_a_pool(real: Tokenizer, tmp_path: Path) -> None:
    assert encoder_pool(ByteTokenizer(), 2) is None
    assert encoder_pool(None, 2) is None
    assert encoder_pool(real, 0) is None
    assert encoder_pool(Tokenizer(real._tokenizer), 1) is None


def test_there_is_at_least_one_encoder_and_never_a_crowd() -> None:
    assert spare_processes(10_000) == 1
    assert 1 <= spare_processes(0) <= 8
