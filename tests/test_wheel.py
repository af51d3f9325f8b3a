"""A wheel has all that the commands need: it is built, installed, and run where there is no source."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = [
    "mesh.fsdp=1", "mesh.tensor=1", "mesh.devices=2", "data.global_batch=4", "data.sequence_length=32",
    "data.tokenizer.vocab=300", "model.vocab=300", "model.layers=1", "model.embed=32", "model.heads=2",
    "model.kv_heads=2", "model.mlp=32",
]  # fmt: skip
IMPORT_ALL = """
import importlib, pkgutil, meshwright
for module in pkgutil.walk_packages(meshwright.__path__, "meshwright."):
    importlib.import_module(module.name)
print(meshwright.__file__)
"""


def tracked():
    """The repository's files as a clone has them, with what is not committed yet."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools writes beside the sources."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in tracked():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, sources / name)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a program of an environment with the wheel in it, in `work`, an empty directory at first."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    # Dependencies are those of the tests' own environment. An editable install there stays unseen: Python reads no .pth
    # file of a folder that another one names.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(pip, check=True)
    work = tmp_path_factory.mktemp("work")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(program, *words):
        command = [place / "bin" / program, *words]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{program} {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    run.work = work
    return run


def test_it_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        (license_file,) = [name for name in file.namelist() if name.endswith("/licenses/LICENSE")]
        assert b"Apache License" in file.read(license_file)
        (metadata,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        assert b"License-Expression: Apache-2.0\n" in file.read(metadata)
    kept = [name for name in tracked() if not name.startswith(("tests/", "docs/", "."))]
    data = (".py", ".yaml", ".css", ".jinja")
    assert held == {f"meshwright/{name}" for name in kept if name.endswith(data)}


def test_its_commands_find_recipes_and_templates(installed):
    recipes = [line.split()[0] for line in installed("meshwright", "recipes", "ls").splitlines()]
    folder = ROOT / "configs" / "recipes"
    assert sorted(recipes) == sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
    assert "quickstart: good" in installed("meshwright", "validate", "quickstart")
    plan = json.loads(installed("meshwright", "plan", "quickstart", *TINY, "--json"))
    directory = installed.work / "runs" / "tiny"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("name: tiny\n")
    (directory / "plan.json").write_text(json.dumps(plan))
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (directory / "events.jsonl").write_text('{"time": 1.0, "event": "finish"}\n')
    installed("meshwright", "report", "runs/tiny")
    page = (directory / "report.html").read_text()
    assert all(f"<h2>{title}</h2>" in page for title in ("Curves", "Mesh", "Sharding", "Events", "Configuration"))
    assert ":root {" in page


def test_every_module_can_be_imported_from_it(installed):
    """Benchmarks too: none needs the tests' folder, or a package that is not a dependency."""
    file = Path(installed("python", "-c", IMPORT_ALL).splitlines()[-1])
    assert ROOT not in file.parents and "site-packages" in file.parts
