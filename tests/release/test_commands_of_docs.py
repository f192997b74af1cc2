"""Walks every command of the Markdown in a fresh clone with an empty home: the README's first, which make the
environment.

What a block is marked to need is not run; what stands in for a reader's own model and files is in `stand_ins`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.release.markdown import pages
from tests.release.newcomer import NEEDS_CLONE, Newcomer, succeeds
from tests.release.stand_ins import write_files
from tests.release.walk import script, walked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), NEEDS_CLONE]


def test_what_the_readme_says_makes_an_environment(newcomer: Newcomer) -> None:
    assert (newcomer.clone / ".venv/bin/seesaw").exists()
    assert (newcomer.home / ".cache/seesaw/profile.json").exists()


@pytest.mark.parametrize("page", [page for page in pages()[1:] if walked(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(newcomer: Newcomer, page: Path) -> None:
    succeeds(newcomer.run("git clean -fdxq -e .venv"))
    write_files(newcomer.clone)
    succeeds(newcomer.run(script(page), first=newcomer.clone / ".venv/bin", minutes=50))


def test_the_site_is_built(newcomer: Newcomer) -> None:
    """Strictly: a warning is a failure."""
    printed = succeeds(newcomer.run("make docs"))
    said = printed.replace("WARNING: Location", "")  # of pip, about its indexes
    assert not re.search(r"\bWARNING\b", said)  # the environment of mkdocs has a name that ends so
    for page in ("index", "api", "planning", "examples/extract/index"):
        assert (newcomer.clone / f"out/site/{page}.html").exists()
    assert "SamplingParams" in (newcomer.clone / "out/site/api.html").read_text()
