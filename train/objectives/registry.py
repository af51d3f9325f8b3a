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
    "lrec": NEXT_TOKEN,  # only the held-out loss; the training loss is in `distillation.py`, as for distill
    "distill": NEXT_TOKEN,
}


def batch_fields(config: RunConfig) -> tuple[str, ...]:
    """Return the names of all fields in the batches of a run."""
    teacher = () if config.recipe.top_k is None else TEACHER_TOP_K_FIELDS
    adapter_ids = (ADAPTER_IDS_FIELD,) if config.adapters else ()
    return (*BATCH_FIELDS, *RECIPES[config.recipe.name].extra_fields, *teacher, *adapter_ids)
