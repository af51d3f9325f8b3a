"""`--target` of `validate` and `plan`: devices that this machine does not have. JAX-free until a plan is compiled."""

import json

import typer

from ...configs.errors import UserError
from ...configs.hardware_targets import Topology, parse_topology
from ...configs.target_fit import config_for_target, target_warnings


def parse_targets(text: str) -> list[Topology]:
    """The targets in `text`, separated by commas. Raises UserError."""
    topologies = [parse_topology(part) for part in text.split(",") if part.strip()]
    if not topologies:
        raise UserError(f"--target: {text!r} names no target; write v5p:4x4x4 or h100x8")
    return topologies


def validate_for_targets(config: str, overrides: list[str], targets: str) -> None:
    """Check a configuration for each target, and print what will be slow there."""
    for topology in parse_targets(targets):
        loaded = config_for_target(config, overrides, topology)
        typer.echo(f"{config}: good for {topology} ({topology.devices} devices)")
        for warning in target_warnings(loaded, topology):
            typer.echo(f"! {warning}", err=True)


def print_target_plans(config: str, overrides: list[str], targets: str, *, as_json: bool) -> None:
    """Compile for each target; print the plans side by side, or as a JSON list. Exit code 1 if one does not fit."""
    topologies = parse_targets(targets)
    for topology in topologies:
        config_for_target(config, overrides, topology)  # what is wrong is said before anything is compiled
    from ..plan.target_plan import plan_target

    plans = [plan_target(config, overrides, topology) for topology in topologies]
    if as_json:
        typer.echo(json.dumps([plan.to_json() for plan in plans], indent=1))
    else:
        from rich.console import Console

        from ..plan.target_view import render

        Console().print(render(plans))
    if not all(plan.fits for plan in plans):
        raise typer.Exit(1)
