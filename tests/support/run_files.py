"""What a run left in its directory."""

from meshwright.train.core.jsonl import read_rows


def metric_rows(run):
    """The rows of metrics.jsonl of the run directory `run`, in order."""
    return read_rows(run / "metrics.jsonl")


def losses(run):
    """Step -> training loss."""
    return {row["step"]: row["loss"] for row in metric_rows(run) if "loss" in row}
