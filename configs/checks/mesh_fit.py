"""Whether models, batch and sequence can be sharded over the axes of a mesh."""

import math

from ..run_fields import RunFields
from ..sections.adapter import NEEDS_ALL_LAYERS, PER_EXAMPLE_METHODS, PREFIX_METHODS
from ..sections.model import ModelConfig
from ..sections.quantization import check_groups
from .elastic_meshes import check_deterministic
from .pipeline import check_pipeline
from .privacy import check_privacy


def check_mesh_fit(config: RunFields, axes: dict[str, int]) -> None:
    """Raise ValueError where the run cannot be sharded over mesh `axes` (axis -> size)."""
    method = None if config.adapter is None else config.adapter.method
    needs = (
        ("seq", PREFIX_METHODS, "whole rows"),
        ("pipe", NEEDS_ALL_LAYERS, "all layers"),
        ("pipe", PER_EXAMPLE_METHODS, "gradients of one example"),
    )
    for axis, methods, need in needs:
        if method in methods and axes[axis] > 1:
            raise ValueError(
                f"mesh.{axis}: {axes[axis]}, but adapter.method {method} needs {need} on a device; set it to 1"
            )
    for axis in ("pipe", "replica"):
        if config.adapters and axes[axis] > 1:
            raise ValueError(
                f"mesh.{axis}: {axes[axis]} with several adapters ({', '.join(config.adapters)}); set it to 1, and "
                "use data, fsdp, seq or tensor"
            )
    model, data = config.model, config.data
    tensor, seq = axes["tensor"], axes["seq"]
    check_model_fits(model, axes, key="model")
    if config.recipe.teacher is not None:
        check_model_fits(config.recipe.teacher, axes, key="recipe.teacher")
    if config.elastic.deterministic:
        check_deterministic(config, axes)
    rows = {axis: axes[axis] for axis in ("replica", "data", "fsdp")} | {"microbatches": config.microbatches}
    rows = {"islands": config.islands.count if config.islands else 1} | rows
    rows = {name: size for name, size in rows.items() if size > 1 or name not in ("islands", "replica")}
    if config.quantization is not None:
        check_groups(config.quantization, model, axes | ({"fsdp": 1} if config.mesh.zero == 1 else {}))
    if data.global_batch % math.prod(rows.values()) and not config.elastic.deterministic:
        raise ValueError(
            f"data.global_batch: {data.global_batch} is not divisible by {' x '.join(rows)} "
            f"({' x '.join(map(str, rows.values()))} = {math.prod(rows.values())}); use a multiple of it, or change one"
        )
    if config.privacy is not None:
        check_privacy(config, axes)
    check_sequence(config, axes)
    check_pipeline(config, axes)
    if seq > 1 and config.sequence.parallel == "ulysses":
        for key, section in (("model", model), ("recipe.teacher", config.recipe.teacher or model)):
            kv_heads = max(section.key_value_heads // tensor, 1)
            if kv_heads % seq:
                raise ValueError(
                    f"sequence.parallel: ulysses shards {kv_heads} key-value heads ({key}.kv_heads / mesh.tensor) over "
                    f"mesh.seq ({seq}), which does not divide them; use all-gather or ring"
                )


def check_model_fits(model: ModelConfig, axes: dict[str, int], *, key: str) -> None:
    """Raise ValueError where the model in section `key` cannot be sharded over mesh `axes` (axis -> size)."""
    tensor = axes["tensor"]
    for name, size in (("heads", model.heads), ("mlp", model.mlp), ("vocab_multiple", model.vocab_multiple)):
        if size % tensor:
            raise ValueError(f"{key}.{name}: {size} is not divisible by mesh.tensor ({tensor}); change one of them")
    if model.key_value_heads % tensor and tensor % model.key_value_heads:
        raise ValueError(
            f"{key}.kv_heads: {model.key_value_heads} and mesh.tensor ({tensor}): one must divide the other; change "
            "one of them (with fewer key-value heads than devices, heads are replicated)"
        )
    if model.embed % axes["fsdp"]:
        raise ValueError(
            f"{key}.embed: {model.embed} is not divisible by mesh.fsdp ({axes['fsdp']}); change one of them"
        )


def check_sequence(config: RunFields, axes: dict[str, int]) -> None:
    """Raise ValueError where `data.sequence_length` cannot be divided by mesh axes or loss chunks."""
    length, tensor, seq = config.data.sequence_length, axes["tensor"], axes["seq"]
    chunks = (
        2 * seq if seq > 1 and config.sequence.parallel != "ulysses" else seq
    )  # in zigzag order a device has two chunks
    if length % chunks:
        raise ValueError(
            f"data.sequence_length: {length} is not divisible by {chunks} (mesh.seq {seq} in zigzag order); "
            "use a multiple of it"
        )
    if length % (seq * tensor):
        raise ValueError(
            f"data.sequence_length: {length} is not divisible by mesh.seq x mesh.tensor ({seq} x {tensor}); "
            "between blocks the sequence is sharded over both; use a multiple of it"
        )
    if length % (seq * config.memory.loss_chunks):
        raise ValueError(
            f"memory.loss_chunks: {config.memory.loss_chunks} does not divide the {length // seq} tokens of a shard; "
            "use a divisor"
        )
