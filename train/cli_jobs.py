"""Verbs about jobs of several processes: hosts taken out and put back, and what became of the promises."""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(help="A run directory, e.g. runs/elastic-demo.")]


def drain(
    run: Run,
    slots: Annotated[list[int], typer.Argument(help="Numbers of the slots (hosts), counted from 0.")],
    undo: Annotated[bool, typer.Option(help="Put them back.")] = False,
) -> None:
    """Take slots out of a running job, saved, or put them back: it goes on with a mesh of elastic.meshes."""
    from .launch.drain import drain as drained

    out = sorted(drained(run, slots, undo=undo))
    typer.echo(f"{run}: {f'slots {out} are' if out else 'no slot is'} drained")


def audit(
    run: Run,
    against: Annotated[Path | None, typer.Option(help="A run that should have ended alike.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Whether a run that kept a ledger lost, repeated or left out a step or a sample; exits 0 only if it did not."""
    from .audit import audit as audited
    from .audit import exit_code, rendered

    verdicts = audited(run, against=against)
    typer.echo(rendered(verdicts, as_json=as_json))
    raise typer.Exit(exit_code(verdicts))
