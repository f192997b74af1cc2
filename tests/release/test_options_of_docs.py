"""Commands in the Markdown name subcommands, options, targets and files that exist.

The slow test walks them: `test_commands_of_docs`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from seesaw.cli.main import app
from tests.release.markdown import NEEDS, ROOT, Block, blocks, indented, invocations, pages, spans
from tests.release.stand_ins import runnable

SHELLS = {"bash", "shell", "console", "zsh", "shell-session", "terminal"}
COMMAND = re.compile(r"^\s*(\$ |seesaw |make |pip |python3? |scripts/|lm_eval )")
SH = [block for page in pages() for block in blocks(page) if block.language == "sh"]
SEESAW: Any = typer.main.get_command(app)
USAGE: Any = typer.BadParameter.__base__
"""`UsageError` of the click that typer has, its own or the library."""


def check_seesaw(words: list[str]) -> None:
    """Parses a command as the command line would, without running it."""
    if not words or words[0].startswith("-"):
        return
    assert words[0] in SEESAW.commands, f"there is no `seesaw {words[0]}`"
    try:
        SEESAW.commands[words[0]].make_context(words[0], words[1:])
    except typer.Exit:
        return
    except USAGE as error:
        if "does not exist" not in error.format_message():  # a file of the reader's
            raise AssertionError(f"`seesaw {' '.join(words)}`: {error.format_message()}") from error


def check_file(words: list[str]) -> None:
    """Targets of make, scripts, and programs of ours."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if words[0] == "make":
        assert set(words[1:]) <= targets, f"`{' '.join(words)}`: the Makefile has no such target"
    programs = [word for word in words[:2] if word.startswith(("scripts/", "benchmarks/", "examples/"))]
    for program in programs:
        assert (ROOT / program).exists(), f"`{' '.join(words)}`: {program} does not exist"


@pytest.mark.parametrize("block", SH, ids=str)
def test_a_block_of_commands_can_be_parsed(block: Block) -> None:
    for words in invocations(runnable(block.text)):
        check_file(words)
        if words[0] == "seesaw":
            check_seesaw(words[1:])


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_sentences_name_options_that_exist(page: Path) -> None:
    for span in spans(page):
        if span.startswith("make ") and " " not in span[5:]:
            check_file(span.split())
        words = span.replace("…", "").split()
        if span.startswith("seesaw ") and re.fullmatch(r"[a-z]+", words[1]):
            check_options(words[1:], span)


def check_options(words: list[str], span: str) -> None:
    assert words[0] in SEESAW.commands, f"`{span}`: there is no such command"
    known = {
        name for param in SEESAW.commands[words[0]].params for name in (*param.opts, *param.secondary_opts)
    }
    for word in words[1:]:
        if word.startswith("--") and word != "--help":
            assert word.split("=")[0] in known, f"`{span}`: seesaw {words[0]} has no {word}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_stand_where_they_are_seen(page: Path) -> None:
    """In blocks of `sh`: those alone are walked."""
    for block in blocks(page):
        assert block.language not in SHELLS, f"{block}: call the language of the block `sh`"
        if block.language in ("", "text"):
            assert not COMMAND.match(block.text), f"{block}: a command in a block that is not `sh`"
        if block.needs is not None:
            assert block.needs in NEEDS, f"{block}: needs {block.needs!r}; known are {', '.join(NEEDS)}"
    for text in indented(page):
        assert not COMMAND.match(text), f"{page.name}: {text.strip()!r} should be a block of `sh`"


def test_marks_stand_before_blocks_of_commands() -> None:
    for page in pages():
        marks = len(re.findall("^<!-- needs:", page.read_text(), re.MULTILINE))
        used = [block for block in blocks(page) if block.needs is not None]
        assert len(used) == marks, f"{page.name}: a mark is not on the line before a block"


def test_commands_are_taken_apart() -> None:
    text = (
        "zcat a.gz | seesaw run --input - \\\n  --plan 'P4->T4'   # later\n"
        "until seesaw run -h; [ $? -ne 3 ]; do sleep 60; done\n"
    )
    assert invocations(text) == [
        *(["zcat", "a.gz"], ["seesaw", "run", "--input", "-", "--plan", "P4->T4"], ["seesaw", "run", "-h"]),
        *(["$?", "-ne", "3", "]"], ["sleep", "60"]),
    ]
    for wrong in (["run", "--modle", "m"], ["runs"], ["run", "--model", "m"]):
        with pytest.raises(AssertionError):
            check_seesaw(wrong)


def test_the_site_has_every_page() -> None:
    """`make docs` would fail otherwise; this is known sooner."""
    listed = re.findall(r"[\w./-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in listed]
    assert not missing, f"mkdocs.yml does not list {missing}"
