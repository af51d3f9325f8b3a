"""The data path in order: open the sources, tokenize, hold out, pack, mix."""

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
MIXTURE_KEY = 0  # the random key of the mixture; source number n has n + 1


@dataclass(frozen=True)
class Data:
    """The data of a run."""

    tokenizer: Tokenizer
    train: Dataset
    held_out: HeldOutDataset | FixedHeldOutMixture | None  # None where data.held_out is 0
    template: Template | None  # of conversations; None where there is none
    tokens: int  # of all token stores; of a stream, its first window
    fingerprint: str  # of everything but the seed that decides the content of sample i
    summary: dict[str, int]  # see `summarize_data`


@dataclass(frozen=True)
class OpenedSource:
    """One source with its documents."""

    key: str  # of its settings, for errors: data.mixture.0
    documents: Documents  # of a stream, its first window
    stream: DocumentStream | None
    may_cut: bool = True  # whether a document longer than a row may be cut

    @property
    def fingerprint(self) -> str:
        return self.stream.fingerprint if self.stream else self.documents.fingerprint


def load_run_data(config: RunConfig) -> Data:
    """`build_data` for a run, checked against the vocabulary of its model."""
    return build_data(config.all_data, seed=config.seed, model_vocab=config.model.vocab, adapters=adapter_rows(config))


def build_data(
    data: DataConfig, *, seed: int, model_vocab: int | None = None, adapters: Mapping[str, int] | None = None
) -> Data:
    """Read, tokenize, split and pack the documents of `data`; slow stages are cached.

    The tokenizer must fit `model_vocab` (None: not checked). With several `adapters` (name -> rows of a batch) the
    sources of the mixture are those of the adapters. Raises UserError where the data cannot be used.
    """
    cache = cache_directory(data.cache)
    template = load_template(data)
    sources = [
        open_entry(source, key=key, window=data.packing.window, cache=cache, template=template)
        for source, key in zip(data.sources, source_keys(data, adapters or {}), strict=True)
    ]
    tokenizer = configured_tokenizer(data.tokenizer) or train_tokenizer(sources, data, cache=cache)
    if model_vocab is not None:
        check_vocab_size(tokenizer, model_vocab)
    packing = Packing(data.packing.method, data.packing.window, RowShape.of(tokenizer, data.sequence_length))

    parts = number_tokens([split_held_out(source, tokenizer, data=data, cache=cache) for source in sources])
    held_out_identities = np.concatenate([part.store.identities[part.documents] for part in parts])
    training_documents = []
    for source, part in zip(sources, parts, strict=True):
        documents = np.flatnonzero(~np.isin(part.store.identities, held_out_identities))
        training_documents.append(drop_longer_than_row(part.store, documents, source, data.sequence_length))
        check_source_size(source, part, documents=training_documents[-1], data=data)

    training = []
    for number, (source, part, documents) in enumerate(zip(sources, parts, training_documents, strict=True), start=1):
        key = (seed, 1 if adapters else number)  # the rows of an adapter are those of a run of its own
        if source.stream:
            window = stream_windows(
                source, tokenizer, held_out_identities=held_out_identities, packing=packing, key=key, cache=cache
            )
            training.append(StreamedDataset(window, key=key))
        else:
            training.append(ShuffledDataset(part.store, documents, packing=packing, key=key))
    if adapters:
        dataset = FixedTrainingMixture(dict(zip(adapters, training, strict=True)), rows=adapters)
        held_out = {name: HeldOutDataset([part], packing=packing) for name, part in zip(adapters, parts, strict=True)}
        evaluation = FixedHeldOutMixture(held_out, rows=adapters) if data.held_out else None
    else:
        weights = [source.weight for source in data.sources]
        dataset = Mixture(training, weights=weights, key=(seed, MIXTURE_KEY)) if data.mixture else training[0]
        evaluation = HeldOutDataset(parts, packing=packing) if data.held_out else None
    summary = summarize_data(parts, dataset)
    tokens = sum(len(part.store.tokens) for part in parts)
    fingerprint = fingerprint_data(data, sources, tokenizer=tokenizer)
    return Data(tokenizer, dataset, evaluation, template, tokens, fingerprint, summary)


def load_template(data: DataConfig) -> Template | None:
    """The chat template of conversations. Our own tokenizers have one special token that templates may name."""
    specials = {"bos_token": END, "eos_token": END}
    return find_template(data.template, tokenizer=data.tokenizer.file, tokens=specials)


def open_entry(source: MixtureSource, *, key: str, window: int, cache: Path, template: Template | None) -> OpenedSource:
    """The documents of one source. Raises UserError where there are none."""
    may_cut = source.format == "text"
    if not source.streaming:
        documents = open_source(source, key=key, cache=cache, template=template)
        return OpenedSource(key, documents, stream=None, may_cut=may_cut)
    stream = open_stream(source, window=window, cache=cache, template=template)
    return OpenedSource(key, stream.window(0), stream, may_cut=may_cut)


def split_held_out(source: OpenedSource, tokenizer: Tokenizer, *, data: DataConfig, cache: Path) -> HeldOutSource:
    """The tokens of a source (of a stream: of its first window), and the documents that are held out."""
    store = tokenize(source.documents, tokenizer, cache=cache)
    held_out = np.flatnonzero(select_held_out(store.identities, fraction=data.held_out))
    return HeldOutSource(source.documents, store, drop_longer_than_row(store, held_out, source, data.sequence_length))


