"""`meshwright checkpoint import | export | ls | verify | repair`: a run's checkpoints, weights in and out. JAX-free.

Checkpoints are read on the CPU of this machine.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...configs.errors import MeshwrightError, UserError
from .arguments import AdapterName, Json, NewDirectory, NewRun, RunPath

if TYPE_CHECKING:
    from ...checkpoint.checkpoint_directory import CheckpointDirectory
    from ...checkpoint.verify import CheckpointEntry

app = typer.Typer(no_args_is_help=True, help="The checkpoints of a run, and weights in and out.")

SHARD_BYTES = 5 * 10**9


@app.command("import")
def checkpoint_import(
    directory: Annotated[Path, typer.Argument(help="A Hugging Face model directory.")], run: NewRun
) -> None:
    """Make a run out of a Hugging Face directory, to generate from and to evaluate."""
    from ..infer.import_export import import_directory

    typer.echo(f"{import_directory(directory, run)}: try `meshwright generate {run} 'Once'`")


@app.command("export")
def checkpoint_export(
    run: RunPath,
    target: NewDirectory,
    shard_bytes: Annotated[int, typer.Option(help="Largest file.")] = SHARD_BYTES,
    adapter: AdapterName = None,
) -> None:
    """Write a run's newest checkpoint as a Hugging Face directory, adapters merged."""
    from ..infer.import_export import export_run

    typer.echo(f"{target}: {', '.join(export_run(Path(run), target, limit=shard_bytes, adapter=adapter))}")


@app.command("ls")
def checkpoint_ls(run: RunPath, as_json: Json = False) -> None:
    """List checkpoints: committed, unfinished, damaged, set aside. Reads manifests only."""
    checkpoints = open_checkpoints(Path(run))
    from ...checkpoint.verify import list_steps

    typer.echo(format_entries(list_steps(checkpoints), as_json=as_json))


@app.command("verify")
def checkpoint_verify(run: RunPath, as_json: Json = False) -> None:
    """Read every checkpoint and compare it with its fingerprints; exits 0 only if all committed ones are whole."""
    checkpoints = open_checkpoints(Path(run))
    from ...checkpoint.verify import verify_all

    entries = list(verify_all(checkpoints))
    damaged = [entry.step for entry in entries if entry.status == "damaged"]
    if damaged:
        verdict = f"damaged: {damaged}; `meshwright checkpoint repair {run}` sets them aside"
    else:
        count = sum(entry.status == "committed" for entry in entries)
        verdict = f"whole: all {count} that are committed, every block read and compared with its fingerprint"
    typer.echo(format_entries(entries, as_json=as_json))
    if not as_json:
        typer.echo(verdict)
    raise typer.Exit(MeshwrightError.exit_code if damaged else 0)


@app.command("repair")
def checkpoint_repair(run: RunPath) -> None:
    """Finish interrupted commits, set damaged checkpoints aside, bring mended ones back. Not while the run trains."""
    checkpoints = open_checkpoints(Path(run))
    from ...checkpoint.verify import repair

    repairs = repair(checkpoints)
    if not checkpoints.steps:
        raise MeshwrightError("; ".join([*repairs, f"no whole checkpoint is left in {checkpoints.directory}"]))
    typer.echo("\n".join(repairs or [f"nothing to repair: {len(checkpoints.steps)} checkpoints are whole"]))


def open_checkpoints(run: Path) -> "CheckpointDirectory":
    """The checkpoints of `run`. Raises UserError where it has none."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # reading must not take a GPU from a run that uses it
    from ...checkpoint.checkpoint_directory import CheckpointDirectory
    from ..core.run_directory import read_config

    read_config(run)
    checkpoints = CheckpointDirectory((run / "checkpoints").absolute())
    if not checkpoints.step_directories and not checkpoints.quarantined:
        raise UserError(f"{run}: no checkpoints yet; train it with `meshwright train {run / 'config.yaml'}`")
    return checkpoints


def format_entries(entries: Sequence["CheckpointEntry"], *, as_json: bool) -> str:
    """A table, or JSON."""
    if as_json:
        return json.dumps([asdict(entry) for entry in entries], indent=1)
    lines = [f"{'step':>8}  {'status':12} {'MB':>9}  {'arrays':>6}  layout"]
    for entry in entries:
        line = f"{entry.step:>8}  {entry.status:12} {entry.bytes / 1e6:>9.2f}  {entry.arrays:>6}  {entry.layout}"
        lines.append(f"{line}  {entry.why}".rstrip())
    return "\n".join(lines)
