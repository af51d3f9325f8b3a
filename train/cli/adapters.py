"""`meshwright adapter import | export | merge`: adapters, as PEFT keeps them. JAX-free."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import AdapterName, NewDirectory, NewRun, RunPath
from .checkpoint import SHARD_BYTES, checkpoint_export

app = typer.Typer(no_args_is_help=True, help="Adapters, as PEFT keeps them.")


@app.command("import")
def adapter_import(
    base: Annotated[Path, typer.Argument(help="The Hugging Face directory of the model it belongs to.")],
    adapter: Annotated[Path, typer.Argument(help="A directory with adapter_config.json.")],
    run: NewRun,
) -> None:
    """Make a run out of a model and an adapter of PEFT."""
    from ..infer.import_export import import_directory

    typer.echo(f"{import_directory(base, run, adapter=adapter)}: try `meshwright generate {run} 'Once'`")


@app.command("export")
def adapter_export(run: RunPath, target: NewDirectory, adapter: AdapterName = None) -> None:
    """Write a run's adapter as PEFT keeps it, beside the tokenizer; of several each to a directory of its name."""
    from ..infer.import_export import export_adapter

    typer.echo(f"{target}: {', '.join(export_adapter(Path(run), target, adapter=adapter))}")


@app.command("merge")
def adapter_merge(run: RunPath, target: NewDirectory, adapter: AdapterName = None) -> None:
    """Write the model with the run's adapter merged into it, as a Hugging Face directory (`checkpoint export`)."""
    checkpoint_export(run, target, SHARD_BYTES, adapter)
