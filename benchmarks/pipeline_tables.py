"""`meshwright bench pipeline-tables`: the simulator next to formulas and published tables, for docs/pipeline.md.

    meshwright bench pipeline-tables                     all three
    meshwright bench pipeline-tables formulas            every schedule at 8 stages, 24 microbatches
    meshwright bench pipeline-tables zero-bubble         bubble rates of 32 stages, 96 microbatches
    meshwright bench pipeline-tables vocabulary          MFU and memory of 8 to 32 GPUs, vocabularies of 32k to 256k

No device is used. Costs are FLOPs and bytes of a microbatch of one sequence: F of a layer is s h (24 h + 4 s), its I
s h (24 h + 8 s), its W 24 s h^2; the head costs 2 s h V for each of the three; a parameter takes 16 bytes with gradient
and Adam, the activations of a layer 34 s h. All else, mainly the efficiency of kernels, is one factor for each setup,
fitted to one cell.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from scipy.optimize import brentq

from ..configs.errors import UserError
from ..parallel.pipeline.tables.costs import Costs
from ..parallel.pipeline.tables.fused_backward import fuse_backward
from ..parallel.pipeline.tables.layer_balance import even_layers, redistribute_layers
from ..parallel.pipeline.tables.schedules.registry import make_table
from ..parallel.pipeline.tables.simulator import Timeline, simulate
from ..parallel.pipeline.tables.table import Table
from .harness import bench_parser


class Setup(NamedTuple):
    """A model on a pipeline."""

    schedule: str
    gpus: int
    layers: int
    embed: int
    sequence: int


class TableRow(NamedTuple):
    """A row of a paper's table, by vocabulary."""

    mfu: tuple[float, ...]
    gigabytes: tuple[float, ...]


# Numbers from papers, with their sources.
_PAPERS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
VOCABULARIES: list[int] = _PAPERS["vocabularies"]
MICROBATCHES: int = _PAPERS["microbatches"]
VOCABULARY = {
    Setup(**row["setup"]): {method: TableRow(**numbers) for method, numbers in row["methods"].items()}
    for row in _PAPERS["vocabulary"]
}
BUBBLES: dict[str, float] = _PAPERS["bubbles"]
BUBBLES_AT: dict[str, int] = _PAPERS["bubbles_at"]
PARAMETER_BYTES = 16  # bfloat16 with its gradient, float32 master copy and two moments
GIB = 2**30
Rows = list[tuple[str, ...]]


