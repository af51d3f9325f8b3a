"""The end summary of a run: what it reached, next to gzip on the same text, and which commands to try next."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from ..configs.run import RunConfig
from ..models.adapters import peft_prompt, peft_writer
from .core.run_directory import read_config
from .run import Summary


def render_end_summary(summary: Summary) -> str:
    """Return a few lines for the terminal."""
    directory, metrics = summary.directory, summary.metrics
    loss = f", training loss {metrics['loss']:.3f}" if "loss" in metrics else ", nothing left to train"
    lines = [f"\n{directory}: {summary.steps} steps{loss}"]
    if (bits := metrics.get("held_out_bits_per_byte")) is not None:
        gzip = json.loads((directory / "environment.json").read_text())["corpus"]["gzip_bits_per_byte"]
        lines.append(f"held-out text: {bits:.3f} bits per byte; gzip -9 on the same bytes: {gzip:.3f}")
    for name, before in summary.initial_metrics.items():
        if name in metrics and not name.endswith("held_out_perplexity"):
            lines.append(
                f"{name.replace('_', ' ')}: {before:.3f} before the first step, {metrics[name]:.3f} after the last"
            )
    lines += [f"report:   {directory / 'report.html'}", "", "Try next:"]
    lines += [f"  {program_name()} {command}" for command in next_commands(read_config(directory), directory)]
    return "\n".join(lines)


def next_commands(config: RunConfig, directory: Path) -> list[str]:
    """Return commands that fit the run in `directory`, without the name of the program."""
    adapter = f"--adapter {next(iter(config.adapters))} " if config.adapters else ""
    commands = [
        f"generate {directory} {adapter}{shlex.quote(example_prompt(config))}",
        f"evaluate {directory}",
    ]
    if config.islands is None:  # an island continues only together with all the others
        commands.append(f"train {directory / 'config.yaml'} steps={2 * config.steps}  # goes on")
    # Data 2 x fsdp 2 x tensor 2 of simulated devices, the quickstart's mesh, can as well be data 2 x fsdp 4.
    if config.mesh.platform == "cpu" and config.mesh.sizes.items() >= {"data": 2, "fsdp": 2, "tensor": 2}.items():
        other_mesh = f"name={directory.name}-elsewhere mesh.tensor=1 mesh.fsdp=4"
        commands.append(f"train {directory / 'config.yaml'} {other_mesh}  # the same run on another mesh")
    if config.adapter is None or config.recipe.name == "reward":  # a PEFT file has no place for a reward head
        commands.append(f"checkpoint export {directory} {directory / 'exported'}  # as transformers loads it")
    elif config.adapter.method in (*peft_writer.PEFT_TYPES, *peft_prompt.PEFT_TYPES) and config.quantization is None:
        commands.append(f"adapter export {directory} {directory / 'adapter'}  # as PEFT loads it")
    return commands if config.recipe.name != "reward" else commands[1:]


def example_prompt(config: RunConfig) -> str:
    """Return the beginning of a text like those the run was trained on."""
    if config.evaluation.prompts:
        return config.evaluation.prompts[0].splitlines()[0]
    return "def " if config.data.source in ("stdlib", "docstrings") else "Once upon a time"


def program_name() -> str:
    """Return what to type for `meshwright` here: the name, or a relative path if it was called by one."""
    called, on_path = Path(sys.argv[0]), shutil.which("meshwright")
    if called.name != "meshwright" or (on_path is not None and Path(on_path).resolve() == called.resolve()):
        return "meshwright"
    return os.path.relpath(called)
