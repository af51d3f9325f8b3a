"""`RunConfig`: the whole configuration as one frozen tree, with the checks that need more than one section."""

import re
from typing import Any

from pydantic import model_validator

from .adapter_runs import inherit_data, merged_data, resolve_adapters, widest_adapter
from .checks.adapter_method import check_budget, check_element_search, check_oft_blocks, check_prefix
from .checks.elastic_meshes import check_elastic_meshes
from .checks.launch_target import check_launch_target
from .checks.mesh_fit import check_mesh_fit
from .checks.multi_adapter import check_adapters
from .run_fields import RunFields
from .sections.adapter import PER_EXAMPLE_METHODS, SPARSE_METHODS
from .sections.data import DataConfig
from .sections.islands import check_islands
from .sections.model import KERNEL_PLATFORMS
from .sections.outer import check_replicas
from .sections.quantization import check_quantization, check_trained_codes
from .sections.recipe import check_recipe, check_teacher
from .trained_segments import segment_starts


class RunConfig(RunFields):
    """One run, validated. Everything that it writes is in `runs/NAME/`."""

    @property
    def all_data(self) -> DataConfig:
        """The section data; with several adapters, with the sources of all of them."""
        return merged_data(self) if self.adapters else self.data

    @model_validator(mode="before")
    @classmethod
    def _default_tokenizer(cls, values: Any) -> Any:
        """Use the tokenizer in the directory of the model, else that of the teacher, where none is configured."""
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
    def _inherit_data(cls, values: Any) -> Any:
        return inherit_data(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _cut_at_trained_layers(self) -> "RunConfig":
        adapter = widest_adapter(resolve_adapters(self)) if self.adapters and self.adapter else self.adapter
        cuts = () if self.mesh.pipe != 1 else segment_starts(self.model, adapter)  # a pipeline has its own cuts
        if cuts != self.model._cuts:
            model = self.model.model_copy()
            model._cuts = cuts
            object.__setattr__(self, "model", model)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise ValueError(f"name: {self.name!r} must be letters, digits, '.', '_' or '-'")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps: {self.optimizer.warmup_steps} exceeds steps ({self.steps}); "
                f"lower it, e.g. optimizer.warmup_steps={self.steps // 10}"
            )
        if self.model.position_encoding == "learned" and self.model.max_positions < self.data.sequence_length:
            raise ValueError(
                f"model.max_positions: {self.model.max_positions} is below data.sequence_length "
                f"({self.data.sequence_length}), but learned positions need one row per token; raise it"
            )
        check_launch_target(self.launch.k8s)
        platform = KERNEL_PLATFORMS.get(self.model.attention)
        if platform is not None and self.mesh.platform not in ("auto", platform):
            raise ValueError(
                f"model.attention: {self.model.attention} needs a {platform.upper()}, but mesh.platform is "
                f"{self.mesh.platform}; use auto or blockwise"
            )
        check_adapters(self)
        check_recipe(self.recipe, self.all_data)
        check_teacher(self.recipe, self.model, self.data)
        if self.adapter is not None and (self.adapter.layers or 0) > self.model.layers:
            raise ValueError(
                f"adapter.layers: {self.adapter.layers} exceeds model.layers ({self.model.layers}); lower it"
            )
        if self.adapter is not None:
            check_oft_blocks(self.adapter, self.model)
            check_prefix(self.adapter, self.model, tokens=self.data.sequence_length)
            if self.adapter.method == "tokens" and self.pipeline.vocab_parallel:
                raise ValueError(
                    f"pipeline.vocab_parallel: {self.pipeline.vocab_parallel} shards the table whose rows "
                    "adapter.method tokens replaces; set it to 0"
                )
            check_element_search(self.adapter, steps=self.steps, average=self.optimizer.ema, spike=self.logging.spike)
            if self.adapter.method in PER_EXAMPLE_METHODS and self.recipe.name == "kto":
                raise ValueError(
                    f"recipe.name: kto compares an answer with the others of its row, but adapter.method "
                    f"{self.adapter.method} needs each example alone; use adapter.method lottery, or recipe.name dpo"
                )
            check_budget(self.adapter, steps=self.steps, average=self.optimizer.ema)
            if self.outer is not None and self.adapter.method in (*SPARSE_METHODS, "adalora"):
                raise ValueError(
                    f"adapter.method: {self.adapter.method} selects weights during training, and replicas would select "
                    "different ones; use lora, or set outer to null"
                )
            if self.adapter.method == "adalora" and self.pipeline.post_validation:
                raise ValueError(
                    "pipeline.post_validation: true, but adapter.method adalora changes the gradient after its norm "
                    "was validated; set it to false"
                )
        check_quantization(self.quantization, self.adapter, self.model, recipe=self.recipe.name)
        check_trained_codes(self.quantization, average=self.optimizer.ema, replicated=self.outer is not None)
        if self.evaluation.answers and any(
            source.format == "text" and source.prompt is None for source in self.all_data.sources
        ):
            raise ValueError(
                f"evaluation.answers: {self.evaluation.answers}, but texts without data.prompt have no questions; set "
                "it to 0"
            )
        if self.recipe.name == "reward" and (self.evaluation.answers or self.evaluation.prompts):
            raise ValueError(
                "evaluation.answers, evaluation.prompts: recipe.name reward trains a model that scores and cannot "
                "generate; set them to 0 and []"
            )
        if self.evaluation.answers and not self.data.held_out:
            raise ValueError(f"evaluation.answers: {self.evaluation.answers}, but data.held_out is 0; raise that")
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
        if (count := self.mesh.device_count) is not None:
            axes = self.mesh.resolve_sizes(count)
            check_mesh_fit(self, axes)
            check_elastic_meshes(self, axes, check_mesh_fit)
        return self
