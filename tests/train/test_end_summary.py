"""The last words of a run name commands that exist and that fit the run."""

import shlex
from pathlib import Path

import pytest
import typer

from meshwright.configs.loader import load_config
from meshwright.train.cli.main import app
from meshwright.train.end_summary import next_commands, program_name

RUN = Path("runs/mine")


def parsed(command_line):
    """The verb, after its arguments were read as the command line does."""
    command, arguments = typer.main.get_command(app), shlex.split(command_line, comments=True)
    verb = []
    while hasattr(command, "commands"):
        verb.append(arguments[0])
        command, *arguments = command.commands[arguments[0]], *arguments[1:]
    command.make_context(command.name, arguments)
    return " ".join(verb)


@pytest.mark.parametrize(
    ("recipe", "verbs"),
    [
        ("quickstart", ["generate", "evaluate", "train", "train", "checkpoint export"]),
        ("pretrain/llama-1b", ["generate", "evaluate", "train", "checkpoint export"]),
        ("finetune/lora", ["generate", "evaluate", "train", "adapter export"]),
        ("finetune/several", ["generate", "evaluate", "train", "adapter export"]),
        ("finetune/qlora", ["generate", "evaluate", "train"]),
        ("lowcomm/islands", ["generate", "evaluate", "checkpoint export"]),
        ("finetune/reward", ["evaluate", "train", "checkpoint export"]),
    ],
)
def test_every_suggested_command_exists(recipe, verbs):
    found = next_commands(load_config(recipe), RUN)
    assert [parsed(words) for words in found] == verbs


def test_the_suggested_prompt_fits_the_data_of_the_run():
    assert next_commands(load_config("quickstart"), RUN)[0] == "generate runs/mine 'def '"
    assert (
        next_commands(load_config("finetune/docstrings"), RUN)[0]
        == "generate runs/mine '# Return True if the name is valid.'"
    )


def test_the_program_is_named_if_on_path_and_else_by_its_path(tmp_path, monkeypatch):
    program = tmp_path / ".venv" / "bin" / "meshwright"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(program)])
    monkeypatch.setenv("PATH", "")
    assert program_name() == ".venv/bin/meshwright"
    monkeypatch.setenv("PATH", str(program.parent))
    assert program_name() == "meshwright"


def test_only_a_run_on_the_quickstart_mesh_is_offered_another_mesh():
    assert any("mesh.fsdp=4" in words for words in next_commands(load_config("quickstart"), RUN))
    assert not any("mesh.fsdp=4" in words for words in next_commands(load_config("pretrain/pipeline-1f1b"), RUN))
