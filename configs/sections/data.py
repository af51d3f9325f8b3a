"""What a run reads: sources of documents, the tokenizer, how documents become rows, and what is held out."""

from typing import Literal

from pydantic import Field, model_validator

from .base import Section

Source = Literal["stdlib", "text", "jsonl", "parquet", "arrow", "hf", "synthetic", "docstrings"]

# What a row is -> the columns it must have, and those it may have. `text` reads `data.field` and `data.prompt`.
FORMAT_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": ((), ()),
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "prompt-completion": (("prompt", "completion"), ("tools",)),
    "preference": (("chosen", "rejected"), ("prompt", "margin", "tools")),
    "unpaired": (("prompt", "completion", "label"), ("tools",)),
}
PAIRED_FORMATS = ("preference", "unpaired")  # formats of which a document is two segments that are compared

NEEDS_PATH = ("text", "jsonl", "parquet", "arrow", "hf")
HAS_COLUMNS = ("jsonl", "parquet", "arrow", "hf")
DOCSTRING_FORMATS = ("prompt-completion", "messages", "preference", "unpaired")


class TokenizerConfig(Section):
    """Exactly one of `{train: bpe, vocab: 2048}`, `{file: tokenizer.json}`, `{bytes: true}`."""

    train: Literal["bpe"] | None = None
    """Train a byte-level BPE on the training documents. Default: not."""
    vocab: int | None = Field(None, ge=258)
    """Ids of the trained tokenizer, its 256 bytes and 2 special tokens included. Goes with `train`."""
    file: str | None = None
    """A tokenizer.json, or the directory that holds one. Default: none."""
    bytes: bool = False
    """One id a byte, and 2 special tokens. Default: false."""

    @model_validator(mode="after")
    def _one(self) -> "TokenizerConfig":
        chosen = [name for name in ("train", "file", "bytes") if getattr(self, name)]
        if len(chosen) != 1:
            raise ValueError(
                f"data.tokenizer: {' and '.join(chosen) or 'nothing'} set; set exactly one of "
                "{train: bpe, vocab: 2048}, {file: tokenizer.json}, {bytes: true} and the others to null"
            )
        if (self.vocab is None) is (chosen == ["train"]):
            raise ValueError(
                f"data.tokenizer.vocab: {self.vocab} with {chosen[0]}; it is the size to train, e.g. "
                "{train: bpe, vocab: 2048}, and has no meaning without train"
            )
        return self


class PackingConfig(Section):
    """How documents fill rows of `data.sequence_length` tokens; a row never lets documents see each other."""

    method: Literal["concat", "best-fit", "single"] = "concat"
    """concat: lay documents end to end and cut into rows; best-fit: cut only what is longer than a row; single: a row
    holds one document. Conversations and pairs are never cut: those longer than a row are left out."""
    window: int = Field(1000, ge=1)
    """Documents packed together, independently of all others. Larger packs tighter. Default: 1000."""


class SourceConfig(Section):
    """One collection of documents."""

    source: Source | None = None
    """Where documents come from. Default: stdlib, the installed Python's own source code; docstrings are those of its
    functions, each with the function, for fine-tuning."""
    path: str | None = None
    """File, directory or glob (text, jsonl, parquet, arrow); local directory or hub name (hf). Default: none."""
    name: str | None = None
    """Configuration of an hf dataset that has several. Default: none."""
    split: str = "train"
    """Split of an hf dataset. Default: train."""
    field: str = "text"
    """Column or key that holds the text. Default: text."""
    prompt: str | None = None
    """Column or key of a text that stands before that of `field` and is read but not learned. Default: all is
    learned."""
    format: Literal[tuple(FORMAT_COLUMNS)] = "text"  # type: ignore[valid-type]
    """What a row is: text, a conversation (messages, sharegpt, alpaca), a prompt and a completion, or answers that are
    compared (preference, unpaired). Default: text."""
    columns: dict[str, str] = {}
    """Name of a column in `format` -> what the data set calls it, e.g. {messages: dialog}. Default: the same."""
    separator: str | None = None
    """text: cut each file into documents at this string. Default: a file is a document."""
    documents: int | None = Field(None, ge=1)
    """Read only the first so many documents. Default: all there are (synthetic: 1000)."""
    streaming: bool = False
    """hf: train while downloading; what was read is kept in the cache, so that resuming is exact. The tokenizer is
    trained, and documents are held out, from the first `data.packing.window` documents. Default: false."""

    @property
    def kind(self) -> Source:
        """The source, with the default filled in."""
        return self.source or "stdlib"


