"""Byte-level BPE tokenizers, such as GPT-2's: what each token spells, and small ones of a few texts' own words."""
import hashlib
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from support.files import byte_level, read_tokenizer
from support.program import UserError, replacing


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """What each token of a byte-level BPE spells; bytes that are no whole letter become U+DC80..U+DCFF."""
    # Byte-level BPE writes the 188 printable bytes as themselves and the others as U+0100, U+0101, ...
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    special, vocabulary = tokenizer.get_added_tokens_decoder(), tokenizer.get_vocab()
    texts = ["\n"] * (max(vocabulary.values()) + 1)  # special tokens separate words, as a line break does
    for token, index in vocabulary.items():
        if index not in special:
            if not byte_of.keys() >= set(token):
                raise UserError(f"the tokenizer is no byte-level BPE as GPT-2's: it has a token {token!r}")
            texts[index] = bytes(byte_of[letter] for letter in token).decode("utf-8", "surrogateescape")
    return texts


def trained_tokenizer(texts: Sequence[str], special: Sequence[str], size: int, folder: Path, name: str) -> Tokenizer:
    """A tokenizer of so many tokens, trained once: it is kept in `folder` as long as all that made it is the same."""
    short = hashlib.sha256(repr([size, special, texts]).encode()).hexdigest()[:8]
    path = folder / f"{name}-tokenizer-{short}" / "tokenizer.json"
    if not path.is_file():
        tokenizer = byte_level(models.BPE())
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<|endoftext|>", *special], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        with replacing(path) as temporary:
            tokenizer.save(str(temporary))
    return read_tokenizer(path.parent)
