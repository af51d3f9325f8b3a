"""The names of our modules in transformers' files, by `model_type`. `huggingface_names.yaml` is the table."""

from pathlib import Path

import yaml

_TABLES = yaml.safe_load((Path(__file__).parent / "huggingface_names.yaml").read_text(encoding="utf-8"))

MODULE_NAMES: dict[str, dict[str, str]] = _TABLES["modules"]  # model_type -> our module -> its name in files
SEQUENCE_CLASSIFIERS: dict[str, str] = _TABLES["sequence_classifiers"]  # model_type -> class of reward models
INPUTS_FIRST = frozenset(_TABLES["inputs_first"])  # model_types that store linear maps as [inputs, outputs]
