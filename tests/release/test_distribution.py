"""Wheel and sdist: what is in them, and that they install and run in an empty environment, away from the checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from email.parser import Parser
from pathlib import Path

import pytest

from seesaw import __version__
from tests.release.markdown import ROOT
from tests.release.newcomer import NEEDS_CLONE, Newcomer, succeeds
from tests.release.stand_ins import MODEL, write_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), NEEDS_CLONE]
USER_SCRIPT = """
from seesaw import LLM, RequestOutput, SamplingParams
with LLM("model", plan="P2->T2") as llm:
    outputs: list[RequestOutput] = list(llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=4)))
print(outputs[0].outputs[0].text)
"""


@pytest.fixture(scope="module")
def dist(newcomer: Newcomer) -> Path:
    """What `make dist` leaves."""
    succeeds(newcomer.run("make dist"))
    return newcomer.clone / "dist"


@pytest.fixture(scope="module")
def elsewhere(newcomer: Newcomer) -> Path:
    """A folder with a model and rows, and an environment that has torch and what checks types."""
    folder = newcomer.home.parent / "elsewhere"
    folder.mkdir()
    shutil.copytree(newcomer.clone / MODEL, folder / "model")
    write_files(folder)
    (folder / "script.py").write_text(USER_SCRIPT)
    pip = f"env/bin/pip install -q -c {newcomer.clone}/constraints.txt"
    succeeds(newcomer.run(f"python3 -m venv env\n{pip} torch\n{pip} mypy", cwd=folder))
    return folder


def committed(*folders: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(listed.stdout.splitlines())


def test_the_wheel_holds_every_file_of_the_package(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(f"seesaw_llm-{__version__}.dist-info/METADATA").decode())
    info = {name for name in names if ".dist-info/" in name}
    assert {f"src/{name}" for name in names - info} == committed("src")
    assert f"seesaw_llm-{__version__}.dist-info/licenses/LICENSE" in info
    assert metadata["Version"] == __version__ and metadata["License-Expression"] == "Apache-2.0"
    assert {"cuda", "dev", "docs"} <= set(metadata.get_all("Provides-Extra", []))
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_the_sdist_holds_what_is_committed(dist: Path) -> None:
    """All but what is hidden, which is for the repository."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {name for name in committed() if not name.startswith(".")}
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    assert {name for name in names - wanted if not name.startswith(".")} == {"PKG-INFO"}


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_and_runs_in_an_empty_environment(
    newcomer: Newcomer, dist: Path, elsewhere: Path, kind: str
) -> None:
    (file,) = dist.glob(kind)
    home = elsewhere / f"home{file.suffix}"
    home.mkdir()
    user = replace(newcomer, home=home)

    def run(script: str) -> str:
        return succeeds(user.run(script, cwd=elsewhere, first=elsewhere / "env/bin"))

    run(f"pip uninstall -q -y seesaw-llm; pip install -q -c {newcomer.clone}/constraints.txt {file}")
    assert run("seesaw --version").strip() == f"seesaw {__version__}"
    assert "Llama-2-70B" in run("seesaw plan --model Llama-2-70B --hardware 8xL4 --workload sharegpt")
    run("seesaw run --model model --input prompts.jsonl --output answers.jsonl --plan 'P2->T2' --force")
    answers = [json.loads(line) for line in (elsewhere / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6 and all(answer["error"] is None for answer in answers)
    run("seesaw report answers.run")
    assert "plotly" in (elsewhere / "answers.run/report.html").read_text().lower()
    if shutil.which("g++"):
        assert list((home / ".cache/seesaw/native").glob("*.so")), "the kernels were not compiled"
    run("seesaw bench --help; python script.py; mypy --strict script.py")
    assert __version__ in run("pip show seesaw-llm")
