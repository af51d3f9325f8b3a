"""`RunConfig`: the whole configuration as one frozen tree, and the checks that need more than one section."""

import math
import re
from typing import Any

from pydantic import Field, model_validator

from .adapter import AHEAD, ELEMENTS, FISHER, WHOLE, AdapterConfig
from .adapters import NamedAdapterConfig, adapters_of, check_adapters, inherited, together, widest
from .base import Section
from .cuts import cuts
from .data import DataConfig
from .elastic import ElasticConfig
from .islands import IslandsConfig, check_islands
from .launch import LaunchConfig
from .meshes import check_deterministic, check_meshes
from .model import ModelConfig
from .outer import OuterConfig, check_replicas, check_routing
from .parallel import MemoryConfig, MeshConfig, PipelineConfig, PrecisionConfig, SequenceConfig
from .privacy import PrivacyConfig, check_privacy
from .quantization import QuantizationConfig, check_codes, check_groups, check_quantization
from .recipe import RecipeConfig, check_recipe, check_teacher
from .training import CheckpointConfig, EvaluationConfig, LoggingConfig, OptimizerConfig


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
    pipeline: PipelineConfig = PipelineConfig()
    sequence: SequenceConfig = SequenceConfig()
    memory: MemoryConfig = MemoryConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    adapter: AdapterConfig | None = None
    """Train a few weights instead of all; null: all."""
    adapters: dict[str, NamedAdapterConfig] = {}
    """Several adapters by name, trained in one step on one base, each on rows of its own; {}: one, or none."""
    quantization: QuantizationConfig | None = None
    """Keep the weights that are not trained in few bits; null: as `precision.parameters` says."""
    outer: OuterConfig | None = None
    """How the replicas of `mesh.replica`, or the islands, meet; null: there is one."""
    islands: IslandsConfig | None = None
    """Replicas that are jobs of their own and meet over a network, instead of `mesh.replica`; null: none."""
    recipe: RecipeConfig = RecipeConfig()
    privacy: PrivacyConfig | None = None
    """Bound what the weights may tell of any one row; null: nothing is promised."""
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    elastic: ElasticConfig = ElasticConfig()
    launch: LaunchConfig = LaunchConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def reads(self) -> DataConfig:
        """The section data; of several adapters with the sources of all."""
        return together(self) if self.adapters else self.data

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_model(cls, values: Any) -> Any:
        """A model that comes from a directory brings its tokenizer; one that does not has its teacher's."""
        data = values.get("data", {}) if isinstance(values, dict) else None
        if not isinstance(data, dict) or "tokenizer" in data:
            return values
        for parent in (values, values.get("recipe", {})):
            model = parent.get("model" if parent is values else "teacher") if isinstance(parent, dict) else None
            if isinstance(model, dict) and model.get("from"):
                return values | {"data": data | {"tokenizer": {"file": model["from"]}}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _adapters_read_the_data(cls, values: Any) -> Any:
        return inherited(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _layers_that_learn_stand_apart(self) -> "RunConfig":
        adapter = widest(adapters_of(self)) if self.adapters and self.adapter else self.adapter
        found = () if self.mesh.pipe != 1 else cuts(self.model, adapter)  # a pipeline cuts elsewhere
        if found != self.model._cuts:
            model = self.model.model_copy()
            model._cuts = found
            object.__setattr__(self, "model", model)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise ValueError(f"name: {self.name!r} must be letters, digits, '.', '_' or '-'")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} exceeds steps ({self.steps}); "
                f"lower it too, e.g. optimizer.warmup_steps={self.steps // 10}"
            )
        if self.model.position_encoding == "learned" and self.model.max_positions < self.data.sequence_length:
            raise ValueError(
                f"model.max_positions: {self.model.max_positions} is below data.sequence_length "
                f"({self.data.sequence_length}); learned positions need one row a token"
            )
        if self.model.attention == "cudnn" and self.mesh.platform == "cpu":
            raise ValueError("model.attention: cudnn needs a GPU and mesh.platform is cpu; use auto or blockwise")
        check_adapters(self)
        check_recipe(self.recipe, self.reads)
        check_teacher(self.recipe, self.model, self.data)
        if self.adapter is not None and (self.adapter.layers or 0) > self.model.layers:
            raise ValueError(f"adapter.layers: {self.adapter.layers} exceeds model.layers ({self.model.layers})")
        if self.adapter is not None:
            check_blocks(self.adapter, self.model)
            check_ahead(self.adapter, self.model, tokens=self.data.sequence_length)
            if self.adapter.method == "tokens" and self.pipeline.vocab_parallel:
                raise ValueError(
                    f"pipeline.vocab_parallel: {self.pipeline.vocab_parallel} cuts the table that adapter.method "
                    "tokens puts rows into; set it to 0"
                )
            check_scouting(self.adapter, steps=self.steps, average=self.optimizer.ema, spike=self.logging.spike)
            if self.adapter.method in FISHER and self.recipe.name == "kto":
                raise ValueError(
                    f"recipe.name: kto measures an answer by the others of its row, and adapter.method "
                    f"{self.adapter.method} looks at each alone; use lottery, or dpo"
                )
            check_budget(self.adapter, steps=self.steps, average=self.optimizer.ema)
            if self.outer is not None and self.adapter.method in (*ELEMENTS, "adalora"):
                raise ValueError(
                    f"adapter.method: {self.adapter.method} chooses what learns while it trains, and replicas would "
                    "choose differently; use lora, or set outer to null"
                )
            if self.adapter.method == "adalora" and self.pipeline.post_validation:
                raise ValueError(
                    "pipeline.post_validation: true, but adapter.method adalora adds to the gradient behind the norm "
                    "that validates it; set it to false"
                )
        check_quantization(self.quantization, self.adapter, self.model, recipe=self.recipe.name)
        check_codes(self.quantization, average=self.optimizer.ema, replicated=self.outer is not None)
        if self.evaluation.answers and any(one.format == "text" and one.prompt is None for one in self.reads.sources):
            raise ValueError(
                f"evaluation.answers: {self.evaluation.answers}, but texts without data.prompt ask nothing; set it to 0"
            )
        if self.recipe.name == "reward" and (self.evaluation.answers or self.evaluation.prompts):
            raise ValueError(
                "evaluation.answers, evaluation.prompts: recipe.name reward learns to score and not to write; set them "
                "to 0 and []"
            )
        if self.evaluation.answers and not self.data.held_out:
            raise ValueError(f"evaluation.answers: {self.evaluation.answers} of none, data.held_out is 0; raise it")
        check_replicas(
            self.outer,
            replicas=self.mesh.replica if self.islands is None else self.islands.count,
            steps=self.steps,
            layers=self.model.layers,
            average=self.optimizer.ema,
        )
        if self.islands is not None:
            check_islands(
                self.islands,
                rule=None if self.outer is None else self.outer.name,
                replicas=self.mesh.replica,
                global_batch=self.data.global_batch,
            )
        if (count := self.mesh.count) is not None:
            check_fits(self, own := self.mesh.resolved(count))
            check_meshes(self, own, check_fits)
        return self


