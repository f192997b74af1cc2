"""The lines that hold the architecture: who may import whom, and that the page about it is complete."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import seesaw

ROOT = Path(seesaw.__file__).parent
FOLDERS = sorted(p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists())
TORCH_FREE_PACKAGES = ("core", "scheduling", "planning")
TORCH_FREE_MODULES = (
    "models/hf_config.py",
    "models/parameters.py",
    "weights/sharding.py",
    "weights/stages.py",
)

MAY_IMPORT = {
    "core": set(),
    "scheduling": {"core"},
    "ops": {"core", "native"},
    "transport": {"core", "native"},
    "models": {"core", "ops"},
    "weights": {"core", "models", "native"},
    "planning": {"core", "scheduling", "models", "weights"},
    "device": {"core"},
    "kv": {"core", "native", "device"},
    "attention": {"core", "native"},
    "native": {"core"},
    "execution": {"core", "device", "models", "weights", "kv", "attention", "ops", "transport", "native"},
    "recording": {"core", "planning", "models"},
    "report": {"core", "recording"},
    "jobs": {"core", "report", "text"},
    "preflight": {"core", "models", "weights", "transport", "execution", "native"},
    "profiling": None,
    "bench": None,
    "cli": None,
}
"""Folders each folder may import from; None is everything."""


def imported_folders(path: Path) -> set[str]:
    """Folders and top modules of seesaw that a file imports at run time."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in _runtime_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("seesaw."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("seesaw.")}
    return found


def _runtime_nodes(tree: ast.AST) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        nodes += [child, *_runtime_nodes(child)]
    return nodes


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    allowed = MAY_IMPORT[folder]
    for path in (ROOT / folder).rglob("*.py"):
        outside = imported_folders(path) - {folder}
        assert allowed is None or outside <= allowed, f"{path.relative_to(ROOT)} imports {outside - allowed}"


def test_control_plane_never_imports_torch() -> None:
    paths = [p.relative_to(ROOT) for folder in TORCH_FREE_PACKAGES for p in (ROOT / folder).rglob("*.py")]
    paths += [Path(module) for module in TORCH_FREE_MODULES]
    names = [".".join(("seesaw", *path.with_suffix("").parts)).removesuffix(".__init__") for path in paths]
    code = "import sys\n" + "".join(f"import {name}\n" for name in sorted(names))
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_seesaw_is_light() -> None:
    code = "import sys, seesaw; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_architecture_page_names_every_folder() -> None:
    page = (ROOT.parents[1] / "docs" / "architecture.md").read_text()
    missing = [folder for folder in FOLDERS if f"`{folder}/`" not in page]
    assert not missing, f"docs/architecture.md says nothing of {missing}"


def test_files_and_functions_keep_their_size() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path.relative_to(ROOT)} is longer than 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 80, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def test_public_names() -> None:
    assert sorted(seesaw.__all__) == sorted(set(seesaw.__all__))
    assert all(hasattr(seesaw, name) for name in seesaw.__all__)
