"""Methods that add weights, by the name in `adapter.method`. The others choose among the weights there are."""

from .ia3 import IA3
from .interface import Method
from .lora import DORA, LORA
from .oft import OFT
from .shira import SHIRA
from .vera import VERA

METHODS: dict[str, Method] = {"lora": LORA, "dora": DORA, "vera": VERA, "ia3": IA3, "oft": OFT, "shira": SHIRA}