class MixtureSource(SourceConfig):
    """One source of a mixture."""

    weight: float = Field(1.0, gt=0)
    """Share of the rows, relative to the other weights. Default: 1."""


class DataConfig(SourceConfig):
    """What a run reads, and in which portions."""

    mixture: tuple[MixtureSource, ...] = ()
    """Several weighted sources, in place of `source`. Default: none."""
    tokenizer: TokenizerConfig = TokenizerConfig(train="bpe", vocab=2048)
    """Default: a BPE of 2048 ids trained on the training documents."""
    template: str | None = None
    """Chat template of conversations: a Jinja file, or `plain`. Default: the one that comes with the tokenizer."""
    sequence_length: int = Field(256, ge=1)
    """Tokens a row. Default: 256."""
    global_batch: int = Field(16, ge=1)
    """Rows an optimizer step, over all devices. Default: 16."""
    packing: PackingConfig = PackingConfig()
    """How documents become rows. Default: concatenated and split."""
    held_out: float = Field(0.02, ge=0, lt=1)
    """Fraction of documents, chosen by content, that is never trained on. Default: 0.02; 0 holds nothing out."""
    prefetch: int = Field(2, ge=1)
    """Batches prepared ahead in the background. Default: 2."""
    cache: str | None = None
    """Directory of tokenized data. Default: $MESHWRIGHT_CACHE, else .cache/meshwright in the working directory."""

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
                f"data.{first}: {getattr(self, first)!r} beside data.mixture; "
                "move it into an entry of the mixture, or set data.mixture to []"
            )
        for number, entry in enumerate(self.mixture):
            check_source(entry, key=f"data.mixture.{number}")
        check_packing(self)
        return self

    @property
    def has_conversations(self) -> bool:
        """Whether conversations are learned."""
        return any(source.format in ("messages", "sharegpt", "alpaca") for source in self.sources)

    @property
    def uncuttable_formats(self) -> set[str]:
        """Formats of the sources whose documents are never cut."""
        return {source.format for source in self.sources} - {"text"}


def _differs(section: SourceConfig, name: str) -> bool:
    return getattr(section, name) != SourceConfig.model_fields[name].default


def check_packing(data: DataConfig) -> None:
    """Raise ValueError where documents would be cut that must not be."""
    if data.uncuttable_formats and data.packing.method == "concat":
        raise ValueError(
            f"data.packing.method: concat cuts documents anywhere, and {' and '.join(sorted(data.uncuttable_formats))} must "
            "stay whole; set it to best-fit, or to single for one example a row"
        )


def check_source(source: SourceConfig, *, key: str) -> None:
    """Raise ValueError where a setting is missing, or set for a source that does not read it."""
    kind = source.kind
    if kind in NEEDS_PATH and not source.path:
        raise ValueError(f"{key}.path: not set, but source {kind} reads one; set it to a file, directory or name")
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
                f"{key}.{name}: {getattr(source, name)!r} means nothing to source {kind}; "
                f"remove it, or set {key}.source to {' or '.join(kinds)}"
            )
    needed, optional = FORMAT_COLUMNS[source.format]
    if unknown := sorted(source.columns.keys() - {*needed, *optional}):
        known = f"those of {source.format} are {', '.join([*needed, *optional])}" if needed else "text has none"
        raise ValueError(f"{key}.columns: {', '.join(unknown)} names no column of the format; {known}")
    if source.format != "text" and (source.field != "text" or source.prompt is not None):
        raise ValueError(f"{key}.field, {key}.prompt: they are for format text; use {key}.columns for {source.format}")
    if source.format == "unpaired" and source.streaming:
        raise ValueError(f"{key}.streaming: true with format unpaired, which reads other rows too; set false")
    if kind == "docstrings" and source.format not in DOCSTRING_FORMATS:
        raise ValueError(
            f"{key}.format: {source.format} is not what docstrings come in; set it to {' or '.join(DOCSTRING_FORMATS)}"
        )
    if source.separator == "":
        raise ValueError(f"{key}.separator: '' cuts nowhere; set a string such as '\\n\\n', or null")
