"""A machine as a newcomer finds it: a clone, an empty home, an environment of nothing but what finds programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.release.markdown import ROOT

INHERITED = ("PIP_", "SSL_", "REQUESTS_")
"""How this machine reaches its package index."""


@dataclass(frozen=True)
class Newcomer:
    """`clone` has the committed files, nothing that was built; `home` starts empty."""

    clone: Path
    home: Path

    @classmethod
    def in_folder(cls, folder: Path) -> Newcomer:
        clone, home = folder / "clone", folder / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        return cls(clone, home)

    def environment(self, first: Path | None = None) -> dict[str, str]:
        """Programs are looked for in `first` before the system's, if given. Downloads may be at hand already."""
        path = [
            str(Path(sys.base_prefix) / "bin"),
            "/usr/local/bin",
            "/usr/bin",
            "/bin",
            "/usr/sbin",
            "/sbin",
        ]
        kept = {name: value for name, value in os.environ.items() if name.startswith(INHERITED)}
        proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
        cache = str(Path.home() / ".cache/pip")
        return {
            **({"PIP_CACHE_DIR": cache} | kept | proxies),
            **{"HOME": str(self.home), "LANG": "C.UTF-8", "TERM": "dumb"},
            "PATH": ":".join([str(first)] * (first is not None) + path),
        }

    def run(
        self, script: str, *, cwd: Path | None = None, first: Path | None = None, minutes: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Runs a piece of bash that ends at its first command that fails, in the clone unless told otherwise."""
        return subprocess.run(
            ["bash", "-c", f"set -eo pipefail\n{script}"],
            cwd=cwd or self.clone,
            env=self.environment(first),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * minutes,
        )


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    """What a script printed; fails with its last lines if it failed."""
    last = "\n".join(done.stdout.splitlines()[-60:])
    assert done.returncode == 0, f"exit code {done.returncode} after\n{last}"
    return done.stdout


NEEDS_CLONE = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git and a checkout"
)
