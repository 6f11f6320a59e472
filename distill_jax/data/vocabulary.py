"""Sentences as tokens, by a vocabulary of word pieces that is learnt from them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.data.checks import DataError, integer
from distill_jax.models import Indices

SPECIAL = ("[PAD]", "[UNK]")  # tokens 0 and 1


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Word pieces; known by the digest of all that decides the tokens of a sentence.

    Args:
      text: of a tokenizer of the tokenizers library, its JSON.
    """

    text: str

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the text, its first 16 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        """The name of the file in which a working directory keeps it."""
        return f"vocabulary-{self.digest}.json"

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return int(self._tokenizer.get_vocab_size())

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            tokenizer = _library().Tokenizer.from_str(self.text)
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(
                f"the vocabulary cannot be read ({error}): expected the JSON of a tokenizer"
            ) from error
        # `encode` alone cuts and pads, and no text of a sentence is token 0 within it.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode(self, sentences: Sequence[str], length: int, what: str = "sentences") -> Indices:
        """The first `length` tokens of each sentence; token 0 pads on the right.

        Args:
          sentences: N texts.
          length: T.
          what: starts the messages.

        Returns:
          `Indices` of (N, T) int32, whose source is the digest.

        Raises:
          DataError: a sentence is empty, or no text.
        """
        length = integer("length", length, 1)
        for i, sentence in enumerate(sentences):
            if not isinstance(sentence, str) or not sentence.strip():
                raise DataError(f"{what}[{i}] is {sentence!r}: expected a sentence, not empty")
        values = np.zeros((len(sentences), length), np.int32)
        for i, encoding in enumerate(self._tokenizer.encode_batch(list(sentences))):
            if not encoding.ids:
                raise DataError(
                    f"{what}[{i}] is {sentences[i]!r}, of which the vocabulary leaves nothing: "
                    "expected a sentence, not empty"
                )
            values[i, : len(encoding.ids)] = encoding.ids[:length]
        return Indices(values, self.size, self.digest)


def learn_vocabulary(sentences: Sequence[str], size: int) -> Vocabulary:
    """Learns a vocabulary of at most `size` word pieces, lower-cased and without accents.

    Equal sentences give the same vocabulary. It may be larger than `size` where these do not
    suffice for the characters that there are.

    Raises:
      DataError: the tokenizers library is not installed, or a size of less than 100.
    """
    library, size = _library(), integer("vocabulary size", size, 100)
    tokenizer = _tokenizer(library, library.models.WordPiece(unk_token=SPECIAL[1]))
    # The trainer numbers the pieces within words as it meets them, in an order that is another one
    # each time, and decides between pairs that are as frequent by these numbers: those of one
    # character are given theirs here.
    pieces = [f"##{character}" for character in sorted(_within_words(tokenizer, sentences))]
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[*SPECIAL, *pieces], show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    model = library.models.WordPiece(tokenizer.get_vocab(), unk_token=SPECIAL[1])
    learnt = _tokenizer(library, model)
    learnt.add_special_tokens(list(SPECIAL))
    return Vocabulary(learnt.to_str())


def _tokenizer(library: Any, model: Any) -> Any:
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _within_words(tokenizer: Any, sentences: Sequence[str]) -> set[str]:
    """The characters of all words but their first."""
    found: set[str] = set()
    for sentence in sentences:
        normalised = tokenizer.normalizer.normalize_str(sentence)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalised):
            found.update(word[1:])
    return found


def read_vocabulary(path: str | pathlib.Path) -> Vocabulary:
    """Reads a vocabulary that a working directory has kept, or any tokenizer's JSON file.

    Raises:
      DataError: it cannot be read, or pads with another token than 0.
    """
    try:
        text = pathlib.Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): expected a tokenizer's JSON") from error
    vocabulary = Vocabulary(text)
    pad = vocabulary._tokenizer.token_to_id(SPECIAL[0])
    if pad != 0:
        raise DataError(f"{path} has {SPECIAL[0]} as token {pad}: expected token 0, which pads")
    return vocabulary


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise DataError(
            f"sentences need the package tokenizers ({error}): expected it installed, as by "
            "pip install 'distill_jax[text]'"
        ) from error
