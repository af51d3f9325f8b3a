"""Recipes by the name used in `recipe.name`."""

from .interface import Recipe
from .kto import KTO
from .next_token import NEXT_TOKEN
from .preference import DPO, IPO, ORPO, SIMPO

RECIPES: dict[str, Recipe] = {
    "pretrain": NEXT_TOKEN,
    "sft": NEXT_TOKEN,
    "dpo": DPO,
    "ipo": IPO,
    "orpo": ORPO,
    "simpo": SIMPO,
    "kto": KTO,
    "lrec": NEXT_TOKEN,  # of its held-out loss; what it learns is in `train/repair.py`
}
