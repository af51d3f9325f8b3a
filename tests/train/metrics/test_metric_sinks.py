"""Every sink has each step once, also after a resume."""

import importlib.util
import json
import struct
import sys
from types import SimpleNamespace

import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.sections.training import LoggingConfig
from meshwright.train.metrics.metric_sinks import JsonLines, TensorBoard, check_sinks, open_sinks


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resuming_drops_the_steps_that_will_be_computed_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for step in (10, 20, 30, 40):
        sink.write(step, {"loss": step / 10})
    path.write_bytes(path.read_bytes() + b'{"step": 50, "lo')  # killed while it wrote
    sink = JsonLines(path, resume_step=20)
    sink.write(30, {"loss": 7.0})
    assert rows(path) == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 30, "loss": 7.0}]


def test_a_new_run_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).write(10, {"loss": 1.0})
    JsonLines(path)
    assert path.read_text() == ""


def test_resuming_leaves_no_half_written_file(tmp_path, monkeypatch):
    """If the run is killed just before the new file is renamed, the old one is intact."""
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).write(10, {"loss": 1.0})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, resume_step=0)
    assert rows(path) == [{"step": 10, "loss": 1.0}]


def tensorboard_events(directory):
    """The events of every file under `directory`, in order of writing: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_tensorboard_gets_the_scalars_and_hides_older_steps_on_resume(tmp_path):
    sink = TensorBoard(tmp_path, resume_step=20)
    sink.write(30, {"loss": 2.5, "mfu": 0.5, "held_out_loss": 3.0})
    sink.close()
    events = list(tensorboard_events(tmp_path))
    values = {value.tag: value.simple_value for event in events for value in event.summary.value}
    assert values == {"train/loss": 2.5, "speed/mfu": 0.5, "held_out/loss": 3.0}
    assert [event.step for event in events if event.HasField("session_log")] == [21]


@pytest.fixture
def wandb(monkeypatch):
    """A fake of the package that records its calls."""
    calls = SimpleNamespace(inits=[], logged=[], finished=0)

    def init(**settings):
        calls.inits.append(settings)
        run = SimpleNamespace(log=calls.logged.append, define_metric=lambda *_, **__: None)
        run.finish = lambda: setattr(calls, "finished", calls.finished + 1)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=importlib.util.find_spec("json")))
    return calls


def test_a_resumed_run_continues_its_run_at_weights_and_biases(tmp_path, wandb):
    logging = LoggingConfig(wandb="proj", tensorboard=False)
    for resume_step in (0, 20):
        sinks = open_sinks(logging, tmp_path, run_name="mine", resume_step=resume_step, config={"seed": 7})
        for sink in sinks:
            sink.write(resume_step + 10, {"loss": 1.5})
            sink.close()
    first, second = wandb.inits
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["project"] == "proj" and first["name"] == "mine" and first["config"] == {"seed": 7}
    assert wandb.logged == [{"step": 10, "train/loss": 1.5}, {"step": 30, "train/loss": 1.5}]
    assert wandb.finished == 2


def test_a_missing_package_is_named_with_its_extra_before_a_file_is_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    logging = LoggingConfig(wandb="proj")
    with pytest.raises(UserError, match=r"logging.wandb: proj .*pip install 'meshwright\[wandb\]'"):
        open_sinks(logging, tmp_path, run_name="mine", resume_step=0, config={})
    assert list(tmp_path.iterdir()) == []
    check_sinks(LoggingConfig())


def test_tensorboard_is_opened_only_if_configured(tmp_path):
    (only,) = open_sinks(LoggingConfig(tensorboard=False), tmp_path, run_name="r", resume_step=0, config={})
    assert isinstance(only, JsonLines) and not (tmp_path / "tensorboard").exists()
