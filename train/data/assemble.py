"""The whole data path in order: open the sources, split, tokenize, pack, mix."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...configs.adapter_runs import adapter_rows
from ...configs.errors import UserError
from ...configs.run import RunConfig
from ...configs.sections.data import DataConfig, MixtureSource
from .chat import Template, find_template
from .dataset import Dataset, HeldOutDataset, HeldOutSource, Packing, ShuffledDataset
from .disk_cache import cache_directory, cache_entry
from .documents import Documents, digest, nonempty_texts
from .fixed_mixture import FixedHeldOutMixture, FixedTrainingMixture
from .held_out_split import select_held_out, text_identity
from .marked_text import plain_text
from .mixture import Mixture
from .rows import RowShape
from .source_paths import source_keys
from .sources import open_source, open_stream
from .streaming_source import DocumentStream, StreamedDataset
from .token_store import TokenStore, tokenize
from .tokenizer import END, Tokenizer, check_vocab_size, configured_tokenizer, load_tokenizer, train_bpe

logger = logging.getLogger(__name__)
MIXTURE_KEY = 0  # the mixture's own key, where source number n has n + 1


@dataclass(frozen=True)
class Data:
    """All a run needs to know about its data."""

    tokenizer: Tokenizer
    train: Dataset
    held_out: HeldOutDataset | FixedHeldOutMixture | None  # None where data.held_out is 0
    template: Template | None  # of conversations; None where there is none
    tokens: int  # of all stores: places that a row may name; of a stream those of its first window
    fingerprint: str  # of everything but the seed that decides what sample i holds
    summary: dict[str, int]  # what `summary` counts


@dataclass(frozen=True)
class OpenedSource:
    """One entry of the mixture, opened."""

    key: str  # where its settings stand, for errors
    documents: Documents  # all of them; of a stream those of its first window
    stream: DocumentStream | None
    may_cut: bool = True  # whether a document longer than a row may be cut

    @property
    def fingerprint(self) -> str:
        return self.stream.fingerprint if self.stream else self.documents.fingerprint


def load_run_data(config: RunConfig) -> Data:
    """`build` for all that a run reads, checked against its model."""
    return build_data(config.all_data, seed=config.seed, model_vocab=config.model.vocab, adapters=adapter_rows(config))


def build_data(
    data: DataConfig, *, seed: int, model_vocab: int | None = None, adapters: Mapping[str, int] | None = None
) -> Data:
    """Read, split, tokenize and pack what `data` describes; all that takes time is cached.

    `model_vocab` is checked against the tokenizer (default: not). With several `adapters` (name -> rows of a batch) the
    sources of the mixture are theirs. Raises UserError where the data cannot be used.
    """
    cache = cache_directory(data.cache)
    template = load_template(data)
    sources = [
        open_entry(
            source,
            key=key,
            window=data.packing.window,
            cache=cache,
            template=template,
        )
        for source, key in zip(data.sources, source_keys(data, adapters or {}), strict=True)
    ]
    tokenizer = configured_tokenizer(data.tokenizer) or train_tokenizer(sources, data, cache=cache)
    if model_vocab is not None:
        check_vocab_size(tokenizer, model_vocab)
    packing = Packing(data.packing.method, data.packing.window, RowShape.of(tokenizer, data.sequence_length))

    parts = number_tokens([split_held_out(source, tokenizer, data=data, cache=cache) for source in sources])
    evaluated = np.concatenate([part.store.identities[part.documents] for part in parts])
    kept = [
        drop_longer_than_row(
            part.store, np.flatnonzero(~np.isin(part.store.identities, evaluated)), source, data.sequence_length
        )
        for source, part in zip(sources, parts, strict=True)
    ]
    for source, part, documents in zip(sources, parts, kept, strict=True):
        check_source_size(source, part, documents=documents, data=data)

    training = []
    for number, (source, part, documents) in enumerate(zip(sources, parts, kept, strict=True), start=1):
        key = (seed, 1 if adapters else number)  # an adapter reads as it would alone
        if source.stream:
            window = stream_windows(
                source, tokenizer, held_out_identities=evaluated, packing=packing, key=key, cache=cache
            )
            training.append(StreamedDataset(window, key=key))
        else:
            training.append(ShuffledDataset(part.store, documents, packing=packing, key=key))
    if adapters:
        mixed = FixedTrainingMixture(dict(zip(adapters, training, strict=True)), rows=adapters)
        held = {name: HeldOutDataset([part], packing=packing) for name, part in zip(adapters, parts, strict=True)}
        evaluation = FixedHeldOutMixture(held, rows=adapters) if data.held_out else None
    else:
        weights = [source.weight for source in data.sources]
        mixed = Mixture(training, weights=weights, key=(seed, MIXTURE_KEY)) if data.mixture else training[0]
        evaluation = HeldOutDataset(parts, packing=packing) if data.held_out else None
    counted = summarize_data(parts, mixed)
    tokens = sum(len(part.store.tokens) for part in parts)
    known = fingerprint_data(data, sources, tokenizer=tokenizer)
    return Data(tokenizer, mixed, evaluation, template, tokens, known, counted)


def load_template(data: DataConfig) -> Template | None:
    """How conversations become text. Tokenizers that are made here have one special token that templates may name."""
    specials = {"bos_token": END, "eos_token": END}
    return find_template(data.template, tokenizer=data.tokenizer.file, tokens=specials)


def open_entry(source: MixtureSource, *, key: str, window: int, cache: Path, template: Template | None) -> OpenedSource:
    """The documents of one source. Raises UserError when there are none."""
    cut = source.format == "text"
    if not source.streaming:
        documents = open_source(source, key=key, cache=cache, template=template)
        return OpenedSource(key, documents, stream=None, may_cut=cut)
    stream = open_stream(source, window=window, cache=cache, template=template)
    return OpenedSource(key, stream.window(0), stream, may_cut=cut)


def split_held_out(source: OpenedSource, tokenizer: Tokenizer, *, data: DataConfig, cache: Path) -> HeldOutSource:
    """The tokens of a source (of a stream: of its first window), and which of its documents are held out."""
    store = tokenize(source.documents, tokenizer, cache=cache)
    chosen = np.flatnonzero(select_held_out(store.identities, fraction=data.held_out))
    return HeldOutSource(source.documents, store, drop_longer_than_row(store, chosen, source, data.sequence_length))


def number_tokens(parts: list[HeldOutSource]) -> list[HeldOutSource]:
    """The parts, each token of their stores with a number of its own."""
    firsts = np.cumsum([0, *(len(part.store.tokens) for part in parts)]).tolist()
    return [
        replace(part, store=replace(part.store, first_token=first)) for part, first in zip(parts, firsts, strict=False)
    ]


def drop_longer_than_row(
    store: TokenStore, documents: np.ndarray, source: OpenedSource, sequence_length: int
) -> np.ndarray:
    """`documents`, less those that are longer than a row and must not be cut; says how many these are."""
    if source.may_cut:
        return documents
    fit = store.lengths[documents] <= sequence_length
    if not fit.all():
        logger.warning(
            "%s: left out %d of %d examples, longer than a row (data.sequence_length: %d); the longest has %d tokens",
            *(source.key, np.count_nonzero(~fit), len(fit), sequence_length, store.lengths[documents].max()),
        )
    return documents[fit]


def stream_windows(
    source: OpenedSource,
    tokenizer: Tokenizer,
    *,
    held_out_identities: np.ndarray,
    packing: Packing,
    key: tuple[int, ...],
    cache: Path,
) -> Callable[[int], tuple[ShuffledDataset, bool]]:
    """The function from a window's number to its samples that `Streamed` asks for.

    Documents whose identity is in `evaluated` are left out, wherever in the stream they come.
    """

    def window(number: int) -> tuple[ShuffledDataset, bool]:
        documents = source.stream.window(number)
        store = tokenize(documents, tokenizer, cache=cache)
        kept = np.flatnonzero(~np.isin(store.identities, held_out_identities))
        kept = drop_longer_than_row(store, kept, source, packing.shape.sequence_length)
        return ShuffledDataset(store, kept, packing=packing, key=(*key, number)), len(documents) < source.stream.size

    return window


def train_tokenizer(sources: list[OpenedSource], data: DataConfig, *, cache: Path) -> Tokenizer:
    """A BPE of the training documents of all sources, each counted once; read twice: to split, and to count."""
    import tokenizers

    vocab = data.tokenizer.vocab
    once = {source.documents.fingerprint: source.documents for source in sources}
    key = digest("bpe-1", tokenizers.__version__, str(vocab), str(data.held_out), *once)

    def write(directory: Path) -> None:
        logger.info("training a tokenizer of %d ids", vocab)
        train_bpe(training_texts(list(once.values()), fraction=data.held_out), vocab=vocab).save(directory)

    return cache_entry(cache / "tokenizers" / key, read=load_tokenizer, write=write)


def training_texts(sources: list[Documents], *, fraction: float) -> Iterator[str]:
    """The text of every document that is not held out."""
    for source in sources:
        out = select_held_out([text_identity(text) for _, text in nonempty_texts(source)], fraction=fraction)
        for hidden, (_, text) in zip(out, nonempty_texts(source), strict=True):
            if not hidden:
                yield plain_text(text)


def check_source_size(source: OpenedSource, part: HeldOutSource, *, documents: np.ndarray, data: DataConfig) -> None:
    """Raise UserError where a source has no text, fills no row, or has nothing to hold out."""
    store = part.store
    if not len(store):
        raise UserError(f"{source.key}: every document of the source is empty; it must hold text")
    if not source.may_cut and not len(documents):
        raise UserError(
            f"data.sequence_length: no example of {source.key} fits in {data.sequence_length} tokens; the shortest has "
            f"{store.lengths.min()}, half have at most {int(np.median(store.lengths))}"
        )
    tokens = int(store.lengths[documents].sum())
    if tokens < data.sequence_length and source.may_cut and not source.stream:
        raise UserError(
            f"data.sequence_length: {data.sequence_length} tokens make a row, but {source.key} has only {tokens} to "
            f"train on ({len(store)} documents, {int(store.lengths.sum())} tokens in all); shorten it or add text"
        )
    if data.held_out and not len(part.documents):
        remedy = (
            "raise data.packing.window" if source.stream else f"set {source.key}.separator, e.g. '\\n\\n', add files"
        )
        raise UserError(
            f"data.held_out: {data.held_out} of {len(store)} document leaves nothing to hold out; {remedy}, "
            "or set data.held_out to 0"
        )


def fingerprint_data(data: DataConfig, sources: list[OpenedSource], *, tokenizer: Tokenizer) -> str:
    """Equal for equal samples: sources, weights, tokenizer, packing and split; the seed is the run's."""
    settings = (data.sequence_length, data.packing.method, data.packing.window, data.held_out)
    weights = [str(source.weight) for source in data.sources] if data.mixture else []
    return digest(*(source.fingerprint for source in sources), tokenizer.fingerprint, *map(str, settings), *weights)


def summarize_data(parts: list[HeldOutSource], training: Dataset) -> dict[str, int]:
    """Counts of all documents that were read, and of those held out; of a stream only its first window was."""
    held = [(part.store, part.documents) for part in parts]
    return {
        "documents": sum(len(store) for store, _ in held),
        "tokens": sum(int(store.offsets[-1]) for store, _ in held),
        "bytes": sum(int(store.sizes.sum()) for store, _ in held),
        "rows": training.rows_per_epoch(0),
        "held_out_documents": sum(len(documents) for _, documents in held),
        "held_out_tokens": sum(int(store.learned[documents].sum()) for store, documents in held),
        "held_out_bytes": sum(int(store.sizes[documents].sum()) for store, documents in held),
    }
