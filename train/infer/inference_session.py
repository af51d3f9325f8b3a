"""Use of a trained run: its newest checkpoint, loaded onto one device, to generate from or to evaluate."""

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ...checkpoint.manifest import DamagedCheckpoint
from ...checkpoint.storage import Storage
from ...configs.errors import UserError
from ...configs.loader import apply_overrides, merge_trees, validate_tree
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
from .precompute_logprobs import with_reference_logprobs

# Overrides that put a run onto one device, whatever it was trained on.
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
    """Continue each prompt with the model of `run`, or answer it if the model was trained on conversations.

    `adapter` chooses one of several adapters.
    """
    from ..data.chat import find_template
    from ..data.tokenizer import load_tokenizer
    from .generation_eval import complete
    from .sampling import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    run = newest_island(run)
    program, state = load_program(inference_config(run, []), run, adapter=adapter)
    config = program.config
    return complete(
        program,
        program.merged_weights(state),
        load_tokenizer(run),
        list(prompts),
        template=find_template(None, tokenizer=str(run), tokens={}) if config.data.has_conversations else None,
        max_tokens=tokens,
        sampling=sampling,
        seed=seed,
    )


def evaluate(run: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Return the held-out metrics of the newest checkpoint of `run`. Raises UserError if nothing is held out."""
    from ..data import assemble
    from .generation_eval import evaluate_answers, load_metrics

    run = newest_island(run)
    config = inference_config(run, overrides)
    data = assemble.load_run_data(config)
    if data.held_out is None:
        raise UserError(f"data.held_out: 0 in {run}: nothing to evaluate on; pass data.held_out=0.02")
    program, state, origin = restore_newest(config, run)
    program.check_origin(origin)  # a recipe may compare with the pretrained weights
    data = with_reference_logprobs(program, data, samples=range(0))
    values = held_out(program, program.compiled_evaluation(), program.eval_params(state), state.frozen, data)
    metrics = load_metrics(config.evaluation.metrics)
    for prefix, part, part_state, part_data in per_adapter(program, state, data):
        scores = evaluate_answers(part, part.merged_weights(part_state), part_data, config.evaluation, metrics)
        values |= {f"{prefix}{name}": value for name, value in scores.items()}
    return values


def inference_config(run: Path, overrides: Sequence[str]) -> RunConfig:
    """The run's configuration on one device, with `overrides` (key.sub=value); without a teacher that is gone."""
    tree = merge_trees(read_config(run).model_dump(mode="json"), ONE_DEVICE)
    teacher = tree["recipe"]["teacher"]
    if teacher is not None and not Path(teacher["from"]).expanduser().exists():
        tree["recipe"] = {"name": "pretrain"}  # the held-out loss is the same without the teacher
    return validate_tree(apply_overrides(tree, overrides))


def load_program(config: RunConfig, run: Path, *, adapter: str | None = None) -> tuple[Program, TrainState]:
    """Return the program and the newest state of `run`; with several adapters, those of the one called `adapter`.

    Raises UserError if the run has no checkpoint or no such adapter, or if it has several and `adapter` is None.
    """
    if adapter is None and config.adapters:
        raise UserError(f"{run} has several adapters, {', '.join(config.adapters)}; choose one with --adapter")
    if adapter is not None and adapter not in config.adapters:
        if not config.adapters:
            raise UserError(f"--adapter: {adapter}, but {run} does not have several adapters; leave it out")
        raise UserError.no_match("--adapter", [adapter], candidates=config.adapters)
    program, state, _ = restore_newest(config, run)
    return (program, state) if adapter is None else extract_adapter(program, state, adapter)


def restore_newest(config: RunConfig, run: Path) -> tuple[Program, TrainState, str | None]:
    """Return the program, its newest undamaged state, and the fingerprint of the pretrained weights it needs.

    Replicas that were trained on devices of their own are all on this one.
    """
    runtime.start(config, ProcessInfo())
    trained = read_config(run)
    config = config.model_copy(update={"outer": trained.outer, "islands": trained.islands})
    program = build(config, make_mesh(config.mesh), replica_count=trained.mesh.replica)
    with closing(Storage(run / "checkpoints", layout=program.layout)) as storage:
        for step in reversed(storage.steps):
            try:
                state, saved = storage.restore(step, shapes=program.shapes, shardings=program.shardings)
            except DamagedCheckpoint as error:
                logging.getLogger("meshwright").warning("%s; using an older one", error)
            else:
                origin = saved.get("origin")
                return program, restore_frozen(program, state, run, origin=origin), origin
    raise UserError(f"{run}: no undamaged checkpoint; train it with `meshwright train {run / 'config.yaml'}`")
