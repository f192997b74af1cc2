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

MAY_ASK_THE_DEVICE = (
    "device/",
    "attention/",
    "kv/",
    "weights/",
    "execution/",
    "core/devices.py",
    "ops/select.py",
)
"""Where devices may be told apart by name: what drives them, where kinds are defined, and what chooses by name. All
others ask properties of `core.devices`."""
DEVICE_NAMES = {"cpu", "cuda"}

MAY_IMPORT = {
    "core": set(),
    "scheduling": {"core"},
    "ops": {"core", "native"},
    "transport": {"core", "native"},
    "models": {"core", "ops"},
    "weights": {"core", "models", "native", "device"},
    "planning": {"core", "scheduling", "models", "weights"},
    "device": {"core"},
    "kv": {"core", "native", "device"},
    "attention": {"core", "native"},
    "native": {"core"},
    "execution": {"core", "device", "models", "weights", "kv", "attention", "ops", "transport", "native"},
    "recording": {"core", "planning", "models"},
    "report": {"core", "recording"},
    "jobs": {"core", "report", "text"},
    "preflight": {"core", "device", "models", "weights", "transport", "execution", "native"},
    "compat": {"core", "device"},
    "profiling": None,
    "bench": None,
    "cli": None,
    "integrations": None,
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


def device_questions(tree: ast.AST) -> list[int]:
    """Lines that tell devices apart by their names, or ask torch about them; assertions decide nothing, and may."""
    found: list[int] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assert):
            continue
        if _asks(node):
            found.append(node.lineno)  # type: ignore[attr-defined]
        found += device_questions(node)
    return found


def _asks(node: ast.AST) -> bool:
    match node:
        case ast.Compare(left=left, ops=operators, comparators=others):
            collections = any(isinstance(o, (ast.In, ast.NotIn)) for o in operators)
            return any(_names_a_device(part) for part in ([] if collections else [left]) + others)
        case ast.MatchValue(value=value):
            return _names_a_device(value)
        case ast.Call(func=ast.Attribute(attr="startswith"), args=[first, *_]):
            return _names_a_device(first)
        case ast.Attribute(attr="is_cuda" | "is_cpu"):
            return True
        case ast.Attribute(value=ast.Name(id="torch"), attr="cuda"):
            return True
        case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr="type"):
            return owner.strip("_") in ("device", "torch")
        case ast.Attribute(value=ast.Call(func=ast.Attribute(attr="device")), attr="type"):
            return True
        case ast.Import(names=names):
            return any(name.name.startswith("torch.cuda") for name in names)
        case ast.ImportFrom(module=str(module)):
            return module.startswith("torch.cuda")
    return False


def _names_a_device(node: ast.AST) -> bool:
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(_names_a_device(element) for element in node.elts)
    value = node.value if isinstance(node, ast.Constant) else None
    return isinstance(value, str) and value.partition(":")[0] in DEVICE_NAMES


def test_none_but_its_drivers_ask_which_device_it_is() -> None:
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(MAY_ASK_THE_DEVICE):
            lines = device_questions(ast.parse(path.read_text()))
            assert not lines, f"{name} asks which device it is on, in lines {lines}; see core/devices.py"


@pytest.mark.parametrize(
    "code",
    [
        'if device == "cpu": pass',
        'x = "cuda" != name',
        'x = kind in ("cpu", "cuda")',
        'x = name.startswith("cuda:")',
        "x = tensor.is_cuda",
        'x = tensor.device.type == "mps"',
        "x = torch.device(name).type",
        "torch.cuda.synchronize()",
        "from torch.cuda import Stream",
        'match name:\n    case "cuda": pass',
    ],
)
def test_questions_about_the_device_are_found(code: str) -> None:
    assert device_questions(ast.parse(code))
    assert not device_questions(ast.parse('x = device_kind(name).on_host; y = "cpu" in controllers'))


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
