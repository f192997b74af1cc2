from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seesaw.core.errors import ConfigError
from seesaw.planning import workload_files
from seesaw.planning.workloads import DEFAULT_REQUESTS, NAMED_WORKLOADS, Workload, workload

TRACES = {
    "sharegpt": (58787, (298.80, 323.73), ((36.0, 280.0), (829.0, 683.0), (3473.1, 999.0)), 0.103),
    "arxiv": (28257, (2588.08, 291.43), ((2730.0, 167.0), (3702.0, 372.0), (3933.4, 3271.3)), -0.484),
    "azure-code": (8819, (2047.85, 27.88), ((1469.0, 13.0), (5187.6, 55.0), (7436.0, 251.5)), -0.005),
    "azure-conv": (19366, (1154.70, 211.13), ((1020.0, 129.0), (2734.5, 424.0), (4142.0, 601.0)), 0.087),
    "lmsys": (100000, (92.20, 207.40), ((28.0, 140.0), (302.0, 512.0), (750.0, 850.0)), 0.202),
    "mooncake": (12031, (12035.06, 342.62), ((6909.0, 350.0), (27367.0, 597.0), (85400.4, 1118.5)), 0.051),
}
"""Of the traces: requests, means, 50th, 90th and 99th percentiles, correlation of the logarithms."""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def rows(path: Path, *values: object) -> Path:
    return write(path, "".join(f"{v if isinstance(v, str) else json.dumps(v)}\n" for v in values))


# ---- named -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED_WORKLOADS)
@pytest.mark.parametrize("seed", [0, 1])
def test_samples_have_the_figures_of_the_trace(name: str, seed: int) -> None:
    _, means, percentiles, correlation = TRACES[name]
    drawn = workload(name, 20_000, seed)
    assert (drawn.mean_prompt, drawn.mean_output) == pytest.approx(means, rel=0.02)
    for found, wanted in zip(drawn.percentiles(50, 90, 99), percentiles, strict=True):
        assert found == pytest.approx(wanted, rel=0.05)
    logs = np.corrcoef(np.log(drawn.prompt), np.log(drawn.output))
    assert logs[0, 1] == pytest.approx(correlation, abs=0.02)


@pytest.mark.parametrize("name", NAMED_WORKLOADS)
def test_histograms_are_whole_compact_and_say_where_they_come_from(name: str) -> None:
    text = (files("seesaw.planning") / "data" / f"{name}.json").read_text(encoding="utf-8")
    stored = json.loads(text)
    assert len(text.encode()) < 60_000
    assert all(stored[key] for key in ("origin", "licence", "cite"))
    assert (
        sum(count for row in stored["cells"] for count in row[1::2]) == stored["requests"] == TRACES[name][0]
    )
    page = (Path(__file__).parents[2] / "docs" / "workloads.md").read_text()
    assert f"`{name}`" in page
    assert stored["licence"] in page
    assert stored["origin"].split(",")[0] in page


def test_the_seed_decides() -> None:
    one, again, other = (workload("ShareGPT", 300, seed) for seed in (5, 5, 6))
    assert np.array_equal(one.prompt, again.prompt)
    assert np.array_equal(one.output, again.output)
    assert not np.array_equal(one.prompt, other.prompt)
    assert len(one) == one.requests == 300
    assert len(workload("lmsys")) == DEFAULT_REQUESTS


def test_order_is_mixed() -> None:
    drawn = workload("sharegpt", 4000)
    halves = [np.median(half) for half in np.array_split(drawn.prompt, 2)]
    assert halves[0] == pytest.approx(halves[1], rel=0.25)


def test_arxiv_stays_within_its_context() -> None:
    drawn = workload("arxiv", 20_000)
    assert drawn.longest <= 4096
    assert drawn.output.min() >= 1


def test_every_size_can_be_drawn() -> None:
    for requests in (1, 2, 7, 100_001):
        assert len(workload("azure-code", requests)) == requests


# ---- uniform, unknown, the type --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["in=3000,out=200", " IN = 3000 , out=200 "])
def test_uniform(text: str) -> None:
    drawn = workload(text, 5)
    assert drawn.prompt.tolist() == [3000] * 5
    assert drawn.output.tolist() == [200] * 5
    assert drawn.describe() == "in=3000,out=200: 5 requests of 3,000 tokens in, 200 out"


