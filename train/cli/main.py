"""The command line: `meshwright VERB`. Imports no JAX; a verb brings in what it needs.

Exit codes: 0 done, 2 the user's mistake (one clear line), 75 stopped on request and saved (start again), 1 the rest.
"""

import json
import logging
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ...checkpoint.storage_timeout import has_stuck_writer
from ...configs import loader as loading
from ...configs.checks.privacy import check_private_inputs
from ...configs.errors import MeshwrightError, UserError
from ...configs.run import RunConfig
from ...configs.sections.launch import SlurmConfig
from ...configs.sections.parallel import PipelineConfig
from ..data.missing_files import find_missing_files
from . import adapters, checkpoint, drafts, jobs, recipes
from .arguments import AdapterName, Config, Json, Overrides, RunPath, Target
from .bench import BENCHMARKS
from .bench import run as run_benchmark

HELP = """Train and fine-tune Flax language models on a sharded mesh, from one YAML file.

Begin with `meshwright train quickstart`; `meshwright recipes ls` lists what else is shipped.

Exit codes: 0 done, 2 your mistake (one clear line), 75 stopped on request and saved (start again), 1 the rest."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="What the model will read.")
app.add_typer(recipes.app, name="recipes")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(adapters.app, name="adapter")


def print_version(requested: bool) -> None:
    """Print the version and end the program, where --version is given."""
    if requested:
        typer.echo(f"meshwright {version('meshwright')}")
        raise typer.Exit


@app.callback(help=HELP)
def root(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a verb."""


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train, or go on where the run of that name stopped."""
    loaded = loading.load_config(config, overrides=overrides or ())
    from ..core.process_env import read_process_info
    from ..run import train as run

    process = read_process_info()
    summary = run(loaded, process_info=process)
    if process.is_first:
        from ..end_summary import render_end_summary

        typer.echo(render_end_summary(summary))


@app.command()
def validate(
    config: Config,
    overrides: Overrides = None,
    deep: Annotated[bool, typer.Option(help="Also trace the model and open the data.")] = False,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Check a configuration; allocates nothing."""
    if target is not None:
        from .targets import validate_for_targets

        validate_for_targets(config, overrides or [], target)
        return
    loaded = loading.load_config(config, overrides=overrides or ())
    if loaded.mesh.pipe != 1 or loaded.pipeline != PipelineConfig():
        from ..engine.pipeline.pipeline_plan import check_pipeline

        check_pipeline(loaded)
    if loaded.privacy is not None:
        check_private_inputs(loaded)
    if loaded.checkpoint.parity != "none":
        from ...checkpoint.redundancy.parity_plan import make_parity_plan

        processes = loaded.launch.processes
        make_parity_plan(loaded.checkpoint, hosts=loaded.launch.hosts or processes, processes=processes)
    if loaded.launch.processes > 1 and loaded.launch.slurm != SlurmConfig():  # with one, the number is yet to be said
        from ..launch.slurm import check_nodes

        check_nodes(loaded.launch.slurm, processes=loaded.launch.processes)
    if deep:
        from ..plan.dry_run import check

        check(loaded)
    typer.echo(loaded.model_dump_json(indent=1) if as_json else f"{config}: good ({summary_line(loaded)})")
    for line in find_missing_files(loaded):
        typer.echo(f"not on this machine: {line}", err=True)


def summary_line(config: RunConfig) -> str:
    """A configuration in a few words, e.g. `llama, 4 layers of 192, data 2, 300 steps`."""
    axes = " x ".join(f"{axis} {size}" for axis, size in config.mesh.sizes.items() if size != 1) or "one device"
    model = config.model
    return f"{model.family}, {model.layers} layers of {model.embed}, {axes}, {config.steps} steps"


@app.command()
def schema() -> None:
    """The JSON Schema of a configuration, for editors."""
    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=1))


@data_app.command("preview")
def data_preview(
    config: Config, overrides: Overrides = None, rows: Annotated[int, typer.Option(help="Rows to print.", min=1)] = 2
) -> None:
    """Print the first rows a run will see, tokens coloured by their weight in the loss."""
    loaded = loading.load_config(config, overrides=overrides or ())
    from rich.console import Console

    from ..data.assemble import load_run_data
    from ..data.preview import render

    Console().print(render(load_run_data(loaded), rows=rows))


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="A YAML file, a shipped recipe, or: lowcomm [CONFIG].")],
    overrides: Overrides = None,
    as_json: Json = False,
    target: Target = None,
    step_seconds: Annotated[float | None, typer.Option(help="lowcomm: what a step computes for.")] = None,
    gigabits: Annotated[float | None, typer.Option(help="lowcomm: of the slow link, in Gbit/s.")] = None,
) -> None:
    """Memory, FLOPs, communication and the sharding of every array; allocates nothing.

    With --target the step is compiled for devices that this machine does not have, and its time is estimated.
    `plan lowcomm` simulates slow links: the published table, or, with a CONFIG, your model, step and link.
    """
    if config == "lowcomm":
        from ..plan.plan_lowcomm import print_plan

        print_plan(overrides or [], step_seconds=step_seconds, gigabits=gigabits, as_json=as_json)
        return
    if step_seconds is not None or gigabits is not None:
        raise UserError(f"--step-seconds, --gigabits: they belong to `plan lowcomm CONFIG`, not to `plan {config}`")
    if target is not None:
        from .targets import print_target_plans

        print_target_plans(config, overrides or [], target, as_json=as_json)
        return
    loaded = loading.load_config(config, overrides=overrides or ())
    from rich.console import Console

    from ..plan.compile_plan import make_plan, render
    from ..plan.dry_run import build_program

    program = build_program(loaded)
    made = make_plan(program, program.compiled_step())
    if as_json:
        typer.echo(json.dumps(made, indent=1))
    else:
        Console().print(render(made))


