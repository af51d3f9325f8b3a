"""The command line: one clear line and the right exit code, before JAX is imported."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meshwright.configs.errors import UserError
from meshwright.configs.loader import load_config, recipe_names
from meshwright.train.cli.bench import BENCHMARKS
from meshwright.train.cli.main import app
from meshwright.train.core.run_directory import open_directory, read_config

FIXTURES = Path(__file__).parents[2] / "models" / "families" / "fixtures"

NO_JAX = "import sys; sys.modules['jax'] = None; from meshwright.train.cli.main import main; main()"


def meshwright(*arguments):
    return subprocess.run([sys.executable, "-c", NO_JAX, *arguments], capture_output=True, text=True, check=False)


def test_a_misspelt_key_is_one_line_and_exit_code_2():
    result = meshwright("train", "quickstart", "mesh.tensr=2")
    assert result.returncode == 2
    assert result.stderr == "meshwright: mesh.tensr: unknown key. Did you mean mesh.tensor?\n"


def test_every_recipe_validates_without_jax():
    assert "quickstart" in recipe_names()
    for name in recipe_names():
        result = meshwright("validate", name)
        if name == "finetune/private":  # what makes it private is the user's
            assert result.returncode == 2 and "data.tokenizer.train" in result.stderr
            result = meshwright(
                "validate", name, f"seed={2**40 + 1}", "data.tokenizer={bytes: true, train: null, vocab: null}"
            )
        assert result.returncode == 0, result.stderr


MISTAKES = {
    "no such file": (["validate", "quickstrat"], r"CONFIG: quickstrat .*Did you mean quickstart\?"),
    "no such engine": (["launch", "quickstart", "--engine", "mesos"], "--engine: mesos matches nothing"),
    "no such teacher": (
        ["validate", "finetune/distill", "recipe.teacher.from=nowhere"],
        "recipe.teacher.from: nowhere has no",
    ),
    "not a run": (["report", "."], "not a run directory"),
    "processes that nodes do not share": (
        ["validate", "quickstart", "launch.processes=8", "launch.slurm.nodes=3"],
        "8 processes do not share 3 nodes evenly; use a divisor of 8",
    ),
    "no such benchmark": (["bench", "steps"], r"bench: steps matches nothing.*Did you mean step\?"),
    "a model of the hub": (
        ["validate", "finetune/lora", "model.from=someone/model"],
        r"model.from: someone/model has no .*`hf download someone/model --local-dir someone/model`",
    ),
    "not an override": (["validate", "quickstart", "steps"], "'steps' is not of the form key.sub=value"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_an_error_with_a_remedy(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception


def test_a_recipe_is_not_copied_over_a_file(tmp_path):
    target = tmp_path / "mine.yaml"
    assert CliRunner().invoke(app, ["recipes", "cp", "quickstart", str(target)]).exit_code == 0
    target.write_text("mine")
    assert isinstance(CliRunner().invoke(app, ["recipes", "cp", "quickstart", str(target)]).exception, UserError)
    assert target.read_text() == "mine"


def test_a_missing_run_is_an_error_that_names_existing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word, message in (("runs/mine", "`meshwright train` makes one"), ("mine", r"did you mean runs/mine\?")):
        with pytest.raises(UserError, match=message):
            read_config(Path(word))
        (tmp_path / "runs" / "mine").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "mine" / "config.yaml").touch()
    with pytest.raises(UserError, match="there are runs/mine"):
        read_config(Path("runs/zzz"))
    (tmp_path / "runs" / "far" / "island-1").mkdir(parents=True)
    (tmp_path / "runs" / "far" / "island-1" / "config.yaml").touch()
    with pytest.raises(UserError, match="there are runs/far/island-1"):
        read_config(Path("runs/far"))


def test_slots_are_drained_only_where_the_run_can_go_on_without_them(tmp_path):
    (tmp_path / "config.yaml").write_text("name: mine\n")
    refused = CliRunner().invoke(app, ["drain", str(tmp_path), "1"])
    assert isinstance(refused.exception, UserError) and "elastic.meshes" in str(refused.exception)
    (tmp_path / "config.yaml").write_text("name: mine\nmesh: {data: 4}\nelastic: {meshes: [{data: 2}]}\n")
    assert "slots [1] are drained" in CliRunner().invoke(app, ["drain", str(tmp_path), "1"]).output
    assert "no slot is drained" in CliRunner().invoke(app, ["drain", str(tmp_path), "1", "--undo"]).output


def test_a_directory_with_one_island_is_used_for_all_of_them(tmp_path):
    """A site of its own leaves runs/NAME/island-0 alone; all of them here then share runs/NAME."""
    (tmp_path / "islands" / "island-0").mkdir(parents=True)
    assert open_directory(load_config("lowcomm/islands"), root=tmp_path) == tmp_path / "islands"
    (tmp_path / "diloco").mkdir()
    (tmp_path / "diloco" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"name: .*no config.yaml"):
        open_directory(load_config("lowcomm/diloco"), root=tmp_path)


def test_validate_names_missing_files_and_succeeds(tmp_path, monkeypatch):
    """A run may be checked on one machine and train on another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((FIXTURES / "llama3" / "config.json").read_text())
    arguments = ["validate", "finetune/lora", "model.from=hf", "data.source=jsonl", "data.path=texts.jsonl"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and result.stdout.startswith("finetune/lora: good")
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [
        "data.path",
        "data.tokenizer.file",
        "model.from",
    ]
    for name in ("texts.jsonl", "hf/tokenizer.json", "hf/model.safetensors"):
        (tmp_path / name).touch()
    assert not CliRunner().invoke(app, arguments).stderr


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_help(name):
    """Its own help, not that of the verb."""
    result = CliRunner().invoke(app, ["bench", name, "--help"])
    assert result.exit_code == 0 and f"usage: meshwright bench {name}" in result.output


def test_help_names_a_command_to_begin_with():
    first, *rest = (
        line for line in CliRunner().invoke(app, ["--help"]).output.splitlines() if "meshwright train" in line
    )
    assert "quickstart" in first and not rest
    assert CliRunner().invoke(app, ["--version"]).output == f"meshwright {version('meshwright')}\n"


def test_the_schema_documents_every_key():
    import json

    schema = json.loads(CliRunner().invoke(app, ["schema"]).output)
    undocumented = [
        f"{name}.{key}"
        for name, section in schema["$defs"].items()
        for key, field in section.get("properties", {}).items()
        if "description" not in field
    ]
    assert not undocumented
