"""The section recipe: the training objective, its settings, and the documents that it can read."""

from typing import Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, field_validator, model_validator

from ..errors import UserError
from .base import Section, check_keys_are_read
from .data import PAIRED_FORMATS, DataConfig
from .model import ModelConfig

# Recipe -> the keys it reads besides `name`, with their defaults; None: no default.
RECIPE_KEYS: dict[str, dict[str, float | None]] = {
    "pretrain": {},
    "sft": {},
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "margin": 1.0},
    "kto": {"beta": 0.1, "desirable": 1.0, "undesirable": 1.0},
    "reward": {},
    "lrec": {},
    "distill": {"teacher": None, "temperature": 1.0, "mix": 1.0, "top_k": None},
}
# Recipe -> the one format of its documents; all others read formats that are not compared.
RECIPE_FORMATS = dict.fromkeys(("dpo", "ipo", "orpo", "simpo", "reward"), "preference") | {"kto": "unpaired"}
REFERENCE_RECIPES = ("dpo", "ipo", "kto")  # recipes that compare with the model before the first step


class RecipeConfig(Section):
    """The training objective."""

    name: Literal[tuple(RECIPE_KEYS)] = "pretrain"  # type: ignore[valid-type]
    """pretrain: the next token; sft: the next token of answers only. From pairs of answers: dpo (arXiv:2305.18290), ipo
    (2310.12036), orpo (2403.07691), simpo (2405.14734), and reward, a score of answers (2203.02155). From single
    answers with a label: kto (2402.01306). lrec (2306.08162): the outputs that a quantized model had before
    quantization. distill (1503.02531): the outputs of another model."""
    beta: float | None = Field(None, gt=0)
    """Factor on differences of log-probabilities (orpo: weight of the odds ratio); null: 0.1 (dpo, ipo, orpo, kto), 2
    (simpo)."""
    margin: float | None = Field(None, ge=0)
    """simpo: target margin between the chosen and the rejected answer, after `beta`; null: 1."""
    desirable: float | None = Field(None, gt=0)
    """kto: weight of desirable answers; null: 1."""
    undesirable: float | None = Field(None, gt=0)
    """kto: weight of undesirable answers; null: 1."""
    teacher: ModelConfig | None = None
    """distill: the teacher, e.g. {from: DIRECTORY}, with the same tokenizer as the student. null: the model itself
    before the first step, so that it forgets less (arXiv:1606.09282)."""
    temperature: float | None = Field(None, gt=0)
    """distill: divides the logits of both models before they are compared; its square multiplies the loss. null: 1."""
    mix: float | None = Field(None, gt=0, le=1)
    """distill: weight of the divergence; 1 - mix is the weight of the next token's loss. null: 1."""
    top_k: int | None = Field(None, ge=1)
    """distill: before the first step, store this many of the teacher's most likely tokens at each position, then drop
    the teacher; needs data.packing.method best-fit or single. null: the teacher runs beside the model in every step."""

    @field_validator("teacher", mode="wrap")
    @classmethod
    def _says_its_own_key(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        """Report errors of a teacher's directory under its own key."""
        try:
            return handler(value)
        except UserError as error:
            raise UserError(str(error).replace("model.from", "recipe.teacher.from", 1)) from None

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> "RecipeConfig":
        check_keys_are_read(self, "recipe", selector="name", readers=RECIPE_KEYS)
        if self.teacher is not None and self.teacher.origin is None:
            raise ValueError(
                "recipe.teacher.from: null, but a teacher needs trained weights; set it to a Hugging Face model "
                "directory (`meshwright checkpoint export RUN DIRECTORY` writes one of a run)"
            )
        if self.top_k is not None and self.teacher is None:
            raise ValueError(f"recipe.top_k: {self.top_k} without a teacher; set recipe.teacher.from, or remove it")
        return self

    @property
    def compares_distributions(self) -> bool:
        """Whether the loss reads the distribution over all next tokens, not only the target's probability."""
        return self.name in ("lrec", "distill")

    @property
    def has_live_teacher(self) -> bool:
        """Whether a teacher runs beside the model in every step."""
        return self.compares_distributions and self.top_k is None

    @property
    def needs_initial_weights(self) -> bool:
        """Whether a resumed run needs the weights from before the first step."""
        return self.name in REFERENCE_RECIPES or (self.has_live_teacher and self.teacher is None)

    @property
    def precomputes_logprobs(self) -> bool:
        """Whether a frozen model reads every document before the first step."""
        return self.name in REFERENCE_RECIPES or self.top_k is not None

    def resolved_value(self, key: str) -> float:
        """The value of a key, or the recipe's default where it is null."""
        value = getattr(self, key)
        return RECIPE_KEYS[self.name][key] if value is None else value


def check_recipe(recipe: RecipeConfig, data: DataConfig) -> None:
    """Raise ValueError where the recipe cannot read the documents."""
    if recipe.top_k is not None and data.packing.method == "concat":
        raise ValueError(
            "data.packing.method: concat cuts documents at other tokens in every epoch, so the teacher's tokens that "
            f"recipe.top_k ({recipe.top_k}) stores would not fit; set it to best-fit or single, or remove recipe.top_k"
        )
    required = RECIPE_FORMATS.get(recipe.name)
    for source in data.sources:
        if required is not None and source.format != required:
            raise ValueError(
                f"data.format: {source.format}, but recipe.name {recipe.name} compares answers; set it to {required}"
            )
        if required is None and source.format in PAIRED_FORMATS:
            readers = [name for name, format in RECIPE_FORMATS.items() if format == source.format]
            raise ValueError(
                f"recipe.name: {recipe.name} does not compare answers, but data.format is {source.format}; set it to "
                f"{' or '.join(readers)}"
            )
        if recipe.name == "sft" and source.format == "text" and source.prompt is None:
            raise ValueError(
                "data.format: text without data.prompt has no answers, but recipe.name sft learns only those; set "
                "data.format (messages, ...) or data.prompt, or set recipe.name to pretrain"
            )
        if recipe.precomputes_logprobs and source.streaming:
            raise ValueError(
                f"data.streaming: true with recipe.name {recipe.name}, which reads every document before the first "
                "step; set it to false"
            )


def check_teacher(recipe: RecipeConfig, model: ModelConfig, data: DataConfig) -> None:
    """Raise ValueError where the teacher has another vocabulary, or cannot read rows of this length."""
    teacher = recipe.teacher
    if teacher is None:
        return
    for key in ("vocab", "padded_vocab"):
        if getattr(teacher, key) != getattr(model, key):
            name = "vocab" if key == "vocab" else "vocab_multiple"
            raise ValueError(
                f"model.{name}: {getattr(model, name)} is not the teacher's ({getattr(teacher, name)}), so outputs "
                f"cannot be compared; set it to {getattr(teacher, name)}, or use another teacher"
            )
    if recipe.top_k is not None and recipe.top_k > model.vocab:
        raise ValueError(f"recipe.top_k: {recipe.top_k} exceeds model.vocab ({model.vocab}); use a smaller one")
    if teacher.position_encoding == "learned" and teacher.max_positions < data.sequence_length:
        raise ValueError(
            f"data.sequence_length: {data.sequence_length} exceeds recipe.teacher.max_positions "
            f"({teacher.max_positions}); lower it, or use another teacher"
        )
