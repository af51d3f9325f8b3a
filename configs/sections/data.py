"""The section data: sources of documents, the tokenizer, packing into rows, and the held-out split."""

from typing import Literal

from pydantic import Field, model_validator

from .base import Section

Source = Literal["stdlib", "text", "jsonl", "parquet", "arrow", "hf", "synthetic", "docstrings"]

# Format -> (required columns, optional columns). `text` reads `data.field` and `data.prompt` instead.
FORMAT_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": ((), ()),
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "prompt-completion": (("prompt", "completion"), ("tools",)),
    "preference": (("chosen", "rejected"), ("prompt", "margin", "tools")),
    "unpaired": (("prompt", "completion", "label"), ("tools",)),
}
PAIRED_FORMATS = ("preference", "unpaired")  # formats whose documents are two segments that a recipe compares

NEEDS_PATH = ("text", "jsonl", "parquet", "arrow", "hf")
HAS_COLUMNS = ("jsonl", "parquet", "arrow", "hf")
DOCSTRING_FORMATS = ("prompt-completion", "messages", "preference", "unpaired")


class TokenizerConfig(Section):
    """Exactly one of `{train: bpe, vocab: 2048}`, `{file: tokenizer.json}`, `{bytes: true}`."""

    train: Literal["bpe"] | None = None
    """Train a byte-level BPE on the training documents; null: do not."""
    vocab: int | None = Field(None, ge=258)
    """Size of the trained vocabulary in ids, 256 bytes and 2 special tokens included; only with `train`."""
    file: str | None = None
    """A tokenizer.json, or the directory that holds one; null: none."""
    bytes: bool = False
    """Use one id per byte, and 2 special tokens."""

    @model_validator(mode="after")
    def _check_exactly_one(self) -> "TokenizerConfig":
        selected = [name for name in ("train", "file", "bytes") if getattr(self, name)]
        if len(selected) != 1:
            raise ValueError(
                f"data.tokenizer: {' and '.join(selected) or 'nothing'} set; set exactly one of "
                "{train: bpe, vocab: 2048}, {file: tokenizer.json}, {bytes: true} and the others to null"
            )
        if (self.vocab is None) is (selected == ["train"]):
            raise ValueError(
                f"data.tokenizer.vocab: {self.vocab} with {selected[0]}; it is the size of a trained tokenizer; set "
                "both or none, e.g. {train: bpe, vocab: 2048}"
            )
        return self


class PackingConfig(Section):
    """How documents fill rows of `data.sequence_length` tokens. Documents in one row never attend to each other."""

    method: Literal["concat", "best-fit", "single"] = "concat"
    """concat: concatenate documents and cut every row's length; best-fit: cut only documents longer than a row; single:
    one document a row. Conversations and pairs are never cut; those longer than a row are skipped."""
    window: int = Field(1000, ge=1)
    """How many documents are packed together, independently of all others; more give less padding."""


class SourceConfig(Section):
    """One collection of documents."""

    source: Source | None = None
    """Kind of the source; null: stdlib, the source code of the installed Python's standard library. docstrings: its
    functions with their docstrings, for fine-tuning."""
    path: str | None = None
    """File, directory or glob (text, jsonl, parquet, arrow); local directory or name on the hub (hf); null: none."""
    name: str | None = None
    """Configuration of an hf data set that has several; null: none."""
    split: str = "train"
    """Split of an hf data set."""
    field: str = "text"
    """Column or key that holds the text."""
    prompt: str | None = None
    """Column or key of a prompt that precedes the text and has no loss; null: the whole text has."""
    format: Literal[tuple(FORMAT_COLUMNS)] = "text"  # type: ignore[valid-type]
    """Content of a row: text, a conversation (messages, sharegpt, alpaca), a prompt and a completion, or answers for a
    recipe that compares them (preference, unpaired)."""
    columns: dict[str, str] = {}
    """Column of `format` -> its name in the data set, e.g. {messages: dialog}; {}: the same names."""
    separator: str | None = None
    """String that separates the documents of a file (text); null: a file is a document."""
    documents: int | None = Field(None, ge=1)
    """Read only this many documents, the first ones; null: all (synthetic: 1000)."""
    streaming: bool = False
    """Train while downloading (hf). Documents are kept in the cache, so that resuming is exact. The tokenizer is
    trained on, and documents are held out of, the first `data.packing.window` documents."""

    @property
    def kind(self) -> Source:
        """`source`, or stdlib where it is null."""
        return self.source or "stdlib"


class MixtureSource(SourceConfig):
    """One weighted source of a mixture."""

    weight: float = Field(1.0, gt=0)
    """Share of the rows, relative to the weights of the other sources."""


