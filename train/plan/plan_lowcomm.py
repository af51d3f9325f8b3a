"""`meshwright plan lowcomm`: a simulation of outer optimizers over a slow link.

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
WIDTH = 126  # characters of a table that does not go to a terminal
LINKS = np.logspace(-6, 4, 201)  # Gbit/s tried for the user's model
SIGMA = 0.5  # of a log-normal step or message time; NoLoCo's "about 20 %" at 1024 replicas and 100 steps


def print_plan(arguments: Sequence[str], *, step_seconds: float | None, gigabits: float | None, as_json: bool) -> None:
    """Print the published tables, or the plan of `arguments`: a CONFIG and overrides key.sub=value."""
    if not arguments:
        if step_seconds is not None or gigabits is not None:
            raise UserError(f"--step-seconds {step_seconds}, --gigabits {gigabits}: name a CONFIG too, for its model")
        plan = {"bandwidth": bandwidth_rows(), "latency": latency_rows()}
        tables = [bandwidth_table(plan["bandwidth"]), latency_table(plan["latency"])]
    else:
        config = load_config(arguments[0], overrides=arguments[1:])
        if config.outer is None:
            raise UserError(
                f"outer: null in {arguments[0]}, whose devices synchronize every step; try lowcomm/streaming"
            )
        if step_seconds is None or gigabits is None:
            raise UserError(
                f"plan lowcomm {arguments[0]}: give the seconds of a step and the bandwidth of the link, "
                "e.g. --step-seconds 2 --gigabits 0.1"
            )
        plan = plan_config(config, step_seconds=step_seconds, gigabits=gigabits)
        tables = [config_table(plan)]
    if as_json:
        print(json.dumps(plan, indent=1))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        console.print(*tables, sep="\n")


def bandwidth_rows() -> list[dict[str, Any]]:
    """Gbit/s needed for a share of time spent computing: simulated, published, and their ratio."""
    rows = []
    for (size, name), published in PUBLISHED_BANDWIDTHS.items():
        work = WORKLOADS[size]
        method = methods(work.layers)[name]
        for target, paper in zip(UTILISATION_TARGETS, published, strict=True):
            simulated = required_bandwidth(work, method, target)
            rows.append(
                {"model": size, "method": name, "target": target, "simulated": simulated, "paper": paper}
                | {"ratio": simulated / paper}
            )
    return rows


def latency_rows() -> list[dict[str, Any]]:
    """Time of an exchange over the median of a message, and of a run over its computing, by number of replicas."""
    rows = []
    for replicas in REPLICAS:
        waiting = waiting_cost(replicas, steps=100, sigma=SIGMA)
        tree, pair = tree_seconds(replicas, SIGMA), pair_seconds(SIGMA)
        rows.append(
            {"replicas": replicas, "tree": tree, "pair": pair, "tree_over_pair": tree / pair}
            | {"run_waiting_for_all": waiting.all_reduce, "run_waiting_for_partner": waiting.pairs}
        )
    return rows


def plan_config(config: RunConfig, *, step_seconds: float, gigabits: float) -> dict[str, Any]:
    """Bytes that `config` sends, and the share of time it computes on that link, next to DiLoCo and data parallelism.

    The simulator knows layers only: other parameters are divided among them.
    """
    outer, layers, islands = config.outer, config.model.layers, config.islands
    replicas = islands.count if islands else config.mesh.replica
    shapes = model_shapes(config)
    reduced = data_parallel_bytes(shapes, replicas=replicas)
    mean_bytes = all_gather_bytes if islands else None
    rounds = outer_traffic(outer, shapes, layers=layers, replicas=replicas, mean_bytes=mean_bytes)
    work = Workload(layers, step_seconds, 8e-9 * reduced)
    rules = {
        "data-parallel": every_step(),
        f"diloco, float32, every {outer.every}": diloco(outer.every),
        f"this configuration ({outer.name})": link_method(outer, sum(step.bytes for step in rounds) / reduced),
    }
    link = np.array([gigabits])
    return {
        "step_seconds": step_seconds,
        "gigabits": gigabits,
        "computing": {name: float(utilisation(work, rule, link)[0]) for name, rule in rules.items()},
        "gigabits_for_90_percent": {name: required_bandwidth(work, rule, 0.9, LINKS) for name, rule in rules.items()},
        **traffic_summary(rounds, shapes, replicas=replicas),
    }


def link_method(outer: OuterConfig, compression: float) -> Method:
    """The simulator's form of `outer`; a round sends `compression` times the bytes of reducing one gradient."""
    if outer.name == "streaming":
        count, order = outer.fragments, outer.order
        return streaming_diloco(outer.every, count=count, order=order, overlap=outer.overlap, compression=compression)
    return diloco(outer.every, overlap=outer.every - 1 if outer.name == "eager" else 0, compression=compression)


def model_shapes(config: RunConfig) -> Shapes:
    """The shape of every parameter by canonical name; no device is used."""
    import jax

    from ...models.decoder import initial_params
    from ...parallel.layout import run_shapes

    key = jax.eval_shape(lambda: jax.random.key(0))
    return run_shapes(jax.eval_shape(lambda key: initial_params(config.model, key), key), config.model)


def bandwidth_table(rows: list[dict[str, Any]]) -> Table:
    """A row for each model and method, a column for each target."""
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
    """A row for each number of replicas."""
    table = Table(
        "replicas", "all-reduce", "pair", "ratio", "run, all wait", "run, pairs wait",
        title=f"Exchange in medians of one message, and a run of 100 steps a round over its computing (sigma {SIGMA})",
    )  # fmt: skip
    for row in rows:
        replicas, *values = row.values()
        table.add_row(str(replicas), *(f"{value:.2f}" for value in values))
    return table


def config_table(plan: dict[str, Any]) -> Table:
    """A row for each method."""
    fewer, peak = plan["times_fewer_bytes"], plan["peak_bytes"] / 1e6
    title = f"{plan['step_seconds']} s a step, {plan['gigabits']} Gbit/s; this configuration sends {fewer:.4g}x less "
    title += f"than data parallelism, at most {peak:.4g} MB at once"
    table = Table("method", "computes", "Gbit/s for 90 %", title=title)
    for name, share in plan["computing"].items():
        table.add_row(name, f"{share:.1%}", f"{plan['gigabits_for_90_percent'][name]:.3g}")
    return table
