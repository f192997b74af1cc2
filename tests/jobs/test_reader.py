"""Lines and rows: what files may look like, and that no bytes break the reader."""

from __future__ import annotations

import io
import json
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seesaw.core.errors import RequestError
from seesaw.jobs.base import Endpoint, Row, RowFailure
from seesaw.jobs.id_index import IdIndex
from seesaw.jobs.lines import count_lines, read_lines
from seesaw.jobs.reader import RowMaker
from seesaw.jobs.requests import ModelNames, RequestMaker
from seesaw.jobs.sources.jsonl import json_records
from tests.jobs.echo_engine import ByteTokenizer
from tests.jobs.poison import POISONS

BOM = b"\xef\xbb\xbf"


def rows(data: bytes) -> list[Row | RowFailure]:
    return list(RowMaker().rows("line", json_records(io.BytesIO(data))))


@pytest.mark.parametrize("start", [b"", BOM])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_file_conventions(start: bytes, end: bytes, last: bool) -> None:
    lines = [b'{"id": "a", "prompt": "1"}', b"", b"  \t", '{"id": "ü", "prompt": "\u2028"}'.encode()]
    data = start + end.join(lines) + (end if last else b"")
    found = rows(data)
    assert [(r.place, r.id) for r in found] == [("line 1", "a"), ("line 4", "ü")]
    assert all(isinstance(r, Row) for r in found)


def test_a_byte_order_mark_only_counts_at_the_start() -> None:
    first, second = rows(BOM + b'{"prompt": "a"}\n' + BOM + b'{"prompt": "a"}\n')
    assert isinstance(first, Row)
    assert isinstance(second, RowFailure)


@pytest.mark.parametrize("data", [b"", b"\n\r\n \n", BOM])
def test_files_without_rows(data: bytes) -> None:
    assert rows(data) == []


def test_utf16_is_recognised() -> None:
    (failure, *_) = rows('{"prompt": "a"}\n'.encode("utf-16"))
    assert isinstance(failure, RowFailure)
    assert "UTF-16" in failure.message


def test_kinds_of_rows() -> None:
    body = {"messages": [], "model": "m"}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}},
        {"custom_id": "c", "messages": []},
        {"id": 7, "prompt": "x", "max_tokens": 3},
        {"prompt_token_ids": [1]},
        {"id": None, "custom_id": "f", "prompt": "x"},
        {"id": "g", "custom_id": "g", "prompt": "x"},
    ]
    found = rows(b"\n".join(json.dumps(line).encode() for line in lines))
    assert [(r.id, r.endpoint.name, r.plain) for r in found if isinstance(r, Row)] == [
        ("a", "CHAT", False),
        ("b", "COMPLETIONS", False),
        ("c", "CHAT", True),
        ("7", "COMPLETIONS", True),
        ("line-5", "COMPLETIONS", True),
        ("f", "COMPLETIONS", True),
        ("g", "COMPLETIONS", True),
    ]
    assert isinstance(found[3], Row)
    assert found[3].body == {"prompt": "x", "max_tokens": 3}


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_lines_up_to_the_limit_are_read(end: bytes) -> None:
    data = BOM + b"x" * 10 + b"\n" + b"y" * 11 + b"\n" + b"z" * 100 + b"\n" + b"w" * 10 + end
    assert list(read_lines(io.BytesIO(data), max_bytes=10)) == [
        (1, b"x" * 10),
        (2, None),
        (3, None),
        (4, b"w" * 10),
    ]


def test_a_huge_line_fails_without_being_held() -> None:
    class Endless(io.RawIOBase):
        """A line of 200 MB, then a row."""

        left = 200 << 20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            if self.left <= 0:
                return 0
            size = min(len(buffer), self.left)
            buffer[:size] = b"x" * size
            self.left -= size
            if self.left == 0:
                tail = b'\n{"id": "a", "prompt": "b"}'
                self.left = -1
                buffer[:] = b"x" * (len(buffer) - len(tail)) + tail
                return len(buffer)
            return size

    tracemalloc.start()
    records = json_records(io.BufferedReader(Endless(), 1 << 16), max_line_bytes=1 << 20)
    found = list(RowMaker().rows("line", records))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [type(r) for r in found] == [RowFailure, Row]
    assert isinstance(found[0], RowFailure)
    assert (found[0].code, found[0].id) == ("line_too_long", "line-1")
    assert "1.00 MiB" in found[0].message
    assert peak < 8 << 20