@pytest.mark.parametrize(
    ("text", "requests", "complaint"),
    [
        ("shargpt", None, "did you mean sharegpt\\?"),
        ("azure", None, "did you mean azure-con?"),
        ("zzz", None, "'zzz' is unknown; expected sharegpt, arxiv"),
        ("in=3000", None, "expected .*in=3000,out=200"),
        ("in=0,out=5", None, "at least 1 token each"),
        ("sharegpt", 0, "requests=0"),
        ("/nowhere/trace.csv", None, "/nowhere/trace.csv: cannot be read: No such file"),
        ("/nowhere/job.jsonl", None, "/nowhere/job.jsonl: cannot be read: No such file"),
    ],
)
def test_errors(text: str, requests: int | None, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        workload(text, requests)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a \.csv nor a \.jsonl file"):
        workload(write(tmp_path / "lengths.txt", "1 2"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        workload(tmp_path / "folder.csv")


def test_a_workload_is_checked_and_cannot_be_changed() -> None:
    prompt = np.array([5, 6])
    made = Workload("mine", prompt, np.array([1, 2]))
    prompt[0] = 99
    assert made.prompt.tolist() == [5, 6]
    with pytest.raises(ValueError, match="read-only"):
        made.prompt[0] = 1
    with pytest.raises(ConfigError, match="empty"):
        Workload("none", np.array([]), np.array([]))
    with pytest.raises(ConfigError, match="one entry"):
        Workload("odd", np.array([1, 2]), np.array([1]))
    with pytest.raises(ConfigError, match="the shortest have 1 and 0"):
        Workload("zero", np.array([1, 2]), np.array([1, 0]))


def test_within_leaves_out_what_does_not_fit() -> None:
    made = Workload("mine", np.array([10, 90, 50]), np.array([5, 20, 50]), np.array([0.0, 1.0, 2.0]), 300)
    some = made.within(100)
    assert (some.prompt.tolist(), some.output.tolist()) == ([10, 50], [5, 50])
    assert some.arrival_s is not None
    assert some.arrival_s.tolist() == [0, 2]
    assert some.requests == 200
    assert "1 of 3 left out that exceed 100 tokens" in some.describe()
    assert made.within(110) is made
    with pytest.raises(ConfigError, match="no request fits 14 tokens, the shortest has 15"):
        made.within(14)


# ---- traces ----------------------------------------------------------------------------------------------------


def test_trace_with_arrivals(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        "\ufeffarrival_s,ContextTokens,note,GeneratedTokens\n# a comment\n0.5,10,x,3\n\n9,30,,5\n2,20,,4.0\n",
    )
    trace = workload(path)
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([10, 20, 30], [3, 4, 5])
    assert trace.arrival_s is not None
    assert trace.arrival_s.tolist() == [0.5, 2, 9]
    assert trace.describe().endswith("arriving over 8 s")
    first = workload(path, 2)
    assert first.prompt.tolist() == [10, 30]  # the first lines, in the order of arrival


def test_published_column_names(tmp_path: Path) -> None:
    azure = write(
        tmp_path / "a.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4,2\n2023-11-16 18:17:05.4799600,3,1\n",
    )
    trace = workload(azure)
    assert trace.arrival_s is not None
    assert trace.arrival_s.tolist() == pytest.approx([0, 1.5])
    vidur = workload(write(tmp_path / "v.csv", "num_prefill_tokens,num_decode_tokens\n7,8\n"))
    assert (vidur.prompt.tolist(), vidur.output.tolist(), vidur.arrival_s) == ([7], [8], None)


def test_a_short_trace_is_repeated_at_its_own_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "arrival_s,ContextTokens,GeneratedTokens\n1,10,1\n3,20,2\n5,30,3\n")
    trace = workload(path, 7)
    assert trace.prompt.tolist() == [10, 20, 30, 10, 20, 30, 10]
    assert trace.arrival_s is not None
    assert trace.arrival_s.tolist() == [1, 3, 5, 7, 9, 11, 13]
    assert "repeated" in trace.describe()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "ContextTokens,GeneratedTokens\n1,2\n3,x\n",
            "t.csv, line 3: GeneratedTokens is 'x'; expected a whole",
        ),
        ("ContextTokens,GeneratedTokens\n\n1,2\n-3,2\n", "line 4: ContextTokens is '-3'"),
        ("ContextTokens,GeneratedTokens\n1,0\n", "line 2: GeneratedTokens is '0'"),
        ("ContextTokens,GeneratedTokens\n1\n", "line 2: GeneratedTokens is ''"),
        ("ContextTokens,GeneratedTokens\n1.5,2\n", "line 2: ContextTokens is '1.5'"),
        ("ContextTokens,GeneratedTokens\n99999999999,2\n", "line 2: ContextTokens is '99999999999'"),
        (
            "ContextTokens,GeneratedTokens,arrival_s\n1,2,nan\n",
            "line 2: arrival_s is 'nan'; expected seconds",
        ),
        ("ContextTokens,GeneratedTokens,arrival_s\n1,2,-1\n", "line 2: arrival_s is '-1'"),
        (
            "ContextTokens,GeneratedTokens,TIMESTAMP\n1,2,noon\n",
            "line 2: TIMESTAMP is 'noon'; expected a date",
        ),
        ("a,b\n1,2\n", "line 1: the first line must name the columns ContextTokens and .* found a, b"),
        ("", "the first line must name the columns .* found none"),
        ("ContextTokens,GeneratedTokens\n", "t.csv: an empty workload"),
    ],
)
def test_malformed_traces(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        workload(write(tmp_path / "t.csv", text))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"ContextTokens,GeneratedTokens\n\xff\xfe,2\n")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        workload(tmp_path / "t.csv")


