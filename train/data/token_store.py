"""A tokenized source on disk: all documents in one memory-mapped array.

tokens.npy      [tokens] uint16 or uint32: every token that is a target
offsets.npy     [documents + 1] int64: document i is tokens[offsets[i]:offsets[i + 1]]
openers.npy     [documents, 2] int64: the input from which the first token of each of its segments is predicted
cuts.npy        [documents] int64: tokens of its first segment; all tokens, where it is not a pair
unlearned.npy   [2, ranges] int64: the zeros of the loss mask: tokens[start:stop] without a loss, in order
labels.npy      [documents] float32: the label of the example, for its recipe
identities.npy  [documents] uint64: a hash of the text, see `held_out_split.py`
sizes.npy       [documents] int64: bytes of the learned text in UTF-8
origins.npy     [documents] int64: its index in the source; empty documents are skipped
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .disk_cache import cache_entry
from .documents import Documents, digest, nonempty_texts
from .encoding import BATCH_CHARACTERS, encode_parts
from .held_out_split import text_identity
from .marked_text import parse_document
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)
ARRAYS = ("tokens", "offsets", "openers", "cuts", "unlearned", "labels", "identities", "sizes", "origins")


@dataclass(frozen=True)
class TokenStore:
    """Documents as token ids; the arrays are described at the head of the file."""

    tokens: np.ndarray
    offsets: np.ndarray
    openers: np.ndarray
    cuts: np.ndarray
    unlearned: np.ndarray
    labels: np.ndarray
    identities: np.ndarray
    sizes: np.ndarray
    origins: np.ndarray
    first_token: int = 0  # index of its first token among those of all stores of the run

    def __len__(self) -> int:
        return len(self.identities)

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64: tokens of each document, the end token included."""
        return np.diff(self.offsets)

    @property
    def learned(self) -> np.ndarray:
        """[documents] int64: tokens of each document with weight 1."""
        start, stop = self.unlearned
        documents = np.searchsorted(self.offsets, start, side="right") - 1
        return self.lengths - np.bincount(documents, stop - start, minlength=len(self)).astype(np.int64)

    def loss_mask(self, begin: int, end: int) -> np.ndarray:
        """[end - begin] float32: 1 for each of tokens[begin:end] that counts in the loss, else 0."""
        loss_mask = np.ones(end - begin, np.float32)
        starts, stops = self.unlearned
        for index in range(np.searchsorted(stops, begin, side="right"), np.searchsorted(starts, end)):
            loss_mask[max(starts[index] - begin, 0) : stops[index] - begin] = 0
        return loss_mask


def tokenize(documents: Documents, tokenizer: Tokenizer, *, cache: Path) -> TokenStore:
    """The documents as tokens, encoded once and then read from the cache."""
    key = digest("tokens-3", documents.fingerprint, tokenizer.fingerprint)
    return cache_entry(
        cache / "tokens" / key,
        read=open_store,
        write=lambda directory: write_store(documents, tokenizer, directory=directory),
    )


def write_store(documents: Documents, tokenizer: Tokenizer, *, directory: Path) -> None:
    """Encode all documents into `directory`, a batch at a time."""
    logger.info("tokenizing %d documents", len(documents))
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    columns: dict[str, list] = {name: [] for name in ("openers", "cuts", "labels", "identities", "sizes", "origins")}
    lengths, unlearned, total = [], [], 0
    with open(directory / "tokens.npy", "wb") as file:
        _write_header(file, dtype, count=0)
        for batch in document_batches(documents):
            examples = [parse_document(text) for _, text in batch]
            segments = iter(encode_parts([part for example in examples for part in example.parts], tokenizer))
            for (origin, text), example in zip(batch, examples, strict=True):
                parts = [next(segments) for _ in example.parts]
                for part in parts:
                    file.write(np.array(part.tokens, dtype).tobytes())
                    unlearned += [(total + start, total + stop) for start, stop in part.loss_mask_zeros]
                    total += len(part.tokens)
                lengths.append(sum(len(part.tokens) for part in parts))
                row = {
                    "openers": (parts[0].opener, parts[-1].opener),
                    "cuts": len(parts[0].tokens),
                    "labels": example.label,
                    "identities": text_identity(text),
                    "sizes": sum(len(part.learned.encode()) for part in example.parts),
                    "origins": origin,
                }
                for name, value in row.items():
                    columns[name].append(value)
        file.seek(0)
        _write_header(file, dtype, count=total)
    dtypes = {"labels": np.float32, "identities": np.uint64}
    for name, values in columns.items():
        array = np.array(values, dtypes.get(name, np.int64))
        np.save(directory / f"{name}.npy", array.reshape(len(lengths), 2) if name == "openers" else array)
    np.save(directory / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(directory / "unlearned.npy", np.array(unlearned, np.int64).reshape(-1, 2).T.copy())


def open_store(directory: Path) -> TokenStore:
    """The store in `directory`, memory-mapped."""
    return TokenStore(**{name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in ARRAYS})


def document_batches(documents: Documents) -> Iterator[list[tuple[int, str]]]:
    """Batches of consecutive (index, text) with about BATCH_CHARACTERS in all."""
    batch, characters = [], 0
    for item in nonempty_texts(documents):
        batch.append(item)
        characters += len(item[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_header(file, dtype: np.dtype, *, count: int) -> None:
    # numpy pads the header, so that it keeps its size when it is rewritten with the final count
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
