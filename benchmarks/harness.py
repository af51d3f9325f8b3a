"""What the benchmarks share: their argument parser, measurements that take turns, and ratios."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def bench_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of `meshwright bench NAME`."""
    return argparse.ArgumentParser(
        prog=f"meshwright bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_in_turns(
    runs: dict[str, Callable[[], Result]], *, rounds: int, warmup_rounds: int = 1
) -> dict[str, list[Result]]:
    """Call all `runs` in each round, so that a busy machine slows all of them; return the results after warm-up."""
    results: dict[str, list[Result]] = {name: [] for name in runs}
    for number in range(warmup_rounds + rounds):
        for name, run in runs.items():
            result = run()
            if number >= warmup_rounds:
                results[name].append(result)
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios of measurements of one round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
