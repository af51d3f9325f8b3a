"""Text to token ids and back: a byte-level BPE trained here, any tokenizer.json, or bytes.

Three ids have a role. `eos` closes every document and is learned; `bos` is the first *input* of every document (the
same id as `eos` where the tokenizer has no other), so that its first token is predicted too; `pad` fills rows and has
weight 0. The library adds none of them, and a text that spells a special token is encoded as ordinary text. Only
rendered chat templates are encoded with special tokens, as in transformers.
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

# Names of special tokens in published tokenizers, tried in this order without a tokenizer_config.json.
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
        """`tokenizers.Encoding` of each text, in which names of special tokens are special tokens; none is added."""
        return self._with_specials.encode_batch(list(texts), add_special_tokens=False)

    @cached_property
    def _with_specials(self) -> Any:
        """A copy of the library that encodes special tokens by their names."""
        library = type(self.library).from_str(self.library.to_str())
        library.encode_special_tokens = False
        return library

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of tokens that do not occur in text: special tokens, and those of templates."""
        return frozenset(self.library.get_added_tokens_decoder())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; invalid UTF-8 becomes U+FFFD."""
        return self.library.decode([int(token) for token in ids], skip_special_tokens=True)

    def decode_all(self, ids: Iterable[int]) -> str:
        """The text of `ids` with the names of special tokens, for display."""
        return self.library.decode([int(token) for token in ids], skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (special tokens); `load_tokenizer(directory)` reads both."""
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
    """The tokenizer of a tokenizer.json, or of its directory.

    Special tokens are those of tokenizer_config.json beside it, else those with usual names. Raises UserError where
    there is no such file, or no token that ends a document.
    """
    import tokenizers

    file = tokenizer_file(path)
    try:
        library = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises the bare class
        raise UserError(f"data.tokenizer.file: {file} is not a tokenizer.json: {error}; save it again") from None
    named = _named_specials(file.with_name("tokenizer_config.json"))
    eos = _special(library, named.get("eos_token"), ENDS)
    if eos is None:
        raise UserError(
            f"data.tokenizer.file: {file} has no token that ends a document; set eos_token in tokenizer_config.json "
            f"beside it, or add one of {', '.join(ENDS)}"
        )
    bos = _special(library, named.get("bos_token"), STARTS)
    pad = _special(library, named.get("pad_token"), PADS)
    return _make_tokenizer(library, bos=eos if bos is None else bos, eos=eos, pad=eos if pad is None else pad)


def check_same_tokenizer(tokenizer: Tokenizer, directory: str | Path, *, key: str) -> None:
    """Raise UserError where the tokenizer in `directory`, the value of `key`, has other ids."""
    other = load_tokenizer(directory)
    if (tokenizer.bos, tokenizer.eos) != (other.bos, other.eos):
        raise UserError(
            f"{key}: {directory} has bos {other.bos} and eos {other.eos}, but the tokenizer of the data has "
            f"{tokenizer.bos} and {tokenizer.eos}; set data.tokenizer.file to {directory}"
        )
    ours, theirs = (item.library.get_vocab(with_added_tokens=True) for item in (tokenizer, other))
    if different := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        token = different[0]
        raise UserError(
            f"{key}: {directory} has another tokenizer: {len(different)} tokens differ, e.g. {token!r} is id "
            f"{theirs.get(token)} there and {ours.get(token)} here; set data.tokenizer.file to {directory}"
        )


def train_bpe(texts: Iterable[str], *, vocab: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab` ids, with special tokens and all 256 bytes. It is deterministic.

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
    """The tokenizer with one id per byte; 256 ends a document, 257 pads.

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
    """The printable character for each byte 0..255 in a byte-level vocabulary.

    Printable Latin-1 characters are unchanged; other bytes get the code points from 256 on, in order. Source: GPT-2.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def configured_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer of a file or of bytes, or None where one must be trained."""
    if config.bytes:
        return byte_tokenizer()
    return load_tokenizer(config.file) if config.file else None


def check_vocab_size(tokenizer: Tokenizer, model_vocab: int) -> None:
    """Raise UserError where the tokenizer has more ids than the model has rows."""
    if tokenizer.vocab_size > model_vocab:
        raise UserError(
            f"model.vocab: {model_vocab} is less than the {tokenizer.vocab_size} ids of the tokenizer; "
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
    library.encode_special_tokens = True  # "<|endoftext|>" in a text is encoded as text
    return Tokenizer(library, **roles)


def _named_specials(file: Path) -> dict[str, str]:
    """Those of `bos_token`, `eos_token`, `pad_token` that a tokenizer_config.json has."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"data.tokenizer.file: {file} is not JSON: {error}; copy it again") from None
    named = {role: content.get(role) for role in ("bos_token", "eos_token", "pad_token")}
    return {role: token["content"] if isinstance(token, dict) else token for role, token in named.items() if token}


def _special(library: Any, named: str | None, usual: Sequence[str]) -> int | None:
    for name in (named,) if named else usual:
        if (index := library.token_to_id(name)) is not None:
            return index
    return None
