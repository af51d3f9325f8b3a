"""Benchmarks by name: each a `main(arguments)` that measures beside a peer or a bound in one run and prints ratios."""

import importlib
from collections.abc import Sequence

from ...configs.errors import UserError

BENCHMARKS = (
    "attention",
    "chaos",
    "checkpoint",
    "finetune",
    "interop",
    "lost-node",
    "lowcomm",
    "lrec",
    "pipeline",
    "pipeline-tables",
    "recovery",
    "step",
    "targets",
)


def run(name: str, arguments: Sequence[str]) -> None:
    """Run the benchmark called `name`. Raises UserError where there is none."""
    if name not in BENCHMARKS:
        raise UserError.no_match("bench", [name], candidates=BENCHMARKS)
    importlib.import_module(f"meshwright.benchmarks.{name.replace('-', '_')}").main(arguments)
