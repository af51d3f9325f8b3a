"""The last words of a run: what it reached, beside what a compressor makes of the same bytes, and what to try next."""

import json

from .run import Summary


def closing_words(summary: Summary) -> str:
    """A few lines for the terminal."""
    directory, metrics = summary.directory, summary.metrics
    lines = [f"\n{directory}: {summary.steps} steps, training loss {metrics.get('loss', float('nan')):.3f}"]
    if (bits := metrics.get("held_out_bits_per_byte")) is not None:
        gzip = json.loads((directory / "environment.json").read_text())["corpus"]["gzip_bits_per_byte"]
        lines.append(f"held-out text: {bits:.3f} bits per byte; gzip -9 on the same bytes: {gzip:.3f}")
    lines += [
        f"report:   {directory / 'report.html'}",
        "",
        "Try next:",
        f"  meshwright generate {directory} 'def '",
        f"  meshwright evaluate {directory}",
        f"  meshwright train {directory / 'config.yaml'} steps={2 * summary.steps}  # goes on",
        f"  meshwright train {directory / 'config.yaml'} name=mine mesh.tensor=1 mesh.fsdp=4",
        "  meshwright recipes ls",
    ]
    return "\n".join(lines)
