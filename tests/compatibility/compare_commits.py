"""Whether two commits train the same parameters, bit for bit: run by hand before and after code is moved or renamed.

    python tests/compatibility/compare_commits.py OLD NEW [--steps 20] [--recipes quickstart elastic/demo ...]

Each commit is cloned into a temporary directory and trains each recipe for some steps, with the Python that runs this
script and on this machine. Then the manifests of the two last checkpoints are compared: they hold a fingerprint (xxh3)
of the bytes of every block of every logical array, by canonical name, of parameters, optimizer and outer state. So a
different mesh or order of layers in storage is no difference; one changed bit is. Prints a line for each recipe and
exits 1 where anything differs. Reads no code of the package.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPES = ("quickstart", "elastic/demo", "lowcomm/diloco", "pretrain/pipeline-1f1b")
# Recipe -> what is changed in it, so that a few steps exercise what it is there for, in one process.
OVERRIDES = {
    "elastic/demo": ["launch.processes=1"],
    "lowcomm/diloco": ["outer.every=8"],
    "lowcomm/noloco": ["outer.every=8"],
    "lowcomm/streaming": ["outer.every=8"],
    "pretrain/pipeline-1f1b": ["pipeline.measure=false"],
}
# What is not compared costs no time.
COMMON = ["evaluation={every: 0}", "logging.every=1", "logging.tensorboard=false"]


def checkout(commit: str, directory: Path) -> Path:
    """Clone `commit` of this repository to `directory`/meshwright: the folder's name is the package's."""
    target = directory / "meshwright"
    subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", ROOT, target], check=True)
    subprocess.run(["git", "checkout", "--quiet", "--detach", commit], cwd=target, check=True)
    return target


def train(package: Path, recipe: str, *, steps: int, cache: Path) -> Path:
    """The run directory of `recipe`, trained by the code in `package`. Raises SystemExit where that fails."""
    scripts = tomllib.loads((package / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["meshwright"].split(":")
    start = f"import meshwright, sys; assert meshwright.__file__.startswith({str(package)!r}), meshwright.__file__; "
    start += f"from {module} import {function} as main; sys.argv[0] = 'meshwright'; main()"
    name = recipe.replace("/", "-")
    overrides = [f"name={name}", f"steps={steps}", f"checkpoint.every={steps}", *COMMON, *OVERRIDES.get(recipe, [])]
    # Compiled programs are kept by their content: commits that compile the same share them.
    environment = {"PYTHONPATH": str(package.parent), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", start, "train", recipe, *overrides],
        cwd=package.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{recipe} in {package} exited {done.returncode}:\n{done.stderr[-3000:]}")
    return package.parent / "runs" / name


def fingerprints(run: Path, step: int) -> dict[str, Any]:
    """Name of every logical array in the checkpoint -> its type, shape and fingerprints."""
    body = json.loads((run / "checkpoints" / str(step) / "manifest.json").read_text())["body"]
    entries = {**body["arrays"], **body["rest"]}
    return {name: [entry["dtype"], entry["shape"], entry["blocks"]] for name, entry in entries.items()}


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def compared(old: Path, new: Path, *, steps: int) -> tuple[bool, str]:
    """Whether two runs ended with the same state, and the sentence that says so, or where they part."""
    before, after = fingerprints(old, steps), fingerprints(new, steps)
    last = losses(new)[-1]
    if before == after:
        return True, f"equal: {len(after)} arrays bit for bit after {steps} steps, loss {last:.6f}"
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    pairs = enumerate(zip(losses(old), losses(new), strict=True), 1)
    parting = (f"losses differ from step {step}, {a} and {b}" for step, (a, b) in pairs if a != b)
    where = next(parting, "losses are equal")
    return False, f"DIFFERENT: {len(names)} of {len(after)} arrays, e.g. {', '.join(names[:3])}; {where}"


def main() -> None:
    """Train with both commits, compare, and exit 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", help="another one, e.g. HEAD; changes that are not committed are not seen")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    arguments = parser.parse_args()
    names = [arguments.old, arguments.new]
    commits = [subprocess.check_output(["git", "rev-parse", name], cwd=ROOT, text=True).strip() for name in names]
    all_equal = True
    with tempfile.TemporaryDirectory() as scratch:
        packages = [checkout(commit, Path(scratch, side)) for commit, side in zip(commits, ("old", "new"), strict=True)]
        for recipe in arguments.recipes:
            runs, seconds = [], []
            for package in packages:
                began = time.monotonic()
                runs.append(train(package, recipe, steps=arguments.steps, cache=Path(scratch, "compiled")))
                seconds.append(f"{time.monotonic() - began:.0f} s")
            equal, sentence = compared(*runs, steps=arguments.steps)
            all_equal = all_equal and equal
            print(f"{recipe}: {sentence} ({' and '.join(seconds)})", flush=True)
    sys.exit(0 if all_equal else 1)


if __name__ == "__main__":
    main()
