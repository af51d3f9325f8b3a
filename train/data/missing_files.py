"""Files that a configuration names and this machine does not have: what `validate` can say without opening any.

No error there: a run may be checked on one machine and train on another. Where it trains, it is one.
"""

from collections.abc import Iterator
from pathlib import Path

from ...configs.adapter_runs import adapter_rows
from ...configs.errors import UserError
from ...configs.run import RunConfig
from .source_paths import match_files, source_keys, tokenizer_file

IN_FILES = ("text", "jsonl", "parquet", "arrow")
WEIGHTS = "*.safetensors"


def find_missing_files(config: RunConfig) -> Iterator[str]:
    """A line for each, with key, value and remedy."""
    for source, key in zip(config.all_data.sources, source_keys(config.all_data, adapter_rows(config)), strict=True):
        if source.kind in IN_FILES:
            try:
                match_files(source.path, kind=source.kind, key=key)
            except UserError as error:
                yield str(error)
    if config.all_data.tokenizer.file is not None:
        try:
            tokenizer_file(config.all_data.tokenizer.file)
        except UserError as error:
            yield str(error)
    for key, model in (("model", config.model), ("recipe.teacher", config.recipe.teacher)):
        if model is not None and model.origin is not None and not any(Path(model.origin).expanduser().glob(WEIGHTS)):
            yield f"{key}.from: {model.origin} holds no {WEIGHTS}; copy the model's weights there"