@app.command()
def schedule(
    name: Annotated[str, typer.Argument(help="A schedule, e.g. 1f1b; a CSV of one; or best, which compares them.")],
    stages: Annotated[int | None, typer.Option(help="Devices of the pipeline.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Microbatches of a step.")] = None,
    chunks: Annotated[int | None, typer.Option(help="Stages a device holds; default the schedule's.")] = None,
    vocab_parallel: Annotated[int, typer.Option(help="Vocabulary passes: 0 none, or Algorithm 1 or 2.")] = 0,
    memory_limit: Annotated[float | None, typer.Option(help="Microbatches a device may hold; auto, best.")] = None,
    backward: Annotated[str, typer.Option(help="split: I and W; fused: one backward.")] = "split",
    costs: Annotated[Path | None, typer.Option(help="YAML or JSON of what each op costs.")] = None,
    cores: Annotated[int | None, typer.Option(help="Cores that simulate all devices; default one for each.")] = None,
    draw: Annotated[Path | None, typer.Option(help="Write a picture: .svg, .png or .pdf.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV.")] = None,
    as_json: Json = False,
) -> None:
    """A pipeline schedule: bubble, memory, time; its picture and table. Needs no devices."""
    from rich.console import Console

    from .schedule import ScheduleRequest, check_targets, make_schedule, render, to_json, write_files

    check_targets(drawing=draw, csv=csv)
    request = ScheduleRequest(name, stages, microbatches, chunks, vocab_parallel, memory_limit, backward, costs, cores)
    result = make_schedule(request)
    write_files(result, drawing=draw, csv=csv, costs=costs)
    if as_json:
        typer.echo(json.dumps(to_json(result), indent=1))
    else:
        console = Console()
        console.print(render(result, width=console.width, limit=memory_limit))
        for file in filter(None, (draw, csv)):
            typer.echo(f"{file}: written")


@app.command()
def generate(
    run: RunPath,
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    adapter: AdapterName = None,
    tokens: Annotated[int, typer.Option(help="Tokens to add.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest tokens of this total probability.")] = None,
    seed: Annotated[int, typer.Option(help="Another one, other texts.")] = 0,
    as_json: Json = False,
) -> None:
    """Continue texts with a trained model."""
    from ..infer.inference_session import generate as generate_texts

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    texts = generate_texts(Path(run), prompts, adapter=adapter, tokens=tokens, **sampling)
    if as_json:
        typer.echo(json.dumps([{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)], indent=1))
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            typer.echo(prompt + text)


@app.command()
def evaluate(run: RunPath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Held-out loss, perplexity and bits per byte of a run's newest checkpoint."""
    from ..infer.inference_session import evaluate as evaluate_run

    values = evaluate_run(Path(run), overrides or [])
    width = max(map(len, values), default=0)
    typer.echo(json.dumps(values) if as_json else "\n".join(f"{name:{width}}  {values[name]:.4f}" for name in values))


@app.command()
def report(run: RunPath) -> None:
    """Write report.html of a run."""
    from ..core.run_directory import read_config
    from ..report.html import write_report
    from ..report.merge_islands import merge_islands

    read_config(Path(run))
    merge_islands(Path(run))  # what islands have written so far
    typer.echo(str(write_report(Path(run))))


@app.command()
def doctor(
    as_json: Json = False,
    cluster: Annotated[bool, typer.Option("--cluster", help="Test many machines: devices, disks, links.")] = False,
    engine: Annotated[str, typer.Option(help="Of --cluster: what brings the processes up.")] = "local",
    processes: Annotated[int, typer.Option(help="Of --cluster.", min=1)] = 2,
    devices_per_process: Annotated[int | None, typer.Option(help="Of --cluster: simulated devices of each.")] = None,
    config: Annotated[str | None, typer.Option(help="Of --cluster: whose launch section to use.")] = None,
) -> None:
    """Versions, devices, collectives, and what is missing for what; with --cluster, a test of many machines."""
    if cluster:
        from ..launch.cluster_test import run_cluster_test

        settings = loading.load_config(config).launch if config is not None else RunConfig().launch
        run_cluster_test(
            engine, settings, processes=processes, devices_per_process=devices_per_process, as_json=as_json
        )
        return
    from ..doctor.machine import main as check_machine

    raise typer.Exit(check_machine(as_json=as_json))


@app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})
def bench(
    context: typer.Context, name: Annotated[str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}.")]
) -> None:
    """Measure against a peer or a bound, in one process; what follows the name is the benchmark's (--help lists it)."""
    run_benchmark(name, context.args)


for verb in (drafts.speculate, jobs.launch, jobs.drain, jobs.audit, jobs.rendezvous):
    app.command()(verb)
data_app.command("continue")(drafts.continue_texts)


def main() -> None:
    """Run a verb; turn errors into one line and an exit code."""
    logger = logging.getLogger("meshwright")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    code = exit_code()
    if has_stuck_writer():  # storage hangs, and the interpreter would wait for it
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def exit_code() -> int:
    """Run the verb that was typed; its exit code."""
    try:
        app(standalone_mode=True)
    except MeshwrightError as error:
        print(f"meshwright: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