def number_tokens(parts: list[HeldOutSource]) -> list[HeldOutSource]:
    """The parts with their stores numbered, so that each token of the run has its own index."""
    firsts = np.cumsum([0, *(len(part.store.tokens) for part in parts)]).tolist()
    return [
        replace(part, store=replace(part.store, first_token=first)) for part, first in zip(parts, firsts, strict=False)
    ]


def drop_longer_than_row(
    store: TokenStore, documents: np.ndarray, source: OpenedSource, sequence_length: int
) -> np.ndarray:
    """`documents` without those that are longer than a row and must not be cut; logs a warning with their number."""
    if source.may_cut:
        return documents
    fits = store.lengths[documents] <= sequence_length
    if not fits.all():
        logger.warning(
            "%s: skipped %d of %d examples that are longer than data.sequence_length (%d); the longest has %d tokens",
            *(source.key, np.count_nonzero(~fits), len(fits), sequence_length, store.lengths[documents].max()),
        )
    return documents[fits]


def stream_windows(
    source: OpenedSource,
    tokenizer: Tokenizer,
    *,
    held_out_identities: np.ndarray,
    packing: Packing,
    key: tuple[int, ...],
    cache: Path,
) -> Callable[[int], tuple[ShuffledDataset, bool]]:
    """Make the function from the number of a window to its samples, as `StreamedDataset` needs it.

    Documents whose identity is in `held_out_identities` are skipped in all windows.
    """

    def window(number: int) -> tuple[ShuffledDataset, bool]:
        documents = source.stream.window(number)
        store = tokenize(documents, tokenizer, cache=cache)
        training = np.flatnonzero(~np.isin(store.identities, held_out_identities))
        training = drop_longer_than_row(store, training, source, packing.shape.sequence_length)
        return ShuffledDataset(store, training, packing=packing, key=(*key, number)), len(
            documents
        ) < source.stream.size

    return window


def train_tokenizer(sources: list[OpenedSource], data: DataConfig, *, cache: Path) -> Tokenizer:
    """A BPE that is trained on the training documents of all sources; a source that occurs twice counts once."""
    import tokenizers

    vocab = data.tokenizer.vocab
    unique = {source.documents.fingerprint: source.documents for source in sources}
    key = digest("bpe-1", tokenizers.__version__, str(vocab), str(data.held_out), *unique)

    def write(directory: Path) -> None:
        logger.info("training a tokenizer of %d ids", vocab)
        train_bpe(training_texts(list(unique.values()), fraction=data.held_out), vocab=vocab).save(directory)

    return cache_entry(cache / "tokenizers" / key, read=load_tokenizer, write=write)


def training_texts(sources: list[Documents], *, fraction: float) -> Iterator[str]:
    """The text of every document that is not held out; reads the documents twice."""
    for source in sources:
        mask = select_held_out([text_identity(text) for _, text in nonempty_texts(source)], fraction=fraction)
        for is_held_out, (_, text) in zip(mask, nonempty_texts(source), strict=True):
            if not is_held_out:
                yield plain_text(text)


def check_source_size(source: OpenedSource, part: HeldOutSource, *, documents: np.ndarray, data: DataConfig) -> None:
    """Raise UserError where a source has no text, fills no row, or has no document to hold out."""
    store = part.store
    if not len(store):
        raise UserError(f"{source.key}: all documents of the source are empty; use a source with text")
    if not source.may_cut and not len(documents):
        raise UserError(
            f"data.sequence_length: {data.sequence_length} tokens fit no example of {source.key}; raise it, the "
            f"shortest has {store.lengths.min()}, half have at most {int(np.median(store.lengths))}"
        )
    tokens = int(store.lengths[documents].sum())
    if tokens < data.sequence_length and source.may_cut and not source.stream:
        raise UserError(
            f"data.sequence_length: {data.sequence_length} exceeds the {tokens} training tokens of {source.key} "
            f"({len(store)} documents, {int(store.lengths.sum())} tokens in all); lower it, or add text"
        )
    if data.held_out and not len(part.documents):
        remedy = (
            "raise data.packing.window" if source.stream else f"set {source.key}.separator, e.g. '\\n\\n', add files"
        )
        raise UserError(
            f"data.held_out: {data.held_out} of {len(store)} document holds out nothing; {remedy}, "
            "or set data.held_out to 0"
        )


def fingerprint_data(data: DataConfig, sources: list[OpenedSource], *, tokenizer: Tokenizer) -> str:
    """A hash of everything but the seed that decides the samples: sources, weights, tokenizer, packing, split."""
    settings = (data.sequence_length, data.packing.method, data.packing.window, data.held_out)
    weights = [str(source.weight) for source in data.sources] if data.mixture else []
    return digest(*(source.fingerprint for source in sources), tokenizer.fingerprint, *map(str, settings), *weights)


def summarize_data(parts: list[HeldOutSource], training: Dataset) -> dict[str, int]:
    """Counts of all documents and of held-out ones; of a stream, only of its first window."""
    held_out = [(part.store, part.documents) for part in parts]
    return {
        "documents": sum(len(store) for store, _ in held_out),
        "tokens": sum(int(store.offsets[-1]) for store, _ in held_out),
        "bytes": sum(int(store.sizes.sum()) for store, _ in held_out),
        "rows": training.rows_per_epoch(0),
        "held_out_documents": sum(len(documents) for _, documents in held_out),
        "held_out_tokens": sum(int(store.learned[documents].sum()) for store, documents in held_out),
        "held_out_bytes": sum(int(store.sizes[documents].sum()) for store, documents in held_out),
    }
