"""A tokenized source on disk: all documents in one memory-mapped array, each closed by the end token.

tokens.npy      [tokens] uint16 or uint32
offsets.npy     [documents + 1] int64: document i is tokens[offsets[i]:offsets[i + 1]]
identities.npy  [documents] uint64: a hash of the text, see split.py
prompts.npy     [documents] int64: tokens at its beginning that are read but not learned
sizes.npy       [documents] int64: bytes of the text that is learned, in UTF-8
origins.npy     [documents] int64: its index in the source; documents without text are left out
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cache import cached
from .documents import Documents, digest, texts
from .examples import divided
from .split import identity
from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)
ARRAYS = ("tokens", "offsets", "identities", "prompts", "sizes", "origins")
BATCH_CHARACTERS = 1 << 22  # text encoded at once: bounds memory, which is ~100 bytes a token while the library encodes


@dataclass(frozen=True)
class TokenStore:
    """Documents as token ids; the arrays are described at the head of the file."""

    tokens: np.ndarray
    offsets: np.ndarray
    identities: np.ndarray
    prompts: np.ndarray
    sizes: np.ndarray
    origins: np.ndarray

    def __len__(self) -> int:
        return len(self.identities)

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64: tokens of each, the end token included."""
        return np.diff(self.offsets)

    @property
    def learned(self) -> np.ndarray:
        """[documents] int64: tokens of each that have weight 1."""
        return self.lengths - self.prompts


def tokenized(documents: Documents, tokenizer: Tokenizer, *, cache: Path) -> TokenStore:
    """The documents as tokens: encoded once, then read from the cache."""
    key = digest("tokens-2", documents.fingerprint, tokenizer.fingerprint)
    return cached(
        cache / "tokens" / key,
        read=open_store,
        write=lambda directory: write_store(documents, tokenizer, directory=directory),
    )


def write_store(documents: Documents, tokenizer: Tokenizer, *, directory: Path) -> None:
    """Encode everything into `directory`, a batch of documents at a time."""
    logger.info("tokenizing %d documents", len(documents))
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    lengths, identities, prompts, sizes, origins = [], [], [], [], []
    with open(directory / "tokens.npy", "wb") as file:
        _write_header(file, dtype, count=0)
        for batch in batched(documents):
            parts = [divided(text) for _, text in batch]
            heads, tails = (encoded([part[which] for part in parts], tokenizer) for which in (0, 1))
            for (origin, text), (_, learned), head, tail in zip(batch, parts, heads, tails, strict=True):
                file.write(np.array([*head, *tail, tokenizer.eos], dtype).tobytes())
                lengths.append(len(head) + len(tail) + 1)
                identities.append(identity(text))
                prompts.append(len(head))
                sizes.append(len(learned.encode()))
                origins.append(origin)
        file.seek(0)
        _write_header(file, dtype, count=sum(lengths))
    np.save(directory / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(directory / "identities.npy", np.array(identities, np.uint64))
    np.save(directory / "prompts.npy", np.array(prompts, np.int64))
    np.save(directory / "sizes.npy", np.array(sizes, np.int64))
    np.save(directory / "origins.npy", np.array(origins, np.int64))


def open_store(directory: Path) -> TokenStore:
    """The store in `directory`, memory-mapped."""
    return TokenStore(**{name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in ARRAYS})


def batched(documents: Documents) -> Iterator[list[tuple[int, str]]]:
    """Consecutive (index, text) of about BATCH_CHARACTERS together."""
    batch, characters = [], 0
    for item in texts(documents):
        batch.append(item)
        characters += len(item[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encoded(batch: list[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each text. One longer than BATCH_CHARACTERS is cut after a line end and encoded piece by piece."""
    pieces = [list(line_pieces(text)) for text in batch]
    ids = iter(tokenizer.encode_batch([piece for text in pieces for piece in text]))
    for text in pieces:
        yield [token for _ in text for token in next(ids)]


def line_pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most BATCH_CHARACTERS, cut after a line end where there is one."""
    start = 0
    while len(text) - start > BATCH_CHARACTERS:
        cut = text.rfind("\n", start, start + BATCH_CHARACTERS) + 1 or start + BATCH_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]


def _write_header(file, dtype: np.dtype, *, count: int) -> None:
    # numpy pads the header so that it does not move when the first dimension grows: it can be rewritten at the end
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
