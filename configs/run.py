"""`RunConfig`: the whole configuration as one frozen tree, and the checks that need more than one section."""

import re

from pydantic import Field, model_validator

from .base import Section
from .data import DataConfig
from .elastic import ElasticConfig
from .model import ModelConfig
from .parallel import MemoryConfig, MeshConfig, PrecisionConfig, SequenceConfig
from .training import (
    CheckpointConfig,
    EvaluationConfig,
    LaunchConfig,
    LoggingConfig,
    OptimizerConfig,
    RecipeConfig,
)


class RunConfig(Section):
    """One run: `runs/NAME/` holds everything it makes."""

    name: str = "run"
    """Directory under runs/."""
    seed: int = Field(0, ge=0)
    """Of initialization, order, dropout."""
    steps: int = Field(100, ge=1)
    """Optimizer updates."""
    microbatches: int = Field(1, ge=1)
    """Parts the global batch is computed in, one after another; the result does not depend on it."""
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    sequence: SequenceConfig = SequenceConfig()
    memory: MemoryConfig = MemoryConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    recipe: RecipeConfig = RecipeConfig()
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    elastic: ElasticConfig = ElasticConfig()
    launch: LaunchConfig = LaunchConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise ValueError(f"name: {self.name!r} must be letters, digits, '.', '_' or '-'")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(f"optimizer.warmup_steps: {self.optimizer.warmup_steps} exceeds steps ({self.steps})")
        if self.model.position_encoding == "learned" and self.model.max_positions < self.data.sequence_length:
            raise ValueError(
                f"model.max_positions: {self.model.max_positions} is below data.sequence_length "
                f"({self.data.sequence_length}); learned positions need one row a token"
            )
        if self.model.attention == "cudnn" and self.mesh.platform == "cpu":
            raise ValueError("model.attention: cudnn needs a GPU and mesh.platform is cpu; use auto or blockwise")
        if (count := self.mesh.count) is not None:
            check_fits(self, self.mesh.resolved(count))
        return self


def check_fits(config: RunConfig, axes: dict[str, int]) -> None:
    """Raise ValueError where the model or the batch cannot be divided over mesh `axes` (axis -> size)."""
    model, data = config.model, config.data
    tensor, seq = axes["tensor"], axes["seq"]
    for key, size in (("heads", model.heads), ("mlp", model.mlp), ("vocab_multiple", model.vocab_multiple)):
        if size % tensor:
            raise ValueError(f"model.{key}: {size} is not divisible by mesh.tensor ({tensor}); change one of them")
    if model.key_value_heads % tensor and tensor % model.key_value_heads:
        raise ValueError(
            f"model.kv_heads: {model.key_value_heads} and mesh.tensor ({tensor}): one must divide the other "
            "(fewer key-value heads than devices are repeated)"
        )
    if model.embed % axes["fsdp"]:
        raise ValueError(f"model.embed: {model.embed} is not divisible by mesh.fsdp ({axes['fsdp']})")
    shards = axes["data"] * axes["fsdp"] * config.microbatches
    if data.global_batch % shards:
        raise ValueError(
            f"data.global_batch: {data.global_batch} is not divisible by data x fsdp x microbatches "
            f"({axes['data']} x {axes['fsdp']} x {config.microbatches} = {shards})"
        )
    check_sequence(config, axes)
    if seq > 1 and config.sequence.parallel == "ulysses":
        kv_heads = max(model.key_value_heads // tensor, 1)
        if kv_heads % seq:
            raise ValueError(
                f"sequence.parallel: ulysses splits {kv_heads} key-value heads (model.kv_heads / mesh.tensor) over "
                f"mesh.seq ({seq}), which does not divide them; use all-gather or ring"
            )


def check_sequence(config: RunConfig, axes: dict[str, int]) -> None:
    """Raise ValueError where `data.sequence_length` cannot be cut as the axes and the loss want it."""
    length, tensor, seq = config.data.sequence_length, axes["tensor"], axes["seq"]
    chunks = 2 * seq if seq > 1 and config.sequence.parallel != "ulysses" else seq  # zigzag deals two chunks a device
    if length % chunks:
        raise ValueError(
            f"data.sequence_length: {length} is not divisible by {chunks} (mesh.seq {seq} in zigzag order)"
        )
    if length % (seq * tensor):
        raise ValueError(
            f"data.sequence_length: {length} is not divisible by mesh.seq x mesh.tensor ({seq} x {tensor}); "
            "between blocks the sequence is sharded over both"
        )
    if length % (seq * config.memory.loss_chunks):
        raise ValueError(
            f"memory.loss_chunks: {config.memory.loss_chunks} does not divide the {length // seq} tokens of a shard"
        )
