"""The files that the section data names, found without opening them, so that `validate` is fast."""

from collections.abc import Mapping
from glob import glob
from pathlib import Path

from ...configs.errors import UserError
from ...configs.sections.data import DataConfig


def source_keys(data: DataConfig, adapters: Mapping[str, int]) -> list[str]:
    """The key of each source in the configuration, for errors."""
    if adapters:
        return [f"adapters.{name}.data" for name in adapters]
    return [f"data.mixture.{number}" for number in range(len(data.mixture))] or ["data"]


def match_files(path: str, *, kind: str, key: str) -> list[Path]:
    """The files of `path`, sorted: a file, a glob, or all files of `kind` in a directory.

    Hidden files and directories are skipped. Raises UserError where there are none.
    """
    base, suffix = Path(path).expanduser(), "" if kind == "text" else f".{kind}"
    if base.is_file():
        return [base]
    if base.is_dir():
        candidates = (file for file in base.rglob("*" + suffix) if file.is_file())
        files = [file for file in candidates if not any(part.startswith(".") for part in file.relative_to(base).parts)]
    else:
        files = [Path(match) for match in glob(str(base), recursive=True) if Path(match).is_file()]
    if not files:
        reason = f"has no {suffix or 'files'}" if base.is_dir() else "matches no file"
        raise UserError(f"{key}.path: {path} {reason} (from {Path.cwd()}); set it to a file, a directory or a glob")
    return sorted(files)


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json at `path`, or in the directory `path`. Raises UserError where there is none."""
    base = Path(path).expanduser()
    file = base / "tokenizer.json" if base.is_dir() else base
    if file.is_file():
        return file
    if not base.is_dir():
        raise UserError(
            f"data.tokenizer.file: {path} does not exist (from {Path.cwd()}); set it to a tokenizer.json or its "
            "directory"
        )
    raise UserError(
        f"data.tokenizer.file: {path} has no tokenizer.json; copy that of the model there (transformers converts other "
        "files: AutoTokenizer.from_pretrained(...).save_pretrained(...)), or set data.tokenizer"
    )
