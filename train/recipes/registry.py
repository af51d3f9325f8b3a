"""Recipes by the name used in `recipe.name`."""

from ...configs.names import BATCH_FIELDS, TOP_FIELDS
from ...configs.recipe import RecipeConfig
from .interface import Recipe
from .kto import KTO
from .next_token import NEXT_TOKEN
from .preference import DPO, IPO, ORPO, SIMPO
from .reward import REWARD

RECIPES: dict[str, Recipe] = {
    "pretrain": NEXT_TOKEN,
    "sft": NEXT_TOKEN,
    "dpo": DPO,
    "ipo": IPO,
    "orpo": ORPO,
    "simpo": SIMPO,
    "kto": KTO,
    "reward": REWARD,
    "lrec": NEXT_TOKEN,  # of their held-out loss; what they learn is in `train/teaching.py`
    "distill": NEXT_TOKEN,
}


def fields(config: RecipeConfig) -> tuple[str, ...]:
    """All fields that batches of a recipe have."""
    return (*BATCH_FIELDS, *RECIPES[config.name].reads, *(() if config.top_k is None else TOP_FIELDS))