def check_blocks(adapter: AdapterConfig, model: ModelConfig) -> None:
    """Raise ValueError where blocks of `oft` do not fit the maps' inputs."""
    for key, size in (("embed", model.embed), ("heads x head_dim", model.heads * model.head_width), ("mlp", model.mlp)):
        if adapter.method == "oft" and size % adapter.block:
            raise ValueError(
                f"adapter.block: {adapter.block} does not divide model.{key} ({size}); use a divisor of it"
            )


def check_budget(adapter: AdapterConfig, *, steps: int, average: float | None) -> None:
    """Raise ValueError where `adalora` cannot share ranks out in a run of `steps`."""
    budget = adapter.budget
    if adapter.method != "adalora":
        return
    if budget.rank > adapter.rank:
        raise ValueError(f"adapter.budget.rank: {budget.rank} exceeds adapter.rank ({adapter.rank}), where it starts")
    if budget.after + budget.settled >= steps:
        raise ValueError(
            f"adapter.budget: after {budget.after} and settled {budget.settled} leave none of {steps} steps to share "
            "ranks out; shorten one of them"
        )
    if average is not None:
        raise ValueError(f"optimizer.ema: {average} would average ranks that were taken away; remove it with adalora")


def check_scouting(adapter: AdapterConfig, *, steps: int, average: float | None, spike: float | None) -> None:
    """Raise ValueError where the search for elements leaves nothing of a run of `steps`."""
    if adapter.method not in ELEMENTS:
        return
    if adapter.scouting >= steps:
        raise ValueError(f"adapter.scouting: {adapter.scouting} updates leave none of {steps} steps to train; lower it")
    if average is not None:
        raise ValueError(f"optimizer.ema: {average} would average over the search of {adapter.method}; remove it")
    if spike is not None:
        raise ValueError(f"logging.spike: {spike} compares the norm of all elements with that of few; set it to null")


def check_ahead(adapter: AdapterConfig, model: ModelConfig, *, tokens: int) -> None:
    """Raise ValueError where `adapter` cannot stand in front of documents, or names tokens that the model lacks."""
    if adapter.method == "tokens" and max(adapter.tokens) >= model.vocab:
        raise ValueError(f"adapter.tokens: {max(adapter.tokens)} is no token, model.vocab is {model.vocab}")
    if adapter.method not in AHEAD:
        return
    if any(window is not None for window in model.windows):
        raise ValueError(
            f"adapter.method: {adapter.method} stands in front of documents, where windows (model.windows: "
            f"{list(model.windows)}) do not reach; use lora"
        )
    if model.attention == "cudnn":
        raise ValueError(f"model.attention: cudnn cannot show all documents the keys of {adapter.method}; use auto")
    if model.position_encoding == "learned" and model.max_positions < adapter.length + tokens:
        raise ValueError(
            f"adapter.length: {adapter.length} and data.sequence_length ({tokens}) exceed model.max_positions "
            f"({model.max_positions}); shorten one of them"
        )


