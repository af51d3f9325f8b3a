"""Recipes by the name used in `recipe.name`."""

from ...configs.names import ADAPTER_IDS_FIELD, BATCH_FIELDS, TEACHER_TOP_K_FIELDS
from ...configs.run import RunConfig
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
    "lrec": NEXT_TOKEN,  # of their held-out loss; what they learn is in `train/objectives/distillation.py`
    "distill": NEXT_TOKEN,
}


def batch_fields(config: RunConfig) -> tuple[str, ...]:
    """All fields that batches of a run have."""
    recipe, own = config.recipe, (ADAPTER_IDS_FIELD,) if config.adapters else ()
    return (
        *BATCH_FIELDS,
        *RECIPES[recipe.name].all_data,
        *(() if recipe.top_k is None else TEACHER_TOP_K_FIELDS),
        *own,
    )
