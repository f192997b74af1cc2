"""Walks every command of the Markdown in a fresh clone, with an empty home: README's first, which make the environment.

What a block is marked to need is not run; what stands in for a reader's own model and files is in `stand_ins`.
"""

from __future__ import annotations

import shlex
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.release.markdown import ROOT, Block, blocks, pages
from tests.release.newcomer import Newcomer, succeeds
from tests.release.stand_ins import runnable, write_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a clone"),
]
README, *OTHERS = pages()


def walked(page: Path) -> list[Block]:
    """Blocks that run anywhere: commands, and programs in Python that are whole."""
    found = [block for block in blocks(page) if block.needs is None]
    return [block for block in found if block.language == "sh" or _is_program(block)]


def _is_program(block: Block) -> bool:
    return block.language == "python" and "from seesaw import" in block.text


def script(page: Path, port: int) -> str:
    """The commands of a page, in order, in one shell, with the place of each block printed before it."""
    parts: list[str] = []
    for block in walked(page):
        text = runnable(block.text, port)
        if block.language == "python":
            text = f"python - <<'PROGRAM'\n{text}PROGRAM\n"
        parts.append(f"echo {shlex.quote(f'## {block}')}\n{text}")
    return "\n".join(parts)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    """Who has walked the README, and so has an environment and a profile of the machine."""
    someone = Newcomer.in_folder(tmp_path_factory.mktemp("newcomer"))
    write_files(someone.clone)
    succeeds(someone.run(script(README, _free_port()), minutes=25))
    yield someone
    shutil.rmtree(someone.clone)


def test_what_the_readme_says_makes_an_environment(newcomer: Newcomer) -> None:
    assert (newcomer.clone / "out/orders.run/report.html").exists()
    assert (newcomer.home / ".cache/seesaw/profile.json").exists()


@pytest.mark.parametrize("page", [page for page in OTHERS if walked(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(newcomer: Newcomer, page: Path) -> None:
    succeeds(newcomer.run("git clean -fdxq -e .venv"))
    write_files(newcomer.clone)
    succeeds(newcomer.run(script(page, _free_port()), first=newcomer.clone / ".venv/bin", minutes=25))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
