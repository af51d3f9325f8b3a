"""Arguments that several verbs take. JAX-free."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AdapterName = Annotated[str | None, typer.Option("--adapter", help="Which of several adapters.")]
Target = Annotated[
    str | None, typer.Option(help="Devices that are not here: v5p:4x4x4, h100x8, 2*v6e:4x4; several with commas.")
]
RunPath = Annotated[str, typer.Argument(help="A run directory, e.g. runs/quickstart.")]
NewRun = Annotated[Path, typer.Argument(help="The run directory to make, e.g. runs/base.")]
NewDirectory = Annotated[Path, typer.Argument(help="A directory to make.")]
