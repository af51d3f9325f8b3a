"""A trained run, used: its newest checkpoint brought onto one device, to generate from or to evaluate."""

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ...checkpoint.manifest import DamagedCheckpoint
from ...checkpoint.storage import Storage
from ...configs.errors import UserError
from ...configs.loader import merged, nested, parse, validated
from ...configs.run import RunConfig
from ...parallel.mesh import make_mesh
from ...parallel.state import TrainState
from ..core.process_env import ProcessInfo
from ..core.run_directory import read_config
from ..core.run_paths import newest_island
from ..engine import runtime
from ..engine.adapter_views import extract_adapter, per_adapter
from ..engine.program import Program, build
from ..engine.quantized_base import restore_frozen
from .evaluation import evaluate as held_out
from .precompute_logprobs import referenced

# One device, whatever the run was trained on.
ONE_DEVICE = {
    "microbatches": 1,
    "mesh": dict.fromkeys(("replica", "pipe", "data", "fsdp", "expert", "seq", "tensor"), 1) | {"devices": None},
    "outer": None,
    "islands": None,
    "elastic": {"meshes": [], "deterministic": False},
}


def generate(
    run: Path,
    prompts: Sequence[str],
    *,
    adapter: str | None = None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> list[str]:
    """What the run's model continues each prompt with; one that learned conversations answers it.

    `adapter` is which of several.
    """
    from ..data.chat import find_template
    from ..data.tokenizer import load
    from .generation_eval import complete
    from .sampling import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    run = newest_island(run)
    program, state = opened(read(run, []), run, adapter=adapter)
    config = program.config
    return complete(
        program,
        program.merged_weights(state),
        load(run),
        list(prompts),
        template=find_template(None, tokenizer=str(run), tokens={}) if config.data.chats else None,
        max_tokens=tokens,
        sampling=sampling,
        seed=seed,
    )


def evaluate(run: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Held-out numbers of the newest checkpoint, and of its answers. Raises UserError where nothing is held out."""
    from ..data import assemble
    from .generation_eval import answered, metric_functions

    run = newest_island(run)
    config = read(run, overrides)
    data = assemble.of_run(config)
    if data.held_out is None:
        raise UserError(f"data.held_out: 0 in {run}: nothing to evaluate on; pass data.held_out=0.02")
    program, state, origin = restored(config, run)
    program.check_origin(origin)  # held-out text is compared with them again
    data = referenced(program, data, samples=range(0))
    values = held_out(program, program.compiled_evaluation(), program.eval_params(state), state.frozen, data)
    metrics = metric_functions(config.evaluation.metrics)
    for prefix, one, own, its in per_adapter(program, state, data):
        found = answered(one, one.merged_weights(own), its, config.evaluation, metrics)
        values |= {f"{prefix}{name}": value for name, value in found.items()}
    return values


def read(run: Path, overrides: Sequence[str]) -> RunConfig:
    """The run's configuration on one device, with `key.sub=value` words on top; without a teacher that is gone."""
    tree = merged(read_config(run).model_dump(mode="json"), ONE_DEVICE)
    teacher = tree["recipe"]["teacher"]
    if teacher is not None and not Path(teacher["from"]).expanduser().exists():
        tree["recipe"] = {"name": "pretrain"}  # what it taught is learned, and held-out numbers are the same without it
    for word in overrides:
        key, _, value = word.partition("=")
        tree = merged(tree, nested(key.split("."), parse(value, origin=word)))
    return validated(tree)


def opened(config: RunConfig, run: Path, *, adapter: str | None = None) -> tuple[Program, TrainState]:
    """The program and the newest state, of several adapters those of `adapter` alone.

    Raises UserError where the run has no checkpoint, or no such adapter.
    """
    check_named(config, run, adapter)
    program, state, _ = restored(config, run)
    return (program, state) if adapter is None else extract_adapter(program, state, adapter)


def check_named(config: RunConfig, run: Path, adapter: str | None) -> None:
    """Raise UserError where `adapter` is not one of several that `run` has, or it has several and none is named."""
    if adapter is None and config.adapters:
        raise UserError(f"{run} has several adapters, {', '.join(config.adapters)}; choose one with --adapter")
    if adapter is not None and adapter not in config.adapters:
        if not config.adapters:
            raise UserError(f"--adapter: {adapter}, but {run} has not several; leave it out")
        raise UserError.no_match("--adapter", [adapter], known=config.adapters)


def restored(config: RunConfig, run: Path) -> tuple[Program, TrainState, str | None]:
    """As `opened`, and the origin of the weights that the run needed again.

    Replicas that trained on devices of their own are all on this one.
    """
    runtime.start(config, ProcessInfo())
    trained = read_config(run)
    together = config.model_copy(update={"outer": trained.outer, "islands": trained.islands})
    program = build(together, make_mesh(config.mesh), replica_count=trained.mesh.replica)
    with closing(Storage(run / "checkpoints", layout=program.layout)) as storage:
        for step in reversed(storage.steps):
            try:
                state, saved = storage.restore(step, shapes=program.shapes, shardings=program.shardings)
            except DamagedCheckpoint as error:
                logging.getLogger("meshwright").warning("%s; using an older one", error)
            else:
                origin = saved.get("origin")
                return program, restore_frozen(program, state, run, origin=origin), origin
    raise UserError(f"{run}: no whole checkpoint; train it with `meshwright train {run / 'config.yaml'}`")
