"""Make the fixtures with the code of the commit that is checked out (fixtures/expected.json says which it was).

    cd CHECKOUT && PYTHONPATH=$(dirname $PWD):tests python -m compatibility.make_fixtures

The fixtures record what must not change. Make them anew only where a release breaks a promise on purpose, and say so.
What a later commit adds (an option, a metric, a field of an event) is written into fixtures/help or expected.json by
hand: the runs stay those of the old commit.
"""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from compatibility.commands import ROOT, run_cli
from compatibility.help import help_texts
from compatibility.observe import (
    CONFIGS,
    EXPORT,
    FIXTURES,
    FOLDER,
    HELD_OUT,
    IMPORT,
    LATER_STEPS,
    RUNS,
    STEPS,
    arrays,
    described,
)

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FLAGS += " --xla_llvm_disable_expensive_passes=true"
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def pack(directory: Path, name: str) -> None:
    """Write `directory` as the fixture `name`, without owners, times, and the report, which is drawn anew."""
    if (file := directory / "environment.json").exists():
        facts = json.loads(file.read_text()) | {"platform": "Linux"}  # whose machine it was is nobody's business
        file.write_text(json.dumps(facts, indent=1) + "\n")

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return None if entry.name.endswith("report.html") else entry

    with tarfile.open(FIXTURES / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        archive.add(directory, arcname=str(directory.relative_to(Path.cwd())), filter=anonymous)


def main() -> None:
    """Train, pack, go on, and write down what came out."""
    os.environ |= ENVIRONMENT | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", FLAGS)}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        here = Path(scratch)
        shutil.copy(FOLDER / "texts.jsonl", here)
        trained = [["train", str(CONFIGS / f"{name}.yaml"), f"steps={STEPS}"] for name in RUNS]
        model, adapter = ([*command[:-1], command[-1].removesuffix("-again")] for command in EXPORT)
        run_cli(trained[0], model, *trained[1:], adapter, cwd=here)
        for name in RUNS:
            pack(here / "runs" / name, name)
        pack(here / "model", "model")
        pack(here / "adapter", "adapter")
        first = {name: described(here / "runs" / name) for name in RUNS}
        stored = {name: arrays(here / "runs" / name, STEPS) for name in RUNS}
        again = [["train", f"runs/{name}/config.yaml", f"steps={LATER_STEPS}"] for name in RUNS]
        done = run_cli(*IMPORT, *HELD_OUT, *again, cwd=here)
        held_out = {one.command[1]: json.loads(one.output) for one in done if one.command[0] == "evaluate"}
        later = {name: described(here / "runs" / name) for name in RUNS}
        record = {
            "commit": commit.stdout.strip(),
            "held_out": held_out,
            "new": first,
            "resumed": later,
            "arrays": stored,
        }
        (FIXTURES / "expected.json").write_text(json.dumps(record, indent=1) + "\n")
        for words, text in help_texts(here).items():
            file = FIXTURES / "help" / f"{'-'.join(['meshwright', *words.split()])}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)


if __name__ == "__main__":
    main()