def check_fits(config: RunConfig, axes: dict[str, int]) -> None:
    """Raise ValueError where the models or the batch cannot be divided over mesh `axes` (axis -> size)."""
    method = None if config.adapter is None else config.adapter.method
    needs = (("seq", AHEAD, "whole rows"), ("pipe", WHOLE, "all layers"), ("pipe", FISHER, "gradients of one example"))
    for axis, methods, need in needs:
        if method in methods and axes[axis] > 1:
            raise ValueError(
                f"mesh.{axis}: {axes[axis]}, but adapter.method {method} needs {need} on a device; set it to 1"
            )
    for axis in ("pipe", "replica"):
        if config.adapters and axes[axis] > 1:
            raise ValueError(
                f"mesh.{axis}: {axes[axis]} beside several adapters ({', '.join(config.adapters)}); set it to 1, and "
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
        for key, one in (("model", model), ("recipe.teacher", config.recipe.teacher or model)):
            kv_heads = max(one.key_value_heads // tensor, 1)
            if kv_heads % seq:
                raise ValueError(
                    f"sequence.parallel: ulysses splits {kv_heads} key-value heads ({key}.kv_heads / mesh.tensor) over "
                    f"mesh.seq ({seq}), which does not divide them; use all-gather or ring"
                )


def check_model_fits(model: ModelConfig, axes: dict[str, int], *, key: str) -> None:
    """Raise ValueError where the model in section `key` cannot be divided over mesh `axes` (axis -> size)."""
    tensor = axes["tensor"]
    for name, size in (("heads", model.heads), ("mlp", model.mlp), ("vocab_multiple", model.vocab_multiple)):
        if size % tensor:
            raise ValueError(f"{key}.{name}: {size} is not divisible by mesh.tensor ({tensor}); change one of them")
    if model.key_value_heads % tensor and tensor % model.key_value_heads:
        raise ValueError(
            f"{key}.kv_heads: {model.key_value_heads} and mesh.tensor ({tensor}): one must divide the other "
            "(fewer key-value heads than devices are repeated)"
        )
    if model.embed % axes["fsdp"]:
        raise ValueError(
            f"{key}.embed: {model.embed} is not divisible by mesh.fsdp ({axes['fsdp']}); change one of them"
        )


def check_pipeline(config: RunConfig, axes: dict[str, int]) -> None:
    """Raise ValueError where what is asked for cannot run in a pipeline. `train/staging.py` counts the layers."""
    if config.outer is not None and config.outer.routing:
        check_routing(pipe=axes["pipe"], replicas=axes["replica"], vocab_parallel=config.pipeline.vocab_parallel)
    if axes["pipe"] == 1:
        return
    if axes["replica"] > 1 and config.pipeline.post_validation:
        raise ValueError(
            f"pipeline.post_validation: true would make the {axes['replica']} replicas wait for each other's norms in "
            "every step; set it to false, or mesh.replica to 1"
        )
    check_ending(config)
    for key, model in (("model", config.model), ("recipe.teacher", config.recipe.teacher or config.model)):
        if len(model.segments) > 1 and (key == "model" or config.recipe.two_models):
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


def check_ending(config: RunConfig) -> None:
    """Raise ValueError where a pipeline that shares its vocabulary or microbatches cannot make the recipe's loss."""
    recipe, cut = config.recipe, config.pipeline.vocab_parallel
    if cut and (recipe.compares_words or recipe.name == "reward"):
        why = "has a score and no words" if recipe.name == "reward" else "compares all words of two models"
        raise ValueError(
            f"pipeline.vocab_parallel: {cut} makes log-probabilities of the next token where the devices meet, and "
            f"recipe.name {recipe.name} {why}; set it to 0"
        )
    if recipe.two_models and config.outer is not None and config.outer.routing:
        raise ValueError(
            f"outer.routing: true would carry what the teacher of recipe.name {recipe.name} said of every token "
            "through all replicas; set it to false, or store the teacher's words (recipe.top_k)"
        )


def check_sequence(config: RunConfig, axes: dict[str, int]) -> None:
    """Raise ValueError where `data.sequence_length` cannot be cut as the axes and the loss want it."""
    length, tensor, seq = config.data.sequence_length, axes["tensor"], axes["seq"]
    chunks = 2 * seq if seq > 1 and config.sequence.parallel != "ulysses" else seq  # zigzag deals two chunks a device
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
            f"memory.loss_chunks: {config.memory.loss_chunks} does not divide the {length // seq} tokens of a shard"
        )
