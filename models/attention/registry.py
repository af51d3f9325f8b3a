"""The implementations of attention by the name `model.attention` gives them, and the choice among them."""

from ...configs.errors import UserError
from .blockwise import BLOCKWISE
from .cudnn import CUDNN
from .dense import DENSE
from .interface import Implementation, Mask, TokenIndices, check

IMPLEMENTATIONS: dict[str, Implementation] = {item.name: item for item in (DENSE, BLOCKWISE, CUDNN)}


def choose(name: str, *, mask: Mask, indices: TokenIndices, q, k, platform: str) -> Implementation:
    """The implementation called `name` for arrays like q and k; "auto" is cudnn unless it refuses, then blockwise.

    q, k and the fields of `indices` only need a shape and a dtype, as `jax.ShapeDtypeStruct` has. `platform` is "cpu"
    or "gpu". Raises UserError for an unknown name, and for a named implementation that refuses.
    """
    if name == "auto":
        return BLOCKWISE if CUDNN.refuse(mask, indices, q, k, platform) else CUDNN
    if name not in IMPLEMENTATIONS:
        raise UserError.no_match("model.attention", [name], candidates=["auto", *IMPLEMENTATIONS])
    check(IMPLEMENTATIONS[name], q, k, k, mask, indices, platform=platform)
    return IMPLEMENTATIONS[name]
