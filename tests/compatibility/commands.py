"""Run commands of `meshwright` as a user does: this is the only place that knows where the command line starts.

    first, second = run_cli(["train", "plain.yaml"], ["evaluate", "runs/plain", "--json"], cwd=directory)

All commands of one call run one after another in one new process, because importing JAX takes seconds.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]  # the package: its pyproject.toml names the function behind the command

# Reads [commands, entry point, file for the results] from its standard input.
DRIVER = """
import contextlib, importlib, io, json, sys
commands, entry_point, results = json.load(sys.stdin)
module, _, name = entry_point.partition(":")
main, done = getattr(importlib.import_module(module), name), []
for command in commands:
    sys.argv = ["meshwright", *command]
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    done.append([code, output.getvalue()])
    with open(results, "w") as file:
        json.dump(done, file)
"""


@dataclass(frozen=True)
class Result:
    """What one command did."""

    command: list[str]
    code: int
    output: str  # its standard output


def entry_point(root: Path = ROOT) -> str:
    """`module:function` of the script `meshwright` in the checkout at `root`."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]["meshwright"]


def run_cli(
    *commands: list[str],
    cwd: Path,
    environment: dict[str, str] | None = None,
    check: bool = True,
    timeout: float = 500,
) -> list[Result]:
    """The results of `commands`, run in order in the directory `cwd`.

    Raises AssertionError with the standard error where the process dies, or where a command fails and `check` is true.
    """
    plain = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", "TYPER_USE_RICH": "0"}
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch, "results.json")
        process = subprocess.run(
            [sys.executable, "-c", DRIVER],
            input=json.dumps([commands, entry_point(), str(results)]),
            env=os.environ | plain | (environment or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        rows = json.loads(results.read_text()) if results.exists() else []
    done = [Result(list(command), *row) for command, row in zip(commands, rows, strict=False)]
    failed = [f"{' '.join(one.command)} exited {one.code}" for one in done if one.code] if check else []
    if len(done) < len(commands):
        failed.append(f"{' '.join(commands[len(done)])} ended the process with {process.returncode}")
    assert not failed, f"{'; '.join(failed)}\n{process.stderr[-4000:]}"
    return done
