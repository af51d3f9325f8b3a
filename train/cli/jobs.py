"""Verbs about jobs of several processes: launch, rendezvous, drain, audit. JAX-free."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ...configs import loader as loading
from ...configs.errors import UserError
from .arguments import Config, Json, Overrides

Run = Annotated[Path, typer.Argument(help="A run directory, e.g. runs/elastic-demo.")]


def launch(
    config: Config,
    overrides: Overrides = None,
    engine: Annotated[str, typer.Option(help="local, slurm, ray, k8s (prints a JobSet), or agents.")] = "local",
    processes: Annotated[int | None, typer.Option(help="Processes; default launch.processes.")] = None,
    devices_per_process: Annotated[int | None, typer.Option(help="Simulated devices of each.")] = None,
    islands: Annotated[int | None, typer.Option(help="Jobs of their own here, instead of mesh.replica.")] = None,
) -> None:
    """Train in several processes, and start them again when one dies or hangs."""
    if islands is not None:
        from ..launch.launch_islands import train_islands

        train_islands(config, overrides or (), count=islands, processes=processes, devices=devices_per_process)
        return
    from ...checkpoint.redundancy.parity_plan import make_parity_plan
    from ..launch import launchers
    from ..launch.job import Job
    from ..launch.mesh_options import mesh_options

    if engine not in launchers.ENGINES:
        raise UserError.no_match("--engine", [engine], candidates=launchers.ENGINES)
    from ..core.run_paths import directory_of_run

    loaded = loading.load_config(config, overrides=overrides or ())
    settings = loaded.launch
    count, processes = loaded.mesh.device_count, processes or settings.processes
    devices = devices_per_process or settings.devices_per_process
    if count is not None and devices is None and count % processes:
        raise UserError(
            f"--processes: {processes} do not share the {count} devices of mesh evenly; use a divisor of {count}, or "
            "--devices-per-process"
        )
    hosts = launchers.count_hosts(engine, settings, processes=processes)
    job = Job(
        name=loaded.name,
        command=[sys.executable, "-m", "meshwright.train.cli", "train", config, *(overrides or ())],
        processes=processes,
        directory=directory_of_run(loaded, root=Path("runs")),
        elastic=loaded.elastic,
        settings=settings,
        devices_per_process=devices,
        mesh_options=mesh_options(loaded, processes=processes, devices_per_process=devices),
        parity_plan=make_parity_plan(loaded.checkpoint, hosts=hosts, processes=processes),
        document=loading.dump_yaml(loaded),
    )
    launchers.launch(engine, job)


def rendezvous(
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: everywhere.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="TCP port.")] = 29510,
) -> None:
    """Where the islands of a run find each other; ends with Ctrl-C."""
    from ..core.signals import StopSignals
    from ..launch.local_islands import serve_rendezvous

    with StopSignals() as stop, serve_rendezvous(host, port) as address:
        typer.echo(f"listening at {address}")
        typer.echo(f"sites say islands.meet=HOST:{address.rpartition(':')[2]}, HOST being this machine seen from there")
        while not stop.requested:
            time.sleep(0.2)


def drain(
    run: Run,
    slots: Annotated[list[int], typer.Argument(help="Numbers of the slots (hosts), counted from 0.")],
    undo: Annotated[bool, typer.Option(help="Put them back.")] = False,
) -> None:
    """Take slots out of a running job, saved, or put them back: it goes on with a mesh of elastic.meshes."""
    from ..core.run_directory import read_config
    from ..launch.drain import drain as drain_slots

    if not read_config(run).elastic.meshes and not undo:
        raise UserError(
            f"elastic.meshes: {run} has none to go on with without slots {sorted(slots)}; stop it, name some (they may "
            "change under one name), and start it again"
        )
    out = sorted(drain_slots(run, slots, undo=undo))
    typer.echo(f"{run}: {f'slots {out} are' if out else 'no slot is'} drained")


def audit(
    run: Run,
    against: Annotated[Path | None, typer.Option(help="A run that should have ended alike.")] = None,
    as_json: Json = False,
) -> None:
    """Whether a run that kept a ledger lost, repeated or left out a step or a sample; exits 0 only if it did not."""
    from ..report.run_audit import audit as audit_run
    from ..report.run_audit import exit_code, render_verdicts

    verdicts = audit_run(run, against=against)
    typer.echo(render_verdicts(verdicts, as_json=as_json))
    raise typer.Exit(exit_code(verdicts))
