"""Which files the section `data` names. Opens none of them, so that `validate` can ask in no time."""

from collections.abc import Mapping
from glob import glob
from pathlib import Path

from ...configs.errors import UserError
from ...configs.sections.data import DataConfig


def source_keys(data: DataConfig, adapters: Mapping[str, int]) -> list[str]:
    """Where the settings of each source stand, for errors."""
    if adapters:
        return [f"adapters.{name}.data" for name in adapters]
    return [f"data.mixture.{number}" for number in range(len(data.mixture))] or ["data"]


def match_files(path: str, *, kind: str, key: str) -> list[Path]:
    """The files `path` names, sorted: a file, a glob, or all files of a directory that are of a source's `kind`.

    Hidden files and directories are skipped. Raises UserError when there are none.
    """
    given, suffix = Path(path).expanduser(), "" if kind == "text" else f".{kind}"
    if given.is_file():
        return [given]
    if given.is_dir():
        inside = (file for file in given.rglob("*" + suffix) if file.is_file())
        found = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(given).parts)]
    else:
        found = [Path(match) for match in glob(str(given), recursive=True) if Path(match).is_file()]
    if not found:
        what = f"holds no {suffix or 'files'}" if given.is_dir() else "matches no file"
        raise UserError(f"{key}.path: {path} {what} (from {Path.cwd()}); set it to a file, a directory or a glob")
    return sorted(found)


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json at `path`, or in the directory `path`. Raises UserError when there is none."""
    given = Path(path).expanduser()
    file = given / "tokenizer.json" if given.is_dir() else given
    if file.is_file():
        return file
    if not given.is_dir():
        raise UserError(
            f"data.tokenizer.file: {path} does not exist (from {Path.cwd()}); set it to a tokenizer.json, or to the "
            "directory of one"
        )
    raise UserError(
        f"data.tokenizer.file: {path} holds no tokenizer.json; copy the model's there (transformers makes one of other "
        "files: AutoTokenizer.from_pretrained(...).save_pretrained(...)), or set data.tokenizer"
    )
