"""What cannot run in a pipeline of `mesh.pipe` stages."""

from ..run_fields import RunFields
from ..sections.outer import check_routing


def check_pipeline(config: RunFields, axes: dict[str, int]) -> None:
    """Raise ValueError where what is asked for cannot run in a pipeline.

    `train/engine/pipeline/pipeline_plan.py` counts the layers.
    """
    if config.outer is not None and config.outer.routing:
        check_routing(pipe=axes["pipe"], replicas=axes["replica"], vocab_parallel=config.pipeline.vocab_parallel)
    if axes["pipe"] == 1:
        return
    if axes["replica"] > 1 and config.pipeline.post_validation:
        raise ValueError(
            f"pipeline.post_validation: true would make the {axes['replica']} replicas wait for each other's norms in "
            "every step; set it to false, or mesh.replica to 1"
        )
    check_pipeline_loss(config)
    for key, model in (("model", config.model), ("recipe.teacher", config.recipe.teacher or config.model)):
        if len(model.segments) > 1 and (key == "model" or config.recipe.has_live_teacher):
            raise ValueError(
                f"{key}.layers: {model.layers} is not a multiple of the {len(model.windows)} layers of {key}.windows' "
                "pattern, and a pipeline cuts between whole patterns; change one of them, or leave mesh.pipe at 1"
            )
    if axes["seq"] > 1 and config.sequence.parallel == "ring":
        raise ValueError(
            "sequence.parallel: ring passes keys around inside a stage, while other stages do something else, and "
            "would never end; use all-gather or ulysses with mesh.pipe"
        )
    if axes["replica"] > 1 and config.memory.offloads:
        raise ValueError(
            f"memory: offload in a pipeline that is one of {axes['replica']} replicas is not supported: what is lifted "
            "over replicas cannot be sliced in host memory; keep or recompute, or leave mesh.replica or mesh.pipe at 1"
        )
    if config.pipeline.vocab_parallel and config.memory.loss_chunks > 1:
        raise ValueError(
            f"memory.loss_chunks: {config.memory.loss_chunks} has no effect with pipeline.vocab_parallel; leave it at 1"
        )
    if config.model.padded_vocab % (axes["pipe"] * axes["tensor"]):
        raise ValueError(
            f"model.vocab_multiple: {config.model.padded_vocab} rows are not divisible by mesh.pipe x mesh.tensor "
            f"({axes['pipe']} x {axes['tensor']}), which share the vocabulary; use a multiple of that"
        )


def check_pipeline_loss(config: RunFields) -> None:
    """Raise ValueError where a pipeline that shares its vocabulary or microbatches cannot make the recipe's loss."""
    recipe, cut = config.recipe, config.pipeline.vocab_parallel
    if cut and (recipe.compares_distributions or recipe.name == "reward"):
        why = "has a score and no words" if recipe.name == "reward" else "compares all words of two models"
        raise ValueError(
            f"pipeline.vocab_parallel: {cut} makes log-probabilities of the next token where the devices meet, and "
            f"recipe.name {recipe.name} {why}; set it to 0"
        )
    if recipe.has_live_teacher and config.outer is not None and config.outer.routing:
        raise ValueError(
            f"outer.routing: true would carry what the teacher of recipe.name {recipe.name} said of every token "
            "through all replicas; set it to false, or store the teacher's words (recipe.top_k)"
        )