class DataConfig(SourceConfig):
    """The documents of a run, and how they become batches."""

    mixture: tuple[MixtureSource, ...] = ()
    """Several weighted sources, in place of `source`; []: none."""
    tokenizer: TokenizerConfig = TokenizerConfig(train="bpe", vocab=2048)
    """The tokenizer. Default: a BPE of 2048 ids, trained on the training documents."""
    template: str | None = None
    """Chat template of conversations: a Jinja file, or `plain`; null: the template that comes with the tokenizer."""
    sequence_length: int = Field(256, ge=1)
    """Tokens per row."""
    global_batch: int = Field(16, ge=1)
    """Rows per optimizer step, over all devices."""
    packing: PackingConfig = PackingConfig()
    """How documents become rows."""
    held_out: float = Field(0.02, ge=0, lt=1)
    """Fraction of documents, selected by content, that is never trained on; 0: none."""
    prefetch: int = Field(2, ge=1)
    """How many batches are prepared in advance, in the background."""
    cache: str | None = None
    """Directory of tokenized data; null: $MESHWRIGHT_CACHE, else .cache/meshwright in the working directory."""

    @property
    def sources(self) -> tuple[MixtureSource, ...]:
        """The mixture; a single source is a mixture of one."""
        if self.mixture:
            return self.mixture
        return (MixtureSource(**{name: getattr(self, name) for name in SourceConfig.model_fields}),)

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        if not self.mixture:
            check_source(self, key="data")
        elif first := next((name for name in SourceConfig.model_fields if _differs(self, name)), None):
            raise ValueError(
                f"data.{first}: {getattr(self, first)!r} with data.mixture; "
                "move it into an entry of the mixture, or set data.mixture to []"
            )
        for number, entry in enumerate(self.mixture):
            check_source(entry, key=f"data.mixture.{number}")
        check_packing(self)
        return self

    @property
    def has_conversations(self) -> bool:
        """Whether some source has conversations."""
        return any(source.format in ("messages", "sharegpt", "alpaca") for source in self.sources)

    @property
    def uncut_formats(self) -> set[str]:
        """Formats among the sources whose documents are never cut."""
        return {source.format for source in self.sources} - {"text"}


def _differs(section: SourceConfig, name: str) -> bool:
    return getattr(section, name) != SourceConfig.model_fields[name].default


def check_packing(data: DataConfig) -> None:
    """Raise ValueError where packing would cut documents that must not be cut."""
    if data.uncut_formats and data.packing.method == "concat":
        raise ValueError(
            f"data.packing.method: concat cuts documents anywhere, and {' and '.join(sorted(data.uncut_formats))} must "
            "stay whole; set it to best-fit, or to single for one example per row"
        )


def check_source(source: SourceConfig, *, key: str) -> None:
    """Raise ValueError where a setting of the source at `key` is missing, or has no effect on it."""
    kind = source.kind
    if kind in NEEDS_PATH and not source.path:
        raise ValueError(f"{key}.path: null, but source {kind} needs one; set it to a file, a directory or a name")
    readers = {
        "path": NEEDS_PATH,
        "name": ("hf",),
        "split": ("hf",),
        "field": HAS_COLUMNS,
        "prompt": HAS_COLUMNS,
        "format": (*HAS_COLUMNS, "docstrings"),
        "columns": HAS_COLUMNS,
        "separator": ("text",),
        "streaming": ("hf",),
    }
    for name, kinds in readers.items():
        if _differs(source, name) and kind not in kinds:
            raise ValueError(
                f"{key}.{name}: {getattr(source, name)!r} has no effect on source {kind}; "
                f"remove it, or set {key}.source to {' or '.join(kinds)}"
            )
    needed, optional = FORMAT_COLUMNS[source.format]
    if unknown := sorted(source.columns.keys() - {*needed, *optional}):
        remedy = f"use those of {', '.join([*needed, *optional])}" if needed else "remove it, format text has none"
        raise ValueError(f"{key}.columns: {', '.join(unknown)} is no column of format {source.format}; {remedy}")
    if source.format != "text" and (source.field != "text" or source.prompt is not None):
        raise ValueError(f"{key}.field, {key}.prompt: only for format text; use {key}.columns for {source.format}")
    if source.format == "unpaired" and source.streaming:
        raise ValueError(f"{key}.streaming: true with format unpaired, which pairs distant rows; set it to false")
    if kind == "docstrings" and source.format not in DOCSTRING_FORMATS:
        raise ValueError(
            f"{key}.format: {source.format} with source docstrings; set it to {' or '.join(DOCSTRING_FORMATS)}"
        )
    if source.separator == "":
        raise ValueError(f"{key}.separator: '' separates nothing; set a string such as '\\n\\n', or null")
