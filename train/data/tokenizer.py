"""Text to token ids and back: a byte-level BPE trained here, any tokenizer.json, or bytes.

Three ids have a role. `eos` closes every document and is learned; `bos` is the first *input* of every document (the
same id as `eos` where the tokenizer has no other), so that its first token is predicted too; `pad` fills rows and has
weight 0. The library adds none of them: encoding never sees a special token, not even where a text spells one. Only
what a chat template wrote is read with its special tokens, as transformers reads it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from ...configs.sections.data import TokenizerConfig
from .documents import digest
from .source_paths import tokenizer_file

END, PAD = "<|endoftext|>", "<|pad|>"

# What published tokenizers call them, tried in this order where no tokenizer_config.json says.
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
STARTS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
PADS = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>")


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` and the ids of the special tokens."""

    library: Any  # tokenizers.Tokenizer
    bos: int
    eos: int
    pad: int

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.library.get_vocab(with_added_tokens=True).values())

    @property
    def fingerprint(self) -> str:
        return digest(self.library.to_str(), str(self.bos), str(self.eos), str(self.pad))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, none of them special."""
        return self.library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in parallel."""
        return [encoded.ids for encoded in self.library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_rendered(self, texts: Sequence[str]) -> list[Any]:
        """`tokenizers.Encoding` of each text, in which the names of special tokens stand for them; none is added."""
        return self._knowing.encode_batch(list(texts), add_special_tokens=False)

    @cached_property
    def _knowing(self) -> Any:
        """The library, with special tokens known by their names."""
        knowing = type(self.library).from_str(self.library.to_str())
        knowing.encode_special_tokens = False
        return knowing

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of tokens that no text has: special ones, and those that templates name."""
        return frozenset(self.library.get_added_tokens_decoder())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens have none, broken UTF-8 becomes U+FFFD."""
        return self.library.decode([int(token) for token in ids], skip_special_tokens=True)

    def decode_all(self, ids: Iterable[int]) -> str:
        """Like `decode`, with special tokens by name: for people to look at."""
        return self.library.decode([int(token) for token in ids], skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and, with the special tokens, tokenizer_config.json; `load(directory)` reads both."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.library.save(str(directory / "tokenizer.json"))
        names = {
            "bos_token": self.library.id_to_token(self.bos),
            "eos_token": self.library.id_to_token(self.eos),
            "pad_token": self.library.id_to_token(self.pad),
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in the directory that holds one.

    Special tokens come from tokenizer_config.json beside it, else by their usual names. Raises UserError when there is
    no such file, or no token that can end a document.
    """
    import tokenizers

    file = tokenizer_file(path)
    try:
        library = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises the bare class
        raise UserError(f"data.tokenizer.file: {file} is not a tokenizer.json: {error}") from None
    named = _named_specials(file.with_name("tokenizer_config.json"))
    eos = _special(library, named.get("eos_token"), ENDS)
    if eos is None:
        raise UserError(
            f"data.tokenizer.file: {file} has no token that ends a document; name one as eos_token in "
            f"tokenizer_config.json beside it, or add one of {', '.join(ENDS)}"
        )
    bos = _special(library, named.get("bos_token"), STARTS)
    pad = _special(library, named.get("pad_token"), PADS)
    return _make_tokenizer(library, bos=eos if bos is None else bos, eos=eos, pad=eos if pad is None else pad)


def check_same_tokenizer(tokenizer: Tokenizer, directory: str | Path, *, key: str) -> None:
    """Raise UserError where the tokenizer in `directory`, which the configuration's `key` names, has other ids."""
    other = load_tokenizer(directory)
    if (tokenizer.bos, tokenizer.eos) != (other.bos, other.eos):
        raise UserError(
            f"{key}: {directory} begins and ends a document with ids {other.bos} and {other.eos}, and the data with "
            f"{tokenizer.bos} and {tokenizer.eos}; set data.tokenizer.file to {directory}"
        )
    ours, theirs = (one.library.get_vocab(with_added_tokens=True) for one in (tokenizer, other))
    if apart := sorted(word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word)):
        word = apart[0]
        raise UserError(
            f"{key}: {directory} has another tokenizer: {len(apart)} words differ, e.g. {word!r} is id "
            f"{theirs.get(word)} there and {ours.get(word)} here; set data.tokenizer.file to {directory}"
        )


def train_bpe(texts: Iterable[str], *, vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` ids, special tokens and all 256 bytes included. Equal texts, equal tokenizer.

    Source: Sennrich et al., arXiv:1508.07909, over bytes as in GPT-2.
    """
    from tokenizers import models, pre_tokenizers, trainers

    library = _byte_level(models.BPE(), split=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    return _make_tokenizer(
        library, bos=library.token_to_id(END), eos=library.token_to_id(END), pad=library.token_to_id(PAD)
    )


def byte_tokenizer() -> Tokenizer:
    """Id = byte; 256 ends a document, 257 pads.

    >>> byte_tokenizer().encode("Aa")
    [65, 97]
    """
    from tokenizers import models

    library = _byte_level(
        models.BPE(vocab={name: byte for byte, name in enumerate(byte_names())}, merges=[]), split=False
    )
    library.add_special_tokens([END, PAD])
    return _make_tokenizer(library, bos=256, eos=256, pad=257)


def byte_names() -> list[str]:
    """The printable character that stands for each byte 0..255 in a byte-level vocabulary.

    Printable Latin-1 stands for itself, the others take the code points from 256 on, in order. Source: GPT-2.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def configured_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that needs no documents, or None where one is to be trained."""
    if config.bytes:
        return byte_tokenizer()
    return load_tokenizer(config.file) if config.file else None


def check_vocab_size(tokenizer: Tokenizer, model_vocab: int) -> None:
    """Raise UserError where the tokenizer makes ids the model has no row for."""
    if tokenizer.vocab_size > model_vocab:
        raise UserError(
            f"model.vocab: {model_vocab} is less than the tokenizer's {tokenizer.vocab_size} ids; "
            f"set model.vocab to at least {tokenizer.vocab_size}, or train a smaller one (data.tokenizer.vocab)"
        )


def _byte_level(model: Any, *, split: bool) -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, pre_tokenizers

    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    library.decoder = decoders.ByteLevel()
    return library


def _make_tokenizer(library: Any, **roles: int) -> Tokenizer:
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True  # a corpus that spells "<|endoftext|>" gets its letters, not the token
    return Tokenizer(library, **roles)


def _named_specials(file: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, `pad_token` of a tokenizer_config.json, as far as they are there."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"data.tokenizer.file: {file} is not JSON: {error}") from None
    named = {role: content.get(role) for role in ("bos_token", "eos_token", "pad_token")}
    return {role: token["content"] if isinstance(token, dict) else token for role, token in named.items() if token}


def _special(library: Any, named: str | None, usual: Sequence[str]) -> int | None:
    for name in (named,) if named else usual:
        if (index := library.token_to_id(name)) is not None:
            return index
    return None
