"""Settings that a pipeline of `mesh.pipe` stages cannot have."""

from ..run_fields import RunFields
from ..sections.outer import check_routing


def check_pipeline(config: RunFields, axes: dict[str, int]) -> None:
    """Raise ValueError where a setting conflicts with a pipeline on mesh `axes` (axis -> size).

    `train/engine/pipeline/pipeline_plan.py` checks the number of layers.
    """
    if config.outer is not None and config.outer.routing:
        check_routing(pipe=axes["pipe"], replicas=axes["replica"], vocab_parallel=config.pipeline.vocab_parallel)
    if axes["pipe"] == 1:
        return
    if axes["replica"] > 1 and config.pipeline.post_validation:
        raise ValueError(
            f"pipeline.post_validation: true would synchronize the gradient norms of {axes['replica']} replicas in "
            "every step; set it to false, or mesh.replica to 1"
        )
    check_pipeline_loss(config)
    for key, model in (("model", config.model), ("recipe.teacher", config.recipe.teacher or config.model)):
        if len(model.segments) > 1 and (key == "model" or config.recipe.has_live_teacher):
            raise ValueError(
                f"{key}.layers: {model.layers} is not a multiple of the {len(model.windows)} layers of {key}.windows, "
                "and a pipeline is cut between whole patterns; change one of them, or set mesh.pipe to 1"
            )
    if axes["seq"] > 1 and config.sequence.parallel == "ring":
        raise ValueError(
            "sequence.parallel: ring communicates inside a pipeline stage while other stages do not, which would "
            "deadlock; use all-gather or ulysses with mesh.pipe"
        )
    if axes["replica"] > 1 and config.memory.offloads:
        raise ValueError(
            f"memory.names: offload is not supported in {axes['replica']} replicas that are pipelines; use keep or "
            "recompute, or set mesh.replica or mesh.pipe to 1"
        )
    if config.pipeline.vocab_parallel and config.memory.loss_chunks > 1:
        raise ValueError(
            f"memory.loss_chunks: {config.memory.loss_chunks} has no effect with pipeline.vocab_parallel; set it to 1"
        )
    if config.model.padded_vocab % (axes["pipe"] * axes["tensor"]):
        raise ValueError(
            f"model.vocab_multiple: {config.model.padded_vocab} rows are not divisible by mesh.pipe x mesh.tensor "
            f"({axes['pipe']} x {axes['tensor']}), which shard the vocabulary; use a multiple of that"
        )


def check_pipeline_loss(config: RunFields) -> None:
    """Raise ValueError where vocabulary parallelism or routing cannot compute the recipe's loss."""
    recipe, vocab_parallel = config.recipe, config.pipeline.vocab_parallel
    if vocab_parallel and (recipe.compares_distributions or recipe.name == "reward"):
        why = "has a score in their place" if recipe.name == "reward" else "compares the logits of two models"
        raise ValueError(
            f"pipeline.vocab_parallel: {vocab_parallel} computes only log-probabilities of targets, but recipe.name "
            f"{recipe.name} {why}; set it to 0"
        )
    if recipe.has_live_teacher and config.outer is not None and config.outer.routing:
        raise ValueError(
            f"outer.routing: true would send the teacher's outputs of recipe.name {recipe.name} through all replicas; "
            "set it to false, or store the teacher's most likely tokens (recipe.top_k)"
        )
