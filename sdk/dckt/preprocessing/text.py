"""From a text to the token ids that the text graph takes.

Shape letters: B batch, L tokens of the longest text of a batch. Ids are int64, (B, L), padded at the end with
0; the graph masks padding, so a vector does not depend on how far its text was padded.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dckt.errors import ConfigError, TextError

PADDING, UNKNOWN = 0, 1
SPECIAL = ("<pad>", "<unk>")
_ASCII_WORD = re.compile(r"\w+(?:'\w+)*")


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """How a text becomes token ids. Stored in the bundle.

    Attributes:
        max_tokens: words after this many are left out.
    """

    max_tokens: int = 300

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"text max_tokens is {self.max_tokens}; expected at least 1")


@cache
def _word() -> re.Pattern[str]:
    r"""A run of letters, digits and marks in any script; an apostrophe inside it belongs to it.

    ``\w`` leaves combining marks out, which would cut the words of Hindi, Thai and many others to pieces.
    """
    marks = "".join(letter for letter in map(chr, range(0x300, 0x1F000)) if unicodedata.category(letter)[0] == "M")
    return re.compile(rf"\w[\w{marks}]*(?:'\w[\w{marks}]*)*")


def tokenize(text: str) -> list[str]:
    """Words of a text, case-folded, after Unicode compatibility normalisation (NFKC).

    >>> tokenize("A red leather Handbag, isn't it?")
    ['a', 'red', 'leather', 'handbag', "isn't", 'it']
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # Looking through Unicode for marks takes a fifth of a second, which a first query in English need not wait for.
    word = _ASCII_WORD if folded.isascii() else _word()
    return word.findall(folded.replace("\u2019", "'"))


@dataclass(frozen=True)
class Vocabulary:
    """The words that a model knows. A word's id is its place; 0 pads and 1 stands for any unknown word.

    Attributes:
        words: every word, the two special ones first.
    """

    words: tuple[str, ...]
    ids: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.words[:2] != SPECIAL:
            raise TextError(f"a vocabulary starts with {SPECIAL}; this one starts with {self.words[:2]}")
        ids = {word: place for place, word in enumerate(self.words)}
        if any(not word or "\n" in word or "\r" in word for word in self.words):
            raise TextError("a word of a vocabulary is empty or holds a line break; each is one line of its file")
        if len(ids) != len(self.words):
            raise TextError(f"a vocabulary of {len(self.words)} words holds only {len(ids)} different ones")
        object.__setattr__(self, "ids", ids)

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, words: Iterable[str]) -> Vocabulary:
        """A vocabulary of ordinary words, in their order, behind the two special ones."""
        return cls((*SPECIAL, *words))

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Reads a file with one word a line, UTF-8.

        Raises:
            TextError: the file is missing, not UTF-8, or not a vocabulary.
        """
        try:
            return cls(tuple(path.read_text(encoding="utf-8").removesuffix("\n").split("\n")))
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{path}: the vocabulary cannot be read ({error})") from error

    def dumps(self) -> str:
        """The text of a vocabulary file: one word a line."""
        return "".join(f"{word}\n" for word in self.words)

    @property
    def sha256(self) -> str:
        """Hash of :meth:`dumps`."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()

    def encode(self, text: str, spec: TextSpec, *, allow_unknown: bool = False) -> list[int]:
        """Token ids of one text, without padding, at least one and at most ``spec.max_tokens``.

        Args:
            text: any text that holds a word.
            spec: the model's limits.
            allow_unknown: a text whose words are all unknown becomes unknown ids instead of an error. A
                collection may hold such texts; a query that is one would find nothing in particular.

        Raises:
            TextError: the text holds no word, or, unless allowed, no known word.
        """
        words = tokenize(text)[: spec.max_tokens]
        if not words:
            raise TextError(f"the text {_shown(text)} holds no word; give it at least one word")
        ids = [self.ids.get(word, UNKNOWN) for word in words]
        if not allow_unknown and all(i == UNKNOWN for i in ids):
            raise TextError(
                f"the model knows none of the words of {_shown(text)} (it has {len(self) - 2:,}); "
                "use other words, or train with texts or word vectors that hold them"
            )
        return ids


def token_batch(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Pads rows of ids to a batch (B, L) of int64; B may be 0, L is at least 1.

    >>> token_batch([[5, 6], [7]]).tolist()
    [[5, 6], [7, 0]]
    """
    length = max([1, *map(len, rows)])
    batch = np.full((len(rows), length), PADDING, dtype=np.int64)
    for place, row in enumerate(rows):
        batch[place, : len(row)] = row
    return batch


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
