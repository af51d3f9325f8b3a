"""The last words of a run: what it reached, beside what a compressor makes of the same bytes, and what to try next."""

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


def closing_words(summary: Summary) -> str:
    """A few lines for the terminal."""
    directory, metrics = summary.directory, summary.metrics
    loss = f", training loss {metrics['loss']:.3f}" if "loss" in metrics else ", nothing left to train"
    lines = [f"\n{directory}: {summary.steps} steps{loss}"]
    if (bits := metrics.get("held_out_bits_per_byte")) is not None:
        gzip = json.loads((directory / "environment.json").read_text())["corpus"]["gzip_bits_per_byte"]
        lines.append(f"held-out text: {bits:.3f} bits per byte; gzip -9 on the same bytes: {gzip:.3f}")
    for name, before in summary.first.items():
        if name in metrics and not name.endswith("held_out_perplexity"):
            lines.append(
                f"{name.replace('_', ' ')}: {before:.3f} before the first step, {metrics[name]:.3f} after the last"
            )
    lines += [f"report:   {directory / 'report.html'}", "", "Try next:"]
    lines += [f"  {typed()} {words}" for words in nexts(read_config(directory), directory)]
    return "\n".join(lines)


def nexts(config: RunConfig, directory: Path) -> list[str]:
    """What one can do with the run in `directory`, as it is typed."""
    named = f"--adapter {next(iter(config.adapters))} " if config.adapters else ""
    away = f"{directory / 'config.yaml'} name={directory.name}-elsewhere mesh.tensor=1 mesh.fsdp=4"
    words = [
        f"generate {directory} {named}{shlex.quote(prompt_of(config))}",
        f"evaluate {directory}",
    ]
    if config.islands is None:  # one of them goes on with all the others
        words.append(f"train {directory / 'config.yaml'} steps={2 * config.steps}  # goes on")
    if on_quickstarts_mesh(config):
        words.append(f"train {away}  # the same run on another mesh")
    if config.adapter is None or config.recipe.name == "reward":  # a file of PEFT's has no place for a score
        words.append(f"checkpoint export {directory} {directory / 'exported'}  # as transformers loads it")
    elif config.adapter.method in (*peft_writer.KINDS, *peft_prompt.KINDS) and config.quantization is None:
        words.append(f"adapter export {directory} {directory / 'adapter'}  # as PEFT loads it")
    return words if config.recipe.name != "reward" else words[1:]


def prompt_of(config: RunConfig) -> str:
    """The beginning of a text such as the run has read."""
    if config.evaluation.prompts:
        return config.evaluation.prompts[0].splitlines()[0]
    return "def " if config.data.source in ("stdlib", "docstrings") else "Once upon a time"


def on_quickstarts_mesh(config: RunConfig) -> bool:
    """Whether data 2 x fsdp 2 x tensor 2 of simulated devices, which can as well be data 2 x fsdp 4."""
    return config.mesh.platform == "cpu" and config.mesh.sizes.items() >= {"data": 2, "fsdp": 2, "tensor": 2}.items()


def typed() -> str:
    """What to type for `meshwright` here: the name, or its path where it was called by one."""
    called, found = Path(sys.argv[0]), shutil.which("meshwright")
    if called.name != "meshwright" or (found is not None and Path(found).resolve() == called.resolve()):
        return "meshwright"
    return os.path.relpath(called)
