"""The command line: one clear line and the right exit code, before JAX is imported."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from meshwright.configs.errors import UserError
from meshwright.configs.load import recipes
from meshwright.train.cli import app

NO_JAX = "import sys; sys.modules['jax'] = None; from meshwright.train.cli import main; main()"


def meshwright(*arguments):
    return subprocess.run([sys.executable, "-c", NO_JAX, *arguments], capture_output=True, text=True, check=False)


def test_a_misspelt_key_is_one_line_and_exit_code_2():
    done = meshwright("train", "quickstart", "mesh.tensr=2")
    assert done.returncode == 2
    assert done.stderr == "meshwright: mesh.tensr: unknown key. Did you mean mesh.tensor?\n"


def test_every_recipe_validates_without_jax():
    assert "quickstart" in recipes()
    for name in recipes():
        done = meshwright("validate", name)
        if name == "finetune/private":  # what makes it private is the user's
            assert done.returncode == 2 and "data.tokenizer.train" in done.stderr
            done = meshwright(
                "validate", name, f"seed={2**40 + 1}", "data.tokenizer={bytes: true, train: null, vocab: null}"
            )
        assert done.returncode == 0, done.stderr


MISTAKES = {
    "no such file": (["validate", "quickstrat"], r"CONFIG: quickstrat matches nothing.*Did you mean quickstart\?"),
    "no such engine": (["launch", "quickstart", "--engine", "mesos"], "--engine: mesos matches nothing"),
    "no such teacher": (
        ["validate", "finetune/distill", "recipe.teacher.from=nowhere"],
        "recipe.teacher.from: nowhere has no",
    ),
    "not a run": (["report", "."], "not a run directory"),
    "not an override": (["validate", "quickstart", "steps"], "'steps' is not of the form key.sub=value"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_says_what_would_do(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception


def test_a_recipe_is_copied_once(tmp_path):
    target = tmp_path / "mine.yaml"
    assert CliRunner().invoke(app, ["recipes", "cp", "quickstart", str(target)]).exit_code == 0
    target.write_text("mine")
    assert isinstance(CliRunner().invoke(app, ["recipes", "cp", "quickstart", str(target)]).exception, UserError)
    assert target.read_text() == "mine"


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