# ---- job files -------------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "system", "content": "x" * 40}, {"role": "user", "content": "y" * 10}]}


@pytest.mark.parametrize(
    ("row", "lengths"),
    [
        ({"prompt": "x" * 401, "max_tokens": 7}, [(101, 7)]),
        ({"prompt": "é"}, [(1, 16)]),
        ({"prompt": [5, 6, 7]}, [(3, 16)]),
        ({"prompt": ["x" * 8]}, [(2, 16)]),
        ({"prompt_token_ids": [5, 6, 7, 8], "max_tokens": 9.0}, [(4, 9)]),
        ({"prompt_tokens": 500, "output_tokens": 20, "max_tokens": 999}, [(500, 20)]),
        ({"input_length": 500, "output_length": 20}, [(500, 20)]),
        ({"prompt": "x" * 8, "n": 3, "max_tokens": 2}, [(2, 2)] * 3),
        (CHAT, [(13 + 8, 256)]),
        ({**CHAT, "max_completion_tokens": 30, "max_tokens": None}, [(13 + 8, 30)]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "x" * 40}, {"type": "image"}]}
                ]
            },
            [(14, 256)],
        ),
        (
            {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x" * 40}},
            [(10, 16)],
        ),
    ],
)
def test_rows_of_job_files(row: dict[str, Any], lengths: list[tuple[int, int]], tmp_path: Path) -> None:
    job = workload(rows(tmp_path / "job.jsonl", row))
    assert list(zip(job.prompt.tolist(), job.output.tolist(), strict=True)) == lengths
    assert job.arrival_s is None


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{broken", "'{broken.*is not JSON"),
        ([1, 2], r"\[1, 2\] is not an object"),
        ({"body": "text"}, "'text' is not an object"),
        ({}, "the row has no prompt"),
        ({"prompt": ""}, "prompt is ''; expected text or token ids"),
        ({"prompt": ["a", "b"]}, "expected text or token ids"),
        ({"messages": []}, r"messages is \[\]; expected a list of objects"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0; expected a whole number"),
        ({"prompt": "x", "n": 1000}, "n is 1000; expected at most 128"),
    ],
)
def test_bad_rows_are_left_out_and_noted(bad: object, reason: str, tmp_path: Path) -> None:
    job = workload(rows(tmp_path / "job.jsonl", {"prompt": "x" * 8}, "", bad, {"prompt_tokens": 3}))
    assert job.prompt.tolist() == [2, 3]
    assert any(note.startswith("1 row left out that cannot be read (line 3: ") for note in job.notes)
    with pytest.raises(ConfigError, match=rf"job.jsonl: no row can be used; line 1: .*{reason}"):
        workload(rows(tmp_path / "job.jsonl", bad, bad))


def test_an_empty_job_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"job\.jsonl: an empty workload: the file has no rows"):
        workload(rows(tmp_path / "job.jsonl", "", "  "))


def test_assumptions_are_noted(tmp_path: Path) -> None:
    job = workload(rows(tmp_path / "job.jsonl", {"prompt": "x" * 8, "max_tokens": 5}))
    assert job.notes == (
        "prompts estimated at 4 characters a token",
        "answers taken to be as long as max_tokens allows",
    )
    assert workload(rows(tmp_path / "j.jsonl", {"prompt_tokens": 8, "output_tokens": 5})).notes == ()


def test_the_first_rows_of_a_job_are_enough(tmp_path: Path) -> None:
    path = rows(tmp_path / "job.jsonl", *({"prompt_tokens": i, "n": 2} for i in (1, 2, 3)), "{broken")
    assert workload(path, 3).prompt.tolist() == [1, 1, 2]
    assert workload(path, 3).notes == ("answers taken to be as long as max_tokens allows",)
    assert workload(path, 8).prompt.tolist() == [1, 1, 2, 2, 3, 3, 1, 1]


@pytest.mark.parametrize("count", [15, 16, 17, 100, 1000])
def test_of_long_job_files_an_even_sample_is_kept(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload_files, "MOST_ROWS", 16)
    path = rows(tmp_path / "job.jsonl", *({"prompt_tokens": i + 1, "output_tokens": 1} for i in range(count)))
    job = workload(path)
    stride = 1
    while -(-count // stride) >= 16:
        stride *= 2
    assert job.prompt.tolist() == list(range(1, count + 1, stride))
    assert job.requests == count
    assert workload(path, 50).requests == 50


def test_lines_that_are_too_long_are_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload_files, "_LINE_BYTES", 1 << 20)
    path = rows(tmp_path / "job.jsonl", {"prompt": "x" * (5 << 19)}, {"prompt": "x" * 4})
    job = workload(path)
    assert job.prompt.tolist() == [1]
    assert "line 1: the line is longer than 1 MiB" in job.notes[-1]
