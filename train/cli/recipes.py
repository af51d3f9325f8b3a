"""Verbs about the shipped configurations: `recipes ls`, `show`, `cp`. JAX-free."""

from pathlib import Path
from typing import Annotated

import typer

from ...configs import loader as loading
from ...configs.errors import UserError

app = typer.Typer(no_args_is_help=True, help="The shipped configurations.")
Recipe = Annotated[str, typer.Argument(help="As `recipes ls` lists it, e.g. finetune/lora.")]


@app.command("ls")
def ls() -> None:
    """List the shipped configurations."""
    for name in loading.recipe_names():
        summary = loading.find_config(name).read_text().splitlines()[0].removeprefix("#").strip()
        typer.echo(f"{name:28} {summary}")


@app.command("show")
def show(name: Recipe) -> None:
    """Print a shipped configuration."""
    typer.echo(loading.find_config(name).read_text(), nl=False)


@app.command("cp")
def cp(name: Recipe, target: Annotated[Path, typer.Argument(help="The new file, or a directory for it.")]) -> None:
    """Copy a shipped configuration, to make it yours."""
    if target.is_dir():
        target = target / f"{Path(name).name}.yaml"
    if target.exists():
        raise UserError(f"{target} exists; choose another name, nothing is overwritten")
    loading.copy_recipe(loading.find_config(name), target)
    typer.echo(f"{target}: run it with `meshwright train {target}`")
