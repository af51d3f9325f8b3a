"""The methods that add weights, by the name in `adapter.method`: to linear maps, or as modules elsewhere."""

from .adalora import ADALORA
from .bottleneck import PARALLEL, SERIAL
from .ia3 import IA3
from .interface import AddedModule, LinearMethod
from .lora import DORA, LORA
from .oft import OFT
from .prefix import PREFIX
from .prompt import P_TUNING, PROMPT
from .shira import SHIRA
from .tokens import TOKENS
from .unipelt import UNIPELT
from .vera import VERA

LINEAR_METHODS: dict[str, LinearMethod] = {
    "lora": LORA,
    "dora": DORA,
    "adalora": ADALORA,
    "vera": VERA,
    "ia3": IA3,
    "oft": OFT,
    "shira": SHIRA,
}
ADDED_MODULES: dict[str, tuple[AddedModule, ...]] = {
    "prefix": (PREFIX,),
    "prompt": (PROMPT,),
    "p-tuning": (P_TUNING,),
    "tokens": (TOKENS,),
    "serial": (SERIAL,),
    "parallel": (PARALLEL,),
    "mam": (PREFIX, PARALLEL),  # "mix and match" of arXiv:2110.04366
    "unipelt": UNIPELT,
}
