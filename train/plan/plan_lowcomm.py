"""`meshwright plan lowcomm`: what a slow link costs, before anybody waits for one.

meshwright plan lowcomm                                                   simulated beside the published table
meshwright plan lowcomm CONFIG --step-seconds 2 --gigabits 0.1            your model, step and link
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ...configs.errors import UserError
from ...configs.loader import load_config
from ...configs.run import RunConfig
from ...configs.sections.outer import OuterConfig
from ...parallel.outer.latency import pair_seconds, tree_seconds, waiting_cost
from ...parallel.outer.link_simulator import Method, Workload, diloco, required_bandwidth, streaming_diloco, utilisation
from ...parallel.outer.link_simulator import data_parallel as every_step
from ...parallel.outer.reference_tables import PUBLISHED_BANDWIDTHS, UTILISATION_TARGETS, WORKLOADS, methods
from ...parallel.outer.traffic import Shapes, all_gather_bytes, data_parallel_bytes, outer_traffic, traffic_summary

REPLICAS = (2, 16, 128, 1024, 4096)
WIDTH = 126  # of a table in a file
LINKS = np.logspace(-6, 4, 201)  # Gbit/s looked through for one's own model
SIGMA = 0.5  # of a log-normal step or message; NoLoCo's "about 20 %" at 1024 replicas and 100 steps is this one


def print_plan(words: Sequence[str], *, step_seconds: float | None, gigabits: float | None, as_json: bool) -> None:
    """Print the published tables, or the plan of `words`: a CONFIG and `key.sub=value`."""
    if not words:
        if step_seconds is not None or gigabits is not None:
            raise UserError(f"--step-seconds {step_seconds}, --gigabits {gigabits}: name a CONFIG too, for its model")
        found = {"bandwidth": bandwidth_rows(), "latency": latency_rows()}
        tables = [bandwidth_table(found["bandwidth"]), latency_table(found["latency"])]
    else:
        config = load_config(words[0], overrides=words[1:])
        if config.outer is None:
            raise UserError(f"outer: not set in {words[0]}: its devices meet every step; try lowcomm/streaming")
        if step_seconds is None or gigabits is None:
            raise UserError(
                f"plan lowcomm {words[0]}: say how long a step computes and what the link carries, "
                "e.g. --step-seconds 2 --gigabits 0.1"
            )
        found = own(config, step_seconds=step_seconds, gigabits=gigabits)
        tables = [own_table(found)]
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        console.print(*tables, sep="\n")


def bandwidth_rows() -> list[dict[str, Any]]:
    """Gbit/s for a share of computing: simulated, published, and their ratio, cell by cell."""
    rows = []
    for (size, name), published in PUBLISHED_BANDWIDTHS.items():
        work = WORKLOADS[size]
        method = methods(work.layers)[name]
        for target, paper in zip(UTILISATION_TARGETS, published, strict=True):
            mine = required_bandwidth(work, method, target)
            rows.append(
                {"model": size, "method": name, "target": target, "simulated": mine, "paper": paper}
                | {"ratio": mine / paper}
            )
    return rows


def latency_rows() -> list[dict[str, Any]]:
    """Times of an exchange in medians of one message, and of a run in its computing's, by number of replicas."""
    rows = []
    for replicas in REPLICAS:
        waited = waiting_cost(replicas, steps=100, sigma=SIGMA)
        tree, pair = tree_seconds(replicas, SIGMA), pair_seconds(SIGMA)
        rows.append(
            {"replicas": replicas, "tree": tree, "pair": pair, "tree_over_pair": tree / pair}
            | {"run_waiting_for_all": waited.all_reduce, "run_waiting_for_partner": waited.pairs}
        )
    return rows


def own(config: RunConfig, *, step_seconds: float, gigabits: float) -> dict[str, Any]:
    """Bytes of `config`, and the share of its time a replica computes beside DiLoCo and data parallelism on that link.

    The simulator knows layers only: what is no layer is spread over them.
    """
    outer, layers, islands = config.outer, config.model.layers, config.islands
    replicas = islands.count if islands else config.mesh.replica
    shapes = model_shapes(config)
    reduced = data_parallel_bytes(shapes, replicas=replicas)
    collected = all_gather_bytes if islands else None
    meetings = outer_traffic(outer, shapes, layers=layers, replicas=replicas, mean_bytes=collected)
    work = Workload(layers, step_seconds, 8e-9 * reduced)
    rules = {
        "data-parallel": every_step(),
        f"diloco, float32, every {outer.every}": diloco(outer.every),
        f"this configuration ({outer.name})": method_of(outer, sum(one.bytes for one in meetings) / reduced),
    }
    link = np.array([gigabits])
    return {
        "step_seconds": step_seconds,
        "gigabits": gigabits,
        "computing": {name: float(utilisation(work, rule, link)[0]) for name, rule in rules.items()},
        "gigabits_for_90_percent": {name: required_bandwidth(work, rule, 0.9, LINKS) for name, rule in rules.items()},
        **traffic_summary(meetings, shapes, replicas=replicas),
    }


def method_of(outer: OuterConfig, shrink: float) -> Method:
    """How the simulator sees `outer`, whose round sends `shrink` of what reducing one gradient would."""
    if outer.name == "streaming":
        count, order = outer.fragments, outer.order
        return streaming_diloco(outer.every, count=count, order=order, overlap=outer.overlap, compression=shrink)
    return diloco(outer.every, overlap=outer.every - 1 if outer.name == "eager" else 0, compression=shrink)


def model_shapes(config: RunConfig) -> Shapes:
    """Shape of every parameter by canonical name; no device is touched."""
    import jax

    from ...models.decoder import initial_params
    from ...parallel.layout import run_shapes

    key = jax.eval_shape(lambda: jax.random.key(0))
    return run_shapes(jax.eval_shape(lambda key: initial_params(config.model, key), key), config.model)


def bandwidth_table(rows: list[dict[str, Any]]) -> Table:
    """A line a model and method, a column a target."""
    heads = [f"{target:.0%}" for target in UTILISATION_TARGETS]
    table = Table("model", "method", *heads, title="Gbit/s for a share of computing: simulated/paper ratio")
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        cell = f"{row['simulated']:.1f}/{row['paper']:.1f} {row['ratio']:.2f}"
        cells.setdefault((row["model"], row["method"]), []).append(cell)
    for names, values in cells.items():
        table.add_row(*names, *values)
    return table


def latency_table(rows: list[dict[str, Any]]) -> Table:
    """A line a number of replicas."""
    table = Table(
        "replicas", "all-reduce", "pair", "ratio", "run, all wait", "run, pairs wait",
        title=f"Exchange in medians of one message, and a run of 100 steps a meeting in its computing (sigma {SIGMA})",
    )  # fmt: skip
    for row in rows:
        replicas, *values = row.values()
        table.add_row(str(replicas), *(f"{value:.2f}" for value in values))
    return table


def own_table(found: dict[str, Any]) -> Table:
    """A line a rule."""
    fewer, peak = found["times_fewer_bytes"], found["peak_bytes"] / 1e6
    title = f"{found['step_seconds']} s a step, {found['gigabits']} Gbit/s; this configuration sends {fewer:.4g}x less "
    title += f"than data parallelism, at most {peak:.4g} MB at once"
    table = Table("method", "computes", "Gbit/s for 90 %", title=title)
    for name, share in found["computing"].items():
        table.add_row(name, f"{share:.1%}", f"{found['gigabits_for_90_percent'][name]:.3g}")
    return table
