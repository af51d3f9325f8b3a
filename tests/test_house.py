"""The rules of the house that a machine can hold. Reads source only."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"configs": 1, "models": 2, "memory": 3, "parallel": 3, "checkpoint": 4, "train": 5, "benchmarks": 6}
MAY_IMPORT_BESIDE = {("parallel", "memory")}
JAX_FREE = (
    "meshwright.configs.load",
    "meshwright.parallel.lowcomm.pairs",
    "meshwright.parallel.pipeline.draw",
    "meshwright.train.islands.archipelago",
    "meshwright.train.cli",
    "meshwright.train.data.assemble",
    "meshwright.train.launch.coordinator",
    "meshwright.train.launch.engines",
    "meshwright.train.launch.group",
    "meshwright.train.launch.progress",
    "meshwright.train.launch.world",
    "meshwright.train.lowcomm",
    "meshwright.train.schedule",
    "meshwright.train.staging",
)
FORBIDDEN_NAMES = re.compile(r"\b(util|utils|helper|helpers|manager|wrapper|misc)\b")


def sources():
    return [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def identifier(file):
    return str(file.relative_to(ROOT))


def imported_rooms(file):
    """Rooms that `file` imports with relative imports."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            yield target[0]


@pytest.mark.parametrize("file", sources(), ids=identifier)
def test_imports_point_down(file):
    room = file.relative_to(ROOT).parts[0]
    for other in set(imported_rooms(file)) - {room, ""}:
        assert ROOMS[other] < ROOMS[room] or (room, other) in MAY_IMPORT_BESIDE, f"{file.name} imports {other}"


@pytest.mark.parametrize("file", sources(), ids=identifier)
def test_a_file_teaches_and_fits_in_a_head(file):
    text = file.read_text()
    tree = ast.parse(text)
    if file.name != "__init__.py":
        assert ast.get_docstring(tree), "no module docstring"
    assert len(text.splitlines()) <= 400, "more than 400 lines: look for the second thing"
    assert not FORBIDDEN_NAMES.search(file.stem), "a name that says nothing"
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Assert) and node.msg is None), f"line {node.lineno}: assert without words"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            own = [node] if node in tree.body else []
            assert all(ast.get_docstring(one) for one in own), f"{node.name} has no docstring"


def test_the_packages_are_the_folders():
    """The editable install sees a room that is not listed; a wheel drops it."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    kept = [*sources(), *(ROOT / "configs").rglob("*.yaml")]
    folders = {f"meshwright.{'.'.join(file.parent.relative_to(ROOT).parts)}" for file in kept}
    assert listed == folders | {"meshwright"}


@pytest.mark.parametrize("room", ["train", "parallel", "models", "memory", "checkpoint"])
def test_the_door_of_a_room_is_empty(room):
    tree = ast.parse((ROOT / room / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("module", JAX_FREE)
def test_no_jax_behind_this_door(module):
    """A misspelt key must be answered in a second; importing jax takes longer."""
    code = f"import sys; sys.modules['jax'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_address_or_path_of_a_machine_is_committed():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"--(?:extra-)?index[-]url|/(?:root|home)/\w|find[-]links")
    found = [name for name in names if (ROOT / name).is_file()
             and pattern.search((ROOT / name).read_text(errors="ignore"))]  # fmt: skip
    assert not found
