"""Files that a configuration names and this machine does not have, found without opening a file.

`validate` only reports them, because a run may be validated on one machine and trained on another, where it is an
error.
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
    """One line for each missing file, with key, value and remedy."""
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
            yield f"{key}.from: {model.origin} has no {WEIGHTS}; copy the model's weights there"