LINE_BYTES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([p.line for p in POISONS]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
)
FIELDS = [
    *("model", "prompt", "messages", "max_tokens", "n", "temperature", "top_p", "top_k", "stop", "logprobs"),
    *("top_logprobs", "stream", "seed", "stop_token_ids", "tools", "response_format", "chat_template_kwargs"),
    *("best_of", "echo", "metadata", "min_tokens", "x"),
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(LINE_BYTES, max_size=6), st.sampled_from([b"\n", b"\r\n"]))
@example([b'{"a":"\\udc00"}', b'{"\\ud800\\ud800": 1}'], b"\n")
def test_random_bytes_become_one_row_each(lines: list[bytes], end: bytes) -> None:
    data = end.join(lines)
    expected = [i for i, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1) if line.strip()]
    found = rows(data)
    assert [row.number for row in found] == list(range(1, len(expected) + 1))
    for row, line in zip(found, expected, strict=True):
        place = row.message.partition(": ")[0] if isinstance(row, RowFailure) else row.place
        assert place == f"line {line}"
        row.id.encode()


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5), st.sampled_from(Endpoint), st.booleans())
def test_random_bodies_are_served_or_refused(
    body: dict[str, object], endpoint: Endpoint, plain: bool
) -> None:
    maker = RequestMaker(ByteTokenizer(), 100, ModelNames("m", "m"))
    row = Row(number=1, place="line 1", digest=0, id="a", endpoint=endpoint, body=body, plain=plain)
    try:
        request = maker.make(row)
    except RequestError as error:
        assert error.code
        assert len(str(error)) < 400
        return
    assert request.id == "a"
    assert all(type(token) is int for token in request.prompt_token_ids)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=3), max_size=300))
def test_id_index_is_a_dict(ids: list[str]) -> None:
    index, oracle = IdIndex(), dict[str, int]()
    for line, row_id in enumerate(ids, 1):
        assert index.add(row_id, line) == oracle.get(row_id)
        oracle.setdefault(row_id, line)


def test_id_index_is_small_and_right_when_large() -> None:
    tracemalloc.start()
    index = IdIndex()
    for i in range(30_000):
        assert index.add(f"a rather long identifier of row {i:060d}", i + 1) is None
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 30 * 30_000
    assert index.add(f"a rather long identifier of row {17_777:060d}", 1) == 17_778


def test_a_duplicate_is_told_where_it_was_in_whichever_input() -> None:
    maker = RowMaker(["a", "b", "c"])
    inputs = [b'\n{"id": "x"}\n\n{"id": "y"}\n', b"", b'{"id": "z"}\n{"id": "y"}\n\n{"id": "x"}\n{"id": "z"}']
    found = [list(maker.rows("line", json_records(io.BytesIO(data)))) for data in inputs]
    assert [row.id for row in found[0]] == ["x", "y"]
    assert found[1] == []
    assert [row.message for row in found[2] if isinstance(row, RowFailure)] == [
        "c: line 2: the id 'y' was used on line 4 of a already; ids must be unique",
        "c: line 4: the id 'x' was used on line 2 of a already; ids must be unique",
        "c: line 5: the id 'z' was used on line 1 already; ids must be unique",
    ]


def test_a_position_may_be_beyond_32_bits() -> None:
    index, far = IdIndex(), (1 << 40) - 1
    assert index.add("a", far) is None
    assert index.add("a", 1) == far


@pytest.mark.parametrize("value", [True, 1.5, "1", None, [1]])
def test_settings_that_are_equal_in_python_are_told_apart(value: object) -> None:
    def outcome(maker: RequestMaker) -> object:
        body = {"prompt": "a", "max_tokens": value}
        row = Row(number=1, place="", digest=0, id="a", endpoint=Endpoint.COMPLETIONS, body=body, plain=True)
        try:
            return maker.make(row)
        except RequestError as error:
            return str(error)

    def fresh() -> RequestMaker:
        return RequestMaker(ByteTokenizer(), 100, ModelNames("m", None))

    maker = fresh()
    for known in (1, 1.0):
        body = {"prompt": "a", "max_tokens": known}
        maker.make(Row(number=1, place="", digest=0, id="b", endpoint=Endpoint.COMPLETIONS, body=body))
    assert outcome(maker) == outcome(maker) == outcome(fresh())


def test_a_model_name_is_checked_in_every_row() -> None:
    maker = RequestMaker(ByteTokenizer(), 100, ModelNames("m", None))

    def make(model: str) -> None:
        body = {"prompt": "a", "model": model}
        maker.make(Row(number=1, place="", digest=0, id="a", endpoint=Endpoint.COMPLETIONS, body=body))

    for model in ("m", "alias", "m", "alias"):
        make(model)
    for _ in range(2):
        with pytest.raises(RequestError, match="this job runs 'alias', 'm'"):
            make("other")


@pytest.mark.parametrize(("data", "lines"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\n\nb", 3)])
def test_lines_are_counted(data: bytes, lines: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("count") / "file"
    path.write_bytes(data)
    stop = threading.Event()
    assert count_lines(path, stop) == lines
    assert count_lines(Path("/dev/null"), stop) is None
    stop.set()
    assert count_lines(path, stop) == (None if data else 0)
