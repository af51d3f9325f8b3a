"""Formats by the name in `quantization.format`."""

from .integer_codes import integers
from .interface import Format
from .nf4 import NF4

FORMATS: dict[str, Format] = {"nf4": NF4} | {f"int{bits}": integers(bits) for bits in (8, 4, 3, 2)}
