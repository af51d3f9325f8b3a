"""Formats by the name in `quantization.format`."""

from .integer_codes import integer_format
from .interface import CodeFormat
from .nf4 import NF4

FORMATS: dict[str, CodeFormat] = {"nf4": NF4} | {f"int{bits}": integer_format(bits) for bits in (8, 4, 3, 2)}
