"""The implementations of attention by the name `model.attention` gives them, and the choice among them."""

from ...configs.errors import UserError
from .blockwise import BLOCKWISE
from .cudnn import CUDNN
from .dense import DENSE
from .interface import Implementation, Mask, TokenIndices, check
from .splash import SPLASH

IMPLEMENTATIONS: dict[str, Implementation] = {item.name: item for item in (DENSE, BLOCKWISE, CUDNN, SPLASH)}
AUTOMATIC = (CUDNN, SPLASH, BLOCKWISE)  # the order in which "auto" tries them; the last one refuses nothing


def choose(name: str, *, mask: Mask, indices: TokenIndices, q, k, platform: str) -> Implementation:
    """The implementation called `name` for arrays like q and k; "auto" is the device's own kernel (cudnn on a GPU,
    splash on a TPU) unless it refuses, then blockwise.

    q, k and the fields of `indices` only need a shape and a dtype, as `jax.ShapeDtypeStruct` has. `platform` is "cpu",
    "gpu" or "tpu". Raises UserError for an unknown name, and for a named implementation that refuses.
    """
    if name == "auto":
        return next(item for item in AUTOMATIC if not item.refuse(mask, indices, q, k, platform))
    if name not in IMPLEMENTATIONS:
        raise UserError.no_match("model.attention", [name], candidates=["auto", *IMPLEMENTATIONS])
    check(IMPLEMENTATIONS[name], q, k, k, mask, indices, platform=platform)
    return IMPLEMENTATIONS[name]
