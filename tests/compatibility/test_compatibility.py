"""What users have on disk and type keeps working: runs, exports and commands of an older commit, see make_fixtures.py.

Only the command line and files are used, so that these tests stay true whatever is renamed inside the package.
"""

import json
import shutil
from pathlib import Path

import pytest
from compatibility.commands import run_cli
from compatibility.help import help_texts, interface
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
    expected,
    unpack,
)
from safetensors.numpy import load_file

TOLERANCE = 1e-5
# One process each; of three, so that two workers share the work.
GROUPS = (("plain", "ema", "lora"), ("replicas", "adalora", "several"), ("fishmask", "codes", "pipeline"))


def prepared(directory: Path, *fixtures: str) -> Path:
    """`directory` with the texts that the runs read and these fixtures in it."""
    shutil.copy(FOLDER / "texts.jsonl", directory)
    for name in fixtures:
        unpack(name, directory)
    return directory


def differences(found, recorded, path: str = "") -> list[str]:
    """Where two JSON trees differ; floats by more than 1e-5 of the recorded one."""
    if isinstance(found, dict) and isinstance(recorded, dict):
        names = sorted(found.keys() | recorded.keys())
        missing = dict.fromkeys(names, "absent")
        pairs = [((missing | found)[name], (missing | recorded)[name], f"{path}/{name}") for name in names]
        return [line for pair in pairs for line in differences(*pair)]
    if isinstance(found, float) and isinstance(recorded, float):
        same = found == pytest.approx(recorded, rel=TOLERANCE)
    else:
        same = found == recorded
    return [] if same else [f"{path}: {found}, recorded {recorded}"]


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_recorded_runs_go_on_and_new_ones_begin_as_they_did(names, tmp_path):
    """Losses, gradient norms, metric names, events with their keys, files, and the names and shapes of the arrays."""
    directory = prepared(tmp_path, "model", *names)
    commands = []
    for name in names:
        commands.append(["train", str(CONFIGS / f"{name}.yaml"), f"name=new-{name}", f"steps={STEPS}"])
        commands.append(["train", f"runs/{name}/config.yaml", f"steps={LATER_STEPS}"])
    run_cli(*commands, cwd=directory)
    recorded, different = expected(), []
    for name in names:
        new, resumed = (directory / "runs" / folder for folder in (f"new-{name}", name))
        different += differences(described(new), recorded["new"][name], f"a new run of {name}")
        different += differences(described(resumed), recorded["resumed"][name], f"the recorded run {name}, resumed")
        for run, step in ((new, STEPS), (resumed, LATER_STEPS)):
            different += differences(arrays(run, step), recorded["arrays"][name], f"checkpoint {step} of {run.name}")
    assert not different, "\n".join(different)


def test_every_recorded_run_is_tested():
    assert sorted(name for group in GROUPS for name in group) == sorted(RUNS)


def test_a_recorded_model_and_adapter_are_read_and_written_as_before(tmp_path):
    """Imported, they have the same held-out loss; exported again from their runs, the same arrays bit for bit."""
    directory = prepared(tmp_path, "model", "adapter", "plain", "lora")
    results = run_cli(*IMPORT, *HELD_OUT, *EXPORT, cwd=directory)
    losses = {one.command[1]: json.loads(one.output) for one in results if one.command[0] == "evaluate"}
    different = differences(losses, expected()["held_out"])
    for folder in ("model", "adapter"):
        again = directory / f"{folder}-again"
        recorded = {file.name for file in (directory / folder).iterdir()}
        assert {file.name for file in again.iterdir()} == recorded
        for name in recorded:
            old, new = directory / folder / name, again / name
            if name.endswith(".safetensors"):
                old_arrays, new_arrays = load_file(old), load_file(new)
                different += differences(
                    {key: (array.shape, array.dtype.name, array.tobytes()) for key, array in new_arrays.items()},
                    {key: (array.shape, array.dtype.name, array.tobytes()) for key, array in old_arrays.items()},
                    f"{folder}/{name}",
                )
            elif name.endswith(".json"):
                different += differences(json.loads(new.read_text()), json.loads(old.read_text()), f"{folder}/{name}")
    assert not different, "\n".join(different)


def test_the_command_line_takes_what_it_took(tmp_path):
    """Verbs, arguments, options and defaults; there may be more, and the sentences beside them may improve."""
    files = FIXTURES.glob("help/*.txt")
    then = {" ".join(file.stem.split("-")[1:]): interface(file.read_text()) for file in files}
    now = {words: interface(text) for words, text in help_texts(tmp_path).items() if words in then}
    known = {
        words: parts | {"options": [option for option in parts["options"] if option in then[words]["options"]]}
        for words, parts in now.items()
    }
    different = differences(known, then)
    assert not different, "\n".join(different)
