"""What is learned: the recipe, the numbers it reads, and the documents it is made for."""

from typing import Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, field_validator, model_validator

from ..errors import UserError
from .base import Section
from .data import PAIRED_FORMATS, DataConfig
from .model import ModelConfig

# Recipe -> the keys it reads beside `name`, with their defaults; None: there is none.
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
# Recipe -> the one format of its documents; the others read what is not compared.
RECIPE_FORMATS = dict.fromkeys(("dpo", "ipo", "orpo", "simpo", "reward"), "preference") | {"kto": "unpaired"}
REFERENCE_RECIPES = ("dpo", "ipo", "kto")  # recipes that compare with the model as it was before the first step


class RecipeConfig(Section):
    """What is learned."""

    name: Literal[tuple(RECIPE_KEYS)] = "pretrain"  # type: ignore[valid-type]
    """pretrain: next token; sft: the same, of answers only; of pairs: dpo (arXiv:2305.18290), ipo (2310.12036), orpo
    (2403.07691), simpo (2405.14734), and a score of answers, reward (2203.02155); of single answers, good or bad: kto
    (2402.01306); of a quantized base, what it said when it was whole: lrec (2306.08162); of another model, what it
    says: distill (1503.02531)."""
    beta: float | None = Field(None, gt=0)
    """How much a difference of log-probabilities counts (orpo: weight of the odds). null: dpo, ipo, orpo, kto 0.1,
    simpo 2."""
    margin: float | None = Field(None, ge=0)
    """simpo: how far the better answer should be ahead, after `beta`; null: 1."""
    desirable: float | None = Field(None, gt=0)
    """kto: weight of answers to give; null: 1."""
    undesirable: float | None = Field(None, gt=0)
    """kto: weight of answers not to give; null: 1."""
    teacher: ModelConfig | None = None
    """distill: the model whose words are learned, e.g. {from: DIRECTORY}; it has the tokenizer of the one that learns.
    null: the model itself, as it was before the first step, so that it forgets less (arXiv:1606.09282)."""
    temperature: float | None = Field(None, gt=0)
    """distill: divides the logits of both models before they are compared, and its square multiplies what comes out;
    null: 1."""
    mix: float | None = Field(None, gt=0, le=1)
    """distill: weight of the divergence; the rest is that of the next token's loss. null: 1."""
    top_k: int | None = Field(None, ge=1)
    """distill: keep the teacher's so many likeliest words of each token, made before the first step, and not the
    teacher; data.packing.method is then best-fit or single. null: the teacher stands beside the model and is asked in
    every step."""

    @field_validator("teacher", mode="wrap")
    @classmethod
    def _says_its_own_key(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        """What is wrong with a teacher's directory is told of the key that names it."""
        try:
            return handler(value)
        except UserError as error:
            raise UserError(str(error).replace("model.from", "recipe.teacher.from", 1)) from None

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> "RecipeConfig":
        for name in type(self).model_fields:
            value: Any = getattr(self, name)
            if name == "name" or value is None or name in RECIPE_KEYS[self.name]:
                continue
            readers = [recipe for recipe, keys in RECIPE_KEYS.items() if name in keys]
            raise ValueError(
                f"recipe.{name}: {value!r} means nothing to {self.name}; remove it, or set recipe.name to "
                f"{' or '.join(readers)}"
            )
        if self.teacher is not None and self.teacher.origin is None:
            raise ValueError(
                "recipe.teacher.from: not set, and a model without weights has nothing to teach; set it to a Hugging "
                "Face model directory (of a run of yours: `meshwright checkpoint export RUN DIRECTORY`)"
            )
        if self.top_k is not None and self.teacher is None:
            raise ValueError(f"recipe.top_k: {self.top_k} words of nobody's; set recipe.teacher.from, or remove it")
        return self

    @property
    def compares_distributions(self) -> bool:
        """Whether all words a model might say next are read, and not the next token's probability alone."""
        return self.name in ("lrec", "distill")

    @property
    def has_live_teacher(self) -> bool:
        """Whether a teacher stands beside the model that is trained."""
        return self.compares_distributions and self.top_k is None

    @property
    def needs_initial_weights(self) -> bool:
        """Whether the model as it was before the first step is read again where a run goes on."""
        return self.name in REFERENCE_RECIPES or (self.has_live_teacher and self.teacher is None)

    @property
    def precomputes_logprobs(self) -> bool:
        """Whether a fixed model reads every document before the first step."""
        return self.name in REFERENCE_RECIPES or self.top_k is not None

    def resolved_value(self, key: str) -> float:
        """The value of a key, its recipe's default where it is null."""
        value = getattr(self, key)
        return RECIPE_KEYS[self.name][key] if value is None else value


def check_recipe(recipe: RecipeConfig, data: DataConfig) -> None:
    """Raise ValueError where the recipe cannot read the documents."""
    if recipe.top_k is not None and data.packing.method == "concat":
        raise ValueError(
            "data.packing.method: concat cuts documents elsewhere in every epoch, so the teacher's words that "
            "recipe.top_k keeps would be those after other words; set it to best-fit or single, or remove recipe.top_k"
        )
    wanted = RECIPE_FORMATS.get(recipe.name)
    for source in data.sources:
        if wanted is not None and source.format != wanted:
            raise ValueError(
                f"data.format: {source.format} is not what recipe.name {recipe.name} compares; set it to {wanted}"
            )
        if wanted is None and source.format in PAIRED_FORMATS:
            readers = [name for name, format in RECIPE_FORMATS.items() if format == source.format]
            raise ValueError(
                f"recipe.name: {recipe.name} does not compare answers, and data.format is {source.format}; set it to "
                f"{' or '.join(readers)}"
            )
        if recipe.name == "sft" and source.format == "text" and source.prompt is None:
            raise ValueError(
                "data.format: text without data.prompt: recipe.name sft learns answers only; set data.format to what "
                "a row is (messages, ...), name data.prompt, or set recipe.name to pretrain"
            )
        if recipe.precomputes_logprobs and source.streaming:
            raise ValueError(
                f"data.streaming: true with recipe.name {recipe.name}, which reads every document before the first "
                "step; set it to false"
            )


def check_teacher(recipe: RecipeConfig, model: ModelConfig, data: DataConfig) -> None:
    """Raise ValueError where the teacher does not speak of the same words, or cannot read rows so long."""
    teacher = recipe.teacher
    if teacher is None:
        return
    for key in ("vocab", "padded_vocab"):
        theirs, own = getattr(teacher, key), getattr(model, key)
        if theirs != own:
            name = "vocab" if key == "vocab" else "vocab_multiple"
            raise ValueError(
                f"model.{name}: {getattr(model, name)} is not the teacher's ({getattr(teacher, name)}), so their words "
                f"cannot be compared; set it to {getattr(teacher, name)}, or take another teacher"
            )
    if recipe.top_k is not None and recipe.top_k > model.vocab:
        raise ValueError(f"recipe.top_k: {recipe.top_k} exceeds model.vocab ({model.vocab}); use a smaller one")
    if teacher.position_encoding == "learned" and teacher.max_positions < data.sequence_length:
        raise ValueError(
            f"data.sequence_length: {data.sequence_length} exceeds the {teacher.max_positions} positions that "
            "recipe.teacher has learned; shorten the rows, or take another teacher"
        )
