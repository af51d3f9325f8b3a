"""The last words of a run: what it reached, beside what a compressor makes of the same bytes, and what to try next."""

import json
import os
import sys
from pathlib import Path

from .directory import read_config
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
    command, named = typed(), [f"--adapter {name} " for name in read_config(directory).adapters]
    lines += [
        f"report:   {directory / 'report.html'}",
        "",
        "Try next:",
        f"  {command} generate {directory} {''.join(named[:1])}'def '",
        f"  {command} evaluate {directory}",
        f"  {command} train {directory / 'config.yaml'} steps={2 * summary.steps}  # goes on",
        f"  {command} train {directory / 'config.yaml'} name=mine mesh.tensor=1 mesh.fsdp=4",
        f"  {command} recipes ls",
    ]
    return "\n".join(lines)


def typed() -> str:
    """What to type for `meshwright` here: the name, or its path where it was called by one."""
    called = Path(sys.argv[0])
    return os.path.relpath(called) if called.name == "meshwright" and os.sep in sys.argv[0] else "meshwright"