def main(arguments: Sequence[str] = ()) -> dict[str, Rows]:
    """Print the tables named in `arguments`, by default all, and return their rows."""
    parser = bench_parser("pipeline-tables", __doc__)
    parser.add_argument("tables", nargs="*", help=f"{', '.join(TABLES)}; default all")
    names = parser.parse_args(arguments).tables
    if unknown := set(names) - TABLES.keys():
        raise UserError.no_match("bench pipeline-tables", unknown, candidates=TABLES)
    results = {name: TABLES[name]() for name in names or TABLES}
    for head, *rows in results.values():
        print("\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows]), end="\n\n")
    return results


def formulas(p: int = 8, m: int = 24) -> Rows:
    """The formula of each schedule and the simulator's value, if all ops cost the same."""
    v = 2
    rows: Rows = []

    def add(label: str, formula: str, value: float, measure: Callable[[Timeline], float], table: Table) -> None:
        rows.append((label, formula, f"{value:.4g}", f"{measure(simulate(table)) + 0:.4g}"))

    def table(name: str, **more: int) -> Table:
        return make_table(name, devices=p, microbatches=m, **more)

    bubble, between = lambda clock: clock.bubble, lambda clock: clock.bubble_between_steps
    held, idle = lambda clock: clock.in_flight.max(), lambda clock: clock.makespan - 3 * m
    add("gpipe, fused: bubble", "(p-1)/(m+p-1)", (p - 1) / (m + p - 1), bubble, fuse_backward(table("gpipe")))
    add("1f1b, fused: bubble", "(p-1)/(m+p-1)", (p - 1) / (m + p - 1), bubble, fuse_backward(table("1f1b")))
    add("1f1b: idle", "(p-1)(F+I)", 2 * (p - 1), idle, table("1f1b"))
    add("1f1b: held", "p", p, held, table("1f1b"))
    interleaved = table("interleaved")
    bound = (p - 1) / (v * m + p - 1)
    add("interleaved, fused: bubble", "(p-1)/(vm+p-1)", bound, bubble, fuse_backward(interleaved))
    add("interleaved: held", "p(1+(p-1)/(pv))", p + (p - 1) / v, held, interleaved)
    add("zb-h1: idle", "(p-1)(F+I-W)", p - 1, idle, table("zb-h1"))
    add("zb-h1: held", "p", p, held, table("zb-h1"))
    add("zb-h2: bubble between steps", "(p-1)(F+I-2W) = 0", 0, between, table("zb-h2"))
    add("zb-h2: held", "2p-1", 2 * p - 1, held, table("zb-h2"))
    add("zb-v: bubble between steps", "0", 0, between, table("zb-v"))
    add("zb-v: held", "p", p, held, table("zb-v"))
    add("v-half: idle", "about (p-1)(F+I+W)/2", 1.5 * (p - 1), idle, table("v-half"))
    add("v-half: held", "(p+2)//2", (p + 2) // 2, held, table("v-half"))
    add("v-min: idle", "about (p-1)(F+I+W) 2/3", 2 * (p - 1), idle, table("v-min"))
    add("v-min: held", "(p+4)//3", (p + 4) // 3, held, table("v-min"))
    for name, plain in (("1f1b", p), ("v-half", (p + 2) // 2)):
        for algorithm, more in ((1, 2), (2, 1)):
            label = f"{name}, vocabulary passes, Algorithm {algorithm}: held"
            formula = f"{'p' if name == '1f1b' else '(p+2)//2'} + {more}"
            add(label, formula, plain + more, held, table(name, vocabulary=algorithm))
    add("interlaced: held", "1.5p", 1.5 * p, held, table("interlaced", vocabulary=1))
    return [("p = 8, m = 24, v = 2", "formula", "is", "simulated"), *rows]


def zero_bubble() -> Rows:
    """Bubble rates of Zero Bubble's table 5, with equal costs and with costs fitted to two of its cells.

    The paper gives rates, not times. The time of a message is fitted to the rate of 1F1B, then the share of W to that
    of ZB-H1; I and F share the rest in proportion to their FLOPs. The other rates are predictions.
    """
    tables = {name: make_table(name, **BUBBLES_AT) for name in BUBBLES}
    tables |= {name: fuse_backward(tables[name]) for name in ("1f1b", "interleaved")}

    def rate(name: str, costs: Costs) -> float:
        return simulate(tables[name], costs).bubble_between_steps

    message = brentq(lambda c: rate("1f1b", _costs(1 / 3, c)) - BUBBLES["1f1b"], 0, 0.1, xtol=1e-4)
    weight = brentq(lambda w: rate("zb-h1", _costs(w, message)) - BUBBLES["zb-h1"], 0.2, 1 / 3, xtol=1e-4)
    rows = []
    for name, published in BUBBLES.items():
        ideal, fitted = rate(name, Costs()), rate(name, _costs(weight, message))
        rows.append((name, f"{published:.4f}", f"{ideal:.4f}", f"{fitted:.4f}", gap(fitted, published)))
    note = f"fitted: W {weight:.3f}, message {message:.3f} of F + I + W"
    return [("bubble rate, p = 32, m = 96", "published", "F = I = W", note, "gap"), *rows]


def _costs(weight: float, message: float, *, embed: int = 6144, sequence: int = 1024) -> Costs:
    """Costs of a microbatch of the 28.3B model, which sum to 1."""
    forward = (24 * embed + 4 * sequence) / (48 * embed + 12 * sequence) * (1 - weight)
    return Costs(forward=forward, input_gradient=1 - weight - forward, weight_gradient=weight, communication=message)


def gap(predicted: float, published: float) -> str:
    """How much larger the prediction is, in percent of the published number."""
    return f"{100 * (predicted / published - 1):+.0f} %"


class Prediction(NamedTuple):
    """A prediction for one method at one vocabulary."""

    utilization: float  # model FLOPs over those that all GPUs could do in the makespan at the rate of layers
    gigabytes: float  # of the fullest GPU


@functools.cache
def table_of(schedule: str, gpus: int, method: str) -> Table:
    """The table of a method. The paper's 1F1B does not split its backward."""
    algorithm = {"algorithm 1": 1, "algorithm 2": 2, "interlaced": 1}.get(method, 0)
    name = "interlaced" if method == "interlaced" else schedule
    table = make_table(name, devices=gpus, microbatches=MICROBATCHES, vocabulary=algorithm)
    return fuse_backward(table) if schedule == "1f1b" else table


def predict(setup: Setup, vocabulary: int, method: str) -> Prediction:
    """Predict utilization and memory of a method from FLOPs and bytes."""
    _, gpus, layers, h, s = setup
    table = table_of(setup.schedule, gpus, method)
    layer = np.array([s * h * (24 * h + 4 * s), s * h * (24 * h + 8 * s), 24 * s * h * h], float)  # F, I, W
    head = 2.0 * s * h * vocabulary  # of F, of I and of W
    stage_layers = even_layers(layers, stages=table.stages)
    if method == "redistributed":
        stage_layers = redistribute_layers(layers, stages=table.stages, head_cost=3 * head / layer.sum())
    per_device = layers / gpus
    passes = (2, 1) if table.algorithm == 2 else (1, 2)  # Algorithm 2 multiplies P by W in S already
    costs = Costs(
        forward=layer[0] * per_device, input_gradient=layer[1] * per_device, weight_gradient=layer[2] * per_device,
        head_forward=head, head_input_gradient=head, head_weight_gradient=head,
        vocabulary_s=passes[0] * head / gpus, vocabulary_t=passes[1] * head / gpus,
        stages=tuple((stage_layers * table.stages / layers).tolist()),
    )  # fmt: skip
    timeline = simulate(table, costs)
    flops = MICROBATCHES * (layers * layer.sum() + 3 * head)
    gigabytes = _gigabytes(setup, vocabulary, table, stage_layers, timeline)
    return Prediction(flops / (gpus * timeline.makespan), gigabytes)


def _gigabytes(setup: Setup, vocabulary: int, table: Table, stage_layers: np.ndarray, timeline: Timeline) -> float:
    """Parameters and activations of the fullest device."""
    _, gpus, _, h, s = setup
    layers = stage_layers[table.placement].sum(axis=1)
    parameters = 12.0 * h * h * layers
    if table.algorithm:
        parameters += 2 * vocabulary * h / gpus
    else:
        parameters[table.device_of(0)] += vocabulary * h
        parameters[table.device_of(table.stages - 1)] += vocabulary * h
    activations = 34.0 * s * h * layers * timeline.in_flight
    return float((PARAMETER_BYTES * parameters + activations).max() / GIB)


def vocabulary_parallelism() -> Rows:
    """MFU and memory at four vocabularies; a setup has the efficiency of its baseline at the smallest one."""
    rows = []
    for setup, methods in VOCABULARY.items():
        name = f"{setup.schedule}, {setup.gpus} GPUs, s = {setup.sequence}"
        efficiency = methods["baseline"].mfu[0] / predict(setup, VOCABULARIES[0], "baseline").utilization
        for method, published in methods.items():
            predictions = [predict(setup, vocabulary, method) for vocabulary in VOCABULARIES[: len(published.mfu)]]
            mfu = [efficiency * prediction.utilization for prediction in predictions]
            memory = [prediction.gigabytes for prediction in predictions]
            rows.append((
                name, method, _row(published.mfu), _row(mfu), _worst_gap(mfu, published.mfu),
                _row(published.gigabytes), _row(memory), _worst_gap(memory, published.gigabytes),
            ))  # fmt: skip
            name = ""
    head = ("setup", "method", "MFU % published", "simulated", "worst gap", "GiB published", "simulated", "worst gap")
    return [head, *rows]


def _row(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.1f}" for number in numbers)


def _worst_gap(predicted: Sequence[float], published: Sequence[float]) -> str:
    return gap(*max(zip(predicted, published, strict=True), key=lambda pair: abs(pair[0] / pair[1] - 1)))


TABLES = {"formulas": formulas, "zero-bubble": zero_bubble, "vocabulary": vocabulary_parallelism}
