"""What is learned: the recipe, the numbers it reads, and the documents it is made for."""

from typing import Any, Literal

from pydantic import Field, model_validator

from .base import Section
from .data import PAIRED, DataConfig

# Recipe -> the keys it reads beside `name`, with their defaults.
RECIPE_KEYS: dict[str, dict[str, float]] = {
    "pretrain": {},
    "sft": {},
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "margin": 1.0},
    "kto": {"beta": 0.1, "desirable": 1.0, "undesirable": 1.0},
    "lrec": {},
}
# Recipe -> the one format of its documents; the others read what is not compared.
RECIPE_FORMATS = {"dpo": "preference", "ipo": "preference", "orpo": "preference", "simpo": "preference"}
RECIPE_FORMATS |= {"kto": "unpaired"}
REFERENCED = ("dpo", "ipo", "kto")  # recipes that compare with the model as it was before the first step


class RecipeConfig(Section):
    """What is learned."""

    name: Literal[tuple(RECIPE_KEYS)] = "pretrain"  # type: ignore[valid-type]
    """pretrain: next token; sft: the same, of answers only; of pairs: dpo (arXiv:2305.18290), ipo (2310.12036), orpo
    (2403.07691), simpo (2405.14734); of single answers, good or bad: kto (2402.01306); of a quantized
    base, what it said when it was whole: lrec (2306.08162)."""
    beta: float | None = Field(None, gt=0)
    """How much a difference of log-probabilities counts (orpo: weight of the odds). null: dpo, ipo, orpo, kto 0.1,
    simpo 2."""
    margin: float | None = Field(None, ge=0)
    """simpo: how far the better answer should be ahead, after `beta`; null: 1."""
    desirable: float | None = Field(None, gt=0)
    """kto: weight of answers to give; null: 1."""
    undesirable: float | None = Field(None, gt=0)
    """kto: weight of answers not to give; null: 1."""

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
        return self

    def number(self, key: str) -> float:
        """The value of a key, its recipe's default where it is null."""
        value = getattr(self, key)
        return RECIPE_KEYS[self.name][key] if value is None else value


def check_recipe(recipe: RecipeConfig, data: DataConfig) -> None:
    """Raise ValueError where the recipe cannot read the documents."""
    wanted = RECIPE_FORMATS.get(recipe.name)
    for source in data.sources:
        if wanted is not None and source.format != wanted:
            raise ValueError(
                f"data.format: {source.format} is not what recipe.name {recipe.name} compares; set it to {wanted}"
            )
        if wanted is None and source.format in PAIRED:
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
        if recipe.name in REFERENCED and source.streaming:
            raise ValueError(
                f"data.streaming: true with recipe.name {recipe.name}, which reads every document before the first "
                "step; set it to false"
            )
