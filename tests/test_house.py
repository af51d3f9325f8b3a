"""The rules of the house that a machine can hold. Reads source only."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.names import vague_names

TESTS = Path(__file__).parent
ROOT = TESTS.parent
ROOMS = {"configs": 1, "models": 2, "memory": 3, "parallel": 3, "checkpoint": 4, "train": 5, "benchmarks": 6}
MAY_IMPORT_BESIDE = {("parallel", "memory")}
# Sub-rooms from the bottom up; a file that lies in the room itself stands at "." and may use all that is below it.
SUB_ROOMS = {
    "train": (
        *("core", "data", "metrics", "optim", "objectives", "engine", "plan", "report", "infer", "islands"),
        *("launch", "doctor", ".", "cli"),
    )
}
# Imported with JAX blocked: a misspelt key must be answered in a second, and an agent must outlive a broken JAX.
JAX_FREE = (
    "configs",
    "parallel/transport",
    "parallel/pipeline/tables",
    "checkpoint/redundancy",
    "train/core",
    "train/data",
    "train/launch",
    "train/cli",
)
JAX_FREE_FILES = (
    "parallel/outer/matchings.py",
    "train/engine/pipeline/pipeline_plan.py",
    "train/islands/island_group.py",
    "train/islands/quorum.py",
    "train/plan/plan_lowcomm.py",
)
# A section, a check, a command group and a benchmark are named after what they are about.
NAMED_AFTER_OTHERS = ("configs.sections", "configs.checks", "train.cli", "benchmarks")
SAME_MEANING = {
    "attention": "models/attention holds implementations, parallel/attention.py spreads one over the mesh",
    "errors": "exceptions: of all rooms, of checkpoints",
    "huggingface": "Hugging Face's formats: of a configuration, of weights",
    "interface": "what the members of the registry beside it provide",
    "pipeline": "pipeline parallelism: tables and executor, and the model cut for them",
    "registry": "name -> member, of the folder that it lies in",
    "run": "a run: its configuration, its course",
}
FORBIDDEN_NAMES = re.compile(r"\b(util|utils|helper|helpers|manager|wrapper|misc)\b")


def sources():
    return [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def identifier(file):
    return str(file.relative_to(ROOT))


def module_of(file):
    """`train/launch/agent.py` -> `train.launch.agent`; a package's `__init__.py` is the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file, modules):
    """Modules of the house that `file` imports, wherever in the file, relative or absolute."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            target = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        elif (node.module or "").split(".")[0] == "meshwright":
            target = node.module.removeprefix("meshwright").lstrip(".")
        else:
            continue
        for name in node.names:
            within = f"{target}.{name.name}".lstrip(".")
            if within in modules or target in modules:
                yield within if within in modules else target


@cache
def graph():
    """module -> the modules that it imports."""
    modules = {module_of(file) for file in sources()}
    return {module_of(file): set(imports(file, modules)) for file in sources()}


def sub_room(module):
    """The folder of a room that `module` lies in; "." for a file of the room itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / parts[0] / parts[1]).is_dir() else "."


def test_imports_point_down():
    """A room imports lower floors, a sub-room imports lower sub-rooms."""
    climbing = []
    for module, others in graph().items():
        room = module.split(".")[0]
        for other in others:
            floor = other.split(".")[0]
            if room == floor:
                order = SUB_ROOMS.get(room)
                climbs = order is not None and order.index(sub_room(other)) > order.index(sub_room(module))
            else:
                climbs = ROOMS[floor] >= ROOMS[room] and (room, floor) not in MAY_IMPORT_BESIDE
            if climbs:
                climbing.append(f"{module} imports {other}")
    assert not climbing


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_neither_files_nor_folders_import_each_other_in_a_circle(depth):
    """A folder `depth` levels down stands for all in it: packages may form a circle where no two files do."""
    shortened = {}
    for module, others in graph().items():
        node = ".".join(module.split(".")[:depth])
        shortened.setdefault(node, set()).update(".".join(other.split(".")[:depth]) for other in others)
    for node, others in shortened.items():
        others.discard(node)
    try:
        TopologicalSorter(shortened).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


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


@pytest.mark.parametrize("door", [file for file in sources() if file.name == "__init__.py"], ids=identifier)
def test_the_door_of_a_room_is_empty(door):
    tree = ast.parse(door.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_no_jax_behind_these_doors():
    """All files of each JAX-free room, imported in one process in which JAX cannot be."""
    files = [file for room in JAX_FREE for file in sorted((ROOT / room).rglob("*.py"))] + [
        ROOT / name for name in JAX_FREE_FILES
    ]
    modules = [f"meshwright.{module_of(file)}" for file in files if file.name != "__main__.py"]
    code = "import importlib, sys; sys.modules['jax'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_say_what_they_are():
    assert not vague_names(), "use the field's term: see the glossary of docs/contracts.md"


def test_modules_of_one_name_mean_the_same():
    modules = {module for module in graph() if module.rpartition(".")[0] not in NAMED_AFTER_OTHERS}
    counts = Counter(module.rpartition(".")[2] for module in modules)
    assert {name for name, count in counts.items() if count > 1} == set(SAME_MEANING)


def test_no_address_or_path_of_a_machine_is_committed():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"--(?:extra-)?index[-]url|/(?:root|home)/\w|find[-]links")
    found = [name for name in names if (ROOT / name).is_file()
             and pattern.search((ROOT / name).read_text(errors="ignore"))]  # fmt: skip
    assert not found
