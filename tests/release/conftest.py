"""The newcomer that the slow tests share, with the environment that the README makes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.release.markdown import pages
from tests.release.newcomer import Newcomer, succeeds
from tests.release.stand_ins import write_files
from tests.release.walk import script


@pytest.fixture(scope="session")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    """Who has walked the README, and so has an environment and a profile of the machine."""
    someone = Newcomer.in_folder(tmp_path_factory.mktemp("newcomer"))
    write_files(someone.clone)
    succeeds(someone.run(script(pages()[0]), minutes=50))
    yield someone
    shutil.rmtree(someone.clone)
