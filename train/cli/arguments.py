"""Arguments that several verbs take. JAX-free."""

from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OfSeveral = Annotated[str | None, typer.Option("--adapter", help="Which of several adapters.")]
RunPath = Annotated[str, typer.Argument(help="A run directory, e.g. runs/quickstart.")]
