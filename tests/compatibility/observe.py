"""What a run directory promises to its readers, read from its files without any code of the package."""

import json
import tarfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FIXTURES = FOLDER / "fixtures"
CONFIGS = FOLDER / "configs"
STEPS, LATER_STEPS = 3, 5  # a recorded run stops after 3 steps, and goes on to 5
# In this order: lora reads the exported model of plain.
RUNS = ("plain", "replicas", "ema", "adalora", "fishmask", "codes", "several", "pipeline", "lora")
# Settings under which the exported model and the exported adapter are evaluated.
EVALUATION = [
    "data={source: jsonl, path: texts.jsonl, sequence_length: 32, global_batch: 8, held_out: 0.2, cache: cache}",
    "evaluation.batches=4",
]
HELD_OUT = [["evaluate", run, *EVALUATION, "--json"] for run in ("runs/from-model", "runs/from-adapter")]
IMPORT = [
    ["checkpoint", "import", "model", "runs/from-model"],
    ["adapter", "import", "model", "adapter", "runs/from-adapter"],
]
EXPORT = [
    ["checkpoint", "export", "runs/plain", "model-again"],
    ["adapter", "export", "runs/lora", "adapter-again"],
]


def expected() -> dict[str, Any]:
    """What the recorded commit wrote, see make_fixtures.py."""
    return json.loads((FIXTURES / "expected.json").read_text())


def unpack(name: str, directory: Path) -> None:
    """Unpack the fixture `name` into `directory`."""
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(directory, filter="data")


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects in a file of one JSON object a line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(run: Path) -> dict[str, dict[str, float]]:
    """Step -> the numbers in metrics.jsonl that depend on arithmetic alone: losses and gradient norms."""
    found: dict[str, dict[str, float]] = {}
    for row in json_lines(run / "metrics.jsonl"):
        numbers = {name: value for name, value in row.items() if "loss" in name or "grad_norm" in name}
        found.setdefault(str(row["step"]), {}).update(numbers)
    return found


def metric_names(run: Path) -> list[str]:
    """Every key of a line of metrics.jsonl."""
    return sorted({name for row in json_lines(run / "metrics.jsonl") for name in row})


def event_keys(run: Path) -> dict[str, list[str]]:
    """Kind of event -> every key of its lines in events.jsonl."""
    found: dict[str, set[str]] = {}
    for row in json_lines(run / "events.jsonl"):
        found.setdefault(row["event"], set()).update(row)
    return {kind: sorted(keys) for kind, keys in sorted(found.items())}


def arrays(run: Path, step: int) -> dict[str, str]:
    """Canonical name -> type and shape of every array in a checkpoint, from its manifest."""
    body = json.loads((run / "checkpoints" / str(step) / "manifest.json").read_text())["body"]
    entries = {**body["arrays"], **{f"{path} (as stored)": entry for path, entry in body["rest"].items()}}
    return {name: f"{entry['dtype']}{entry['shape']}" for name, entry in sorted(entries.items())}


def files(run: Path) -> list[str]:
    """The files of a run directory that are not inside a checkpoint, of the run or of its base."""
    found = [file.relative_to(run) for file in run.rglob("*") if file.is_file()]
    return sorted(str(file) for file in found if file.parts[0] not in ("checkpoints", "base"))


def described(run: Path) -> dict[str, Any]:
    """All of this of one run, but the arrays."""
    return {
        "losses": losses(run),
        "metrics": metric_names(run),
        "events": event_keys(run),
        "files": files(run),
    }
